"""Least squares for the layer that reads a group: its kept columns take over from those that go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .families import Group, weight
from .linalg import add_to_gram, damped_diagonal, held_out_ridge, product, solve_psd, symmetrize
from .processes import Processes
from .slicing import consumer_columns, set_weight, slice_group
from .walk import BlockWalk

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class LeastSquares:
    """`min ||z X - y||^2 + ridge ||diag(G)^(1/2) X||^2` over tokens, G = z^T z, from sums over them in float64.

    ridge None: half of the one of `RIDGES` with which solutions from one half of the tokens fit the other half best, for
    there are twice as many in the end. Neighbouring tokens tell the same story, so the halves are made of whole stretches.
    """

    def __init__(self, width: int, out: int, ridge: float | None, device: torch.device) -> None:
        self.ridge = ridge
        parts = 1 if ridge is not None else 2
        self.sums = torch.zeros(parts, width, width + out, dtype=torch.float64, device=device)
        """Of each part of the tokens: [G, z^T y]."""

    def add(self, z: Tensor, y: Tensor) -> None:
        """Some tokens more: z [tokens, width], y [tokens, out]."""
        parts = len(self.sums)
        for sums, own, wanted in zip(self.sums, z.tensor_split(parts), y.tensor_split(parts), strict=True):
            add_to_gram(sums[:, : len(sums)], own)
            sums[:, len(sums) :] += product(own.T, wanted)

    def solve(self, processes: Processes) -> Tensor:
        """X^T [out, width]. Once: the sums are lost, as there may be no memory for more of them."""
        processes.add_up(self.sums)
        systems = [(sums[:, : len(sums)], sums[:, len(sums) :]) for sums in self.sums]
        ridge = self.ridge
        if ridge is None:  # no ridge is so small that single precision would not do to compare them
            fitted, held_out = [(gram.float(), toward.float()) for gram, toward in systems]
            symmetrize(held_out[0])
            ridge = held_out_ridge([(fitted, held_out)], RIDGES) / 2
        gram, toward = systems[0]
        for more, beside in systems[1:]:
            gram += more
            toward += beside
        gram.diagonal().copy_(damped_diagonal(gram, ridge))
        return solve_psd(gram, toward).T


def corrected_consumer(
    walk: BlockWalk, group: Group, keep: Tensor, ridge: float | None = None, with_bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(weight [out, kept columns], bias [out] or None) of the consumer with only the units `keep`, on the walk's activations.

    `W' = W_S + (G_SS + ridge diag G_SS)^-1 G_SE W_E`, S the kept and E the other columns, from kept columns only: G_SS and
    z_S^T (z_E W_E^T); the full Gram matrix is never formed. ridge: as `LeastSquares` has it. `with_bias`: a bias, where there
    is one, is corrected as the weight of a constant input, so that it takes over the mean of what goes.
    """
    full, bias = weight(group.consumer), group.consumer.bias
    columns = consumer_columns(group, keep).to(full.device)
    gone = torch.ones(full.shape[1], dtype=torch.bool, device=full.device).index_fill_(0, columns, False)
    rest = gone.nonzero().flatten()
    lost = full[:, rest].T.to(torch.promote_types(full.dtype, torch.float32))
    constant = 1 if with_bias and isinstance(bias, Tensor) else 0
    system = LeastSquares(len(columns) + constant, len(full), ridge, full.device)

    def add(_: Group, z: Tensor) -> None:
        kept = z.index_select(1, columns)
        if constant:
            kept = torch.cat([kept, kept.new_ones(len(kept), 1)], dim=1)
        system.add(kept, product(z.index_select(1, rest), lost))

    walk.halt(group, add, columns)
    change = system.solve(walk.processes)
    corrected = (full[:, columns] + change[:, : len(columns)]).to(full.dtype)
    return corrected, (bias + change[:, -1]).to(bias.dtype) if constant and isinstance(bias, Tensor) else None


def cut_and_correct(walk: BlockWalk, group: Group, cut: Callable[[], None], ridge: float | None = None) -> None:
    """`cut` a group whose other units change with that, and have the consumer absorb the change too.

    `W' = W_S + (G + ridge diag G)^-1 z_S^T (z W^T - z_S W_S^T)` with z what the consumer read before, z_S what it reads of the
    same tokens afterwards, and G = z_S^T z_S. What it made before is kept for all tokens meanwhile.
    """
    full = weight(group.consumer)
    wanted: list[Tensor] = []
    walk.run(group.block, [group], lambda _, z: wanted.append((z @ full.T.to(z)).cpu()))
    cut()
    small = weight(group.consumer)
    system = LeastSquares(small.shape[1], len(small), ridge, small.device)
    walk.run(group.block, [group], lambda _, z: system.add(z, wanted.pop(0).to(z) - z @ small.T.to(z)))
    set_weight(group.consumer, (small + system.solve(walk.processes)).to(small.dtype))


def set_bias(linear: nn.Module, value: Tensor) -> None:
    """Give `linear` the bias `value` [out]: a new parameter, as `slicing.set_weight` makes one."""
    linear.bias = nn.Parameter(value.clone(), bool(linear.bias.requires_grad))


def put(group: Group, keep: Tensor, corrected: Tensor, bias: Tensor | None) -> None:
    """Slice a group, and give its consumer the weight that was made for what is left, and the bias if there is one."""
    slice_group(group, keep)
    set_weight(group.consumer, corrected)
    if bias is not None:
        set_bias(group.consumer, bias)
