"""Second moments of what consumers read, from which STAT decides and corrects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import Group, weight
from ..linalg import add_to_gram, symmetrize
from ..probes import OVERFLOW
from ..walk import BlockWalk
from .stat_experts import add_to_grams


@dataclass(frozen=True)
class Inputs:
    """What one consumer reads, z [tokens, width]."""

    gram: Tensor
    """`z^T z`, float64: [width, width], or [experts, neurons, neurons]; with a mean, `(z - mean)^T (z - mean)`."""
    mean: Tensor | None
    """Where the consumer has a bias, which takes over the mean of what goes: only what varies has to be made up for."""


def inputs_of(
    walk: BlockWalk, index: int, groups: list[Group], *, advance: bool = False, centred: bool = True
) -> dict[str, Inputs]:
    """Of each group's consumer, all groups of one block in one run; not `centred`, without means."""
    grams = {group.name: _nothing_yet(group) for group in groups}
    biased = [group for group in groups if centred and group.experts is None and isinstance(group.consumer.bias, Tensor)]
    sums = {group.name: grams[group.name].new_zeros(len(grams[group.name]) + 1) for group in biased}

    def add(group: Group, z: Tensor) -> None:
        if group.experts is not None:
            add_to_grams(grams[group.name], group, z)
            return
        add_to_gram(grams[group.name], z)
        if group.name in sums:
            sums[group.name] += torch.cat([z.sum(0), z.new_tensor([len(z)])])  # of as few as one product of the Gram matrix has

    walk.run(index, groups, add, advance)
    walk.processes.add_up(*grams.values(), *sums.values())
    found = {}
    for name, gram in grams.items():
        for each in gram if gram.dim() == 3 else (gram,):
            symmetrize(each)
        if not torch.isfinite(gram.diagonal(dim1=-2, dim2=-1)).all():  # no product is larger than both squares
            raise ValueError(
                f"The activations that enter {name} are NaN or infinite; nothing can be decided from them. {OVERFLOW}"
            )
        mean = sums[name][:-1] / sums[name][-1] if name in sums else None
        found[name] = Inputs(gram if mean is None else gram.addr_(mean, mean, alpha=-float(sums[name][-1])), mean)
    return found


def _nothing_yet(group: Group) -> Tensor:
    """[width, width], or one such matrix for every expert."""
    width = group.units if group.experts is not None else group.units * group.width
    each = (group.width,) if group.experts is not None else ()
    return torch.zeros(*each, width, width, dtype=torch.float64, device=weight(group.consumer).device)
