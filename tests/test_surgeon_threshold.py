"""One threshold over all layers, against sorting everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_stat.methods.surgeon_threshold import ElementThreshold, LineThreshold

few = settings(max_examples=25, derandomize=True, deadline=None)
seeds = st.integers(0, 10_000)


def layers(seed: int, ties: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 8), (8, 4), (3, 12)]
    costs = [torch.rand(shape, generator=generator) ** 6 * 10 ** float(seed % 5 - 9) for shape in shapes]
    return [(cost * 3e9).round() for cost in costs] if ties else costs


@few
@given(seeds, st.integers(0, 108), st.booleans())
def test_exactly_as_many_weights_go_as_were_asked_and_they_are_the_cheapest(seed: int, num_gone: int, ties: bool) -> None:
    costs, threshold = layers(seed, ties), ElementThreshold()
    for cost in costs:
        threshold.see(cost)
    threshold.settle(num_gone)
    masks = [threshold.mask(cost) for cost in costs]
    assert sum(int(mask.sum()) for mask in masks) == num_gone
    gone, kept = (
        torch.cat([cost[mask if wanted else ~mask] for cost, mask in zip(costs, masks, strict=True)]) for wanted in (1, 0)
    )
    if len(gone) and len(kept):
        assert float(gone.max()) <= float(kept.min()) * (1 + 2**-11)


@few
@given(seeds, st.integers(0, 54), st.booleans())
def test_two_of_four_never_halve_a_group(seed: int, num_gone: int, ties: bool) -> None:
    costs, threshold = layers(seed, ties), ElementThreshold(of_four=True)
    for cost in costs:
        threshold.see(cost)
    threshold.settle(num_gone)
    masks = [threshold.mask(cost) for cost in costs]
    assert sum(int(mask.sum()) for mask in masks) == num_gone + num_gone % 2
    for cost, mask in zip(costs, masks, strict=True):
        four, own = mask.view(len(mask), -1, 4), cost.view(len(cost), -1, 4)
        assert set(four.sum(-1).flatten().tolist()) <= {0, 2}
        whole = four.any(-1)
        assert (own[whole][four[whole]].view(-1, 2).max(1).values <= own[whole][~four[whole]].view(-1, 2).min(1).values).all()


@few
@given(seeds, st.integers(0, 108))
def test_overlap_of_rows_and_columns_counts_once(seed: int, num_gone: int) -> None:
    costs = [(cost.sum(1), cost.sum(0)) for cost in layers(seed, ties=False)]
    threshold = LineThreshold()
    for rows, columns in costs:
        threshold.see(rows, columns)
    threshold.settle(num_gone)
    masks = [threshold.mask(rows, columns) for rows, columns in costs]
    found = sum(int((rows[:, None] | columns).sum()) for rows, columns in masks)
    levels = torch.cat([torch.cat(pair) for pair in costs]).double().sort().values.tolist()
    exact = next(
        total
        for level in [float("-inf"), *levels]
        if (total := sum(int(((r.double() <= level)[:, None] | (c.double() <= level)).sum()) for r, c in costs)) >= num_gone
    )
    assert found == exact


@few
@given(seeds, st.integers(0, 54), st.booleans())
def test_every_layer_may_lose_the_same_share(seed: int, num_gone: int, of_four: bool) -> None:
    costs, threshold = layers(seed, ties=False), ElementThreshold(of_four, per_layer=True)
    for cost in costs:
        threshold.see(cost)
    threshold.settle(num_gone)
    share, step = num_gone / sum(cost.numel() for cost in costs), 2 if of_four else 1
    for cost in costs:
        gone = int(threshold.mask(cost).sum())
        assert share * cost.numel() - 1e-6 <= gone < share * cost.numel() + 2 * step


def test_nothing_asked_nothing_gone() -> None:
    rows, columns = torch.zeros(3), torch.zeros(4)
    lines, elements = LineThreshold(), ElementThreshold()
    lines.see(rows, columns)
    elements.see(torch.zeros(3, 4))
    lines.settle(0)
    elements.settle(0)
    assert not any(mask.any() for mask in (*lines.mask(rows, columns), elements.mask(torch.zeros(3, 4))))


@pytest.mark.parametrize("value", [0.0, 1e-38, 3e38])
def test_costs_of_any_size_have_a_bin(value: float) -> None:
    costs, threshold = torch.full((2, 4), value), ElementThreshold()
    threshold.see(costs)
    threshold.settle(3)
    assert int(threshold.mask(costs).sum()) == 3
