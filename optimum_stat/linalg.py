"""The matrix routines the methods share: Gram matrices in, orders, error curves and corrections out.

Conventions, everywhere in this file: a linear layer computes `y = z @ W.T` from `z` [tokens, width] with `W` [out, width];
`gram` = sum over tokens of `z^T z`, [width, width]; a *unit* is a run of `block` neighbouring columns of `z`, so there are
`width // block` of them. All results are exact functions of second moments, whatever the number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg.blas import dger
from scipy.linalg.lapack import dpstrf
from torch import Tensor

Matrix = npt.NDArray[np.float64]
PANEL = 32  # columns removed at once: turns rank-1 updates into matrix products
POOL = 64  # candidates for these removals
OUTPUTS = 64  # or random sums of them, enough to compare a few ridges
CORNER = 256  # of a matrix, copied at once when it is made symmetric: copies of larger ones leave the processor's caches
CHUNK = 2048  # rows whose products may be summed in single precision before they enter a double precision total


def add_to_gram(gram: Tensor, rows: Tensor) -> None:
    """Add `rows^T rows` to `gram` [width, width] in place; call `symmetrize` once after the last addition.

    Products in the rows' precision over at most 2,048 rows at a time, sums in the Gram matrix's (float64): single
    precision loses its digits inside long sums. Only blocks on and above the diagonal are computed.
    """
    width, panel = rows.shape[1], max(256, -(-rows.shape[1] // 6))
    for chunk in torch.split(rows, CHUNK):
        for start in range(0, width, panel):
            stop = min(start + panel, width)
            gram[start:stop, start:] += chunk[:, start:stop].T @ chunk[:, start:]


def symmetrize(gram: Tensor) -> Tensor:
    """Copy the upper triangle onto the lower one, in place."""
    for start in range(0, len(gram), CORNER):
        stop = min(start + CORNER, len(gram))
        gram[start:stop, :start] = gram[:start, start:stop].T
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
    return gram


def damped(gram: Tensor, ridge: float) -> Tensor:
    """`gram + ridge * diag(gram)`, with a floor for dead columns so that the result can be inverted.

    Proportional to the diagonal, not to its mean: one massive column would otherwise drown all others.
    """
    result = gram.clone()
    result.diagonal().copy_(damped_diagonal(gram, ridge))
    return result


def damped_diagonal(gram: Tensor, ridge: float) -> Tensor:
    """That of `damped`."""
    diagonal = gram.diagonal()
    floor = (diagonal.max() * 1e-12).clamp_min(1e-30)  # 1e-30: all columns may be dead, and the inverse must stay finite
    return diagonal + (ridge * diagonal + floor)


def held_out_ridge(halves: Sequence[tuple[Tensor, Tensor]], ridges: Sequence[float]) -> float:
    """The one of `ridges` with which the solution from one half of the data is best on the other half, and the other way round.

    halves: (G, C) = (z^T z, z^T y) of two halves of the tokens; a solution is `X = (G + ridge diag G)^-1 C`, and what it loses
    on the other half is `||z X - y||^2 = <X, G X - 2 C>` and a constant. Of very many outputs y, random sums are fitted. The
    loss falls and then rises with the ridge, so that the search goes downhill from the one in the middle.
    """
    outputs = halves[0][1].shape[1]
    sums = torch.eye(outputs) if outputs <= OUTPUTS else torch.randn(outputs, OUTPUTS, generator=torch.Generator().manual_seed(0))
    few = [(gram, toward @ sums.to(toward)) for gram, toward in halves]

    @functools.cache
    def lost(ridge: float) -> float:
        total = 0.0
        for (gram, toward), (other_gram, other_toward) in (few, few[::-1]):
            found = solve_psd(damped(gram, ridge), toward)
            total += float((found * (other_gram @ found - 2 * other_toward)).sum())
        return total

    ordered, best = sorted(ridges), len(ridges) // 2
    for step in (1, -1):  # it is large more often than small
        while 0 <= best + step < len(ordered) and lost(ordered[best + step]) < lost(ordered[best]):
            best += step
    return ordered[best]


def least_squares_map(gram: Tensor, keep: Tensor, ridge: float = 0.0) -> Tensor:
    """T [kept, width] minimising `||z - z[:, keep] T||^2 + ridge ||diag(gram)^(1/2) (I - E T)||^2`; T[:, keep] is the identity.

    The corrected layer is `W @ T.T`, for any weighting of the output (W only multiplies T from outside).
    Source: STAT's interpolation matrix `[I, R11^-1 R12]`, in normal equations; `ridge` is our addition.
    """
    width = gram.shape[0]
    gone = torch.ones(width, dtype=torch.bool, device=gram.device).index_fill_(0, keep, False).nonzero().flatten()
    result = torch.zeros(len(keep), width, dtype=gram.dtype, device=gram.device)
    result[torch.arange(len(keep), device=gram.device), keep] = 1
    result[:, gone] = solve_psd(damped(gram[keep][:, keep], ridge), gram[keep][:, gone])
    return result


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a positive semi-definite matrix.

    One that rounding has made indefinite (fewer tokens than columns, products in single precision) is replaced by the nearest
    one whose eigenvalues are at least as large as the rounding errors show to be: the size of its most negative one.
    """
    count = len(matrix)
    if matrix.device.type == "cpu" and count % 256 == 0:  # rows so far apart meet in the processor's cache: half the speed
        grown = torch.eye(count + 8, dtype=matrix.dtype)
        grown[:count, :count] = matrix
        factor, info = torch.linalg.cholesky_ex(grown)
        factor = factor[:count, :count]
    else:
        factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return factor
    if not torch.isfinite(matrix).all():
        raise ValueError(f"A Gram matrix must be finite; this one, {list(matrix.shape)}, is not.")
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(max(-float(values[0]), float(values[-1]) * 1e-12))
    upper = torch.linalg.qr(values.sqrt()[:, None] * vectors.T).R
    return (upper * torch.where(upper.diagonal() < 0, -1, 1)[:, None]).T


def solve_psd(matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix^-1 right` for a symmetric positive semi-definite matrix; its null space, if any, is left out."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        # cholesky_solve gives the same bits, from a copy of the factor: of models as large as memory, that is too much
        half = torch.linalg.solve_triangular(factor, right, upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)
    values, vectors = torch.linalg.eigh(matrix)
    inverse = torch.where(values > values[-1] * len(values) * torch.finfo(matrix.dtype).eps, 1 / values, 0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def pivoted_cholesky(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Column-pivoted QR of the activations, from their Gram matrix: `(order [width], pivots [width], residual [width + 1])`.

    `pivots[k] = |R_kk|` and `residual[k] = ||R[k:, k:]||_F`, the error of all columns when the first k of `order` are kept.
    Columns beyond the numerical rank come last, with zeros.
    Source: LAPACK dpstrf, which chooses pivots as QR does because `gram = R^T R` (STAT selects neurons this way).
    """
    if gram.shape != gram.T.shape or not torch.isfinite(gram).all():
        raise ValueError(f"A Gram matrix must be square and finite; this one is {list(gram.shape)}.")
    factor, order, rank, _ = dpstrf(gram.double().cpu().numpy(), lower=1)
    lower = torch.from_numpy(factor).tril()
    lower[:, rank:] = 0
    energy = torch.cat([lower.square().sum(0), lower.new_zeros(1)])
    residual = energy.flip(0).cumsum(0).flip(0).sqrt()
    return torch.from_numpy(order.astype("int64")) - 1, lower.diagonal().clone(), residual


def error_curve(gram: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    """Error left when the first k columns of `order` are kept, every k at once, corrections included: [width + 1].

    `error[k] = min_V ||z W^T - z[:, order[:k]] V^T||^2`. With `gram[order][:, order] = L L^T` and `Q = L^T W^T[order]`
    it is `sum_{i >= k} ||Q_i||^2`: one factorisation for the whole curve.
    """
    factor = cholesky(_square_part(damped(gram, 0.0), order.to(gram.device)))
    lost = (factor.T @ weight.T[order]).square().sum(1)
    return torch.cat([lost.flip(0).cumsum(0).flip(0), lost.new_zeros(1)])


def backward_elimination(gram: Tensor, weight: Tensor, block: int = 1, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Remove unit after unit, each time the one whose removal costs least after the best correction of those left.

    gram: [width, width], weight: [out, width]. Returns `(order [units], error [units + 1])`, best unit first;
    `error[k]` is the squared output error with the first k units kept and corrected (plus the ridge's own penalty on
    the change of weight). With `H = gram^-1` and weights optimal for the units left, removing block B costs exactly
    `tr(W_B^T (H_BB)^-1 W_B)`. A metric on the output enters through `weight`: pass `M^(1/2) W`.

    Greedy over all units if they are wide or at most 64, else over the 64 that are cheapest at the start of every 32 removals;
    the costs are exact in either case, to the precision of `gram`.
    Source: optimal brain surgeon for structures (ZipLM, 2302.04089), in the order-recursive form.
    """
    inverse = torch.cholesky_inverse(cholesky(damped(gram, ridge))).mT  # symmetric: it only lies in memory row by row now
    left = Remainder(inverse, weight.T.to(gram.dtype).clone(memory_format=torch.contiguous_format), block)
    removed, cost = [], []
    while left.num_open:
        gone, spent = left.cheapest()
        removed.append(left.units[gone])
        cost.append(spent)
        left.remove(gone)
    order, error = torch.cat(removed).flip(0), torch.cat(cost).cumsum(0).flip(0)
    return order, torch.cat([error, error.new_zeros(1)])


class Remainder:
    """The units that backward elimination has left: the inverse of their Gram matrix, and the corrected rows of weights.

    `inverse - lost^T lost` is the inverse as it is now: a product of many removals at once takes far less time than theirs one
    by one, and is of those columns alone that are left then. Removed units stay in their places until then: nothing reads
    what rounding leaves of them, but costs that count for nothing.
    """

    def __init__(self, inverse: Tensor, rows: Tensor, block: int) -> None:
        self.units = torch.arange(len(rows) // block, device=rows.device)
        """Which unit of the whole stands at each place."""
        self.num_open = len(self.units)
        self._block = block
        self._stand(inverse, rows)

    def _stand(self, inverse: Tensor, rows: Tensor) -> None:
        """Nothing is lost yet."""
        self._inverse, self._rows = inverse, rows
        self._room = inverse.new_empty(len(rows) // 5 + PANEL + self._block, len(rows))
        self._lost = self._room[:0]
        self._open = torch.ones_like(self.units, dtype=torch.bool)
        shape = (len(self.units), self._block)
        self._own = inverse.view(*shape, *shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
        """Each unit's part of the inverse, as it is now: [units, block, block]."""

    def cheapest(self) -> tuple[Tensor, Tensor]:
        """The next units to remove, in order, and what each costs.

        Wide units one by one. Single columns many at once: costs depend on the rows through their products only, so the pool is
        a pair of small square matrices, its part of the inverse, and `energy = rows rows^T`.
        """
        scores = torch.where(self._open, self._costs(), torch.inf)
        pool = scores.topk(min(POOL, self.num_open) if self._block == 1 else 1, largest=False).indices
        if self._block > 1:
            return pool, scores[pool].clamp_min(0)
        lost, rows = self._lost.index_select(1, pool), self._rows[pool]
        own, energy = self._inverse[pool[:, None], pool].addmm_(lost.T, lost, alpha=-1), rows @ rows.T
        picked, spent = _eliminate(own.double().cpu().numpy(), energy.double().cpu().numpy())
        return pool[torch.tensor(picked, device=pool.device)], torch.tensor(spent, dtype=rows.dtype, device=rows.device)

    def _costs(self) -> Tensor:
        """What removing each unit costs now: `tr(W_B^T (H_BB)^-1 W_B)`, [units]."""
        if self._block == 1:
            return torch.linalg.vector_norm(self._rows, dim=1).square() / self._own.flatten()
        parts = self._rows.view(len(self.units), self._block, -1)
        return (parts * torch.linalg.solve(self._own, parts)).sum((1, 2))

    def remove(self, gone: Tensor) -> None:
        """Correct what is left for the loss of the units at these places."""
        columns, count = unit_columns(gone, self._block), self._block
        beside = self._inverse[columns].addmm_(self._lost.index_select(1, columns).T, self._lost, alpha=-1)
        factor = cholesky(beside.index_select(1, columns))
        lost = torch.linalg.solve_triangular(factor, beside, upper=False)
        self._rows.addmm_(lost.T, torch.linalg.solve_triangular(factor, self._rows[columns], upper=False), alpha=-1)
        parts = lost.view(len(lost), len(self.units), count)
        squares = lost.square().sum(0).view_as(self._own) if count == 1 else torch.einsum("kui,kuj->uij", parts, parts)
        self._own -= squares
        self._own[gone] = torch.eye(count, dtype=lost.dtype, device=lost.device)
        self._open[gone] = False
        self.num_open -= len(gone)
        start, stop = len(self._lost), len(self._lost) + len(lost)
        self._room[start:stop] = lost
        self._lost = self._room[:stop]
        if self.num_open < 0.8 * len(self.units):
            self._compress()

    def _compress(self) -> None:
        """Forget the places of what is gone, and bring the inverse up to date."""
        columns = unit_columns(self._open.nonzero().flatten(), self._block)
        self.units = self.units[self._open]
        inverse, lost = _square_part(self._inverse, columns), self._lost.index_select(1, columns)
        self._stand(inverse.addmm_(lost.T, lost, alpha=-1), self._rows.index_select(0, columns))


def unit_columns(units: Tensor, block: int) -> Tensor:
    """The columns of `units`, each `block` wide: [len(units) * block]."""
    return (units[:, None] * block + torch.arange(block, device=units.device)).flatten()


def _square_part(matrix: Tensor, at: Tensor) -> Tensor:
    """`matrix[at][:, at]`, ten times faster."""
    return matrix.index_select(0, at).index_select(1, at)


def _eliminate(inverse: Matrix, energy: Matrix) -> tuple[list[int], list[float]]:
    """Greedy elimination within the pool; overwrites both. BLAS by hand: thousands of tiny steps, each cheaper than a torch call.

    Removing unit u takes `spread row^T` from the inverse and `spread half^T + half spread^T` from the energy.
    """
    of_inverse, of_energy, closed = inverse.diagonal(), energy.diagonal(), np.zeros(len(inverse))
    gone: list[int] = []
    spent: list[float] = []
    for _ in range(min(PANEL, len(inverse))):
        costs = closed + of_energy / of_inverse
        unit = int(costs.argmin())
        gone.append(unit)
        spent.append(max(0.0, float(costs[unit])))  # rounding may take copies below zero
        row = inverse[unit].copy()
        spread = row / row[unit]
        half = energy[unit] - energy[unit, unit] / 2 * spread
        for matrix, left, right in ((inverse, spread, row), (energy, spread, half), (energy, half, spread)):
            dger(-1.0, right, left, a=matrix.T, overwrite_a=1)  # the transpose is stored as BLAS wants it
        inverse[unit, unit], closed[unit] = 1, np.inf
    return gone, spent
