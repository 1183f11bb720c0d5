"""What every part of a model costs as a function of the width of its residual stream: exactly linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .budget import Lengths, block_fixed, model_cost, unit_cost
from .families import Group, find_blocks, find_groups, weight
from .stream import without_weights

Line = tuple[float, float]
"""Intercept and slope."""


@dataclass(frozen=True)
class TrunkCosts:
    """`sum over blocks that stay of (fixed_b(h) + sum over its groups of unit_g(h) k_g)`, h the width and k the units kept."""

    width: int
    total: float
    """Of the dense model."""
    fixed: tuple[Line, ...]
    """Of each block, what belongs to no unit."""
    unit: Mapping[str, Line]
    """Of each group, what one unit costs."""
    block: Mapping[str, int]
    """Of each group, where it stands."""

    @classmethod
    def of(cls, model: Any, groups: Sequence[Group], budget: str, seq_len: Lengths) -> TrunkCosts:
        """Of `groups` under a budget of "params" or "macs"; from two widths."""
        every, width = list(range(len(find_blocks(model)))), int(weight(find_groups(model)[0].consumer).shape[0])
        widths = width, 1
        copies = [model, without_weights(model, every, torch.arange(1))]
        at = [{g.name: unit_cost(g, budget, seq_len) for g in find_groups(one)} for one in copies]
        rest = [block_fixed(one, budget, seq_len) for one in copies]
        lines = {name: _line(widths, at[0][name], at[1][name]) for name in at[0]}
        fixed = [_line(widths, own, other) for own, other in zip(*rest, strict=True)]
        chosen = {group.name for group in groups}
        for group in find_groups(model):  # what may not go is fixed
            if group.name not in chosen:
                fixed[group.block] = _sum(fixed[group.block], lines[group.name], group.units)
        return cls(
            width,
            float(model_cost(model, budget, seq_len)),
            tuple(fixed),
            {name: lines[name] for name in chosen},
            {group.name: group.block for group in groups},
        )

    def spent(self, counts: Mapping[str, Any], blocks: Any, width: Any) -> Any:
        """With `counts` units of every group, each block as often as `blocks` says, and a stream of `width`; all may be soft."""
        parts = [a + b * width for a, b in self.fixed]
        for name, count in counts.items():
            a, b = self.unit[name]
            parts[self.block[name]] = parts[self.block[name]] + (a + b * width) * count
        return sum(part * blocks[index] for index, part in enumerate(parts))


def _line(at: tuple[int, int], first: float, second: float) -> Line:
    slope = (first - second) / (at[0] - at[1])
    return second - slope * at[1], slope


def _sum(one: Line, other: Line, times: int) -> Line:
    return one[0] + times * other[0], one[1] + times * other[1]
