"""Random models of two layers of every family, and token ids to calibrate them on. Nothing is downloaded.

Biases and norms are random too: a model whose biases are zero and whose norms are one hides every mistake with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCAB, HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, NEURONS = 67, 32, 2, 4, 2, 44
LABELS = 3
PAD = 1  # not 0: an id that padding happens to have must not matter
_BERT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 64,
}
_GROUPED = {"num_key_value_heads": KEY_VALUE_HEADS}
_LLAMA = {**_BERT, **_GROUPED, "bos_token_id": 0, "eos_token_id": 2}
_BLOOM = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
_FALCON = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "ffn_hidden_size": NEURONS}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
SIZES: dict[str, dict[str, Any]] = {
    "albert": {**_BERT, "embedding_size": 24},
    "apertus": {**_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "bert": _BERT,
    "bloom": _BLOOM,
    "cohere": {**_LLAMA, "use_qk_norm": True, "logit_scale": 1.0},
    "deberta": {**_BERT, **_RELATIVE, "max_relative_positions": 16},
    "deberta-v2": {**_BERT, **_RELATIVE, "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
    "distilbert": {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": NEURONS, "max_position_embeddings": 64},
    "electra": {**_BERT, "embedding_size": 24},
    "falcon": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": KEY_VALUE_HEADS, "bias": True},
    "gemma": {**_LLAMA, "head_dim": 12},
    "gemma2": {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "gemma3_text": {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "glm": {**_LLAMA, "head_dim": 8},
    "gpt2": {
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": NEURONS,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    "gpt_neox": {**_BERT, "rotary_pct": 0.5},
    "granite": {**_LLAMA, "residual_multiplier": 0.5},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 6},
    "modernbert": {
        **_BERT,
        "layer_types": ["full_attention", "sliding_attention"],
        "local_attention": 8,
        **dict.fromkeys(("bos_token_id", "cls_token_id"), 0),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    },
    "nemotron": {**_LLAMA, "head_dim": 8},
    "olmo2": _LLAMA,
    "opt": {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "ffn_dim": NEURONS,
        "word_embed_proj_dim": HIDDEN,
        "max_position_embeddings": 64,
    },
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": {**_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**_LLAMA, "head_dim": 12},  # not hidden_size / heads
    "roberta": _BERT,
    "smollm3": _LLAMA,
    "starcoder2": {**_LLAMA, "sliding_window": None},
}
SIZES |= {
    "falcon, one key head": {**_FALCON, "multi_query": True, "new_decoder_architecture": False},
    "falcon, biased": {**_FALCON, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    "llama, one key head": {**_LLAMA, "num_key_value_heads": 1},
    "deberta-v2, shared": {**SIZES["deberta-v2"], "share_att_key": True},
    "albert, two blocks": {**SIZES["albert"], "num_hidden_layers": 4, "num_hidden_groups": 2},
}
"""One row a family; after a comma, other architectures under a family's name."""
_ENCODERS = ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "roberta")
ENCODERS = tuple(name for name in SIZES if name.split(",")[0] in _ENCODERS)
DECODERS = tuple(name for name in SIZES if name not in ENCODERS)
LLAMAS = tuple(name for name in DECODERS if name.split(",")[0] not in ("bloom", "falcon", "gpt2", "gpt_neox", "opt"))
"""Those with a record of transformers' own for sizes layer by layer; all but one have grouped-query attention."""
CORE = ("bert", "gpt2", "llama", "opt", "qwen2")
"""What is combined with everything in every run of the tests; the others wait for `make test-all`."""
FIXED_STREAM: tuple[str, ...] = ()
"""Their residual streams cannot be narrowed."""
INEXACT = ("olmo2",)
"""Dropping a head changes what the others do: a norm over all of them."""


def combinations(choices: Iterable[str]) -> list[Any]:
    """Parameters (choice, family) for every choice and family; marked "full" but for CORE, and one choice for each other row."""
    own = list(choices)
    turns = {family: own[i % len(own)] for i, family in enumerate(family for family in SIZES if family not in CORE)}
    return [
        pytest.param(choice, family, marks=[] if turns.get(family, choice) == choice else pytest.mark.full)
        for choice in own
        for family in SIZES
    ]


def tiny(family: str, head: str | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model. head: "CausalLM", "SequenceClassification", ..., "" for none; None: the family's usual one."""
    head = ("MaskedLM" if family in ENCODERS else "CausalLM") if head is None else head
    labels = 2 if head == "QuestionAnswering" else LABELS
    sizes = {"vocab_size": VOCAB, "pad_token_id": PAD, "num_labels": labels, **SIZES[family], **changes}
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    config = transformers.AutoConfig.for_model(family.split(",")[0], **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config)
        roughen(model)
    return model.eval()


@torch.no_grad()
def roughen(model: nn.Module) -> None:
    """Random biases and norms; weights large enough for attention and activation functions to leave their linear range."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(10 if "embed" in name or "wte" in name or "wpe" in name else 5)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.3)
        else:
            parameter.normal_(1, 0.2)


def batches(
    lengths: tuple[int, ...] = (12, 9, 5, 12, 7, 3), batch_size: int = 3, *, left: bool = False, extra: int = 0, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Ready batches of random ids, padded (`left`: in front) to the longest of the batch and `extra` further places.

    `position_ids` count the real tokens, so that where the padding stands changes nothing at all.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return [_padded(part, max(map(len, part)) + extra, left) for part in parts]


def _padded(rows: list[Tensor], length: int, left: bool) -> dict[str, Tensor]:
    result = {
        "input_ids": torch.full((len(rows), length), PAD),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "position_ids": torch.zeros(len(rows), length, dtype=torch.long),
    }
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if left else slice(0, len(row))
        result["input_ids"][i, at] = row
        result["attention_mask"][i, at] = 1
        result["position_ids"][i, at] = torch.arange(len(row))
    return result


def many(num_tokens: int = 1000, length: int = 20) -> list[dict[str, Tensor]]:
    """Enough data for every correction to be well determined."""
    return batches((length,) * (num_tokens // length), batch_size=25, seed=1)


@torch.no_grad()
def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the model predicts for the real tokens, or for the sequence, in one tensor.

    A loaded weight begins wherever it stands in the file, and matrix kernels round otherwise where memory is not aligned.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    accepted = {name: value for name, value in batch.items() if name != "position_ids" or takes_positions(model)}
    output = model.eval()(**accepted)
    named = [output[name] for name in ("logits", "start_logits", "end_logits", "last_hidden_state") if name in output]
    mask = batch["attention_mask"].bool()
    return torch.cat([(value[mask] if value.shape[:2] == mask.shape else value).flatten().float() for value in named])


def takes_positions(model: Any) -> bool:
    """Some count positions by themselves, or have none."""
    return model.config.model_type not in ("bloom", "deberta", "deberta-v2", "distilbert")
