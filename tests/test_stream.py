"""Residual dimensions and whole layers: sliced equals masked, in every family."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import FIXED_STREAM, HIDDEN, SIZES, batches, outputs, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_stat.families import find_blocks
from optimum_stat.stream import find_stream, narrow, shorten
from optimum_stat.structure import write_record

KEEP = torch.tensor([0, 2, 3, 5, 8, 12, 17, 18, 19, 23, 30, 31])
MODELS = [(family, None) for family in SIZES if family not in FIXED_STREAM]
MODELS += [("bert", head) for head in ("SequenceClassification", "QuestionAnswering")]
MODELS += [(family, "SequenceClassification") for family in ("llama", "distilbert", "roberta", "modernbert", "gpt2", "albert")]


@torch.no_grad()
def masked(model: PreTrainedModel, keep: Tensor) -> PreTrainedModel:
    """The dense model with zeros wherever a dropped dimension is written or read, and with norms that see the others alone."""
    model = copy.deepcopy(model)
    gone = torch.ones(HIDDEN, dtype=torch.bool).index_fill_(0, keep, False).nonzero().flatten()
    axes = find_stream(model).axes
    for module, name, axis in axes:
        getattr(module, name).index_fill_(axis, gone, 0)
    for module in {module for module, _, _ in axes if module.weight.dim() == 1}:
        module.forward = normalise_over(module, keep)
    return model


def normalise_over(norm: nn.Module, keep: Tensor):
    small = copy.deepcopy(norm)
    for name, value in list(small.named_parameters()):
        setattr(small, name, nn.Parameter(value[keep]))
    if isinstance(small, nn.LayerNorm):
        small.normalized_shape = (len(keep),)
    return lambda x: torch.zeros_like(x).index_copy_(-1, keep, small(x[..., keep]))


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_a_narrow_stream_computes_what_the_masked_one_does(family: str, head: str | None):
    model = tiny(family, head)
    expected = masked(model, KEEP)
    narrow(model, KEEP)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in expected.parameters())
    for batch in batches():
        torch.testing.assert_close(outputs(model, batch), outputs(expected, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in SIZES if not family.startswith("albert")])
def test_without_some_layers_it_computes_what_the_others_do(family: str, tmp_path):
    """Against the dense model whose dropped blocks hand their input on; and it loads again."""
    model = tiny(family, **four_layers(family))
    expected = copy.deepcopy(model)
    for index in (1, 2):
        block = find_blocks(expected)[index]
        block.forward = handing_on(block.forward)
    shorten(model, [0, 3])
    for batch in batches():
        torch.testing.assert_close(outputs(model, batch), outputs(expected, batch), rtol=1e-4, atol=1e-5)
    write_record(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2
    assert torch.equal(outputs(loaded, batches()[0]), outputs(model, batches()[0]))


def handing_on(forward):
    def instead(hidden_states, *args, **kwargs):
        found = forward(hidden_states, *args, **kwargs)
        return (hidden_states, *found[1:]) if isinstance(found, tuple) else hidden_states

    return instead


def four_layers(family: str) -> dict[str, object]:
    sizes = SIZES[family]
    name = next(name for name in ("num_hidden_layers", "n_layer", "n_layers") if name in sizes)
    return {name: 4, **({"layer_types": sizes["layer_types"] * 2} if "layer_types" in sizes else {})}
