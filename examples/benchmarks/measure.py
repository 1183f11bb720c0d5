"""What the benchmarks share: the floor that a run is compared with, and a table."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch


@torch.no_grad()
def forward_seconds(model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], repeats: int = 2) -> float:
    """Best of `repeats` forward passes of the whole model over the calibration batches."""
    device, times = next(model.parameters()).device, []
    for _ in range(repeats):
        start = time.perf_counter()
        for batch in batches:
            model(**{name: value.to(device) for name, value in batch.items()})
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def in_turn(*models: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], repeats: int = 3) -> list[float]:
    """`forward_seconds` of each, one after the other, again and again: what slows the machine slows all of them."""
    times = [[forward_seconds(model, batches, 1) for model in models] for _ in range(repeats)]
    return [min(own) for own in zip(*times, strict=True)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
