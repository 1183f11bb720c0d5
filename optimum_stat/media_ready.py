"""Rows that hold what a model reads already, as Trainer takes them: tensors, arrays or lists, of one example or of several."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .labels import POSITIONS

RANKS = {
    "pixel_values": 4,
    "input_values": 2,
    "input_features": 3,
    "input_ids": 2,
    "attention_mask": 2,
    "decoder_input_ids": 2,
    "decoder_attention_mask": 2,
    "labels": 2,
}
"""Input -> how many dimensions it has in a batch."""


def ready_inputs(row: Mapping[str, Any], model: Any, where: str, with_labels: bool) -> dict[str, Tensor]:
    """What of a row the model's forward takes as it is, each [examples, ...]; any name, where it is a tensor.

    with_labels: whether they are token ids that a decoder reads.

    Raises:
        ValueError: a list is no numbers in rows of one length, or padded sounds are there.
    """
    accepted = set(inspect.signature(model.forward).parameters) - (set() if with_labels else {"labels", *POSITIONS})
    found = {}
    for name, value in row.items():
        if name in accepted and (isinstance(value, Tensor) or (name in RANKS and isinstance(value, (list, tuple, np.ndarray)))):
            found[name] = _in_a_batch(name, value, where)
    return _without_frames(found, where)


def check_vocabulary(ids: Tensor, text_config: Any, where: str) -> None:
    """Raise if one is no token of the model."""
    size = getattr(text_config, "vocab_size", None)
    wrong = ids[(ids < 0) | (ids >= size)] if size is not None else ids[:0]
    if wrong.numel():
        raise ValueError(
            f"{where} has token id {int(wrong[0])}, but the model's vocabulary has {size} tokens: the tokenizer does not match "
            "this model. Pass the tokenizer that the model was trained with."
        )


def _in_a_batch(name: str, value: Any, where: str) -> Tensor:
    try:
        tensor = value.cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has in {name} no numbers of one shape: {error}") from error
    tensor = tensor.long() if name in RANKS and not tensor.is_floating_point() else tensor
    return tensor[None] if tensor.dim() + 1 == RANKS.get(name) else tensor


def _without_frames(found: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """A mask over samples is no mask over the tokens that are made of them."""
    if "input_values" in found or "input_features" in found:
        mask = found.pop("attention_mask", None)
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError(f"{where} has padded sounds; give batches of sounds of one length, so that no padding counts.")
    return found
