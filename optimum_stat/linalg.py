"""The matrix routines the methods share: Gram matrices in, orders, error curves and corrections out.

Conventions, everywhere in this file: a linear layer computes `y = z @ W.T` from `z` [tokens, width] with `W` [out, width];
`gram` = sum over tokens of `z^T z`, [width, width]; a *unit* is a run of `block` neighbouring columns of `z`, so there are
`width // block` of them. All results are exact functions of second moments, whatever the number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

System = tuple[Tensor, Tensor]
"""(z^T z, z^T y)."""

OUTPUTS = 64  # or random sums of them, enough to compare a few ridges
CORNER = 256  # of a matrix, copied at once when it is made symmetric: copies of larger ones leave the processor's caches
PANEL = 192  # rows of a Cholesky factor that are made at once
CHUNK = 2048  # rows whose products may be summed in single precision before they enter a double precision total


def add_to_gram(gram: Tensor, rows: Tensor) -> None:
    """Add `rows^T rows` to `gram` [width, width] in place; call `symmetrize` once after the last addition.

    Products in the rows' precision (`product`) over at most 2,048 rows at a time, sums in the Gram matrix's (float64): single
    precision loses its digits inside long sums. Only blocks on and above the diagonal are computed.
    """
    width, panel = rows.shape[1], max(256, -(-rows.shape[1] // 6))
    for chunk in torch.split(rows, CHUNK):
        parts = _halves(chunk, 2) or [chunk]
        for start in range(0, width, panel):
            stop = min(start + panel, width)
            gram[start:stop, start:] += _products([part[:, start:stop].T for part in parts], [part[:, start:] for part in parts])


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, by a GPU's tensor cores where they lose nothing: if one of the two comes from a model in half precision."""
    lefts, rights = _halves(left, 3), _halves(right, 3)
    return _products(lefts, rights) if 0 < len(lefts) * len(rights) < 4 else left @ right


def _halves(matrix: Tensor, most: int) -> list[Tensor]:
    """The fewest matrices in bfloat16 that add up to `matrix`; none if these are too many, or there is nothing to gain.

    What a model in bfloat16 hands on is one, in float16 two, and all numbers in single precision are three. Their products are
    exact in single precision, in which tensor cores sum them, in a tenth of its own time.
    """
    halves, rest = list[Tensor](), matrix
    if matrix.dtype == torch.float32 and matrix.is_cuda and _has_tensor_cores(matrix.device):
        while len(halves) < most:
            halves.append(rest.bfloat16())
            rest = rest - halves[-1]
            if not rest.any():
                return halves
    return []


@functools.cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Such that take half precision and return single; torch asks for that since its version 2.8."""
    known = torch.__version__ >= "2.8" and torch.version.hip is None
    return known and torch.cuda.get_device_capability(device) >= (8, 0)


def _products(lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    """Of two sums, of one matrix each or of halves."""
    if lefts[0].dtype != torch.bfloat16:
        return lefts[0] @ rights[0]
    return functools.reduce(torch.add, (torch.mm(one, other, out_dtype=torch.float32) for one in lefts for other in rights))


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


def held_out_ridge(folds: Sequence[tuple[System, System]], ridges: Sequence[float]) -> float:
    """The one of `ridges` with which the solution from a part of the data is best on another part, over all such pairs.

    folds: of each part (G, C) = (z^T z, z^T y); the solution from the first is `X = (G + ridge diag G)^-1 C`, and what it loses
    on the second is `||z X - y||^2 = <X, G X - 2 C>` and a constant. Of very many outputs y, random sums are fitted. The
    loss falls and then rises with the ridge, so that the search goes downhill from the one in the middle.
    """
    outputs = folds[0][0][1].shape[1]
    sums = torch.eye(outputs) if outputs <= OUTPUTS else torch.randn(outputs, OUTPUTS, generator=torch.Generator().manual_seed(0))
    few = [[(gram, toward @ sums.to(toward)) for gram, toward in fold] for fold in folds]

    @functools.cache
    def lost(ridge: float) -> float:
        total = 0.0
        for (gram, toward), (other_gram, other_toward) in few:
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
    """Lower Cholesky factor of a positive semi-definite matrix, of which what stands below the diagonal is not read.

    One that rounding has made indefinite (fewer tokens than columns, products in single precision) is replaced by the nearest
    one whose eigenvalues are at least as large as the rounding errors show to be: the size of its most negative one.
    """
    factor = _factor(matrix)
    if factor is not None:
        return factor
    if not torch.isfinite(matrix).all():
        raise ValueError(f"A Gram matrix must be finite; this one, {list(matrix.shape)}, is not.")
    values, vectors = torch.linalg.eigh(matrix, UPLO="U")
    values = values.clamp_min(max(-float(values[0]), float(values[-1]) * 1e-12))
    upper = torch.linalg.qr(values.sqrt()[:, None] * vectors.T).R
    return (upper * torch.where(upper.diagonal() < 0, -1, 1)[:, None]).T


def _factor(matrix: Tensor) -> Tensor | None:
    """Lower Cholesky factor of a positive definite matrix, None of others. Only what stands on and above the diagonal is read.

    On a CPU large ones go by panels, for matrix products do most of the work then: LAPACK's own takes up to twice as long.
    """
    if matrix.device.type != "cpu" or len(matrix) <= 512:
        factor, info = torch.linalg.cholesky_ex(matrix.mT)
        return None if int(info) else factor
    upper = matrix.clone(memory_format=torch.contiguous_format)
    for start in range(0, len(upper), PANEL):
        stop = min(start + PANEL, len(upper))
        rows, above = upper[start:stop, start:], upper[:start, start:]
        rows.addmm_(above[:, : stop - start].T, above, alpha=-1)
        corner, info = torch.linalg.cholesky_ex(rows[:, : stop - start].mT)
        if int(info):
            return None
        rows[:, : stop - start] = corner.T
        rows[:, stop - start :] = torch.linalg.solve_triangular(corner, rows[:, stop - start :], upper=False)
    return upper.triu_().T


def solve_psd(matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix^-1 right` for a symmetric positive semi-definite matrix, of which what stands below the diagonal is not read.

    Its null space, if any, is left out.
    """
    factor = _factor(matrix)
    if factor is not None:
        # cholesky_solve gives the same bits, from a copy of the factor: of models as large as memory, that is too much
        half = torch.linalg.solve_triangular(factor, right, upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)
    values, vectors = torch.linalg.eigh(matrix, UPLO="U")
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
    residual = sums_of_what_goes(lower.square().sum(0)).sqrt()
    return torch.from_numpy(order.astype("int64")) - 1, lower.diagonal().clone(), residual


def error_curve(gram: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    """Error left when the first k columns of `order` are kept, every k at once, corrections included: [width + 1].

    `error[k] = min_V ||z W^T - z[:, order[:k]] V^T||^2`. With `gram[order][:, order] = L L^T` and `Q = L^T W^T[order]`
    it is `sum_{i >= k} ||Q_i||^2`: one factorisation for the whole curve.
    """
    factor = cholesky(square_part(damped(gram, 0.0), order.to(gram.device)))
    return sums_of_what_goes((factor.T @ weight.T[order]).square().sum(1))


def sums_of_what_goes(lost: Tensor) -> Tensor:
    """What each unit loses, [units] in their order -> the sum over all but the first k, for every k: [units + 1]."""
    return torch.cat([lost.flip(0).cumsum(0).flip(0), lost.new_zeros(1)])


def unit_columns(units: Tensor, block: int) -> Tensor:
    """The columns of `units`, each `block` wide: [len(units) * block]."""
    return (units[:, None] * block + torch.arange(block, device=units.device)).flatten()


def square_part(matrix: Tensor, at: Tensor) -> Tensor:
    """`matrix[at][:, at]`, ten times faster."""
    return matrix.index_select(0, at).index_select(1, at)
