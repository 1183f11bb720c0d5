"""Neurons of experts: each expert has statistics, an order and a correction of its own, and keeps as many as the others.

`E` experts of `F` neurons; columns stand neuron after neuron, of each neuron those of all experts. What an expert makes of a
token that its router sent elsewhere is zero, so its Gram matrix is one over its own tokens. Products of two experts' neurons
are left out: with them, a matrix would have `E^2` times the elements, 128 GiB in a block of Mixtral 8x22B.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..correction import LeastSquares
from ..elimination import backward_elimination
from ..families import Group, weight
from ..linalg import add_to_gram
from ..walk import BlockWalk


def each_expert(group: Group, z: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(expert, what its neurons are for the tokens that it is asked about: [its tokens, F]). z: [tokens, F * E]."""
    for expert in range(group.width):
        own = z[:, expert :: group.width]
        yield expert, own[(own != 0).any(1)]


def add_to_grams(grams: Tensor, group: Group, z: Tensor) -> None:
    """Add each expert's `z^T z` to `grams` [E, F, F], in place; only on and above the diagonals."""
    for expert, own in each_expert(group, z):
        add_to_gram(grams[expert], own)


def rank_in_experts(group: Group, grams: Tensor, scaled: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """(order [F, E], error [F + 1]): `order[k]` is the k-th best neuron of every expert, errors are sums over experts.

    scaled: the consumer's weight in the metric of its outputs, [out, F * E]. Within an expert as `backward_elimination`.
    """
    orders, errors = zip(
        *(backward_elimination(grams[i], scaled[:, i :: group.width], 1, ridge) for i in range(group.width)), strict=True
    )
    return torch.stack(orders, dim=1), torch.stack(errors).sum(0)


def corrected_experts(walk: BlockWalk, group: Group, keep: Tensor, ridge: float | None) -> Tensor:
    """The consumer's weight [out, k * E] with only the neurons `keep` [k, E]: `correction.corrected_consumer`, by expert."""
    full, count = weight(group.consumer), len(keep)
    by_expert = full.view(len(full), group.units, group.width).permute(2, 1, 0)  # [E, F, out]
    keep = keep.to(full.device)
    gone = torch.ones(group.width, group.units, dtype=torch.bool, device=full.device).scatter_(1, keep.T, False)
    rest = gone.nonzero()[:, 1].view(group.width, -1)
    exact = torch.promote_types(full.dtype, torch.float32)
    systems = [LeastSquares(count, len(full), ridge, full.device) for _ in range(group.width)]

    def add(_: Group, z: Tensor) -> None:
        for expert, own in each_expert(group, z):
            systems[expert].add(own[:, keep[:, expert]], own[:, rest[expert]] @ by_expert[expert, rest[expert]].to(exact))

    walk.run(group.block, [group], add)
    corrected = torch.empty(len(full), count, group.width, dtype=full.dtype, device=full.device)
    for expert, system in enumerate(systems):
        corrected[:, :, expert] = (by_expert[expert, keep[:, expert]].T + system.solve(walk.processes)).to(full.dtype)
    return corrected.flatten(1)
