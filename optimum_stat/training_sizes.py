"""From what masks say of the units to the units that stay, at a share of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .budget import allocate
from .linalg import sums_of_what_goes
from .slicing import Plan


@dataclass(frozen=True)
class Size:
    """What the masks have to come down to."""

    keep: float
    costs: Mapping[str, Sequence[float]]
    """Group name -> what each of `sizes` costs."""
    sizes: Mapping[str, Sequence[int]]
    limit: Callable[[float], float]
    """From a share of the dense model to what the kept units may cost together."""

    @property
    def unit_costs(self) -> dict[str, float]:
        """What one unit of each group costs."""
        return {name: own[-1] / self.sizes[name][-1] for name, own in self.costs.items()}

    def best(self, scores: Mapping[str, Tensor], share: float) -> Plan:
        """The units of the highest scores, one threshold for all groups, that fit into `share`; never none of a group.

        With errors of `cost * score`, error saved per cost is the score: so the allocation is a threshold, and takes care of
        floors, of steps of several units, and of what the threshold leaves unspent.
        """
        costs, order = self.unit_costs, orders(scores)
        error = {name: sums_of_what_goes(own[order[name]]) * costs[name] for name, own in scores.items()}
        return first(order, allocate(error, self.costs, self.sizes, self.limit(share)))


def orders(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each group's units, best first."""
    return {name: own.argsort(descending=True, stable=True) for name, own in scores.items()}


def first(order: Mapping[str, Tensor], kept: Mapping[str, int]) -> Plan:
    """The first `kept` units of each order, in their old order."""
    return {name: order[name][:count].sort().values for name, count in kept.items()}
