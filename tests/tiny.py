"""Random models of two layers of every family, and token ids to calibrate them on. Nothing is downloaded.

Biases and norms are random too: a model whose biases are zero and whose norms are one hides every mistake with them.
"""

from __future__ import annotations

import itertools
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
    "mpnet": _BERT,
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
_ENCODERS = ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta")
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


_TOWERS = {**_BERT, "image_size": 12, "patch_size": 4, "num_channels": 3}
_BART = {
    "d_model": HIDDEN,
    **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("attention_heads", HEADS))},
    "encoder_ffn_dim": NEURONS,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 64,
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 0),
    "eos_token_id": 2,
}
_T5 = {"d_model": HIDDEN, "d_kv": 8, "d_ff": NEURONS, "num_layers": LAYERS, "num_heads": HEADS, "initializer_factor": 0.4}
_T5 |= {"decoder_start_token_id": PAD}
_WAVES = {"conv_dim": (16, 16), "conv_kernel": (4, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2}
_WAVES |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_TEXT = {**_BERT, "vocab_size": VOCAB, "eos_token_id": 2, "bos_token_id": 0}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("Seq2SeqLM", _BART),
    "clip": (
        "",
        {"text_config": _TEXT, "vision_config": _TOWERS, "projection_dim": 16},
    ),
    "clip_text_model": ("", {**_BERT, "eos_token_id": 2}),
    "clip_vision_model": ("", _TOWERS),
    "dinov2": ("ImageClassification", {**_TOWERS, "mlp_ratio": 2}),
    "dinov2, gated": ("ImageClassification", {**_TOWERS, "use_swiglu_ffn": True, "mlp_ratio": 3}),
    "siglip": ("", {"text_config": {**_TEXT, "projection_size": HIDDEN}, "vision_config": _TOWERS}),
    "siglip_vision_model": ("", _TOWERS),
    "t5": ("Seq2SeqLM", _T5),
    "t5, gated": ("Seq2SeqLM", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "vit": ("ImageClassification", _TOWERS),
    "wav2vec2": ("CTC", {**_BERT, **_WAVES}),
    "wav2vec2, norm first": ("CTC", {**_BERT, **_WAVES, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "whisper": ("SpeechSeq2Seq", {**_BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64}),
}
"""Families that read something else than one list of token ids, or more: the head they usually have, and their sizes."""
_EXPERTS = {**_LLAMA, "num_experts_per_tok": 2, "intermediate_size": 48}
_SMALL = {**_EXPERTS, "moe_intermediate_size": 32, "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("CausalLM", {**_EXPERTS, "num_local_experts": 4, "head_dim": 8, "sliding_window": 6}),
    "mixtral": ("CausalLM", {**_EXPERTS, "num_local_experts": 4, "sliding_window": None}),
    "qwen2_moe": ("CausalLM", {**_SMALL, "shared_expert_intermediate_size": NEURONS}),
    "qwen3_moe": ("CausalLM", {**_SMALL, "head_dim": 8}),
    "qwen3_moe, first dense": ("CausalLM", {**_SMALL, "head_dim": 8, "mlp_only_layers": [0]}),
}
"""Those with experts."""
OTHERS |= MIXTURES
ROWS = (*SIZES, *OTHERS)
"""All of them: the rows of the table."""
SEQUENCES = tuple(name for name in OTHERS if OTHERS[name][0] in ("Seq2SeqLM", "SpeechSeq2Seq", "CausalLM"))
"""Those that generate."""
FIXED_STREAM = (*FIXED_STREAM, *OTHERS)


def one_in_three(*axes: Iterable[Any]) -> list[Any]:
    """Parameters for every combination, two of three marked "full": of three axes, every two values still meet."""
    numbered = itertools.product(*(tuple(enumerate(axis)) for axis in axes))
    return [
        pytest.param(*(value for _, value in each), marks=[] if sum(at for at, _ in each) % 3 == 0 else pytest.mark.full)
        for each in numbered
    ]


def combinations(
    choices: Iterable[str], of_tokens_alone: Iterable[str] = (), of: Iterable[str] = ROWS, core: Iterable[str] = CORE
) -> list[Any]:
    """Parameters (choice, family) for every choice and family `of` these; marked "full" but for all of `core`, and one
    choice for every third other row (each of them has three in `test_table.py`).

    Choices `of_tokens_alone` are not combined with OTHERS.
    """
    own, alone, families, in_all = list(choices), set(of_tokens_alone), tuple(of), set(core)
    able = {family: [choice for choice in own if family in SIZES or choice not in alone] for family in families}
    able |= {family: [choice for choice in able[family] if choice != "stat-paper"] for family in MIXTURES if family in able}
    others = [family for family in families if family not in in_all]
    turns = {family: able[family][i % len(able[family])] for i, family in enumerate(others) if i % 3 == 0}
    return [
        pytest.param(choice, family, marks=[] if family in in_all or turns.get(family) == choice else pytest.mark.full)
        for choice in own
        for family in families
        if choice in able[family]
    ]


def auto_of(family: str, head: str | None = None) -> Any:
    """The Auto class of a family with its usual head."""
    usual = OTHERS[family][0] if family in OTHERS else "MaskedLM" if family in ENCODERS else "CausalLM"
    head = usual if head is None else head
    return getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")


def accepted(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the model's forward takes."""
    floats = {name: value.to(model.dtype) for name, value in batch.items() if value.is_floating_point()}
    return {name: batch[name] for name in batch if name != "position_ids" or takes_positions(model)} | floats


def predicted(output: Any) -> Tensor:
    """The main output."""
    return next(output[name] for name in ("logits", "last_hidden_state", "image_embeds") if name in output)


def tiny(family: str, head: str | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model. head: "CausalLM", "SequenceClassification", ..., "" for none; None: the family's usual one."""
    own = OTHERS[family][1] if family in OTHERS else SIZES[family]
    labels = 2 if head == "QuestionAnswering" else LABELS
    sizes = {"vocab_size": VOCAB, "pad_token_id": PAD, "num_labels": labels, **own, **changes}
    auto = auto_of(family, head)
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


def data_of(family: str, count: int = 12, batch_size: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """Ready batches of what the family reads: token ids, pixels, waveforms, a decoder's token ids."""
    generator, kind = torch.Generator().manual_seed(seed), family.split(",")[0]
    lengths = tuple(int(n) for n in torch.randint(3, 13, (count,), generator=generator))
    found = batches(lengths, batch_size, seed=seed)
    if kind in SIZES or family in MIXTURES:
        return found
    for number, batch in enumerate(found):
        size = len(batch.pop("position_ids"))
        if kind in ("clip", "siglip", "vit", "dinov2", "clip_vision_model", "siglip_vision_model"):
            batch["pixel_values"] = torch.randn(size, 3, 12, 12, generator=generator)
        if kind == "wav2vec2":
            batch["input_values"] = torch.randn(size, 90 + 30 * number, generator=generator)
        if kind == "whisper":
            batch["input_features"] = torch.randn(size, 8, 40, generator=generator)
        if kind in ("t5", "bart", "whisper"):
            decoder = batches(tuple(3 + (n + i) % 7 for i, n in enumerate(lengths[:size])), size, seed=seed + number + 1)[0]
            batch |= {f"decoder_{name}": decoder[name] for name in ("input_ids", "attention_mask")}
        if kind not in ("t5", "bart", "clip", "siglip", "clip_text_model", "siglip_text_model"):
            del batch["input_ids"], batch["attention_mask"]
    return found


def many(num_tokens: int = 1000, length: int = 20) -> list[dict[str, Tensor]]:
    """Enough data for every correction to be well determined."""
    return batches((length,) * (num_tokens // length), batch_size=25, seed=1)


def plenty(family: str) -> list[dict[str, Tensor]]:
    """The same, of what the family reads."""
    return many() if family in SIZES else data_of(family, 120, 24, seed=1)


@torch.no_grad()
def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the model predicts for the real tokens, or for the sequence, in one tensor.

    A loaded weight begins wherever it stands in the file, and matrix kernels round otherwise where memory is not aligned.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    output = model.eval()(**accepted(model, batch))
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "image_embeds", "text_embeds")
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask", torch.empty(0))).bool()
    named = [output[name] for name in names if name in output]
    return torch.cat([(value[mask] if value.shape[:2] == mask.shape else value).flatten().float() for value in named])


def checkpoint_activations(model: Any) -> None:
    """By the name that the installed transformers has for it."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def takes_positions(model: Any) -> bool:
    """Some count positions by themselves, or have none."""
    return model.config.model_type not in ("bloom", "deberta", "deberta-v2", "distilbert")
