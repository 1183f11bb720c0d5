"""A family of models on disk: written, measured and timed beside the dense one, each with a card that shows them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import evaluation, recipe_update
from .probes import quiet
from .rows import Rows
from .speed import side_by_side
from .sweep_report import SweepReport
from .timing import Setting, Workload


def write(pruner: Any, family: Iterable[Any], folder: Path, dataset: Any) -> SweepReport:
    """Every model of `family` into a folder of its own; `pruner` has the dense one.

    With a `dataset`, the metric of all models on it, and their speed on the work that `serve_...` of the configuration say.
    """
    reports, weights, found = [], [], []
    dense = None if dataset is None else pruner.model  # which a sweep leaves as it is
    if dense is not None:
        with quiet(dense):  # what cannot be timed is found out before anything is written
            Workload(dense, Setting.of(dense, pruner.config.serve_phase, 1, 1))
    for small in family:
        own = folder / str(small.config.keep)
        small.save_pretrained(own)
        reports.append(small.report)
        weights.append(sum(file.stat().st_size for file in own.glob("*.safetensors")))
        if dense is not None:
            found.append(_measured(small, dense, dataset))
    report = SweepReport.of_models(pruner, reports, weights)
    if dense is None:
        return report
    name = Rows(dataset, None, 1).source().partition(", columns ")[0]
    sizes = [
        dataclasses.replace(size, metrics=metrics, speed=speed)
        for size, (metrics, speed) in zip(report.sizes, found, strict=True)
    ]
    before = _metrics(pruner, dense, dataset)
    report = dataclasses.replace(report, sizes=tuple(sizes), dataset=name, dense_metrics=before)
    for size in report.sizes:
        metrics = [{"name": each, "dataset": name, "value": v, "dense": before[each]} for each, v in size.metrics.items()]
        about = {"speed": [size.speed.to_dict()] if size.speed else [], "family": report.to_dict()}
        recipe_update.enter(folder / str(size.keep), metrics, **about)
    return report


def _measured(small: Any, dense: Any, dataset: Any) -> tuple[dict[str, float], Any]:
    config = small.config
    work = config.serve_batch_size, config.serve_seq_len or small.report.seq_len, config.serve_phase, config.serve_compiled
    return _metrics(small, small.model, dataset), side_by_side(dense, small.model, *work)


def _metrics(pruner: Any, model: Any, dataset: Any) -> dict[str, float]:
    config = evaluation.data_config(seq_len=pruner.config.seq_len, batch_size=pruner.config.batch_size)
    metrics = evaluation.measure(model, pruner.tokenizer, evaluation.Data(dataset, config)).metrics
    return {name: float(f"{value:.6g}") for name, value in metrics.items()}
