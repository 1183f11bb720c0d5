"""The LLM Surgeon's published costs, threshold and updates, on coupled units.

The paper removes rows and columns of each layer on their own. A neuron whose column of the consumer is removed no longer gets a
gradient, so its producers' rows are dead in the next shot and go for free; and one whose row of a producer is removed is always
zero, so that its column goes for free (appendix of 2312.17244; `dead` rows and columns in the authors' code). On units that go as
a whole this means: a unit costs what its cheapest side costs, only that side's layer is updated, and all of it is removed.

Differences from the source: dead sides go at once instead of in the next shot; query and key rows, which alone do not silence a
head, have no cost of their own; a bias is updated as the weight of a constant input, but not removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..correction import set_bias
from ..families import Group, weight
from ..linalg import sums_of_what_goes
from ..offload import brought_in
from ..slicing import Plan, consumer_columns, set_weight
from .surgeon_curvature import Factors
from .surgeon_kfac import column_costs, damped_inverse, remove_columns, remove_rows, row_costs


@dataclass(frozen=True)
class _Side:
    """A layer whose rows or columns, removed, silence a unit."""

    linear: nn.Module
    lines: Tensor
    """Its rows (producers) or columns (consumer) that belong to all units, in order: [units, lines per unit]."""


def layers(group: Group) -> list[nn.Module]:
    """The layers whose factors are needed: the consumer, and every producer that alone silences a unit."""
    return [side.linear for side in _sides(group)]


def rank(group: Group, factors: Mapping[nn.Module, Factors], damping: float) -> tuple[Tensor, Tensor]:
    """Units by their own cost, and the sums of these costs."""
    cost = _costs(group, factors, damping).min(0).values.clamp_min(0)
    order = cost.argsort(descending=True, stable=True)
    return order, sums_of_what_goes(cost[order])


@torch.no_grad()
def update(
    stats: Iterable[tuple[Group, Mapping[nn.Module, Factors]]], plan: Plan, damping: float, max_correlate: int = 0
) -> None:
    """Correct, in every group, the layer on whose side each unit goes; nothing changes before all has been measured."""
    waiting = []
    for group, factors in stats:
        gone = torch.ones(group.units, dtype=torch.bool).index_fill_(0, plan[group.name].cpu(), False)
        cheapest = _costs(group, factors, damping).argmin(0).cpu()
        for index, side in enumerate(_sides(group)):
            lines = side.lines[gone & (cheapest == index)].flatten()
            if len(lines):
                own = factors[side.linear]
                waiting.append((side.linear, _updated(side.linear, lines, own, damping, max_correlate, consumer=index == 0)))
    for linear, (value, bias) in waiting:
        with brought_in(linear):
            set_weight(linear, value)
            if bias is not None:
                set_bias(linear, bias)


def _sides(group: Group) -> list[_Side]:
    every = torch.arange(group.units)
    sides = [_Side(group.consumer, consumer_columns(group, every).view(group.units, -1))]
    if group.shares_key_value:
        return sides  # the value serves all units
    # of heads, the values; of neurons, each; they stand last in what makes more than them
    last = 1 if group.structure == "neurons" else group.width // group.query_heads
    silencing = group.producers[-1:] if group.structure == "heads" else group.producers
    return [*sides, *(_Side(producer.linear, producer.rows(group.units)[:, -last:]) for producer in silencing)]


def _costs(group: Group, factors: Mapping[nn.Module, Factors], damping: float) -> Tensor:
    """What each unit costs on each side: [sides, units], the consumer first."""
    costs = []
    for index, side in enumerate(_sides(group)):
        value, a = _with_bias(side.linear, factors[side.linear])
        lines, block = side.lines.flatten().to(value.device), side.lines.shape[1]
        if index == 0:
            inverse = damped_inverse(a, damping)[lines][:, lines]
            costs.append(column_costs(value[:, lines], factors[side.linear].gradients, inverse, block))
        else:
            inverse = damped_inverse(factors[side.linear].gradients, damping)[lines][:, lines]
            costs.append(row_costs(value[lines], a, inverse, block))
    return torch.stack(costs)


def _updated(
    linear: nn.Module, lines: Tensor, factors: Factors, damping: float, max_correlate: int, consumer: bool
) -> tuple[Tensor, Tensor | None]:
    """(weight, bias or None) without `lines`, of the layer's old shapes."""
    value, a = _with_bias(linear, factors)
    lines = lines.to(value.device)
    if consumer:
        value = remove_columns(value, damped_inverse(a, damping), lines, max_correlate)
    else:
        value = remove_rows(value, damped_inverse(factors.gradients, damping), lines, max_correlate)
    value = value.to(weight(linear).dtype)
    return (value[:, :-1], value[:, -1]) if isinstance(linear.bias, Tensor) else (value, None)


def _with_bias(linear: nn.Module, factors: Factors) -> tuple[Tensor, Tensor]:
    """(weight, A) in float64, with the bias as last column where there is one."""
    value = weight(linear).double()
    if isinstance(linear.bias, Tensor):
        return torch.cat([value, linear.bias.double()[:, None]], dim=1), factors.inputs
    return value, factors.inputs[:-1, :-1]
