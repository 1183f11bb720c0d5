"""The exact allocation, against every plan there is."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_stat.budget import allocate
from optimum_stat.knapsack import BINS, allocate_exactly

Problem = tuple[dict[str, Tensor], dict[str, list[float]], dict[str, list[int]]]


@st.composite
def problems(draw: st.DrawFn, whole: bool = True) -> Problem:
    """Up to four groups; non-increasing errors, last entry 0; costs of any shape: steps, flats, larger sizes that cost less."""
    error, costs, sizes = {}, {}, {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        units = draw(st.integers(1, 6))
        drops = draw(st.lists(st.floats(0, 100), min_size=units, max_size=units))
        error[name] = torch.tensor([*[*itertools.accumulate(drops[::-1])][::-1], 0.0], dtype=torch.float64)
        sizes[name] = sorted({*draw(st.sets(st.integers(1, units))), units})
        cost = st.integers(0, 40) if whole else st.floats(0, 40)
        costs[name] = [draw(cost) for _ in sizes[name]]
    return error, costs, sizes


def cost(problem: Problem, kept: dict[str, int]) -> Fraction:
    """Exact: in floating point 1 + 1e-300 would be no more than 1."""
    return sum((Fraction(problem[1][name][problem[2][name].index(k)]) for name, k in kept.items()), Fraction())


def loss(problem: Problem, kept: dict[str, int]) -> float:
    return sum(float(problem[0][name][k]) for name, k in kept.items())


def best(problem: Problem, limit: float | Fraction) -> float:
    plans = (dict(zip(problem[2], sizes, strict=True)) for sizes in itertools.product(*problem[2].values()))
    return min(loss(problem, plan) for plan in plans if cost(problem, plan) <= limit)


def between(problem: Problem, share: float) -> Fraction:
    smallest, largest = (sum(Fraction(pick(own)) for own in problem[1].values()) for pick in (min, max))
    return smallest + Fraction(share) * (largest - smallest)


def rounded_up(limit: Fraction) -> float:
    return near if (near := float(limit)) >= limit else math.nextafter(near, math.inf)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(problems(), st.floats(0, 1))
def test_no_plan_within_the_budget_is_better(problem: Problem, share: float) -> None:
    limit = rounded_up(between(problem, share))
    kept = allocate_exactly(*problem, limit)
    assert all(kept[name] in sizes for name, sizes in problem[2].items())
    assert cost(problem, kept) <= limit
    assert loss(problem, kept) == pytest.approx(best(problem, limit), rel=1e-9, abs=1e-9)
    for name, sizes in problem[2].items():  # not even a step that saves nothing is left out
        now = sizes.index(kept[name])
        steps = [each - problem[1][name][now] for each in problem[1][name][now + 1 :]]
        assert all(step > limit - cost(problem, kept) for step in steps), f"{name} could have kept more"


@settings(max_examples=200, derandomize=True, deadline=None)
@given(problems(whole=False), st.floats(0, 1))
def test_costs_without_a_common_measure_are_never_exceeded_and_nearly_exact(problem: Problem, share: float) -> None:
    limit = rounded_up(between(problem, share))
    kept = allocate_exactly(*problem, limit)
    assert cost(problem, kept) <= limit
    smallest = between(problem, 0)
    lost_to_rounding = (limit - smallest) * len(problem[0]) / BINS
    tighter = max(smallest, limit - lost_to_rounding - Fraction(1e-9))
    assert loss(problem, kept) <= best(problem, tighter) + 1e-9


def test_it_beats_the_relaxation_where_that_is_stuck() -> None:
    error = {"a": torch.tensor([100.0, 60.0, 0.0]), "b": torch.tensor([100.0, 55.0, 0.0])}
    costs, sizes = {"a": [3, 8], "b": [2, 6]}, {"a": [1, 2], "b": [1, 2]}
    assert allocate(error, costs, sizes, 10) == {"a": 1, "b": 2}
    assert allocate_exactly(error, costs, sizes, 10) == {"a": 2, "b": 1}


def test_a_staircase_is_climbed_to_its_next_edge() -> None:
    """Sizes 1 to 4 take the same time: nobody keeps 1, 2 or 3."""
    error = {name: torch.linspace(8, 0, 9) for name in "ab"}
    costs = {name: [10] * 4 + [20] * 4 for name in "ab"}
    sizes = {name: list(range(1, 9)) for name in "ab"}
    assert sorted(allocate_exactly(error, costs, sizes, 35).values()) == [4, 8]
    assert allocate_exactly(error, costs, sizes, 20) == {"a": 4, "b": 4}


def test_everything_fits_into_the_whole_budget() -> None:
    costs = {"a": [0, 123456789], "b": [7, 987654321]}
    error, sizes = {name: torch.tensor([2.0, 1.0, 0.0]) for name in "ab"}, {name: [1, 2] for name in "ab"}
    assert allocate_exactly(error, costs, sizes, 123456789 + 987654321) == {"a": 2, "b": 2}


def test_it_says_by_how_much_the_budget_is_missed() -> None:
    error, sizes = {name: torch.tensor([2.0, 1.0, 0.0]) for name in "ab"}, {name: [1, 2] for name in "ab"}
    costs = {"a": [1500, 2000], "b": [3000, 4000]}
    assert allocate_exactly(error, costs, sizes, 4500) == {"a": 1, "b": 1}
    with pytest.raises(ValueError, match=r"4,499 .* 4,500"):
        allocate_exactly(error, costs, sizes, 4499)
