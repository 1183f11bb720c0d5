"""Several sizes of one model, beside each other: what was expected, what was measured, and which of them are worth having."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .budget import Cost
from .report import Forecast, PruningReport
from .speed import Speed

if TYPE_CHECKING:
    from .pruner import Pruner

LESS_IS_BETTER = ("perplexity", "masked_lm_loss", "loss", "wer")


@dataclass(frozen=True)
class Size:
    """One of the sizes."""

    keep: float
    cost: Cost
    error: float
    """The increase of the loss that the method expects: see `Forecast.error`."""
    weight_bytes: int
    """Of the weights' files; where there are none yet, of all parameters in the model's dtype."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Measured; empty where nothing was."""
    speed: Speed | None = None
    """Measured, in turn with the dense model."""


@dataclass(frozen=True)
class SweepReport:
    """Several sizes of one model. `str(report)` is a table; `to_dict()` holds plain JSON values."""

    method: str
    budget: str
    dense: Cost
    dense_bytes: int
    sizes: tuple[Size, ...]
    dataset: str = ""
    """What the metrics were measured on."""
    dense_metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_models(cls, pruner: Pruner[Any], reports: Sequence[PruningReport], weights: Sequence[int]) -> SweepReport:
        """Of models that have been pruned and written, with so many bytes of weights; `pruner` has the dense one."""
        sizes = [Size(own.keep, own.pruned, own.error, size) for own, size in zip(reports, weights, strict=True)]
        return cls(pruner.method, pruner.config.budget, reports[0].dense, _bytes(pruner, reports[0].dense), tuple(sizes))

    @classmethod
    def of_plan(cls, pruner: Pruner[Any], plan: Sequence[Forecast]) -> SweepReport:
        """Of models that have not."""
        dense = pruner.currency.dense
        sizes = [Size(own.keep, own.cost, own.error, _bytes(pruner, own.cost)) for own in plan]
        return cls(pruner.method, pruner.config.budget, dense, _bytes(pruner, dense), tuple(sizes))

    @property
    def metric(self) -> str | None:
        """The first of the measured ones: what quality is about."""
        return next(iter(self.sizes[0].metrics), None)

    @property
    def front(self) -> tuple[bool, ...]:
        """Of each size, whether no other is at least as good and at least as fast, and one of the two better."""
        points = [(self._loss(size), size.speed.ratio.median if size.speed else size.cost.block_macs) for size in self.sizes]
        return tuple(not any(_beats(other, own) for other in points) for own in points)

    def _loss(self, size: Size) -> float:
        if self.metric is None:
            return size.error
        value = size.metrics[self.metric]
        return value if self.metric in LESS_IS_BETTER else -value

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        rows = zip(self.sizes, self.front, strict=True)
        sizes = [
            {**dataclasses.asdict(size), "speed": size.speed and size.speed.to_dict(), "on_front": on_front}
            for size, on_front in rows
        ]
        return {**dataclasses.asdict(self), "sizes": sizes, "metric": self.metric}

    def __str__(self) -> str:
        first, names = self.sizes[0], list(self.sizes[0].metrics)
        head = f"{'keep':>6}{'parameters':>14}{'':>6}{'of the blocks':>15}{'MACs':>8}{'MB':>9}{'expected error':>16}"
        head += "".join(f"{name:>{_width(name)}}" for name in names) + (f"{'ms':>10}{'of dense':>10}" if first.speed else "")
        lines = [head + f"{'front':>7}"]
        if names:
            dense = Size(1.0, self.dense, 0.0, self.dense_bytes, self.dense_metrics)
            timed = f"{first.speed.dense.median:>10.2f}{1:>10.2f}" if first.speed else ""
            lines.append(f"{' dense':>6}{self._line(dense, names)[6:]}{timed}")
        for size, on_front in zip(self.sizes, self.front, strict=True):
            timed = f"{size.speed.pruned.median:>10.2f}{size.speed.ratio.median:>10.2f}" if size.speed else ""
            lines.append(f"{self._line(size, names)}{timed}{'yes' if on_front else '':>7}".rstrip())
        about = [f"measured on {self.dataset}"] * bool(names) + ([f"times: {first.speed.work}"] if first.speed else [])
        return "\n".join([*lines, *about])

    def _line(self, size: Size, names: Sequence[str]) -> str:
        cost, dense = size.cost, self.dense
        shares = f"{cost.block_params / dense.block_params:>15.2f}{cost.block_macs / dense.block_macs:>8.2f}"
        metrics = "".join(f"{size.metrics[name]:>{_width(name)}.4f}" for name in names)
        start = f"{size.keep:>6.4g}{cost.params:>14,}{cost.params / dense.params:>6.2f}{shares}"
        return f"{start}{size.weight_bytes / 1e6:>9.1f}{size.error:>16.4g}{metrics}"


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _width(name: str) -> int:
    return max(12, len(name) + 2)


def _bytes(pruner: Pruner[Any], cost: Cost) -> int:
    return cost.params * pruner.model.dtype.itemsize
