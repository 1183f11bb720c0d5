"""Least squares for the layer that reads a group: its kept columns take over from those that go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .families import Group, weight
from .linalg import add_to_gram, damped_diagonal, solve_psd, symmetrize
from .slicing import consumer_columns, set_weight
from .walk import BlockWalk


def corrected_consumer(
    walk: BlockWalk, group: Group, keep: Tensor, ridge: float, with_bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(weight [out, kept columns], bias [out] or None) of the consumer with only the units `keep`, on the walk's activations.

    `W' = W_S + (G_SS + ridge diag G_SS)^-1 G_SE W_E`, S the kept and E the other columns, from kept columns only: G_SS and
    z_S^T (z_E W_E^T); the full Gram matrix is never formed. `with_bias`: a bias, where there is one, is corrected as the weight
    of a constant input, so that it takes over the mean of what goes.
    """
    full, bias = weight(group.consumer), group.consumer.bias
    columns = consumer_columns(group, keep).to(full.device)
    gone = torch.ones(full.shape[1], dtype=torch.bool, device=full.device).index_fill_(0, columns, False)
    rest = gone.nonzero().flatten()
    lost = full[:, rest].T.to(torch.promote_types(full.dtype, torch.float32))
    constant = 1 if with_bias and isinstance(bias, Tensor) else 0
    width = len(columns) + constant
    sums = torch.zeros(width, width + len(full), dtype=torch.float64, device=full.device)
    gram, cross = torch.split(sums, [width, len(full)], dim=1)

    def add(_: Group, z: Tensor) -> None:
        kept = z.index_select(1, columns)
        if constant:
            kept = torch.cat([kept, kept.new_ones(len(kept), 1)], dim=1)
        add_to_gram(gram, kept)
        cross.add_(kept.T @ (z.index_select(1, rest) @ lost))

    walk.run(group.block, [group], add)
    walk.processes.add_up(sums)
    change = solved(sums, ridge)
    corrected = (full[:, columns] + change[:, : len(columns)]).to(full.dtype)
    return corrected, (bias + change[:, -1]).to(bias.dtype) if constant and isinstance(bias, Tensor) else None


def cut_and_correct(walk: BlockWalk, group: Group, cut: Callable[[], None], ridge: float) -> None:
    """`cut` a group whose other units change with that, and have the consumer absorb the change too.

    `W' = W_S + (G + ridge diag G)^-1 z_S^T (z W^T - z_S W_S^T)` with z what the consumer read before, z_S what it reads of the
    same tokens afterwards, and G = z_S^T z_S. What it made before is kept for all tokens meanwhile.
    """
    full = weight(group.consumer)
    wanted: list[Tensor] = []
    walk.run(group.block, [group], lambda _, z: wanted.append((z @ full.T.to(z)).cpu()))
    cut()
    small = weight(group.consumer)
    width, out = small.shape[1], len(small)
    sums = torch.zeros(width, width + out, dtype=torch.float64, device=small.device)
    gram, cross = torch.split(sums, [width, out], dim=1)

    def add(_: Group, z: Tensor) -> None:
        add_to_gram(gram, z)
        cross.add_(z.T @ (wanted.pop(0).to(z) - z @ small.T.to(z)))

    walk.run(group.block, [group], add)
    walk.processes.add_up(sums)
    change = solved(sums, ridge)
    set_weight(group.consumer, (small + change).to(small.dtype))


def solved(sums: Tensor, ridge: float) -> Tensor:
    """`((G + ridge diag G)^-1 C)^T` of `sums` = [G, C]; the sums are lost: there may be no memory for a second G."""
    gram, cross = sums[:, : len(sums)], sums[:, len(sums) :]
    symmetrize(gram)
    gram.diagonal().copy_(damped_diagonal(gram, ridge))
    return solve_psd(gram, cross).T


def set_bias(linear: nn.Module, value: Tensor) -> None:
    """Give `linear` the bias `value` [out]: a new parameter, as `slicing.set_weight` makes one."""
    linear.bias = nn.Parameter(value.clone(), bool(linear.bias.requires_grad))
