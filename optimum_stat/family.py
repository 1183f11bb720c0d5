"""A family of models on disk: written, measured and timed beside the dense one, each with a card that shows them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from . import recipe_update
from .blocks import reads_tokens_alone
from .evaluation import Data, Measured, measure
from .probes import quiet
from .processes import Processes
from .rows import name_of
from .scores import cosine
from .speed import Speed, side_by_side
from .sweep_report import SweepReport
from .timing import Setting, Workload


def write(pruner: Any, family: Iterable[Any], folder: Path, data: Data | None) -> SweepReport:
    """Every model of `family` into a folder of its own; `pruner` has the dense one.

    With `data`, the metric of all models on it, and their speed on the work that `serve_...` of the configuration say; models
    that read anything else than token ids are timed on one example of it. Of several processes the main one measures, which
    alone gets the measures, and the others wait.
    """
    processes, reports, weights, found, measuring = Processes.launched(), [], [], [], list[_Dense]()

    def look(small: Any) -> None:
        (dense,) = measuring
        measured = measure(small.model, small.tokenizer, dense.data)
        found.append((_metrics(measured, dense.embeddings), dense.beside(small)))

    if data is not None:
        processes.as_main(lambda: measuring.append(_Dense.of(pruner, data)))
    for small in family:
        own = folder / str(small.config.keep)
        small.save_pretrained(own)
        reports.append(small.report)
        weights.append(sum(file.stat().st_size for file in own.glob("*.safetensors")))
        if data is not None:
            processes.as_main(partial(look, small))
    report = SweepReport.of_models(pruner, reports, weights)
    if not measuring:
        return report
    (dense,) = measuring
    name = name_of(dense.data.dataset) or "data without a name"
    sizes = [
        dataclasses.replace(size, metrics=metrics, speed=speed)
        for size, (metrics, speed) in zip(report.sizes, found, strict=True)
    ]
    before = dense.metrics
    report = dataclasses.replace(report, sizes=tuple(sizes), dataset=name, dense_metrics=before)
    for size in report.sizes:
        metrics = [{"name": each, "dataset": name, "value": v, "dense": before[each]} for each, v in size.metrics.items()]
        about = {"speed": [size.speed.to_dict()] if size.speed else [], "family": report.to_dict()}
        recipe_update.enter(folder / str(size.keep), metrics, **about)
    return report


@dataclasses.dataclass(frozen=True)
class _Dense:
    """The dense model, which a sweep leaves as it is, and what it is worth."""

    model: Any
    data: Data
    metrics: dict[str, float]
    example: dict[str, Any] | None
    """To time it on; None: token ids."""
    embeddings: Tensor | None
    """Of a model without a head."""

    @classmethod
    def of(cls, pruner: Any, data: Data) -> _Dense:
        """What cannot be timed or measured is found out before anything is written."""
        config, model = pruner.config, pruner.model
        data = dataclasses.replace(
            data, config=dataclasses.replace(data.config, seq_len=config.seq_len, batch_size=config.batch_size)
        )
        alone = reads_tokens_alone(model)
        if alone or config.serve_phase != "prefill":
            with quiet(model):
                Workload(model, Setting.of(model, config.serve_phase, 1, 1), None if alone else {})
        found = measure(model, pruner.tokenizer, data)
        own = found.embeddings
        return cls(model, data, _metrics(found, own), None if alone else found.example, own)

    def beside(self, small: Any) -> Speed:
        """Its speed beside a smaller one's."""
        config = small.config
        length = config.serve_seq_len or (small.report.seq_len if self.example is None else 0)
        work = config.serve_batch_size, length, config.serve_phase, config.serve_compiled
        return side_by_side(self.model, small.model, *work, self.example)


def _metrics(found: Measured, dense: Tensor | None) -> dict[str, float]:
    """dense: the dense model's embeddings, where there are any."""
    near = {} if found.embeddings is None or dense is None else {"cosine_with_dense": cosine(found.embeddings, dense)}
    return {name: float(f"{value:.6g}") for name, value in {**found.metrics, **near}.items()}
