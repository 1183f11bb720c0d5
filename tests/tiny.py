"""Random two-layer models of every family, and token ids to calibrate them on. Nothing is downloaded.

Biases and norms are random too: a model whose biases are zero and whose norms are one hides every mistake with them.
"""

from __future__ import annotations

from typing import Any

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
_LLAMA = {**_BERT, "num_key_value_heads": KEY_VALUE_HEADS, "bos_token_id": 0, "eos_token_id": 2}
SIZES: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "distilbert": {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": NEURONS, "max_position_embeddings": 64},
    "electra": {**_BERT, "embedding_size": 24},
    "gpt2": {
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": NEURONS,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 6},
    "opt": {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "ffn_dim": NEURONS,
        "word_embed_proj_dim": HIDDEN,
        "max_position_embeddings": 64,
    },
    "qwen2": {**_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**_LLAMA, "head_dim": 12},  # not hidden_size / heads
    "roberta": _BERT,
}
ENCODERS = ("bert", "distilbert", "electra", "roberta")
DECODERS = tuple(family for family in SIZES if family not in ENCODERS)
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")


def tiny(family: str, head: str | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model. head: "CausalLM", "SequenceClassification", ..., "" for none; None: the family's usual one."""
    head = ("MaskedLM" if family in ENCODERS else "CausalLM") if head is None else head
    labels = 2 if head == "QuestionAnswering" else LABELS
    sizes = {"vocab_size": VOCAB, "pad_token_id": PAD, "num_labels": labels, **SIZES[family], **changes}
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    config = transformers.AutoConfig.for_model(family, **sizes)
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
    """What the model predicts for the real tokens, or for the sequence, in one tensor."""
    accepted = {name: value for name, value in batch.items() if name != "position_ids" or takes_positions(model)}
    output = model.eval()(**accepted)
    named = [output[name] for name in ("logits", "start_logits", "end_logits", "last_hidden_state") if name in output]
    mask = batch["attention_mask"].bool()
    return torch.cat([(value[mask] if value.shape[:2] == mask.shape else value).flatten().float() for value in named])


def takes_positions(model: Any) -> bool:
    """DistilBERT counts positions by itself."""
    return model.config.model_type != "distilbert"
