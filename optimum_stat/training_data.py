"""From calibration batches to what `transformers.Trainer` reads: examples, a collator, and the metric of the model's task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from .data import Batches, joined
from .families import task_of
from .labels import IGNORED, POSITIONS

Example = dict[str, Tensor]
"""`input_ids` and the like [length], `labels` [length] or [] or [classes], `start_positions` []."""


def examples(batches: Batches) -> list[Example]:
    """One dict an example, without the padding behind it, in the order of the batches."""
    found = []
    for batch, labels in zip(batches, batches.labels or [{}] * len(batches), strict=True):
        for row, mask in enumerate(batch["attention_mask"]):
            length = int(mask.nonzero()[-1]) + 1
            own = {name: value[row] for name, value in {**batch, **labels}.items()}
            found.append({name: value[:length] if value.shape[:1] == mask.shape else value for name, value in own.items()})
    return found


def with_labels(rows: Sequence[Example]) -> list[Example]:
    """Those with a label that a loss counts: a mean over none of a batch is no number.

    Raises:
        ValueError: there are none.
    """
    found = [row for row in rows if _counts(row)]
    if not found:
        raise ValueError(
            f"None of {len(rows)} examples has a label that counts: tokens without one have {IGNORED}, and an answer behind the "
            "last token that was read is none (seq_len). Or use distill=1, which needs no labels."
        )
    return found


def _counts(row: Example) -> bool:
    if POSITIONS[0] in row:
        return any(0 <= int(row[name]) < len(row["input_ids"]) for name in POSITIONS)
    labels = row.get("labels")
    return labels is None or not labels.dim() or labels.is_floating_point() or bool((labels != IGNORED).any())


@dataclass(frozen=True)
class Collator:
    """Pads examples to one length; for causal language models, the next tokens are the labels."""

    pad_id: int
    next_tokens: bool

    def __call__(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """[examples, length], on the right."""
        batch = {name: joined(name, [row[name][None] for row in rows], self.pad_id) for name in rows[0]}
        if self.next_tokens:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return batch


def metrics_of(model: Any) -> tuple[str, ...]:
    """The names of what `scores` finds, apart from the loss; none for language models and models without a head."""
    task = task_of(model)
    if task == "text-classification":
        return ("pearsonr",) if model.config.num_labels == 1 else ("accuracy",)
    return {"token-classification": ("accuracy",), "question-answering": ("exact_match",)}.get(task, ())


def scores(model: nn.Module, prediction: Any) -> dict[str, float]:
    """Accuracy (of examples, of tokens, or of single yes-no labels), Pearson's correlation, or the share of answers whose start
    and end are both right."""
    (name,) = metrics_of(model)
    predicted, labels = prediction.predictions, prediction.label_ids
    if name == "exact_match":
        right = [value.argmax(-1) == label.reshape(-1) for value, label in zip(predicted, labels, strict=True)]
        return {name: float((right[0] & right[1]).mean())}
    logits = predicted[0] if isinstance(predicted, tuple) else predicted
    if name == "pearsonr":
        both = np.stack([logits.reshape(-1), labels.reshape(-1)])
        return {name: float(np.corrcoef(both)[0, 1]) if both.shape[1] > 1 and both.std(1).all() else math.nan}
    if labels.dtype.kind == "f":  # one yes or no for each class
        return {name: float(((logits > 0) == (labels > 0)).mean())}
    counts = labels != IGNORED
    return {name: float((logits.argmax(-1) == labels)[counts].mean())}
