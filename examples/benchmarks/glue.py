"""The tasks of GLUE that the encoder benchmarks use: where they keep their data, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy import stats


@dataclass(frozen=True)
class Task:
    title: str
    columns: tuple[str, ...]
    label: str
    num_labels: int
    metric: str
    of: Callable[[torch.Tensor, list[Any]], float]
    """From the logits of all examples and their labels to the metric, times 100."""


def accuracy(logits: torch.Tensor, labels: list[int]) -> float:
    return 100 * float((logits.argmax(-1) == torch.tensor(labels)).double().mean())


def matthews(logits: torch.Tensor, labels: list[int]) -> float:
    predicted = logits.argmax(-1).numpy()
    if len(set(predicted.tolist())) < 2:
        return 0.0
    return 100 * float(np.corrcoef(predicted, labels)[0, 1])  # for two classes it is Pearson's


def spearman(logits: torch.Tensor, labels: list[float]) -> float:
    return 100 * float(stats.spearmanr(logits[:, 0].numpy(), labels).statistic)


TASKS = {
    "sst2": Task("SST-2", ("sentence",), "label", 2, "accuracy", accuracy),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", 1, "Spearman's correlation", spearman),
    "cola": Task("CoLA", ("sentence",), "label", 2, "Matthews' correlation", matthews),
}


def read(folder: Path) -> tuple[Dataset, Dataset]:
    train, dev = (Dataset.from_parquet(str(folder / f"{name}.parquet")) for name in ("train", "dev"))
    return train, dev


@torch.no_grad()
def score(task: Task, model: torch.nn.Module, tokenizer: Any, dev: Dataset) -> float:
    logits = []
    for start in range(0, len(dev), 64):
        rows = dev[start : start + 64]
        encoded = tokenizer(
            *(rows[name] for name in task.columns), padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        logits.append(model(**encoded).logits)
    return task.of(torch.cat(logits), dev[task.label])
