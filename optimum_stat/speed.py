"""A pruned model's speed beside its dense one's: both in memory, timed in turn, in one process."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .calls import stack_tokens
from .probes import device_of, quiet
from .timing import Setting, Workload, longest, pairs

SECONDS = 3.0  # for one comparison


@dataclass(frozen=True)
class Spread:
    """The quartiles of what was measured: half of it lies between `low` and `high`."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least two values."""
        return cls(*(float(f"{value:.5g}") for value in statistics.quantiles(values, n=4, method="inclusive")))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Speed:
    """One kind of work, done by both models in turn."""

    device: str
    phase: str
    batch_size: int
    seq_len: int
    dense: Spread
    """Milliseconds of a forward pass."""
    pruned: Spread
    ratio: Spread
    """Pruned over dense, pair by pair: what else the machine does meanwhile moves both."""
    repeats: int

    @property
    def tokens(self) -> int:
        """That one pass reads."""
        return self.batch_size * (self.seq_len if self.phase == "prefill" else 1)

    @property
    def work(self) -> str:
        """In words."""
        return f"{self.phase} of {self.batch_size} x {self.seq_len} tokens, {self.device}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; with the median throughput of both, in tokens a second."""
        each = {f"{name}_tokens_per_second": round(1e3 * self.tokens / own.median, 1) for name, own in self._sides()}
        return {**dataclasses.asdict(self), **each}

    def _sides(self) -> tuple[tuple[str, Spread], ...]:
        return ("dense", self.dense), ("pruned", self.pruned)

    def __str__(self) -> str:
        """Milliseconds and tokens a second."""
        rates = " and ".join(f"{1e3 * self.tokens / own.median:,.0f}" for _, own in self._sides())
        return (
            f"{self.phase} {self.batch_size} x {self.seq_len} tokens: {self.dense} ms dense, {self.pruned} ms pruned, ratio "
            f"{self.ratio}; {rates} tokens/s"
        )


def side_by_side(
    dense: Any,
    pruned: Any,
    batch_size: int,
    seq_len: int,
    phase: str = "prefill",
    compiled: bool = False,
    example: dict[str, Tensor] | None = None,
) -> Speed:
    """Time both on the same work, in turn, for about three seconds. Both stand on the same device.

    seq_len: what of it the model has positions for. example: inputs of one example, of models that read anything else than token
    ids; its tokens in all lists of blocks together then are the length.
    """
    with quiet(dense), quiet(pruned):
        if example is None:
            seq_len = min(seq_len, longest(dense, phase) or seq_len)
        else:
            seq_len = sum(stack_tokens(dense, {name: value.to(device_of(dense)) for name, value in example.items()}))
        runs = []
        for model in (pruned, dense):
            setting = Setting.of(model, phase, batch_size, seq_len, compiled)
            runs.append(Workload(model, setting, example).run_model())
        found = pairs(runs[0], runs[1], device_of(dense), SECONDS)
    own, other = [[each / 1e6 for each in side] for side in zip(*found, strict=True)]
    ratios = [mine / theirs for mine, theirs in zip(own, other, strict=True)]
    return Speed(setting.where, phase, batch_size, seq_len, Spread.of(other), Spread.of(own), Spread.of(ratios), len(found))
