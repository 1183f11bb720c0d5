"""What could be pruned in a model, from its config alone: the groups, what a unit of each costs, how small it can get."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from .budget import Cost, Lengths, in_words, model_cost, options, unit_cost
from .config import PruningConfig
from .currency import Currency
from .families import Group, find_groups
from .inspection import config_of, from_config_alone, lengths_of
from .routers import Mixture, find_mixtures
from .trunk import smallest

SEQ_LEN = 128  # tokens of the text whose multiply-adds are counted
BUDGETS = ("params", "macs")
USUAL = PruningConfig().structures


@dataclass(frozen=True)
class GroupCost:
    """One group and what a unit of it costs."""

    name: str
    """Its block and its place there; whole experts and their neurons share one."""
    structure: str
    """What `structures` calls it."""
    units: int
    fewest: int
    """How few units can stay."""
    params: int
    macs: int
    """For one example of `DryRun.seq_len` tokens."""
    note: str
    """Why dropping a unit changes others too; empty where it does not."""

    @property
    def label(self) -> str:
        """What it is called where blocks are alike."""
        place = self.name.partition(".")[2]
        return f"neurons of {place}" if self.structure == "neurons" != place else place


@dataclass(frozen=True)
class DryRun:
    """What `prune` would find. `str()` is a table, equal blocks in one line; `to_dict()` holds plain JSON values."""

    model: str
    model_type: str
    seq_len: Lengths
    """Of each list of blocks, where there are images: their patches follow from the config."""
    groups: tuple[GroupCost, ...]
    params: int
    """Of the blocks, before pruning."""
    macs: int
    smallest: dict[str, float]
    """Budget -> the smallest share of the blocks' cost that can be kept: with the fewest heads and neurons in every group."""
    smallest_with: dict[str, dict[str, float]]
    """"values", "experts" -> the same, if these are asked for besides; only where they can go."""
    whole: dict[str, str]
    """Those of them that cannot go -> why."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.model} ({self.model_type}): blocks of {self.params:,} parameters, {self.macs:,} multiply-adds for "
            f"{in_words(self.seq_len)}",
            f"{'blocks':<12}{'group':<20}{'units':>8}{'fewest':>8}{'params of one':>16}{'macs of one':>16}",
        ]
        rows: dict[tuple[Any, ...], list[int]] = {}
        for group in self.groups:
            row = group.label, group.units, group.fewest, group.params, group.macs
            rows.setdefault(row, []).append(int(group.name.partition(".")[0]))
        for (label, units, fewest, params, macs), blocks in rows.items():
            lines.append(f"{ranges(blocks):<12}{label:<20}{units:>8,}{fewest:>8}{params:>16,}{macs:>16,}")
        lines.append(f"smallest: {_shares(self.smallest)}")
        lines += [f"with {name} too: {_shares(own)}" for name, own in self.smallest_with.items()]
        lines += [f"no {name}: {why}" for name, why in self.whole.items()]
        lines += sorted({f"{group.label}: {group.note}" for group in self.groups if group.note})
        return "\n".join(lines)


def dry_run(
    model: str,
    revision: str | None = None,
    round_to: int = PruningConfig().round_to,
    seq_len: int = SEQ_LEN,
    *,
    trust_remote_code: bool = False,
) -> DryRun:
    """Build the model without weights and look for its groups. `model`: a Hub id or a folder; only config.json is read.

    Raises:
        ValueError: it cannot be pruned; says what was found and what was not.
    """
    config = config_of(model, revision, trust_remote_code=trust_remote_code)
    built = from_config_alone(config, trust_remote_code=trust_remote_code)
    length = lengths_of(built, seq_len)
    found, whole = find_groups(built), dict[str, str]()
    divided: dict[str, list[Group]] = {}
    for name in ("pairs", "values"):
        try:
            divided[name] = find_groups(built, (name,))
        except ValueError as error:
            whole[name] = str(error).partition(": ")[2]
    mixtures = find_mixtures(built)
    if not mixtures and any(group.experts is not None for group in found):
        whole["experts"] = "their router is more than rows, and perhaps biases, of experts."
    groups = [_cost(built, group, round_to, length) for group in chain(found, *divided.values())]
    total = {budget: model_cost(built, budget, length) for budget in BUDGETS}
    more: dict[str, Sequence[Any]] = {"values": divided.get("values", ()), "experts": mixtures}
    least = {name: _least(built, (*USUAL, name), round_to, length) for name, own in more.items() if own}
    return DryRun(
        model,
        config.model_type,
        length,
        tuple(sorted([*groups, *_experts(mixtures)], key=lambda group: int(group.name.partition(".")[0]))),
        total["params"],
        total["macs"],
        _least(built, USUAL, round_to, length),
        least,
        whole,
    )


def _cost(model: Any, group: Group, round_to: int, seq_len: Lengths) -> GroupCost:
    costs = [unit_cost(group, budget, seq_len) for budget in BUDGETS]
    return GroupCost(group.name, group.structure, group.units, options(group, round_to)[0], costs[0], costs[1], group.inexact)


def _experts(mixtures: list[Mixture]) -> Iterator[GroupCost]:
    """A whole expert takes its row of the router along; a token goes through as many as before, so that no work is saved."""
    for mixture in mixtures:
        parts: list[Any] = [mixture.group.experts, mixture.router]
        params = sum(own.numel() for part in parts for own in part.parameters())
        yield GroupCost(mixture.name, "experts", mixture.units, mixture.fewest, params // mixture.units, 0, "")


def _least(model: Any, structures: tuple[str, ...], round_to: int, seq_len: Lengths) -> dict[str, float]:
    """What the smallest plan there is would keep."""
    dense, found = Cost.of(model, seq_len), dict[str, float]()
    for budget in BUDGETS:
        currency = Currency(model, budget, round_to, structures, seq_len, dense, None)
        small = smallest(tuple(name for name in structures if name == "experts"), currency)
        costs, _ = small.choices(find_groups(small.model, structures))
        cost = model_cost(small.model, budget, seq_len) - sum(own[-1] - min(own) for own in costs.values())
        found[budget] = cost / model_cost(model, budget, seq_len)
    return found


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.2%} of the {name}" for name, share in shares.items())


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)
