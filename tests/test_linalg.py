"""Every matrix routine against brute force, `torch.linalg.lstsq` and LAPACK's pivoted QR on the activations themselves."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_stat import elimination, linalg

few = settings(max_examples=15, derandomize=True, deadline=None)
seeds = st.integers(0, 10_000)


def _activations(seed: int, tokens: int, width: int, spread: float = 1.0) -> Tensor:
    """Correlated columns; `spread` > 1 scales them apart, so that no two pivots are near a tie."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    z = z @ (torch.eye(width, dtype=torch.float64) + 0.3 * torch.randn(width, width, generator=generator, dtype=torch.float64))
    scale = spread ** torch.randperm(width, generator=generator).double()
    return z / z.norm(dim=0) * scale


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_ridge(z: Tensor, ridge: float) -> Tensor:
    """The rows that turn a ridge relative to diag(z^T z) into plain least squares."""
    return torch.cat([z, ridge**0.5 * torch.diag(z.norm(dim=0))])


def _lost(z: Tensor, target: Tensor, keep: list[int]) -> float:
    """Squared error of the best linear prediction of `target` from the columns `keep` of z."""
    if not keep:
        return float(target.square().sum())
    fit = torch.linalg.lstsq(z[:, keep], target, driver="gelsd").solution
    return float((target - z[:, keep] @ fit).square().sum())


@pytest.mark.parametrize("width", [1, 2, 255, 256, 257, 513, 1537])
def test_gram_is_the_sum_of_products_over_all_chunks(width: int) -> None:
    rows = _randn(width, 4099, width)  # two chunks and a rest
    gram = torch.zeros(width, width, dtype=torch.float64)
    for part in (rows[:5], rows[5:6], rows[6:]):
        linalg.add_to_gram(gram, part)
    result = linalg.symmetrize(gram)
    torch.testing.assert_close(result, rows.T @ rows, rtol=1e-12, atol=1e-9)
    assert torch.equal(result, result.T)


def test_gram_of_float32_rows_is_summed_in_float64() -> None:
    # Whole numbers: products over one chunk stay below 2^24 and are exact in float32, the whole sum does not fit there.
    rows = torch.randint(60, 90, (20_000, 300), generator=torch.Generator().manual_seed(0)) | 1
    gram = torch.zeros(300, 300, dtype=torch.float64)
    linalg.add_to_gram(gram, rows.float())
    exact = (rows.double().T @ rows.double()).long()
    assert exact.max() > 2**24
    assert torch.equal(linalg.symmetrize(gram).long(), exact)


@few
@given(seeds, st.integers(2, 12), st.sampled_from([0.0, 1e-3, 0.3]), st.data())
def test_least_squares_map_solves_its_problem(seed: int, width: int, ridge: float, data: st.DataObject) -> None:
    z = _activations(seed, 40, width)
    keep = data.draw(st.permutations(range(width)))[: data.draw(st.integers(1, width))]
    result = linalg.least_squares_map(z.T @ z, torch.tensor(keep), ridge)
    augmented = _with_ridge(z, ridge)
    expected = torch.linalg.lstsq(augmented[:, keep], augmented).solution
    expected[:, keep] = torch.eye(len(keep), dtype=torch.float64)  # the ridge pulls towards the kept themselves
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-8)
    assert torch.equal(result[:, keep], torch.eye(len(keep), dtype=torch.float64))


def test_least_squares_map_with_copies_and_dead_columns() -> None:
    z = _activations(1, 50, 6)
    z = torch.cat([z, z[:, :2] - 2 * z[:, 2:4], torch.zeros(50, 2, dtype=torch.float64)], dim=1)
    keep = [8, 0, 2, 6, 4, 1]  # a dead column, and a dependent triple
    result = linalg.least_squares_map(z.T @ z, torch.tensor(keep))
    best = z[:, keep] @ torch.linalg.lstsq(z[:, keep], z, driver="gelsd").solution
    torch.testing.assert_close(z[:, keep] @ result, best, rtol=0, atol=1e-5)
    assert result.abs().max() < 1e3, "coefficients blow up along the null space"
    assert not result[:, 9].any(), "a dead column needs no prediction"
    assert torch.equal(linalg.least_squares_map(torch.zeros(3, 3).double(), torch.tensor([1])), torch.eye(3)[1:2].double())


@few
@given(seeds, st.integers(1, 8), st.integers(0, 8))
def test_solve_psd(seed: int, width: int, rank: int) -> None:
    root = torch.randint(-3, 4, (min(rank, width), width), generator=torch.Generator().manual_seed(seed)).double()
    matrix = root.T @ root
    right = matrix @ _randn(seed, width, 3)
    torch.testing.assert_close(matrix @ linalg.solve_psd(matrix, right), right, rtol=1e-8, atol=1e-8)


def test_solve_psd_leaves_the_null_space_out() -> None:
    matrix = torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    right = _randn(0, 3, 2)
    expected = torch.from_numpy(np.linalg.pinv(matrix.numpy())) @ right
    torch.testing.assert_close(linalg.solve_psd(matrix, right), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [512, 513, 576, 769])
def test_large_matrices_are_factored_by_panels(width: int, dtype: torch.dtype) -> None:
    """Also parts of wider ones; what stands below the diagonal is not read."""
    z = _randn(width, 3 * width, width)
    matrix = z.T @ z / (3 * width)
    wanted, right = torch.from_numpy(scipy.linalg.cholesky(matrix.numpy(), lower=True)), _randn(1, width, 3)
    wide = torch.cat([matrix.triu() + torch.full_like(matrix, torch.nan).tril(-1), right], dim=1).to(dtype)
    upper, tolerance = wide[:, :width], torch.finfo(dtype).eps * 1e2
    factor = linalg.cholesky(upper)
    torch.testing.assert_close(factor.double(), wanted, rtol=0, atol=tolerance)
    assert not factor.triu(1).any()
    found = linalg.solve_psd(upper, right.to(dtype)).double()
    torch.testing.assert_close(matrix @ found, right, rtol=0, atol=10 * tolerance)
    assert torch.equal(upper.triu(), matrix.triu().to(dtype)), "the matrix itself is not overwritten"


def test_large_matrices_that_are_not_definite() -> None:
    """In a later panel, or in the first: what the null space leaves is solved, and the nearest definite one is factored."""
    for dead in (0, 100):
        root = torch.cat([torch.zeros(300, dead, dtype=torch.float64), _randn(0, 300, 600 - dead)], dim=1)
        matrix, right = root.T @ root, root.T @ _randn(1, 300, 2)
        torch.testing.assert_close(matrix @ linalg.solve_psd(matrix.triu(), right), right, rtol=1e-8, atol=1e-6)
        factor = linalg.cholesky(matrix - 1e-3 * torch.eye(600, dtype=torch.float64))
        torch.testing.assert_close(factor @ factor.T, matrix, rtol=0, atol=3e-3)


def test_damped_is_relative_to_each_column() -> None:
    gram = torch.tensor([[1e6, 2.0, 0.0], [2.0, 1e-3, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    result = linalg.damped(gram, 0.1)
    torch.testing.assert_close(result.diagonal()[:2], gram.diagonal()[:2] * 1.1, rtol=1e-2, atol=0)
    assert torch.equal(result - torch.diag(result.diagonal()), gram - torch.diag(gram.diagonal()))
    assert 0 < result[2, 2] <= 1e-5
    assert (linalg.damped(torch.zeros(2, 2, dtype=torch.float64), 0.0).diagonal() > 0).all()


@few
@given(seeds, st.integers(1, 14))
def test_pivoted_cholesky_is_pivoted_qr(seed: int, width: int) -> None:
    z = _activations(seed, 60, width, spread=1.4)
    order, pivots, residual = linalg.pivoted_cholesky(z.T @ z)
    r, expected = scipy.linalg.qr(z.numpy(), mode="r", pivoting=True)
    assert order.tolist() == expected.tolist()
    np.testing.assert_allclose(pivots, np.abs(np.diag(r)), rtol=1e-6)
    np.testing.assert_allclose(residual, [np.linalg.norm(r[k:width, k:]) for k in range(width + 1)], rtol=1e-6, atol=1e-9)


def test_pivoted_cholesky_of_dependent_columns() -> None:
    z = _activations(3, 60, 5, spread=1.7)
    z = torch.cat([z, 0.5 * z[:, :3], torch.zeros(60, 1, dtype=torch.float64)], dim=1)
    order, pivots, residual = linalg.pivoted_cholesky(z.T @ z)
    _, expected = scipy.linalg.qr(z.numpy(), mode="r", pivoting=True)
    assert order[:5].tolist() == expected[:5].tolist()
    assert sorted(order.tolist()) == list(range(9))
    assert (pivots[:5] > 0).all()
    assert not pivots[5:].any()
    assert not residual[5:].any()
    assert len(residual) == 10


def test_pivoted_cholesky_refuses_what_is_no_gram_matrix() -> None:
    with pytest.raises(ValueError, match="Gram matrix"):
        linalg.pivoted_cholesky(torch.full((2, 2), torch.nan))


@few
@given(seeds, st.integers(1, 10), st.integers(1, 4))
def test_error_curve_is_the_least_squares_residual_for_every_k(seed: int, width: int, out: int) -> None:
    z, weight = _activations(seed, 40, width), _randn(seed + 1, out, width)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    curve = linalg.error_curve(z.T @ z, weight, order)
    expected = [_lost(z, z @ weight.T, order[:k].tolist()) for k in range(width + 1)]
    np.testing.assert_allclose(curve, expected, rtol=1e-7, atol=1e-9 * expected[0])


def _columns(units: list[int], block: int) -> list[int]:
    return [unit * block + i for unit in units for i in range(block)]


def _greedy(z: Tensor, target: Tensor, units: int, block: int) -> tuple[list[int], list[float]]:
    """Backward elimination with every error solved for anew."""
    left, removed, error = list(range(units)), [], [0.0]
    while left:
        trials = [(_lost(z, target, _columns([u for u in left if u != gone], block)), gone) for gone in left]
        best, gone = min(trials)
        left.remove(gone)
        removed.append(gone)
        error.append(best)
    return removed[::-1], error[::-1]


@few
@given(seeds, st.integers(1, 7), st.sampled_from([1, 1, 2, 3]), st.sampled_from([0.0, 0.05]), st.integers(1, 5))
def test_backward_elimination_is_greedy_with_refits(seed: int, units: int, block: int, ridge: float, out: int) -> None:
    z, weight = _activations(seed, 50, units * block), _randn(seed + 1, out, units * block)
    order, error = elimination.backward_elimination(z.T @ z, weight, block, ridge)
    augmented = _with_ridge(z, ridge)
    expected_order, expected_error = _greedy(augmented, augmented @ weight.T, units, block)
    assert order.tolist() == expected_order
    np.testing.assert_allclose(error, expected_error, rtol=1e-7, atol=1e-9 * expected_error[0])
    assert error[-1] == 0


def _pooled_greedy(gram: np.ndarray, weight: np.ndarray, block: int) -> list[int]:
    """The documented rule: of single columns, PANEL removals among the POOL cheapest; every cost from a fresh inverse."""
    panel, candidates = (elimination.PANEL, elimination.POOL) if block == 1 else (1, None)
    left, removed = list(range(len(gram) // block)), []

    def costs() -> dict[int, float]:
        columns = _columns(left, block)
        inverse = np.linalg.inv(gram[np.ix_(columns, columns)])
        rows = inverse @ gram[columns] @ weight.T
        parts = {unit: slice(i * block, (i + 1) * block) for i, unit in enumerate(left)}
        return {u: float(np.sum(rows[at] * np.linalg.solve(inverse[at, at], rows[at]))) for u, at in parts.items()}

    while left:
        now = costs()
        pool = sorted(now, key=now.__getitem__)[:candidates]
        for _ in range(min(panel, len(pool))):
            now = costs()
            gone = min(pool, key=now.__getitem__)
            removed.append(gone)
            pool.remove(gone)
            left.remove(gone)
    return removed[::-1]


@pytest.mark.parametrize(("units", "block"), [(200, 1), (140, 2)])
def test_backward_elimination_of_many_units(units: int, block: int) -> None:
    width = units * block
    z, weight = _activations(units, 2 * width, width, spread=1.01), _randn(5, 3, width)
    order, error = elimination.backward_elimination(z.T @ z, weight, block)
    assert order.tolist() == _pooled_greedy((z.T @ z).numpy(), weight.numpy(), block)
    for k in (0, 1, 17, 40, 96, 130, units - 33, units - 1, units):
        expected = _lost(z, z @ weight.T, _columns(order[:k].tolist(), block))
        assert float(error[k]) == pytest.approx(expected, rel=1e-6, abs=1e-9 * float(error[0])), k


@pytest.mark.parametrize("block", [1, 4])
def test_backward_elimination_in_single_precision(block: int) -> None:
    width, ridge = 200, 0.01
    z, weight = _activations(3, 600, width, spread=1.02), _randn(6, 3, width)
    order, error = elimination.backward_elimination((z.T @ z).float(), weight.float(), block, ridge)
    augmented = _with_ridge(z, ridge)
    expected = [_lost(augmented, augmented @ weight.T, _columns(order[:k].tolist(), block)) for k in range(len(order) + 1)]
    np.testing.assert_allclose(error, expected, rtol=1e-3, atol=1e-5 * expected[0])


@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_fewer_tokens_than_columns(ridge: float) -> None:
    rows, weight = _activations(4, 50, 120).float(), _randn(6, 3, 120)
    gram = torch.zeros(120, 120, dtype=torch.float64)
    linalg.add_to_gram(gram, rows)
    linalg.symmetrize(gram)
    order, error = elimination.backward_elimination(gram, weight, 1, ridge)
    z = rows.double()
    for k in range(0, 121, 10):
        assert float(error[k]) == pytest.approx(_lost(z, z @ weight.T, order[:k].tolist()), rel=1e-3, abs=1e-5 * float(error[0]))


def test_error_curve_of_fewer_tokens_than_columns() -> None:
    rows, weight, order = _activations(4, 50, 120).float(), _randn(6, 3, 120), torch.randperm(120)
    gram = torch.zeros(120, 120, dtype=torch.float64)
    linalg.add_to_gram(gram, rows)
    curve, z = linalg.error_curve(linalg.symmetrize(gram), weight, order), rows.double()
    for k in range(0, 121, 10):
        assert float(curve[k]) == pytest.approx(_lost(z, z @ weight.T, order[:k].tolist()), rel=1e-3, abs=2e-5 * float(curve[0]))


@pytest.mark.parametrize(("dtype", "ridge"), [(torch.float64, 0.0), (torch.float64, 0.01), (torch.float32, 0.01)])
def test_a_wholly_dead_layer_loses_nothing(dtype: torch.dtype, ridge: float) -> None:
    order, error = elimination.backward_elimination(torch.zeros(4, 4, dtype=dtype), _randn(0, 2, 4), 1, ridge)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert error.abs().max() < 1e-9


@pytest.mark.parametrize("block", [1, 2])
def test_copies_go_first_and_cost_nothing(block: int) -> None:
    z, weight = _activations(7, 80, 5 * block), _randn(8, 4, 10 * block)
    both = torch.cat([z, z.flip(1).view(80, 5, block).flip(2).reshape(80, -1)], dim=1)  # unit 9 - u is a copy of u
    order, error = elimination.backward_elimination(both.T @ both, weight, block)
    assert {min(int(u), 9 - int(u)) for u in order[:5]} == set(range(5))
    assert error[5:].max() < 1e-8 * error[0]
    assert error[4] > 1e-4 * error[0]


def test_a_dead_column_goes_first() -> None:
    z, weight = _activations(9, 40, 4), _randn(9, 2, 4)
    z[:, 2] = 0
    order, error = elimination.backward_elimination(z.T @ z, weight)
    assert order[-1] == 2
    assert error[3] <= 1e-9 * error[0]
    assert torch.isfinite(error).all()


def test_a_metric_on_the_output_enters_through_the_weight() -> None:
    z, weight, root = _activations(10, 60, 6), _randn(11, 3, 6), _randn(12, 3, 3)
    metric = root @ root.T
    values, vectors = torch.linalg.eigh(metric)
    order, error = elimination.backward_elimination(z.T @ z, (vectors * values.sqrt()) @ vectors.T @ weight)
    for k in range(7):
        keep = order[:k].tolist()
        left = z @ weight.T - z[:, keep] @ torch.linalg.lstsq(z[:, keep], z @ weight.T).solution if k else z @ weight.T
        assert float(error[k]) == pytest.approx(float(torch.trace(left @ metric @ left.T)), rel=1e-7, abs=1e-9)
    assert order.tolist() != elimination.backward_elimination(z.T @ z, weight)[0].tolist()


def test_unit_columns() -> None:
    assert linalg.unit_columns(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]
