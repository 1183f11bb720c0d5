"""A table of measured latencies: how long a model takes with every size of its blocks, as far as it was timed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    model: str = ""
    """Which models these times are of, see `latency_timing.shapes_of`; empty where that was not written down."""

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

    def compare(self, pruned: Any, keep: float, kept: Mapping[str, int], *, given: bool) -> Latency:
        """What was asked and predicted beside what the pruned model takes now; given: the times are from the user's own file.

        Call it inside `quiet(pruned)`.
        """
        work = Workload(pruned, self.setting)
        measured = steady_time(work.run_model(), work.device)
        asked, predicted = keep * self.total, self.predicted(kept)
        if abs(measured - predicted) > TOLERANCE * predicted:
            place = f"They are remembered in {cache_folder()}: delete that folder" if cache_folder().is_dir() else "Wait for it"
            logger.warning(
                "The pruned model takes %.2f ms; %.2f ms were predicted. Did the machine do something else, now or when the "
                "times were measured? %s, and prune the dense model again, to measure anew.",
                measured / 1e6,
                predicted / 1e6,
                "They are those of latency_table: leave it out" if given else place,
            )
        milliseconds = (each / 1e6 for each in (self.total, asked, predicted, measured))
        own = self.setting
        return Latency(own.where, own.phase, own.batch_size, own.seq_len, *milliseconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `to_dict`.

        Raises:
            ValueError, TypeError, KeyError: these are no values of a table.
        """
        table = cls(**{**values, "setting": Setting(**values["setting"])})
        for field in dataclasses.fields(Setting):
            if type(found := getattr(table.setting, field.name)).__name__ != field.type:
                raise TypeError(f"its {field.name} is {found!r}, no {field.type}")
        _check(table)
        return table


def _check(table: LatencyTable) -> None:
    """Raise ValueError unless all numbers are such as are measured."""
    for name, sizes in table.sizes.items():
        times = table.times.get(name, ())
        if not _whole([*sizes, *times]) or list(sizes) != sorted({*sizes}) or min([1, *sizes]) < 1:
            raise ValueError(f"of {name} it has the sizes {list(sizes)}, in {list(times)} nanoseconds")
    if not _whole([table.total]) or not table.total:
        raise ValueError(f"the dense model takes {table.total!r} nanoseconds in it")
    rows = [list(each) for each in table.whole]
    fits = len(rows) > 1 and all(len(row) == 2 and _whole(row) for row in rows) and rows[-1][1] == table.total
    if not fits or any(one[0] >= other[0] or one[1] > other[1] for one, other in pairwise(rows)):
        raise ValueError(f"whole models take {rows} nanoseconds in it, the dense one {table.total}")


def _whole(values: Iterable[Any]) -> bool:
    """Whether all are whole numbers, none below 0."""
    return all(type(each) is int and each >= 0 for each in values)


def cache_folder() -> Path:
    """Where tables are remembered. Delete it to have them measured anew."""
    return Path(constants.HF_HOME, "optimum-stat", "latency")
