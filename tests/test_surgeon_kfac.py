"""Costs and updates of one linear layer, against brute force on the inverse of the whole Kronecker product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_stat.methods import surgeon_kfac as kfac

few = settings(max_examples=15, derandomize=True, deadline=None)
seeds = st.integers(0, 10_000)
OUT, IN = 5, 6


def _layer(seed: int, out: int = OUT, width: int = IN) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, G, A) in float64, both factors well-conditioned and full of correlations."""
    generator = torch.Generator().manual_seed(seed)
    weight, g, a = (
        torch.randn(shape, generator=generator).double() for shape in ((out, width), (3 * out, out), (3 * width, width))
    )
    return weight, g.T @ g / len(g), a.T @ a / len(a)


def _brute(weight: Tensor, g: Tensor, a: Tensor, gone: Tensor) -> tuple[float, Tensor]:
    """Optimal brain surgeon on the whole inverse: what removing the weights `gone` (a mask) costs, and the weight left."""
    inverse = torch.linalg.inv(torch.kron(g, a))
    at = gone.flatten().nonzero().flatten()
    multipliers = torch.linalg.solve(inverse[at][:, at], weight.flatten()[at])
    change = -(inverse[:, at] @ multipliers).view_as(weight)
    loss = float(change.flatten() @ torch.kron(g, a) @ change.flatten() / 2)
    assert abs(loss - float(weight.flatten()[at] @ multipliers / 2)) < 1e-8 * max(1, loss)
    return loss, weight + change


def _loss(g: Tensor, a: Tensor, change: Tensor) -> float:
    return float((g @ change @ a * change).sum() / 2)


def _mask(rows: list[int], columns: list[int]) -> Tensor:
    mask = torch.zeros(OUT, IN, dtype=torch.bool)
    mask[rows], mask[:, columns] = True, True
    return mask


def _some(seed: int, most: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(most, generator=generator)[: 1 + seed % (most - 1)].tolist()


@few
@given(seeds)
def test_every_element_row_and_column_costs_what_brute_force_says(seed: int) -> None:
    weight, g, a = _layer(seed)
    g_inverse, a_inverse = torch.linalg.inv(g), torch.linalg.inv(a)
    elements = kfac.element_costs(weight, g_inverse, a_inverse)
    for i, j in [(0, 0), (2, 3), (4, 5)]:
        alone = torch.zeros(OUT, IN, dtype=torch.bool)
        alone[i, j] = True
        torch.testing.assert_close(float(elements[i, j]), _brute(weight, g, a, alone)[0])
    rows = [_brute(weight, g, a, _mask([i], []))[0] for i in range(OUT)]
    columns = [_brute(weight, g, a, _mask([], [j]))[0] for j in range(IN)]
    torch.testing.assert_close(kfac.row_costs(weight, a, g_inverse).tolist(), rows)
    torch.testing.assert_close(kfac.column_costs(weight, g, a_inverse).tolist(), columns)


@few
@given(seeds, st.sampled_from([2, 3]))
def test_units_of_several_columns_cost_what_brute_force_says(seed: int, block: int) -> None:
    weight, g, a = _layer(seed)
    costs = kfac.column_costs(weight, g, torch.linalg.inv(a), block).tolist()
    units = [list(range(start, start + block)) for start in range(0, IN, block)]
    torch.testing.assert_close(costs, [_brute(weight, g, a, _mask([], unit))[0] for unit in units])
    torch.testing.assert_close(kfac.row_costs(weight.T, g, torch.linalg.inv(a), block).tolist(), costs)


@few
@given(seeds, seeds)
def test_rows_and_columns_together_are_the_exact_joint_update_in_either_order(seed: int, other: int) -> None:
    weight, g, a = _layer(seed)
    rows, columns = _some(seed, OUT), _some(other, IN)
    g_inverse, a_inverse = torch.linalg.inv(g), torch.linalg.inv(a)
    first = kfac.remove_columns(kfac.remove_rows(weight, g_inverse, torch.tensor(rows)), a_inverse, torch.tensor(columns))
    second = kfac.remove_rows(kfac.remove_columns(weight, a_inverse, torch.tensor(columns)), g_inverse, torch.tensor(rows))
    loss, exact = _brute(weight, g, a, _mask(rows, columns))
    torch.testing.assert_close(first, exact)
    torch.testing.assert_close(second, exact)
    assert not first[_mask(rows, columns)].any()
    added = weight + sum(
        part - weight
        for part in (
            kfac.remove_rows(weight, g_inverse, torch.tensor(rows)),
            kfac.remove_columns(weight, a_inverse, torch.tensor(columns)),
        )
    )
    added[_mask(rows, columns)] = 0  # as the authors' code has it
    assert loss <= _loss(g, a, added - weight) + 1e-12


@few
@given(seeds)
def test_correlated_updates_beat_independent_ones_beat_none(seed: int) -> None:
    weight, g, a = _layer(seed, 8, 24)
    columns, a_inverse = torch.arange(24)[seed % 3 :: 3], torch.linalg.inv(a)
    together, pairs, alone = (kfac.remove_columns(weight, a_inverse, columns, size) for size in (0, 2, 1))
    none = weight.clone()
    none[:, columns] = 0
    losses = [_loss(g, a, new - weight) for new in (together, pairs, alone, none)]
    assert losses[0] < min(losses[1:])
    assert all(not new[:, columns].any() for new in (together, pairs, alone))


def test_a_column_alone_is_the_independent_update() -> None:
    weight, g, a = _layer(3)
    alone = kfac.remove_columns(weight, torch.linalg.inv(a), torch.tensor([1, 4]), max_correlate=1)
    expected = weight + sum(_brute(weight, g, a, _mask([], [j]))[1] - weight for j in (1, 4))
    expected[:, [1, 4]] = 0
    torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_damping_is_relative_to_the_mean_of_the_diagonal(damping: float) -> None:
    _, g, _ = _layer(1)
    expected = torch.linalg.inv(g + damping * g.diagonal().mean() * torch.eye(OUT).double())
    torch.testing.assert_close(kfac.damped_inverse(g.float(), damping), expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(kfac.damped_inverse(torch.zeros(3, 3), damping)).all()


def test_dead_columns_cost_nothing_and_move_nothing() -> None:
    weight, g, a = _layer(2)
    a[1], a[:, 1] = 0, 0
    a_inverse = kfac.damped_inverse(a, 1e-9)
    assert float(kfac.column_costs(weight, g, a_inverse)[1]) < 1e-6
    left = [0, 2, 3, 4, 5]
    torch.testing.assert_close(kfac.remove_columns(weight, a_inverse, torch.tensor([1]))[:, left], weight[:, left])


@few
@given(seeds)
def test_elements_together_are_the_exact_joint_update(seed: int) -> None:
    weight, g, a = _layer(seed)
    gone = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(seed)) < 0.5
    loss, exact = _brute(weight, g, a, gone)
    by_steps = kfac.remove_elements(weight, g, a, gone, tolerance=1e-10, max_steps=500)
    in_one_run = kfac.remove_elements_in_runs(weight, torch.linalg.inv(g), torch.linalg.inv(a), gone, 10_000)
    for found in (by_steps, in_one_run):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)
        assert not found[gone].any()
    assert _loss(g, a, exact - weight) == pytest.approx(loss)


def test_longer_runs_of_elements_are_better_and_the_exact_update_is_best() -> None:
    weight, g, a = _layer(5, 16, 24)
    gone = torch.rand(16, 24, generator=torch.Generator().manual_seed(0)) < 0.4
    inverses = torch.linalg.inv(g), torch.linalg.inv(a)
    losses = [_loss(g, a, -weight * gone)]
    losses += [_loss(g, a, kfac.remove_elements_in_runs(weight, *inverses, gone, n) - weight) for n in (1, 10, 60)]
    losses.append(_loss(g, a, kfac.remove_elements(weight, g, a, gone) - weight))
    assert losses[1] > losses[2] > losses[3] > losses[4]
    assert losses[2] < losses[0]


def test_a_run_is_the_exact_update_of_its_elements_on_the_weights_left_by_the_last() -> None:
    weight, g, a = _layer(6)
    gone = torch.zeros(OUT, IN, dtype=torch.bool)
    gone[0, [1, 4]], gone[3, [0, 5]] = True, True
    expected = weight
    for run in ([(0, 1), (0, 4), (3, 0)], [(3, 5)]):
        own = torch.zeros_like(gone)
        own[tuple(zip(*run, strict=True))] = True
        expected = _brute(expected, g, a, own)[1]
    expected[gone] = 0
    found = kfac.remove_elements_in_runs(weight, torch.linalg.inv(g), torch.linalg.inv(a), gone, 3)
    torch.testing.assert_close(found, expected)
