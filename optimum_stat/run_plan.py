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
from transformers import AutoConfig

from .budget import Cost, options
from .checkpoint import auto_class
from .currency import Currency
from .data import SEQ_LEN
from .device_speed import Speeds
from .families import Group, find_blocks, find_groups
from .hub import impatient
from .inspection import lengths_of
from .methods.stat import STATConfig
from .run_work import Stage, Work, matrices
from .sources import located


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
            f"{'time on ' + self.device:<40}{'forward passes':>16}{'seconds':>16}",
            *(f"{'  ' + stage.name:<40}{stage.forwards:>16.2f}{stage.seconds:>16,.1f}" for stage in self.stages),
            f"{'  together':<40}{self.forwards:>16.2f}{self.seconds:>16,.1f}",
            f"{'  one forward pass':<40}{1:>16.2f}{self.forward_seconds:>16,.1f}",
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
            "Only runs of our own recipe can be planned from the config alone, on heads and neurons, for params or macs; asked "
            f"are budget={asked.budget!r}, structures={asked.structures!r}, published={asked.published}."
        )
    place, gguf = located(model)
    kwargs |= gguf
    with impatient(place):
        found = AutoConfig.from_pretrained(place, **kwargs)
        kind: Any = auto_class(place, task, kwargs)
    with torch.device("meta"):
        built = kind.from_config(found) if hasattr(kind, "from_config") else kind(found)
    stored = _dtype(dtype or found.dtype)
    built.to(stored)
    groups = find_groups(built, asked.structures)
    blocks = find_blocks(built)
    num_tokens, seq_len = _amount(asked, found, built)
    dense = Cost.of(built, seq_len)
    currency = Currency(built, asked.budget, asked.round_to, asked.structures, seq_len, dense, None)
    kept = uniform(groups, currency, asked)
    where, sizes = device or torch.device("cpu"), compute_module_sizes(built)
    speeds = Speeds.measure(where, stored)
    work = Work(built, groups, kept, num_tokens, seq_len)
    forward_seconds = work.forward / work.pace(speeds)
    statistics = [[matrices(group) for group in groups if group.block == i] for i in range(len(blocks))]
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
        statistics_bytes=max(8 * sum(n * width**2 for n, width in own) + 16 * max(w for _, w in own) ** 2 for own in statistics),
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


def _dtype(asked: Any) -> torch.dtype:
    name = str(asked or torch.float32).removeprefix("torch.")
    stored = getattr(torch, name, None)
    if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
        raise ValueError(f"dtype={name!r} asked; it must be one of torch's, such as float32, bfloat16 or float16.")
    return stored


def _amount(asked: STATConfig, found: Any, built: Any) -> tuple[int, int]:
    """Calibration tokens, and tokens of one example; of a model of images alone, those of an image."""
    longest = getattr(found.get_text_config(), "max_position_embeddings", None) or SEQ_LEN
    seq_len = asked.seq_len or min(SEQ_LEN, longest)
    of_images = lengths_of(built, seq_len)
    seq_len = of_images if isinstance(of_images, int) else seq_len
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
