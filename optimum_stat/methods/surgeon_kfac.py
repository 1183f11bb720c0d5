"""Optimal brain surgeon on one linear layer whose curvature is a Kronecker product: costs and updates, tensors only.

Conventions: `weight` [out, in]; the loss changes by `1/2 vec(D)^T (G (x) A) vec(D)` when the weight changes by D, vec row by row,
with A [in, in] the second moment of the layer's inputs and G [out, out] that of the gradients of its outputs. `a_inverse` and
`g_inverse` are their damped inverses. A layer's bias is its last column, and A then ends with the constant input 1.
Source: The LLM Surgeon (2312.17244).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import cholesky, solve_psd


def damped_inverse(factor: Tensor, damping: float) -> Tensor:
    """`(factor + damping * mean(diag factor) * I)^-1` in float64. Source: the authors' code, which damps relative to the mean."""
    mean = factor.diagonal().mean().clamp_min(1e-30)  # a layer may be dead, and its inverse must stay finite
    eye = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
    return torch.cholesky_inverse(cholesky(factor.double() + max(damping, 1e-12) * mean * eye))


def element_costs(weight: Tensor, g_inverse: Tensor, a_inverse: Tensor) -> Tensor:
    """What removing each weight alone costs after the best update of all others: `1/2 W_ij^2 / (G^-1_ii A^-1_jj)`, [out, in]."""
    return weight.square() / (2 * g_inverse.diagonal()[:, None] * a_inverse.diagonal())


def column_costs(weight: Tensor, g: Tensor, a_inverse: Tensor, block: int = 1) -> Tensor:
    """What removing each run of `block` columns costs: `1/2 tr(W_B^T G W_B (A^-1_BB)^-1)`, [in // block].

    g is the undamped factor, as in the authors' code. With `block` 1 it is the published `1/2 (W^T G W)_jj / A^-1_jj`.
    """
    units = weight.shape[1] // block
    parts = weight.T.reshape(units, block, -1)
    energy = (parts @ g) @ parts.transpose(1, 2)
    own = a_inverse.view(units, block, units, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return torch.linalg.solve(own, energy).diagonal(dim1=1, dim2=2).sum(1) / 2


def row_costs(weight: Tensor, a: Tensor, g_inverse: Tensor, block: int = 1) -> Tensor:
    """What removing each run of `block` rows costs: `1/2 tr(W_B A W_B^T (G^-1_BB)^-1)`, [out // block]."""
    return column_costs(weight.T, a, g_inverse, block)


def remove_columns(weight: Tensor, a_inverse: Tensor, columns: Tensor, max_correlate: int = 0) -> Tensor:
    """`W P_A`: the weight without `columns` (they are zero), the others moved to where the loss is least, [out, in].

    `P_A = I - E_C (A^-1_CC)^-1 A^-1_C:`; G cancels. `max_correlate` columns at a time, the others as if alone (0: all together).
    With all together, rows after columns is the exact joint optimum `P_G W P_A`, in either order; the authors' code adds the two
    updates instead, which is not.
    """
    removed = weight.to(a_inverse.dtype).clone()
    for part in torch.split(columns, max_correlate or max(1, len(columns))):
        rows = a_inverse.index_select(0, part)
        removed -= weight.to(rows.dtype)[:, part] @ solve_psd(rows.index_select(1, part), rows)
    removed[:, columns] = 0
    return removed


def remove_rows(weight: Tensor, g_inverse: Tensor, rows: Tensor, max_correlate: int = 0) -> Tensor:
    """`P_G W`: the weight without `rows`, the others moved to where the loss is least, [out, in]."""
    return remove_columns(weight.T, g_inverse, rows, max_correlate).T


def remove_elements(weight: Tensor, g: Tensor, a: Tensor, gone: Tensor, tolerance: float = 1e-3, max_steps: int = 12) -> Tensor:
    """The weight without the elements where `gone` [out, in] is true, all others moved together to where the loss is least.

    g and a are the damped factors. Minimises `1/2 tr(G D A D^T)` over the D that empties these elements, by conjugate gradients
    on `(G D A)_kept = 0`: first row by row (G = I), which gets near the end sooner, then with G; each for at most `max_steps`, or
    until the residual is `tolerance` times that of no update at all. A step is a few products of matrices, and nothing of the
    size of the number of weights squared ever exists.
    Differs from the source, which correlates at most `max_correlate` elements at a time: `remove_elements_in_runs`.
    """
    keep, eye = (~gone).to(g.dtype), torch.eye(len(g), dtype=g.dtype, device=g.device)
    change = -weight.to(g.dtype) * gone
    for metric in (eye, g):
        change = _descend(change, metric, a, keep, tolerance, max_steps)
    return keep * (weight.to(g.dtype) + change)


def _descend(change: Tensor, g: Tensor, a: Tensor, keep: Tensor, tolerance: float, max_steps: int) -> Tensor:
    """Conjugate gradients for the kept elements of `change`; what is emptied stays as it is."""
    # heavier damping than that of the problem makes the better preconditioner, because only part of the elements may move
    inverses = [torch.cholesky_inverse(cholesky(factor + torch.diag(factor.diagonal()))) for factor in (g, a)]
    start = (keep * (g @ (change * (1 - keep)) @ a)).norm()
    residual = -keep * (g @ change @ a)
    direction, before = torch.zeros_like(residual), residual.new_tensor(1.0)
    for _ in range(max_steps):
        if residual.norm() <= tolerance * start:
            break
        scaled = keep * (inverses[0] @ residual @ inverses[1])
        now = (residual * scaled).sum()
        direction = scaled + (now / before) * direction
        ahead = keep * (g @ direction @ a)
        step = now / (direction * ahead).sum()
        change = change + step * direction
        residual, before = residual - step * ahead, now
    return change


def remove_elements_in_runs(weight: Tensor, g_inverse: Tensor, a_inverse: Tensor, gone: Tensor, max_correlate: int) -> Tensor:
    """The published update: row after row, at most `max_correlate` elements at a time, each run on the weights the last one left.

    `W' = W - G^-1 M A^-1`, M empty but for the run's elements Q: `M_Q = (G^-1_rr o A^-1_cc)^-1 W_Q`. What has been emptied may
    move again with a later run and is emptied at the end, as in the authors' code.
    """
    result = weight.to(g_inverse.dtype).clone()
    for run in torch.split(gone.nonzero(), max_correlate):
        rows, columns = run[:, 0], run[:, 1]
        correlation = g_inverse[rows][:, rows] * a_inverse[columns][:, columns]
        multipliers = solve_psd(correlation, result[rows, columns][:, None])[:, 0]
        first, last = int(rows[0]), int(rows[-1]) + 1
        sparse = torch.zeros(last - first, result.shape[1], dtype=result.dtype, device=result.device)
        sparse[rows - first, columns] = multipliers
        result -= g_inverse[:, first:last] @ (sparse @ a_inverse)
    result[gone] = 0
    return result
