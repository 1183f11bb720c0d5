"""Measured latency: how long a model's blocks take at every size, on the device at hand."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from scipy.optimize import isotonic_regression
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from .budget import options
from .families import Group, find_blocks, find_groups, groups_of_block, sliding_window
from .probes import device_of
from .slicing import slice_group
from .walk import record_calls

logger = logging.getLogger(__name__)
SIZES = 32  # numbers of neurons that are tried
PAIRS = (7, 100)  # timings of a block beside its dense one: at least, at most
TOLERANCE = 0.1  # between what was predicted and what is measured, before somebody is told
SECONDS = 0.3  # for one size, if so many timings fit into it


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the whole model's forward pass, where the budget was a latency."""

    device: str
    batch_size: int
    seq_len: int
    """Tokens of each example in the batch."""
    dense: float
    asked: float
    predicted: float
    """From the times of the blocks' sizes."""
    measured: float
    """Of the pruned model, right after pruning."""


@dataclass(frozen=True)
class LatencyTable:
    """Wall times of a model and of each group's sizes, in whole nanoseconds."""

    device: str
    """As `describe_device` has it."""
    batch_size: int
    seq_len: int
    total: int
    """The dense model's forward pass over one batch: [batch_size, seq_len] tokens, without padding."""
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
        inputs = _inputs(pruned, self.batch_size, self.seq_len)
        with torch.no_grad():
            measured = median_time(lambda: pruned(**inputs), device_of(pruned))
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
        return Latency(self.device, self.batch_size, self.seq_len, *milliseconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def latency_table(model: Any, round_to: int, batch_size: int, seq_len: int, path: str | None) -> LatencyTable:
    """The table in the file `path`; without one, this machine's from an earlier run, or measured now and remembered.

    Raises:
        ValueError: the file is no table, is that of another device or batch, or does not fit the model.
    """
    if path is not None:
        table = _read(Path(path), model, round_to, batch_size)
        if table.seq_len != seq_len:
            asked = f"{table.seq_len} tokens an example; the mean of the calibration data is {seq_len}"
            logger.warning("The latencies in %s are for %s. The budget counts the former.", path, asked)
        return table
    cached = cache_folder() / f"{_key(model, round_to, batch_size, seq_len)}.json"
    if cached.exists():
        return LatencyTable(**json.loads(cached.read_text()))
    table = measure_table(model, round_to, batch_size, seq_len)
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
def measure_table(model: Any, round_to: int, batch_size: int, seq_len: int) -> LatencyTable:
    """Time the model, and a copy of each kind of block at up to 32 sizes of its heads and of its neurons.

    Every size is timed in turn with the dense block: the median of the ratios is not moved by what else the machine does in
    the meantime, and as in a real model no block finds its weights in the cache. Call it inside `quiet(model)`.
    """
    inputs = _inputs(model, batch_size, seq_len)
    calls = record_calls(model, find_blocks(model), inputs)
    device, blocks = device_of(model), find_blocks(model)
    total = median_time(lambda: model(**inputs), device)
    sizes, times, known = dict[str, list[int]](), dict[str, list[int]](), dict[Any, dict[str, tuple[list[int], list[int]]]]()
    for index, block in enumerate(tqdm(blocks, desc="Timing", unit="block")):
        kind = _kind(model, index, block)
        if kind not in known:
            args, kwargs = calls[index][0]
            share = len(calls[index]) * median_ratio(lambda: block(*args, **kwargs), lambda: model(**inputs), device)  # noqa: B023
            known[kind] = _time_sizes(model, index, lambda b: b(*args, **kwargs), round_to, round(share * total))  # noqa: B023
        for structure, (own_sizes, own_times) in known[kind].items():
            sizes[f"{index}.{structure}"], times[f"{index}.{structure}"] = own_sizes, own_times
    # blocks that together take longer than the model were timed while the machine did something else
    scale = min(1.0, total / sum(times[f"{index}.heads"][-1] for index in range(len(blocks))))
    times = {name: [int(scale * each) for each in own] for name, own in times.items()}
    return LatencyTable(describe_device(model), batch_size, seq_len, total, sizes, times)


def _time_sizes(
    model: Any, index: int, run: Callable[[nn.Module], Any], round_to: int, dense_time: int
) -> dict[str, tuple[list[int], list[int]]]:
    """Structure -> (sizes, nanoseconds of the whole block with that many units of it)."""
    dense, device, found = find_blocks(model)[index], device_of(model), {}
    for at, group in enumerate(groups_of_block(model, index, dense)):
        sizes = sizes_to_try(group, round_to)
        times = []
        for size in tqdm(sizes[:-1], desc=f"Timing {group.structure}", unit="size", leave=False):
            small = copy.deepcopy(dense)
            slice_group(groups_of_block(model, index, small)[at], torch.arange(size))
            times.append(round(dense_time * median_ratio(lambda: run(small), lambda: run(dense), device)))  # noqa: B023
        # more units of one alignment do not take less time; what says so is noise, which the allocation would pick out
        found[group.structure] = sizes, np.rint(isotonic_regression([*times, dense_time]).x).astype(int).tolist()
    return found


def sizes_to_try(group: Group, round_to: int) -> list[int]:
    """All numbers of heads; at most 32 numbers of neurons, evenly spaced multiples of `round_to`, and the dense one."""
    return options(group, round_to * max(1, -(-group.units // (SIZES * round_to))))


def describe_device(model: nn.Module) -> str:
    """What the times depend on: the device, the number of threads on a CPU, and the model's dtype."""
    device, dtype = device_of(model), str(next(model.parameters()).dtype).removeprefix("torch.")
    on_cpu = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{device.type} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else on_cpu}), {dtype}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _inputs(model: Any, batch_size: int, seq_len: int) -> dict[str, Tensor]:
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocab_size, (batch_size, seq_len), generator=torch.Generator().manual_seed(0))
    return {name: value.to(device_of(model)) for name, value in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)))}


def median_time(run: Callable[[], Any], device: torch.device) -> int:
    """Median nanoseconds of a call, after two that do not count."""
    once = max(_timed(run, device), _timed(run, device))
    times = [_timed(run, device) for _ in range(_repeats(once))]
    return round(statistics.median(times))


def median_ratio(run: Callable[[], Any], beside: Callable[[], Any], device: torch.device) -> float:
    """Median of the ratios of their times, taken in turn."""
    once = max(_timed(run, device) + _timed(beside, device) for _ in range(2))
    pairs = [(_timed(beside, device), _timed(run, device)) for _ in range(_repeats(once))]
    return statistics.median(own / other for other, own in pairs)


def _repeats(nanoseconds: int) -> int:
    fewest, most = PAIRS
    return max(fewest, min(most, int(SECONDS * 1e9 / max(1, nanoseconds))))


def _timed(run: Callable[[], Any], device: torch.device) -> int:
    start = time.perf_counter_ns()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns() - start


def _kind(model: Any, index: int, block: nn.Module) -> Any:
    """Blocks of one kind take the same time."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return shapes, sliding_window(model.config, index)


def _key(model: Any, round_to: int, batch_size: int, seq_len: int) -> str:
    kinds = [repr(_kind(model, index, block)) for index, block in enumerate(find_blocks(model))]
    versions = [metadata.version(name) for name in ("optimum-stat", "torch", "transformers")]
    attention = getattr(model.config, "_attn_implementation", None)
    what = [type(model).__name__, attention, describe_device(model), round_to, batch_size, seq_len, kinds, versions]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]


def _read(path: Path, model: Any, round_to: int, batch_size: int) -> LatencyTable:
    """A table from a file of its own, or from the recipe of a model that was pruned with it."""
    try:
        values = json.loads(path.read_text())
        table = LatencyTable(**(values.get("latency_table") or values))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"latency_table={str(path)!r} asked, but it holds no table of latencies: {error}") from error
    here = describe_device(model)
    if table.device != here:
        gone = "" if torch.cuda.is_available() or not table.device.startswith("cuda") else ", which this machine does not have"
        raise ValueError(
            f"The latencies in {path} were measured on {table.device}{gone}; the model is on {here}. Times of one device say "
            "nothing about another's: leave latency_table out to measure here, or prune where they were measured."
        )
    if table.batch_size != batch_size:
        raise ValueError(f"The latencies in {path} are of batches of {table.batch_size}, but {batch_size} is asked.")
    wanted = {group.name: sizes_to_try(group, round_to) for group in find_groups(model)}
    wrong = [name for name in {**wanted, **table.sizes} if wanted.get(name) != list(table.sizes.get(name, ()))]
    if wrong or any(len(table.times.get(name, ())) != len(sizes) for name, sizes in wanted.items()):
        name = (wrong or list(wanted))[0]
        raise ValueError(
            f"The latencies in {path} are another model's: of {name} it has the sizes {list(table.sizes.get(name, ()))}, and "
            f"{wanted.get(name)} are wanted. Leave latency_table out to measure them."
        )
    return table
