"""Measure and rank, block by block; what an earlier run has found is not measured again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .budget import Ranking
from .data import Batches
from .families import Group

if TYPE_CHECKING:
    from .pruner import Pruner


def survey(pruner: Pruner[Any], groups: list[Group], batches: Batches) -> Ranking:
    """The ranking of all groups. A block's is written down as soon as it is known, before the next is measured.

    `rank` sees the groups of one block at a time, and once none, for the class of its result, whose fields are all mappings from
    groups' names to tensors: what it compares with other blocks it has to leave to `allocate`.
    """
    journal = pruner.journal
    blocks = dict.fromkeys(group.block for group in groups)
    found = {block: journal.recall(f"ranking {block}") for block in blocks}
    rest = [group for group in groups if found[group.block] is None]
    stats = iter(pruner.measure(rest, batches)) if rest else iter(())
    for first in stats:
        own = [group for group in rest if group.block == first[0].block]
        # no further than the block's own groups: what measures the next block would take this one's weights away
        part = _tensors(pruner.rank(own, chain([first], islice(stats, len(own) - 1))))
        journal.keep(f"ranking {first[0].block}", part.items())
        found[first[0].block] = part
    return _joined(pruner.rank([], ()), groups, [part for part in found.values() if part is not None])


def _tensors(ranking: Ranking) -> dict[str, Tensor]:
    names = [field.name for field in dataclasses.fields(ranking)]
    return {f"{name} {group}": value for name in names for group, value in getattr(ranking, name).items()}


def _joined(like: Ranking, groups: Sequence[Group], parts: Sequence[dict[str, Tensor]]) -> Ranking:
    """All parts as one ranking of the class of `like`, its groups in the order of the forward pass."""
    every = {key: value for part in parts for key, value in part.items()}
    fields = [field.name for field in dataclasses.fields(like)]
    keys = {name: [(group.name, f"{name} {group.name}") for group in groups] for name in fields}
    return type(like)(**{name: {group: every[key] for group, key in keys[name] if key in every} for name in fields})
