"""Time a model's blocks at every size, on the device at hand: what fills a table of latencies."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import nn
from transformers.utils.logging import tqdm

from .budget import options
from .calls import Call
from .families import find_groups, groups_of_block, sliding_window
from .latency import LatencyTable
from .probes import quiet
from .slicing import slice_model
from .timing import SECONDS, Setting, Workload, steady_ratio, steady_time

SIZES = 32  # of a group that are tried
FIRST = 24  # of these, before it is known where the steps are
STEP = 0.01  # of the dense block's time: neighbours that differ by less are not looked between
MOST_SAVED = 0.98  # of a block's time, at most, goes with its heads and neurons
COPIES = 3  # of a block at each size: where a copy's weights lie in memory makes a difference
WHOLE = (0.75, 0.5, 0.25, 0.0)  # of every group's units: what whole models are timed with, the last with as few as there may be
WHOLE_SECONDS = 1.5  # for each of these
CLOSE = 0.02  # between the time of a model and what the table says of it
NEAR = 0.08  # of the dense model's time: what was known so near to a new one is forgotten


@torch.no_grad()
def measure_table(model: Any, round_to: int, setting: Setting) -> LatencyTable:
    """Time the model, and copies of each kind of block at up to 32 sizes of its heads and of its neurons.

    Every size is timed in turn with the dense block, so that what else the machine does meanwhile moves both, and before each as
    much memory is read as the model's blocks take, so that as in a real model no block finds its weights in the cache. Then a few
    models that are smaller throughout say how these times add up. Call it inside `quiet(model)`.
    """
    work = Workload(model, setting)
    calls, run, blocks = work.calls(), work.run_model(), work.blocks
    total = steady_time(run, work.device)
    sizes, times, known = dict[str, list[int]](), dict[str, list[int]](), dict[Any, dict[str, tuple[list[int], list[int]]]]()
    for index, block in enumerate(tqdm(blocks, desc="Timing", unit="block")):
        kind = kind_of(model, index, block)
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
    table = LatencyTable(setting, total, sizes, times, [[0, 0], [total, total]], shapes_of(model))
    return dataclasses.replace(table, whole=_time_whole(model, table))


def time_with(model: Any, table: LatencyTable, kept: Mapping[str, int]) -> list[list[int]] | None:
    """`table.whole` with what `model` takes if it keeps so many units; None if that is what the table says.

    The model may be smaller already than the one that was timed. Call it inside `quiet(model)`.
    """
    now = {group.name: group.units for group in find_groups(model)}
    added, expected = table.added(kept), table.predicted(kept)
    if kept == now:
        return None
    taken = round(_ratio(model, Workload(model, table.setting), kept) * table.predicted(now))
    if abs(taken - expected) <= CLOSE * expected:
        return None
    others = {known: own for known, own in table.whole if abs(known - added) > NEAR * table.total or known == table.total}
    return _rising({**others, added: taken}, table.total)


def _time_whole(model: Any, table: LatencyTable) -> list[list[int]]:
    """Some models, from the smallest to the dense one."""
    work, found = Workload(model, table.setting), {table.total: table.total}
    for share in tqdm(WHOLE, desc="Timing", unit="model"):
        kept = {name: min(sizes, key=lambda size: abs(size - share * sizes[-1])) for name, sizes in table.sizes.items()}
        if (added := table.added(kept)) not in found:
            found[added] = round(_ratio(model, work, kept) * table.total)
    return _rising(found, table.total)


def _ratio(model: Any, work: Workload, kept: Mapping[str, int]) -> float:
    """The time of a model with so many units, of that of the whole one, whose work is given."""
    small = copy.deepcopy(model, {id(own): own for own in chain(model.parameters(), model.buffers())})  # weights are shared
    slice_model(small, {name: torch.arange(size) for name, size in kept.items()})
    work.start_over()
    with quiet(small):
        return steady_ratio(Workload(small, work.setting).run_model(), work.run_model(), work.device, WHOLE_SECONDS)


def _rising(taken: Mapping[int, int], total: int) -> list[list[int]]:
    """Sorted; a larger model does not take less time."""
    known = sorted(taken)
    rising = isotonic_regression([min(taken[added], total) for added in known]).x
    return [list(each) for each in zip(known, np.rint(rising).astype(int).tolist(), strict=True)]


def _time_block(work: Workload, index: int, call: Call, round_to: int, dense_time: int) -> dict[str, tuple[list[int], list[int]]]:
    """Structure -> (sizes, nanoseconds of the whole block with that many units of it)."""
    timed = {
        group.structure: _time_sizes(work, index, call, group.structure, options(group, round_to))
        for group in groups_of_block(work.model, index, work.blocks[index])
        if group.structure in ("heads", "neurons")
    }
    # more units of one alignment do not take less time; what says so is noise, which the allocation would pick out
    rising = {structure: isotonic_regression(list(ratios.values())).x for structure, ratios in timed.items()}
    # nor is there a block that takes no time at all
    spare = min(1.0, MOST_SAVED / max(MOST_SAVED, sum(1 - own[0] for own in rising.values())))
    found = {structure: np.rint(dense_time * (1 - spare * (1 - own))).astype(int).tolist() for structure, own in rising.items()}
    return {structure: (list(ratios), found[structure]) for structure, ratios in timed.items()}


def _time_sizes(work: Workload, index: int, call: Call, structure: str, allowed: Sequence[int]) -> dict[int, float]:
    """Size -> time over the dense block's, ascending: at most 24 even sizes first, then those between the largest steps."""
    ratios = {allowed[-1]: 1.0}

    def measure(size: int) -> None:
        if size not in ratios:
            found = []
            for _ in range(COPIES):
                work.start_over()
                small, dense = work.run_block(index, call, structure, size), work.run_block(index, call)
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


def shapes_of(model: Any) -> str:
    """The same for models whose weights have the same shapes; else another one."""
    shapes = [[name, list(parameter.shape)] for name, parameter in model.named_parameters()]
    return hashlib.sha256(json.dumps([type(model).__name__, shapes]).encode()).hexdigest()[:24]


def kind_of(model: Any, index: int, block: nn.Module) -> Any:
    """Blocks of one kind take the same time."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return shapes, sliding_window(model.config, index)
