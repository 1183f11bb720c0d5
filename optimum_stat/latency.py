"""Measured latency: how long a model's blocks take at every size, on the device at hand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from scipy.optimize import isotonic_regression
from torch import nn
from transformers.utils.logging import tqdm

from .budget import options
from .calls import Call
from .families import Group, find_blocks, find_groups, groups_of_block, sliding_window
from .timing import SECONDS, Setting, Workload, steady_ratio, steady_time

logger = logging.getLogger(__name__)
SIZES = 32  # of a group that are tried
FIRST = 24  # of these, before it is known where the steps are
STEP = 0.01  # of the dense block's time: neighbours that differ by less are not looked between
MOST_SAVED = 0.98  # of a block's time, at most, goes with its heads and neurons
COPIES = 3  # of a block at each size: where a copy's weights lie in memory makes a difference
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

    @property
    def fixed(self) -> int:
        """Nanoseconds that no plan can save."""
        return self.total - sum(times[-1] - min(times) for times in self.times.values())

    def choices(self, groups: Sequence[Group]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """What each size that a group still has costs more than the dense group's fastest one; and these sizes."""
        costs, sizes = {}, {}
        for group in groups:
            times, fastest = self.times[group.name], min(self.times[group.name])
            sizes[group.name] = [size for size in self.sizes[group.name] if size <= group.units]
            costs[group.name] = [each - fastest for each in times[: len(sizes[group.name])]]
        return costs, sizes

    def predicted(self, kept: Mapping[str, int]) -> int:
        """Nanoseconds of the whole model with these sizes: what every group saves of its block adds up."""
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


def latency_table(model: Any, round_to: int, setting: Setting, path: str | None = None) -> LatencyTable:
    """The table in the file `path`; without one, this machine's from an earlier run, or measured now and remembered.

    Raises:
        ValueError: the file is no table, is that of another setting, or does not fit the model.
    """
    if path is not None:
        table = _read(Path(path), model, round_to, setting)
        if table.setting.seq_len != setting.seq_len:
            asked = f"{table.setting.seq_len} tokens an example; asked, or the mean of the calibration data, is {setting.seq_len}"
            logger.warning("The latencies in %s are for %s. The budget counts the former.", path, asked)
        return table
    cached = cache_folder() / f"{_key(model, round_to, setting)}.json"
    if cached.exists():
        return LatencyTable.from_dict(json.loads(cached.read_text()))
    table = measure_table(model, round_to, setting)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        beside = cached.with_name(f".{cached.name}.{time.time_ns()}")
        beside.write_text(json.dumps(table.to_dict()))
        beside.replace(cached)
    except OSError as error:  # the next run measures again; this one goes on
        logger.warning("The latencies could not be remembered in %s: %s", cached.parent, error)
    return table


def cache_folder() -> Path:
    """Where tables are remembered. Delete it to have them measured anew."""
    return Path(constants.HF_HOME, "optimum-stat", "latency")


@torch.no_grad()
def measure_table(model: Any, round_to: int, setting: Setting) -> LatencyTable:
    """Time the model, and copies of each kind of block at up to 32 sizes of its heads and of its neurons.

    Every size is timed in turn with the dense block, so that what else the machine does meanwhile moves both, and before each as
    much memory is read as the model's blocks take, so that as in a real model no block finds its weights in the cache. Call it
    inside `quiet(model)`.
    """
    work = Workload(model, setting)
    calls, run, blocks = work.calls(), work.run_model(), work.blocks
    total = steady_time(run, work.device)
    sizes, times, known = dict[str, list[int]](), dict[str, list[int]](), dict[Any, dict[str, tuple[list[int], list[int]]]]()
    for index, block in enumerate(tqdm(blocks, desc="Timing", unit="block")):
        kind = _kind(model, index, block)
        if kind not in known:
            call = calls[index][0]
            share = len(calls[index]) * steady_ratio(work.run_block(index, call), run, work.device, before=work.forget)
            known[kind] = _time_block(work, index, call, round_to, round(share * total))
        for structure, (own_sizes, own_times) in known[kind].items():
            sizes[f"{index}.{structure}"], times[f"{index}.{structure}"] = own_sizes, own_times
    together = sum(times[f"{index}.heads"][-1] for index in range(len(blocks)))
    if setting.compiled:  # what is left of a compiled model without its blocks would not be compiled
        scale = min(1.0, total / together)
    else:  # what blocks were timed at decides how they share what the model takes without the rest of it, not how much that is
        scale = (1 - min(MOST_SAVED, steady_ratio(work.run_without_blocks(calls), run, work.device))) * total / together
    times = {name: [int(scale * each) for each in own] for name, own in times.items()}
    return LatencyTable(setting, total, sizes, times)


def _time_block(work: Workload, index: int, call: Call, round_to: int, dense_time: int) -> dict[str, tuple[list[int], list[int]]]:
    """Structure -> (sizes, nanoseconds of the whole block with that many units of it)."""
    timed = {
        group.structure: _time_sizes(work, index, call, at, options(group, round_to))
        for at, group in enumerate(groups_of_block(work.model, index, work.blocks[index]))
    }
    # more units of one alignment do not take less time; what says so is noise, which the allocation would pick out
    rising = {structure: isotonic_regression(list(ratios.values())).x for structure, ratios in timed.items()}
    # nor is there a block that takes no time at all
    spare = min(1.0, MOST_SAVED / max(MOST_SAVED, sum(1 - own[0] for own in rising.values())))
    found = {structure: np.rint(dense_time * (1 - spare * (1 - own))).astype(int).tolist() for structure, own in rising.items()}
    return {structure: (list(ratios), found[structure]) for structure, ratios in timed.items()}


def _time_sizes(work: Workload, index: int, call: Call, group: int, allowed: Sequence[int]) -> dict[int, float]:
    """Size -> time over the dense block's, ascending: at most 24 even sizes first, then those between the largest steps."""
    ratios = {allowed[-1]: 1.0}

    def measure(size: int) -> None:
        if size not in ratios:
            found = []
            for _ in range(COPIES):
                work.start_over()
                small, dense = work.run_block(index, call, group, size), work.run_block(index, call)
                found.append(steady_ratio(small, dense, work.device, SECONDS / COPIES, work.forget))
            ratios[size] = min(1.0, statistics.median(found))

    step = allowed[0]
    while allowed[-1] // step > FIRST:
        step *= 2  # matrix kernels have their steps at such multiples
    first = [size for size in allowed if size % step == 0 or size == allowed[0]]
    for size in tqdm(first, desc="Timing", unit="size", leave=False):
        measure(size)
    while len(ratios) < SIZES and (size := _between(ratios, allowed)) is not None:
        measure(size)
    return dict(sorted(ratios.items()))


def _between(ratios: Mapping[int, float], allowed: Sequence[int]) -> int | None:
    """The middle of the sizes between those two neighbours whose times differ most; None if all steps are found."""
    known = sorted(ratios)
    steps = [(abs(ratios[b] - ratios[a]), [size for size in allowed if a < size < b]) for a, b in pairwise(known)]
    step, inside = max(((step, inside) for step, inside in steps if inside), key=lambda each: each[0], default=(0.0, []))
    return inside[len(inside) // 2] if step > STEP else None


def _kind(model: Any, index: int, block: nn.Module) -> Any:
    """Blocks of one kind take the same time."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return shapes, sliding_window(model.config, index)


def _key(model: Any, round_to: int, setting: Setting) -> str:
    kinds = [repr(_kind(model, index, block)) for index, block in enumerate(find_blocks(model))]
    versions = [metadata.version(name) for name in ("optimum-stat", "torch", "transformers")]
    what = [type(model).__name__, setting.to_dict(), round_to, kinds, versions]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]


def _read(path: Path, model: Any, round_to: int, setting: Setting) -> LatencyTable:
    """A table from a file of its own, or from the recipe of a model that was pruned with it."""
    try:
        values = json.loads(path.read_text())
        table = LatencyTable.from_dict(values.get("latency_table") or values)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"latency_table={str(path)!r} asked, but it holds no table of latencies: {error}") from error
    there = table.setting
    if (there.device, there.dtype) != (setting.device, setting.dtype):
        gone = "" if torch.cuda.is_available() or not there.device.startswith("cuda") else ", which this machine does not have"
        raise ValueError(
            f"The latencies in {path} were measured on {there.device}, {there.dtype}{gone}; the model is on {setting.device}, "
            f"{setting.dtype}. Times of one device say nothing about another's: leave latency_table out to measure here, or "
            "prune where they were measured."
        )
    if dataclasses.replace(there, seq_len=setting.seq_len) != setting:
        raise ValueError(f"The latencies in {path} are of {there}, but {setting} is asked.")
    _check_sizes(path, table, {group.name: options(group, round_to) for group in find_groups(model)})
    return table


def _check_sizes(path: Path, table: LatencyTable, allowed: Mapping[str, Sequence[int]]) -> None:
    for name in {**allowed, **table.sizes}:
        found, times, own = list(table.sizes.get(name, ())), table.times.get(name, ()), allowed.get(name, [0])
        if not found or found[-1] != own[-1] or not set(found) <= set(own) or len(times) != len(found):
            raise ValueError(
                f"The latencies in {path} are another model's, or of another round_to: of {name} it has the sizes {found}, and "
                f"some of {list(own)} are wanted. Leave latency_table out to measure them."
            )
