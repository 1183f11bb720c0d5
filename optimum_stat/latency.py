"""A table of measured latencies: how long a model takes with every size of its blocks, as far as it was timed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants

from .families import Group
from .timing import Setting, Workload, steady_time

logger = logging.getLogger(__name__)
TOLERANCE = 0.1  # between what was predicted and what is measured, before somebody is told


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the whole model's forward pass, where the budget was a latency."""

    device: str
    """And dtype, and implementation."""
    phase: str
    """"prefill" or "decode"."""
    batch_size: int
    seq_len: int
    """Tokens of each example in the batch; while decoding, in the cache."""
    dense: float
    asked: float
    predicted: float
    """From the times of the blocks' sizes."""
    measured: float
    """Of the pruned model, right after pruning."""


@dataclass(frozen=True)
class LatencyTable:
    """Wall times of a model and of each group's sizes, in whole nanoseconds."""

    setting: Setting
    total: int
    """The dense model's time."""
    sizes: Mapping[str, Sequence[int]]
    """Group name -> the sizes that were timed, the last the dense one."""
    times: Mapping[str, Sequence[int]]
    """Group name -> the time of its block with that many of its units and all others: one for each size."""
    whole: Sequence[Sequence[int]]
    """Whole models, the smallest first: [what the blocks' times add up to, the time that it takes], the last the dense one.

    The two differ, as a small model finds in the cache what a large one reads from memory, and what every layer costs whatever
    its size cannot be seen in one of them. Both rise."""

    def fixed(self, names: Iterable[str]) -> int:
        """What the blocks' times add up to with the fastest sizes of the groups `names`, and all other units."""
        return self.total - sum(self.times[name][-1] - min(self.times[name]) for name in names)

    def limit(self, nanoseconds: float) -> float:
        """What the blocks' times may add up to, that the model takes no more than so long."""
        added, taken = np.array(self.whole, dtype=np.float64).T
        above = int(np.searchsorted(taken, nanoseconds, side="right"))
        if above in (0, len(taken)):
            at = min(above, len(taken) - 1)
            return float(added[at] + nanoseconds - taken[at])
        share = (nanoseconds - taken[above - 1]) / (taken[above] - taken[above - 1])
        return float(added[above - 1] + share * (added[above] - added[above - 1]))

    def taken(self, added: float) -> int:
        """The inverse of `limit`: nanoseconds of a model whose blocks' times add up to `added`."""
        known, taken = np.array(self.whole).T
        return int(np.interp(added, known, taken))

    def choices(self, groups: Sequence[Group]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """What each size that a group still has costs more than the dense group's fastest one; and these sizes."""
        costs, sizes = {}, {}
        for group in groups:
            times, fastest = self.times[group.name], min(self.times[group.name])
            sizes[group.name] = [size for size in self.sizes[group.name] if size <= group.units]
            costs[group.name] = [each - fastest for each in times[: len(sizes[group.name])]]
        return costs, sizes

    def predicted(self, kept: Mapping[str, int]) -> int:
        """Nanoseconds of the whole model with these sizes."""
        return self.taken(self.added(kept))

    def added(self, kept: Mapping[str, int]) -> int:
        """The model's time less what every group saves of its block."""
        at = {name: self.times[name][list(self.sizes[name]).index(size)] for name, size in kept.items()}
        return self.total + sum(at[name] - self.times[name][-1] for name in kept)

    def compare(self, pruned: Any, keep: float, kept: Mapping[str, int]) -> Latency:
        """What was asked and predicted beside what the pruned model takes now. Call it inside `quiet(pruned)`."""
        work = Workload(pruned, self.setting)
        measured = steady_time(work.run_model(), work.device)
        asked, predicted = keep * self.total, self.predicted(kept)
        if abs(measured - predicted) > TOLERANCE * predicted:
            logger.warning(
                "The pruned model takes %.2f ms; %.2f ms were predicted. Did the machine do something else meanwhile? "
                "The times are remembered in %s: delete that folder, and prune the dense model again, to measure anew.",
                measured / 1e6,
                predicted / 1e6,
                cache_folder(),
            )
        milliseconds = (each / 1e6 for each in (self.total, asked, predicted, measured))
        own = self.setting
        return Latency(own.where, own.phase, own.batch_size, own.seq_len, *milliseconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `to_dict`."""
        return cls(**{**values, "setting": Setting(**values["setting"])})


def cache_folder() -> Path:
    """Where tables are remembered. Delete it to have them measured anew."""
    return Path(constants.HF_HOME, "optimum-stat", "latency")
