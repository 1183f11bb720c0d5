"""What a run of STAT would take, before anything is loaded or read: sizes, memory, time. From config.json alone.

Nothing is known of the data yet, so every group is taken to keep the same share. What each group would really keep, and the
error that is expected of it, is what `Pruner.plan` says, from the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import compute_module_sizes, infer_auto_device_map
from torch import nn
from transformers import AutoConfig

from .budget import Cost, options, unit_cost
from .checkpoint import auto_class
from .currency import Currency
from .data import SEQ_LEN
from .device_speed import Speeds
from .families import Group, find_blocks, find_groups, weight
from .gradients import FISHER_TOKENS
from .methods.stat import STATConfig


@dataclass(frozen=True)
class Stage:
    """One part of the work, for all blocks together."""

    name: str
    macs: float
    """Multiply-adds, of whatever kind."""
    forwards: float
    """In forward passes of the dense model over the calibration data, if all multiply-adds took the same time."""
    seconds: float
    """On this device, from speeds that were measured now."""


@dataclass(frozen=True)
class RunPlan:
    """What a run would take. `str()` is for people; `to_dict()` holds plain JSON values."""

    model: str
    model_type: str
    dtype: str
    keep: float
    budget: str
    num_tokens: int
    seq_len: int
    dense: Cost
    pruned: Cost
    """With the same share of every group."""
    bytes_before: int
    bytes_after: int
    statistics_bytes: int
    """Of the largest block: its Gram matrices, and what the elimination works with."""
    activation_bytes: int
    """What enters a block, for all calibration data."""
    block_bytes: int
    """Weights of the largest block."""
    resident_bytes: int
    """Weights outside the blocks: all that stays in memory of a model whose blocks are offloaded."""
    stages: tuple[Stage, ...]
    forward_seconds: float
    """One forward pass over the calibration data."""
    device: str
    placement: Mapping[str, int]
    """Where the weights would lie under `max_memory`, in bytes: "cpu", "disk", or the number of a GPU."""

    @property
    def forwards(self) -> float:
        """All stages, in forward passes."""
        return sum(stage.forwards for stage in self.stages)

    @property
    def seconds(self) -> float:
        """All stages, on this device."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {**dataclasses.asdict(self), "forwards": self.forwards, "seconds": self.seconds}

    def __str__(self) -> str:
        before, after = self.dense, self.pruned
        offloaded = self.resident_bytes + self.block_bytes
        together = offloaded + self.statistics_bytes + self.activation_bytes
        lines = [
            f"{self.model} ({self.model_type}, {self.dtype}), {self.keep:.0%} of the blocks' {self.budget}, "
            f"{self.num_tokens:,} tokens in examples of {self.seq_len}",
            f"{'':<26}{'before':>20}{'after':>20}",
            f"{'parameters':<26}{before.params:>20,}{after.params:>20,}",
            f"{'of the blocks':<26}{before.block_params:>20,}{after.block_params:>20,}",
            f"{'MACs of an example':<26}{before.block_macs:>20,}{after.block_macs:>20,}",
            f"{'weights':<26}{_size(self.bytes_before):>20}{_size(self.bytes_after):>20}",
            f"memory: {_size(self.bytes_before)} of weights, {_size(self.statistics_bytes)} of statistics (largest block), "
            f"{_size(self.activation_bytes)} of activations; with the blocks offloaded "
            f"{_size(offloaded)} of weights, {_size(together)} in all",
            f"{'time on ' + self.device:<40}{'forward passes':>16}{'seconds':>12}",
            *(f"{'  ' + stage.name:<40}{stage.forwards:>16.2f}{stage.seconds:>12,.1f}" for stage in self.stages),
            f"{'  together':<40}{self.forwards:>16.2f}{self.seconds:>12,.1f}",
            f"{'  one forward pass':<40}{1:>16.2f}{self.forward_seconds:>12,.1f}",
        ]
        if self.placement:
            parts = ", ".join(f"{_size(size)} on {_place(place)}" for place, size in self.placement.items())
            lines.append(f"weights with this max_memory: {parts}")
        return "\n".join(lines)


def plan_run(
    model: str,
    config: STATConfig | None = None,
    *,
    task: str | None = None,
    dtype: str | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> RunPlan:
    """What pruning `model`, a Hub id or a folder, with `config` would take. Reads config.json; times a few products on `device`.

    kwargs: revision, trust_remote_code, ..., as for `AutoConfig.from_pretrained`.

    Raises:
        ValueError: the model cannot be pruned, or not as small as asked; or the plan of the published algorithm is asked for.
    """
    asked = config or STATConfig()
    if asked.published or asked.budget not in ("params", "macs") or not {*asked.structures} <= {"heads", "neurons"}:
        raise ValueError(
            "Only runs of our own recipe can be planned from the config alone, on heads and neurons, for params or macs."
        )
    found = AutoConfig.from_pretrained(model, **kwargs)
    kind: Any = auto_class(model, task, kwargs)
    with torch.device("meta"):
        built = kind.from_config(found) if hasattr(kind, "from_config") else kind(found)
    stored = _dtype(dtype or found.dtype)
    built.to(stored)
    groups = find_groups(built, asked.structures)
    blocks = find_blocks(built)
    num_tokens, seq_len = _amount(asked, found)
    dense = Cost.of(built, seq_len)
    currency = Currency(built, asked.budget, asked.round_to, asked.structures, seq_len, dense, None)
    kept = uniform(groups, currency, asked)
    where, sizes = device or torch.device("cpu"), compute_module_sizes(built)
    speeds = Speeds.measure(where, stored)
    work = _Work(built, groups, kept, num_tokens, seq_len)
    forward_seconds = work.forward / speeds.forward
    statistics = [[weight(group.consumer).shape[1] for group in groups if group.block == i] for i in range(len(blocks))]
    block_bytes = [stored.itemsize * sum(p.numel() for p in block.parameters()) for block in blocks]
    return RunPlan(
        model=model,
        model_type=found.model_type,
        dtype=str(stored).removeprefix("torch."),
        keep=asked.keep,
        budget=asked.budget,
        num_tokens=num_tokens,
        seq_len=seq_len,
        dense=dense,
        pruned=(pruned := currency.cost_of(kept)),
        bytes_before=stored.itemsize * dense.params,
        bytes_after=stored.itemsize * pruned.params,
        # float64 sums, and four matrices of the widest in single precision: a copy, damped, its factor, its inverse
        statistics_bytes=max(8 * sum(width**2 for width in own) + 16 * max(own) ** 2 for own in statistics),
        activation_bytes=num_tokens * found.get_text_config().hidden_size * stored.itemsize,
        block_bytes=max(block_bytes),
        resident_bytes=stored.itemsize * dense.params - sum(block_bytes),
        stages=tuple(work.stages(speeds, asked.metric)),
        forward_seconds=forward_seconds,
        device=speeds.device,
        placement=_placement(built, sizes, max_memory, stored),
    )


def uniform(groups: Sequence[Group], currency: Currency, config: STATConfig) -> dict[str, int]:
    """The same share of every group, the largest that is within the budget."""
    limit, costs = currency.limit(config.keep), currency.unit_costs(groups)
    sizes = {group.name: options(group, config.round_to) for group in groups}

    def at(share: float) -> dict[str, int]:
        return {g.name: max([size for size in sizes[g.name] if size <= share * g.units] or sizes[g.name][:1]) for g in groups}

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        within = sum(costs[name] * count for name, count in at(middle).items()) <= limit
        low, high = (middle, high) if within else (low, middle)
    return at(high) if sum(costs[name] * count for name, count in at(high).items()) <= limit else at(low)


@dataclass(frozen=True)
class _Work:
    """Multiply-adds of everything that a run does; `T` tokens, `w` columns of a consumer, `k` that stay, `o` outputs."""

    model: nn.Module
    groups: Sequence[Group]
    kept: Mapping[str, int]
    num_tokens: int
    seq_len: int

    @property
    def head(self) -> float:
        """What stands on top of the blocks, over all data."""
        on_top = self.model.get_output_embeddings()  # type: ignore[operator]
        return 0.0 if on_top is None else float(weight(on_top).numel()) * self.num_tokens

    @property
    def blocks(self) -> float:
        return sum(self._run(group, group.units) for group in self.groups)

    @property
    def forward(self) -> float:
        """One forward pass of the dense model over all data."""
        return self.blocks + self.head

    def stages(self, speeds: Speeds, metric: str) -> list[Stage]:
        grams = sum(self.num_tokens * self._wide(group) ** 2 * 0.58 for group in self.groups)  # six panels of the triangle
        found = []
        if metric == "fisher":
            share = min(1.0, FISHER_TOKENS / self.num_tokens)
            found.append(self._stage("gradients", 2 * share * self.forward, share * self.forward, speeds))
        found.append(self._stage("forward pass", 0, self.blocks, speeds))
        found.append(self._stage("Gram matrices", grams, 0, speeds, speeds.gram))
        eliminated = sum(self._elimination(group) for group in self.groups)
        seconds = eliminated / speeds.elimination + sum(group.units for group in self.groups) * speeds.unit
        found.append(Stage("choosing", eliminated, eliminated / self.forward, seconds))
        again, moments, solves = map(sum, zip(*(self._correction(group) for group in self.groups), strict=True))
        found.append(self._stage("forward passes of the corrections", 0, again, speeds))
        found.append(self._stage("moments of the corrections", moments, 0, speeds, speeds.gram))
        return [*found, self._stage("solving", solves, 0, speeds, speeds.factor)]

    def _stage(self, name: str, other: float, forward: float, speeds: Speeds, speed: float | None = None) -> Stage:
        seconds = forward / speeds.forward + other / (speed or speeds.forward)
        return Stage(name, other + forward, (other + forward) / self.forward, seconds)

    def _run(self, group: Group, units: int) -> float:
        return unit_cost(self.model, group, "macs", self.seq_len) * units * self.num_tokens / self.seq_len

    @staticmethod
    def _wide(group: Group) -> int:
        return int(weight(group.consumer).shape[1])

    def _elimination(self, group: Group) -> float:
        """The inverse (`w^3`), and 32 units at a time what each removal changes in it and in the rows."""
        wide, out = self._wide(group), int(weight(group.consumer).shape[0])
        return wide**3 * 1.6 + 0.6 * wide**2 * out

    def _correction(self, group: Group) -> tuple[float, float, float]:
        """(forward passes up to this consumer and, behind a block's last one, to the next block; moments; solving)."""
        count, out = self.kept[group.name], int(weight(group.consumer).shape[0])
        wide, left = self._wide(group), count * group.width
        own = [each for each in self.groups if each.block == group.block]
        before = sum(self._run(each, self.kept[each.name]) for each in own[: own.index(group)])
        again = before + self._run(group, group.units) - self.num_tokens * wide * out
        if group is own[-1]:
            again += sum(self._run(each, self.kept[each.name]) for each in own)
        moments = self.num_tokens * (0.58 * left**2 + (wide - left) * out + left * out)
        return again, moments, left**3 / 3 + left**2 * out


def _dtype(asked: Any) -> torch.dtype:
    name = str(asked or torch.float32).removeprefix("torch.")
    stored = getattr(torch, name, None)
    if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
        raise ValueError(f"dtype={name!r} asked; it must be one of torch's, such as float32, bfloat16 or float16.")
    return stored


def _amount(asked: STATConfig, found: Any) -> tuple[int, int]:
    """Calibration tokens, and tokens of one example."""
    longest = getattr(found.get_text_config(), "max_position_embeddings", None) or SEQ_LEN
    seq_len = asked.seq_len or min(SEQ_LEN, longest)
    bounds = [asked.num_tokens, asked.max_examples and asked.max_examples * seq_len]
    known = [bound for bound in bounds if bound]
    if not known:
        raise ValueError("num_tokens=None asked: a plan from the config alone needs to know how many tokens there will be.")
    return min(known), seq_len


def _placement(
    model: Any, sizes: Mapping[str, int], max_memory: Mapping[int | str, int | str] | None, dtype: torch.dtype
) -> dict[str, int]:
    if not max_memory:
        return {}
    placed: dict[str, int] = {}
    whole = list(getattr(model, "_no_split_modules", None) or [])
    for name, where in infer_auto_device_map(model, dict(max_memory), no_split_module_classes=whole, dtype=dtype).items():
        placed[str(where)] = placed.get(str(where), 0) + int(sizes[name])
    return placed


def _place(place: str) -> str:
    return f"GPU {place}" if place.isdigit() else "the disk" if place == "disk" else f"the {place.upper()}"


def _size(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
