"""What every benchmark writes down of a run: one JSON line; and the tables that are made of such lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from measure import table

from optimum_stat import Pruner

LIBRARIES = ("optimum-stat", "torch", "transformers")


@dataclass(frozen=True)
class Result:
    """One run: one model, one method, one budget, one seed."""

    benchmark: str
    metric: str
    recipe: str
    keep: float
    budget: str
    kept: float
    """Share of the budget that is left."""
    seed: int
    score: float
    """On data that no calibration saw."""
    dense: float
    """The same of the dense model."""
    tokens: int
    seconds: float
    """Of `prune`."""
    forward_passes: float
    """The same, in passes of the dense model over the same data."""
    latency: float
    """A pass of the pruned model over the calibration batches, as a share of one of the dense model."""
    peak_mib: float | None
    """Largest growth of the process's memory in a stage."""
    params: int
    block_params: int
    block_macs: int
    expected: float
    """The increase of the loss that the method expected."""
    sizes: dict[str, float]
    """Share of its units that each group keeps."""
    versions: dict[str, str] = field(default_factory=lambda: {name: metadata.version(name) for name in LIBRARIES})
    threads: int = field(default_factory=torch.get_num_threads)

    @classmethod
    def of(
        cls,
        pruner: Pruner[Any],
        *,
        benchmark: str,
        metric: str,
        recipe: str,
        seed: int,
        score: float,
        dense: float,
        dense_seconds: float,
        pruned_seconds: float,
    ) -> Result:
        """Of a pruner that has pruned; the last two: one pass over the calibration batches."""
        report = pruner.report
        seconds = sum(stage.seconds for stage in report.stages.values())
        peaks = [stage.peak_bytes for stage in report.stages.values() if stage.peak_bytes is not None]
        return cls(
            benchmark=benchmark,
            metric=metric,
            recipe=recipe,
            keep=report.keep,
            budget=report.budget,
            kept=round(report.reached, 4),
            seed=seed,
            score=round(score, 2),
            dense=round(dense, 2),
            tokens=report.num_tokens,
            seconds=round(seconds, 1),
            forward_passes=round(seconds / dense_seconds, 1),
            latency=round(pruned_seconds / dense_seconds, 3),
            peak_mib=round(max(peaks) / 2**20) if peaks else None,
            params=report.pruned.params,
            block_params=report.pruned.block_params,
            block_macs=report.pruned.block_macs,
            expected=report.error,
            sizes={group.name: round(group.kept / group.units, 3) for group in report.groups},
        )

    def append(self, path: Path | None) -> None:
        """Write it to the end of a file of JSON lines, if there is one."""
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(self)) + "\n")


def read_results(paths: Iterable[Path]) -> list[Result]:
    """All lines of all files; of runs that were done again, the last."""
    found = {}
    for path in paths:
        for line in path.read_text().splitlines():
            result = Result(**json.loads(line))
            found[result.benchmark, result.recipe, result.keep, result.budget, result.tokens, result.seed] = result
    return list(found.values())


def by_keep(results: Sequence[Result]) -> str:
    """One row a recipe, one column a share: mean (range) over seeds; at the end the time of `prune`."""
    shares = sorted({result.keep for result in results}, reverse=True)
    budget = {"macs": "MACs", "params": "parameters"}.get(results[0].budget, results[0].budget)
    rows = []
    for recipe in dict.fromkeys(result.recipe for result in results):
        own = [result for result in results if result.recipe == recipe]
        cells = [_spread([result.score for result in own if result.keep == keep]) for keep in shares]
        rows.append((recipe, *cells, f"{median(result.forward_passes for result in own):.1f}"))
    return table(("recipe", *(f"{share} of the {budget}" for share in shares), "forward passes"), rows)


def _spread(scores: list[float]) -> str:
    if len(scores) < 2:
        return f"{scores[0]:.2f}" if scores else ""
    return f"{fmean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})"
