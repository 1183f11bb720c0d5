"""How many units every group keeps, exactly: the multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from .budget import fill

BINS = 1 << 16  # of the budget, where costs have no common measure


def allocate_exactly(
    error: Mapping[str, Tensor],
    costs: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Sequence[int]],
    limit: float,
) -> dict[str, int]:
    """Units to keep per group: the minimum of `sum error[g][k_g]` subject to `sum cost_g(k_g) <= limit`, over all choices.

    error: [units + 1] per group; sizes: the k to choose from; costs: one for each of these, of any shape: measured times
    have steps, and more units may even be faster. Dynamic programming over the budget, `least[b]` = the least error of the
    groups so far within b; `sum of choices * budget` steps of it. Exact where the costs are whole multiples of one measure and
    the budget holds at most 2^20 of it; else costs are rounded up to 1/65536 of the budget, so the result is never above it.

    Raises:
        ValueError: even the cheapest sizes cost more than the limit.
    """
    base = {name: min(values) for name, values in costs.items()}
    spare = limit - math.fsum(base.values())
    if spare < 0:
        raise ValueError(
            f"The budget leaves {limit:,.6g} for heads and neurons, but the smallest plan costs {limit - spare:,.6g}. Keep more."
        )
    extra = {name: np.asarray(values, dtype=np.float64) - base[name] for name, values in costs.items()}
    measure = _measure(list(extra.values()), spare)
    bins = int(spare / measure)
    steps = {name: np.minimum(np.ceil(cost / measure), bins + 1).astype(np.int64) for name, cost in extra.items()}
    lost = {name: error[name].double().cpu().numpy()[np.asarray(sizes[name])] for name in sizes}
    least = [np.zeros(bins + 1)]
    for name in sizes:
        least.append(_with_group(least[-1], steps[name], lost[name]))
    at, left = {}, bins
    for name in reversed(list(sizes)):
        least.pop()
        at[name] = _choice(least[-1], steps[name], lost[name], left)
        left -= int(steps[name][at[name]])
    return fill(error, costs, sizes, limit, at)  # units of no worth at all, and what was lost to rounding


def _measure(costs: Sequence[np.ndarray], spare: float) -> float:
    """The common measure of all costs if it is coarse enough, else a 65536th of the budget."""
    together = np.concatenate(costs)
    if bool((together == np.round(together)).all()):
        common = float(np.gcd.reduce(together.astype(np.int64)))
        if common and spare / common <= 16 * BINS:
            return common
    return max(spare, math.ulp(1.0)) / BINS


def _with_group(least: np.ndarray, steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The least error within every budget once one more group has chosen.

    What it chooses is looked up later, for the one budget that counts: four times as fast as noting it for each.
    """
    best, total = np.full(len(least), np.inf), np.empty(len(least))
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        if step < len(least):
            within = np.add(least[: len(least) - step], value, out=total[step:])
            np.minimum(best[step:], within, out=best[step:])
    return best


def _choice(least: np.ndarray, steps: np.ndarray, values: np.ndarray, budget: int) -> int:
    """What a group chooses within `budget`, behind groups that leave `least`; of equals the one that loses most itself."""
    order = np.argsort(-values, kind="stable")
    order = order[steps[order] <= budget]
    return int(order[(least[budget - steps[order]] + values[order]).argmin()])
