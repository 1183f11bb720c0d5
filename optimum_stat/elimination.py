"""Backward elimination: the order in which units go, and what each step costs after the best correction of those left."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg.blas import dgemm
from scipy.linalg.lapack import dpotrf, dtrtri
from torch import Tensor

from .linalg import cholesky, damped, square_part, sums_of_what_goes, unit_columns

Matrix = npt.NDArray[np.float64]
PANEL = 32  # columns removed at once: turns rank-1 updates into matrix products
POOL = 64  # candidates for these removals


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
        gone, spent = left.remove_cheapest()
        removed.append(gone)
        cost.append(spent)
    return torch.cat(removed).flip(0), sums_of_what_goes(torch.cat(cost).flip(0))


def precise_enough(gram: Tensor, ridge: float) -> Tensor:
    """`gram` in the precision that its elimination needs: single, once the ridge bounds the condition number."""
    return gram.float() if ridge >= 1e-3 else gram


class Remainder:
    """The units that backward elimination has left: the inverse of their Gram matrix, and the corrected rows of weights.

    `inverse - lost^T lost` is the inverse as it is now: a product of many removals at once takes far less time than theirs one
    by one, and is of those columns alone that are left then. Removed units stay in their places until then: nothing reads
    what rounding leaves of them, but costs that count for nothing.
    """

    def __init__(self, inverse: Tensor, rows: Tensor, block: int) -> None:
        self.num_open = len(rows) // block
        self._units = torch.arange(self.num_open, device=rows.device)  # which unit of the whole stands at each place
        self._block = block
        self._stand(inverse, rows)

    def _stand(self, inverse: Tensor, rows: Tensor) -> None:
        """Nothing is lost yet."""
        self._inverse, self._rows = inverse, rows
        self._room = inverse.new_empty(len(rows) // 5 + PANEL + self._block, len(rows))
        self._lost = self._room[:0]
        self._open = torch.ones_like(self._units, dtype=torch.bool)
        shape = (len(self._units), self._block)
        self._own = inverse.view(*shape, *shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
        """Each unit's part of the inverse, as it is now: [units, block, block]."""

    def remove_cheapest(self) -> tuple[Tensor, Tensor]:
        """The next units to go, in order, and what each costs, after which the others are corrected for their loss."""
        scores = torch.where(self._open, self._costs(), torch.inf)
        pool = scores.topk(min(POOL, self.num_open) if self._block == 1 else 1, largest=False).indices
        if self._block == 1:
            gone, spent, whiten = self._within(pool)
        else:
            gone, spent, whiten = pool, scores[pool].clamp_min(0), _inverse_factor(self._own[pool[0]])
        units = self._units[gone]
        self._remove(gone, whiten)
        return units, spent

    def _within(self, pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of single columns many at once: (which go, costs, the inverse of the factor of their part of the inverse).

        Costs depend on the rows through their products only, so the pool is a pair of small square matrices, its part of the
        inverse, and `energy = rows rows^T`.
        """
        lost, rows = self._lost.index_select(1, pool), self._rows.index_select(0, pool)
        own, energy = square_part(self._inverse, pool).addmm_(lost.T, lost, alpha=-1), rows @ rows.T
        both = torch.cat([own, energy], dim=1).double().cpu().numpy()  # a step takes less there than a GPU takes to begin one
        picked, spent = _eliminate(both.copy())
        factor, indefinite = dpotrf(both[picked][:, picked], lower=1)
        small = _inverse_factor(torch.from_numpy(both[picked][:, picked])).numpy() if indefinite else dtrtri(factor, lower=1)[0]
        found = torch.from_numpy(np.column_stack([picked, spent, small])).to(rows.device)  # at once: each copy has to be awaited
        return pool[found[:, 0].long()], found[:, 1].to(rows.dtype), found[:, 2:].to(rows.dtype)

    def _costs(self) -> Tensor:
        """What removing each unit costs now: `tr(W_B^T (H_BB)^-1 W_B)`, [units]."""
        if self._block == 1:
            return torch.linalg.vector_norm(self._rows, dim=1).square() / self._own.flatten()
        parts = self._rows.view(len(self._units), self._block, -1)
        return (torch.linalg.inv(self._own) * (parts @ parts.mT)).sum((1, 2))  # of squares: half the time that solving takes

    def _remove(self, gone: Tensor, whiten: Tensor) -> None:
        """Correct what is left for the loss of the units at these places; whiten: L^-1, `L L^T` their part of the inverse."""
        columns, count = unit_columns(gone, self._block), self._block
        beside = self._inverse.index_select(0, columns).addmm_(self._lost.index_select(1, columns).T, self._lost, alpha=-1)
        lost = whiten @ beside
        self._rows.addmm_(lost.T, whiten @ self._rows.index_select(0, columns), alpha=-1)
        parts = lost.view(len(lost), len(self._units), count)
        squares = lost.square().sum(0).view_as(self._own) if count == 1 else torch.einsum("kui,kuj->uij", parts, parts)
        self._own -= squares
        self._own[gone] = torch.eye(count, dtype=lost.dtype, device=lost.device)
        self._open[gone] = False
        self.num_open -= len(gone)
        start, stop = len(self._lost), len(self._lost) + len(lost)
        self._room[start:stop] = lost
        self._lost = self._room[:stop]
        if self.num_open < 0.8 * len(self._units):
            self._compress()

    def _compress(self) -> None:
        """Forget the places of what is gone, and bring the inverse up to date."""
        columns = unit_columns(self._open.nonzero().flatten(), self._block)
        self._units = self._units[self._open]
        inverse, lost = square_part(self._inverse, columns), self._lost.index_select(1, columns)
        self._stand(inverse.addmm_(lost.T, lost, alpha=-1), self._rows.index_select(0, columns))


def _inverse_factor(matrix: Tensor) -> Tensor:
    """L^-1, with `L L^T = matrix`."""
    return torch.linalg.solve_triangular(cholesky(matrix), torch.eye(len(matrix)).to(matrix), upper=False)


def _eliminate(both: Matrix) -> tuple[list[int], list[float]]:
    """Greedy elimination within the pool; overwrites `both` = [inverse, energy]. By hand: tiny steps, cheaper than torch calls.

    Removing unit u takes `spread row^T` from the inverse and `spread half^T + half spread^T` from the energy.
    """
    count = len(both)
    inverse, energy = both[:, :count], both[:, count:]
    of_inverse, of_energy, costs = inverse.diagonal(), energy.diagonal(), np.empty(count)
    left, right = np.empty((2, count)), np.zeros((2, 2 * count))
    gone: list[int] = []
    spent: list[float] = []
    for _ in range(min(PANEL, count)):
        np.divide(of_energy, of_inverse, out=costs)
        unit = int(costs.argmin())
        gone.append(unit)
        spent.append(max(0.0, float(costs[unit])))  # rounding may take copies below zero
        row, beside, spread = inverse[unit], energy[unit], right[1, count:]
        np.divide(row, row[unit], out=spread)
        left[0] = spread
        np.subtract(beside, beside[unit] / 2 * spread, out=left[1])
        right[0, :count], right[0, count:] = row, left[1]
        dgemm(-1.0, right.T, left.T, 1.0, both.T, trans_b=1, overwrite_c=1)  # transposes lie in memory as BLAS wants them
        inverse[unit, unit], energy[unit, unit] = 1, np.inf  # for good: nothing finite takes it away
    return gone, spent
