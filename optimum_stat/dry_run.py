"""What could be pruned in a model, from its config alone: the groups, what a unit of each costs, how small it can get."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from .budget import model_cost, options, unit_cost
from .config import PruningConfig
from .families import find_groups

SEQ_LEN = 128  # tokens of the example whose multiply-adds are counted
BUDGETS = ("params", "macs")


@dataclass(frozen=True)
class GroupCost:
    """One group and what a unit of it costs."""

    name: str
    units: int
    fewest: int
    """How few units can stay."""
    params: int
    macs: int
    """For one example of `DryRun.seq_len` tokens."""
    note: str
    """Why dropping a unit changes others too; empty where it does not."""


@dataclass(frozen=True)
class DryRun:
    """What `prune` would find. `str()` is a table, equal blocks in one line; `to_dict()` holds plain JSON values."""

    model: str
    model_type: str
    seq_len: int
    groups: tuple[GroupCost, ...]
    params: int
    """Of the blocks, before pruning."""
    macs: int
    smallest: dict[str, float]
    """Budget -> the smallest share of the blocks' cost that can be kept: with the fewest units in every group."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.model} ({self.model_type}): blocks of {self.params:,} parameters, {self.macs:,} multiply-adds for "
            f"{self.seq_len} tokens",
            f"{'blocks':<12}{'group':<10}{'units':>8}{'fewest':>8}{'params of one':>16}{'macs of one':>16}",
        ]
        rows: dict[tuple[Any, ...], list[int]] = {}
        for group in self.groups:
            block, _, structure = group.name.partition(".")
            rows.setdefault((structure, group.units, group.fewest, group.params, group.macs), []).append(int(block))
        for (structure, units, fewest, params, macs), blocks in rows.items():
            lines.append(f"{ranges(blocks):<12}{structure:<10}{units:>8,}{fewest:>8}{params:>16,}{macs:>16,}")
        smallest = ", ".join(f"{share:.2%} of the {name}" for name, share in self.smallest.items())
        notes = sorted({f"{group.name.partition('.')[2]}: {group.note}" for group in self.groups if group.note})
        return "\n".join([*lines, f"smallest: {smallest}", *notes])


def dry_run(model: str, revision: str | None = None, round_to: int = PruningConfig().round_to, seq_len: int = SEQ_LEN) -> DryRun:
    """Build the model without weights and look for its groups. `model`: a Hub id or a folder; only config.json is read.

    Raises:
        ValueError: it cannot be pruned; says what was found and what was not.
    """
    config = AutoConfig.from_pretrained(model, revision=revision)
    with torch.device("meta"):
        built = AutoModel.from_config(config)
    found = find_groups(built)
    groups = tuple(
        GroupCost(
            name=group.name,
            units=group.units,
            fewest=options(group, round_to)[0],
            params=unit_cost(built, group, "params", seq_len),
            macs=unit_cost(built, group, "macs", seq_len),
            note=group.inexact,
        )
        for group in found
    )
    total = {budget: model_cost(built, budget, seq_len) for budget in BUDGETS}
    saved = {budget: sum((each.units - each.fewest) * getattr(each, budget) for each in groups) for budget in BUDGETS}
    smallest = {budget: 1 - saved[budget] / total[budget] for budget in BUDGETS}
    return DryRun(model, config.model_type, seq_len, groups, total["params"], total["macs"], smallest)


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)
