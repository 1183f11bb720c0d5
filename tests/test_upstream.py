"""What transformers tests of every model, on pruned ones: the patterns of its common model tests, written anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made import pruned
from tiny import DECODERS, accepted, batches, checkpoint_activations, data_of, outputs, predicted
from transformers import PreTrainedModel

from optimum_stat.probes import caches_in

DOZEN = (
    "bert",
    "roberta",
    "modernbert",
    "gpt2",
    "opt",
    "llama",
    "qwen3",
    "gemma2",
    "bloom",
    "t5",
    "bart",
    "vit",
    "wav2vec2",
    "mixtral",
)


def batching_equivalence(family: str, folder: Path) -> None:
    """An example alone gets what it gets in a batch."""
    model, batch = pruned(family), data_of(family)[0]
    together = predicted(model(**accepted(model, batch)))
    for row in range(len(together)):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
        real = slice(None) if mask is None else mask[row].bool()
        wanted, found = together[row], predicted(model(**accepted(model, alone)))[0]
        if mask is not None and wanted.shape[0] == len(real):
            wanted, found = wanted[real], found[real]
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def left_padding(family: str, folder: Path) -> None:
    """Where the padding stands does not matter to decoders that are told the positions."""
    if family not in DECODERS or family in ("bloom", "opt"):  # these count them by themselves
        return
    model = pruned(family)
    right, left = (outputs(model, batches(left=where)[0]) for where in (False, True))
    torch.testing.assert_close(left, right, atol=2e-4, rtol=1e-4)


def cache_against_none(family: str, folder: Path) -> None:
    """The next token's logits are those of a forward pass over everything."""
    if family not in DECODERS and family != "mixtral":
        return
    model, ids = pruned(family), batches((9, 9))[0]["input_ids"]
    model.config.use_cache = True
    whole = model(input_ids=ids).logits[:, -1]
    cache = caches_in(model(input_ids=ids[:, :-1], use_cache=True))
    torch.testing.assert_close(model(input_ids=ids[:, -1:], **cache).logits[:, -1], whole, atol=2e-4, rtol=1e-4)


def gradient_checkpointing(family: str, folder: Path) -> None:
    """The gradients are the same with it."""
    found = []
    for checkpointed in (False, True):
        model = pruned(family)
        model.config.use_cache = False
        if checkpointed:
            checkpoint_activations(model)
        without_dropout(model)
        model.train()
        predicted(model(**accepted(model, data_of(family)[0]))).square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def without_dropout(model: PreTrainedModel) -> None:
    names = ("p", "dropout", "attention_dropout", "activation_dropout", "layerdrop", "mask_time_prob", "mask_feature_prob")
    for owner in (*model.modules(), model.config):
        for name in names:
            if isinstance(getattr(owner, name, None), float):
                setattr(owner, name, 0.0)


def tied_weights(family: str, folder: Path) -> None:
    """What shares a parameter does so after loading, and is stored once."""
    model = pruned(family)
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    shared = [len({id(p) for _, p in m.named_parameters(remove_duplicate=False)}) for m in (model, again)]
    assert shared[0] == shared[1] == len(list(model.parameters()))


def resize_of_embeddings(family: str, folder: Path) -> None:
    """New tokens get a place, in the output too, and the model still loads."""
    model = pruned(family)
    if "pixel_values" in model.main_input_name or family == "wav2vec2":
        return
    before = predicted(model(**accepted(model, data_of(family)[0])))
    model.resize_token_embeddings(75, mean_resizing=False)
    after = predicted(model(**accepted(model, data_of(family)[0])))
    assert after.shape[-1] == 75
    torch.testing.assert_close(after[..., :67], before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(folder)
    assert torch.equal(outputs(type(model).from_pretrained(folder), data_of(family)[0]), outputs(model, data_of(family)[0]))


PATTERNS: tuple[Callable[[str, Path], None], ...] = (
    batching_equivalence,
    left_padding,
    cache_against_none,
    gradient_checkpointing,
    tied_weights,
    resize_of_embeddings,
)
IN_EVERY_RUN = ("llama", "t5", "vit")


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in IN_EVERY_RUN else pytest.mark.full) for family in DOZEN]
)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)
def test_pattern(family: str, pattern: Callable[[str, Path], None], tmp_path: Path):
    with torch.set_grad_enabled(pattern is gradient_checkpointing):
        pattern(family, tmp_path)
