"""What a pruning run did: a typed object with a table for people and plain values for JSON."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from .budget import Cost, Lengths
from .data import Batches
from .experts import opened_in
from .families import Group
from .latency import Latency
from .memory import Memory
from .offload import is_offloaded
from .probes import device_of, quiet, small_parts

if TYPE_CHECKING:
    from .pruner import Pruner

FORWARD_TOKENS = 2048  # to time a forward pass on
AT_ONCE = {"cuda": 4096}  # of them on a device; 512 elsewhere, which is enough for a CPU
POINTS = 32  # of an error curve, for a picture of it


@dataclass(frozen=True)
class GroupReport:
    """One group: how many units it had and keeps, and what the method expected that to cost."""

    name: str
    units: int
    kept: int
    error: float
    """The predicted error at this size, as a share of the error of removing the whole group (0 if nothing was removed). In
    several shots, that of the last one."""
    expected: float
    """The predicted increase of the loss, see `Pruner.nats`, or, gradient-free, the error; of methods that train, the sum of the
    scores that go. That of all shots together."""
    note: str = ""
    """Why dropping one unit changes others too; empty where it does not."""
    curve: tuple[tuple[int, float], ...] = ()
    """(units kept, expected increase of the loss) at some sizes, that kept among them. In several shots, of the last one."""

    @classmethod
    def of(cls, group: Group, curve: Tensor, kept: int, nats: float) -> GroupReport:
        """curve: the error for every number of units kept, [units + 1]; nats: what an error of 1 stands for."""
        share = float(curve[kept] / curve[0]) if curve[0] else 0.0
        sizes = sorted({*range(1, group.units + 1, max(1, group.units // POINTS)), kept, group.units})
        points = tuple((size, float(f"{nats * float(curve[size]):.4g}")) for size in sizes)
        return cls(group.name, group.units, kept, share, nats * float(curve[kept]), group.inexact, points)


Lines = tuple[GroupReport, ...]
"""What one shot did, group by group."""


@dataclass(frozen=True)
class Stage:
    """Wall time and memory of one stage."""

    seconds: float
    peak_bytes: int | None
    """Growth of the process's (or the accelerator's) memory over the stage's start; None where it cannot be read."""


@dataclass(frozen=True)
class PruningReport:
    """What `prune` did. `str(report)` is a table; `to_dict()` holds plain JSON values."""

    method: str
    keep: float
    budget: str
    reached: float
    """Share of the blocks' cost, or of the model's memory or latency, that is left; never above `keep`."""
    seq_len: Lengths
    num_tokens: int
    num_examples: int
    data: str
    fingerprint: str
    dense: Cost
    pruned: Cost
    groups: Lines
    counts: str = "units"
    """What the groups count: "units" that were sliced away, or "weights" that became zeros in a model of the old shape."""
    stages: dict[str, Stage] = field(default_factory=dict)
    forward_seconds: float | None = None
    """Of one forward pass of the dense model over the calibration data, reckoned from about 2,048 tokens, before and after they
    are measured; None if offloaded."""
    latency: Latency | None = None
    memory: Memory | None = None
    training: dict[str, Any] | None = None
    """Of methods that train: "teacher", what it was, and "arguments", those of Trainer that differ from its defaults."""

    @property
    def forward_passes(self) -> float | None:
        """The time of all stages, in forward passes of the dense model over the same data."""
        return sum(stage.seconds for stage in self.stages.values()) / self.forward_seconds if self.forward_seconds else None

    @property
    def error(self) -> float:
        """What the method expected of all groups together, see `GroupReport.expected`."""
        return sum(group.expected for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        passes = {"forward_passes": None if self.forward_passes is None else round(self.forward_passes, 1)}
        return {**dataclasses.asdict(self), **passes, "error": self.error}

    def __str__(self) -> str:
        of = "the model's" if self.budget in ("latency", "memory") else "the blocks'"
        lines = [
            f"{self.method}: {self.reached:.1%} of {of} {self.budget} kept ({self.keep:.1%} asked), "
            f"{self.num_tokens:,} tokens of {self.data}",
            f"{'group':<14}{'units':>8}{'kept':>8}{'share':>8}{'error':>9}",
        ]
        for group in self.groups:
            share = group.kept / group.units
            lines.append(f"{group.name:<14}{group.units:>8}{group.kept:>8}{share:>8.0%}{group.error:>9.2%}")
        notes = {
            f"{group.name.partition('.')[2]}: {group.note}": None
            for group in self.groups
            if group.note and group.kept < group.units
        }
        lines += [f"not exact for {note}" for note in notes]
        if self.latency is not None:
            own = self.latency
            lines.append(
                f"ms for {own.batch_size} x {own.seq_len} tokens on {own.device}: {own.dense:.2f} dense, {own.asked:.2f} asked, "
                f"{own.predicted:.2f} predicted, {own.measured:.2f} measured"
            )
        if self.memory is not None:
            lines.append(str(self.memory))
        for name, stage in self.stages.items():
            peak = "" if stage.peak_bytes is None else f", {stage.peak_bytes / 2**20:,.0f} MiB more than before"
            lines.append(f"{name}: {stage.seconds:.1f} s{peak}")
        if self.forward_passes is not None:
            lines.append(f"in all the time of {self.forward_passes:.1f} forward passes of the dense model over the same data")
        return "\n".join(lines)


@dataclass(frozen=True)
class Forecast:
    """What a share of the model would keep, and the error that the method expects of it."""

    keep: float
    cost: Cost
    error: float
    """The increase of the loss that the method expects, see `Pruner.nats`."""
    kept: Mapping[str, int]
    """Group name -> units."""


def make_report(pruner: Pruner[Any], lines: Sequence[Lines], batches: Batches) -> PruningReport:
    """The report of a pruner whose model is as it is to be; `lines`: what each shot did."""
    table, residents, latency, memory = pruner.currency.table, pruner.currency.residents, None, None
    dense, pruned = pruner.currency.dense, pruner.cost(batches)
    groups = tuple(
        replace(shots[-1], units=shots[0].units, expected=sum(shot.expected for shot in shots))
        for shots in zip(*lines, strict=True)
    )
    if table is not None:
        with quiet(pruner.model):
            latency = table.compare(
                pruner.model,
                pruner.config.keep,
                {group.name: group.kept for group in groups},
                given=pruner.currency.table_is_given,
            )
        reached = latency.predicted / latency.dense
    elif residents is not None:
        memory = residents.compare(pruner.model, pruner.config.keep)
        reached = memory.reached / memory.dense
    elif pruner.counts == "weights":  # zeros of old are as good as new ones
        reached = sum(group.kept for group in groups) / sum(group.units for group in groups)
    else:
        budget = f"block_{pruner.config.budget}"
        reached = getattr(pruned, budget) / getattr(dense, budget)
    return PruningReport(
        method=pruner.method,
        keep=pruner.config.keep,
        budget=pruner.config.budget,
        reached=reached,
        seq_len=batches.seq_len,
        num_tokens=batches.num_tokens,
        num_examples=batches.num_examples,
        data=batches.source,
        fingerprint=batches.fingerprint,
        dense=dense,
        pruned=pruned,
        groups=groups,
        counts=pruner.counts,
        stages=dict(pruner.stages),
        forward_seconds=pruner.forward_seconds,
        latency=latency,
        memory=memory,
    )


@torch.no_grad()
def forward_seconds(model: Any, batches: Batches) -> float | None:
    """Of one pass of the model, as it is, over this process's data, from every so many examples; the first run does not count."""
    if is_offloaded(model):
        return None
    device = device_of(model)
    parts = [inputs for inputs, _ in small_parts(batches, AT_ONCE.get(device.type, 512))]
    some = parts[:: max(1, batches.num_tokens // FORWARD_TOKENS)]

    def seconds(parts: list[dict[str, Tensor]]) -> float:
        start = time.perf_counter()
        for inputs in parts:
            model(**{name: value.to(device) for name, value in inputs.items()})
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with quiet(model):
        seconds(some[:1])
        return seconds(some) * len(parts) / len(some) / batches.processes.count


def pace_again(pruner: Pruner[Any], batches: Batches) -> float | None:
    """What was found before, averaged with what a pass takes now, as shared machines change their pace; the model must be dense.

    Not of one whose experts are open, where every token goes through all of them.
    """
    before, model = pruner.forward_seconds, pruner.model
    if before is None or opened_in(model) or pruner.cost(batches) != pruner.currency.dense:
        return before
    return (before + (forward_seconds(model, batches) or before)) / 2


TimedStage = Callable[[str], AbstractContextManager[None]]


def stage_timer(stages: dict[str, Stage], suffix: str, device: torch.device) -> TimedStage:
    """`timed` for stages whose names end with `suffix`."""
    return lambda name: timed(stages, name + suffix, device)


@contextmanager
def timed(stages: dict[str, Stage], name: str, device: torch.device) -> Iterator[None]:
    """Enter the wall time and peak memory of the enclosed work into `stages`."""
    start, before = time.perf_counter(), _reset_peak(device)
    try:
        yield
    finally:
        after = _peak(device)
        grown = None if before is None or after is None else max(0, after - before)
        stages[name] = Stage(time.perf_counter() - start, grown)


def _reset_peak(device: torch.device) -> int | None:
    """Memory in use now, and start watching for its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the highest resident set so far
    except OSError:
        return None
    return int(psutil.Process().memory_info().rss)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
