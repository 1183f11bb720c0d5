"""Whole experts: which a model has, and how one is dropped with its row of the router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import at
from .experts import keep_stacked
from .families import Group, find_blocks, find_groups
from .family_table import EXPERT_COUNT, ROUTERS


@dataclass(frozen=True, eq=False)
class Mixture:
    """The experts of one block, and what chooses among them."""

    group: Group
    """Of their neurons."""
    router: nn.Module
    units: int
    """How many experts there are."""
    fewest: int
    """How many a token goes through."""

    @property
    def name(self) -> str:
        """In messages."""
        return f"{self.group.block}.{self.group.place}"


def find_mixtures(model: Any) -> list[Mixture]:
    """Every block's experts, in the order of the forward pass: none, if the model has none or a router of an unknown form."""
    blocks, found = find_blocks(model), []
    for group in find_groups(model, ("neurons",)):
        if group.experts is None:
            continue
        parent = next(each for each in blocks[group.block].modules() if group.experts in each._modules.values())
        router = next((own for name in ROUTERS if (own := at(parent, name)) is not None), None)
        units = int(getattr(group.experts, EXPERT_COUNT))
        if router is None or not _is_router(router, units):
            return []
        found.append(Mixture(group, router, units, group.active[0]))
    return found


def keep_experts(model: Any, keep: Tensor) -> None:
    """Keep only the experts `keep`, counted on from one block to the next, in place, each with its row of the router.

    A token then goes to the best of those that are left, with the shares that the router gives these.

    Raises:
        ValueError: some block would have fewer than a token goes through.
    """
    mixtures = find_mixtures(model)
    own = split(mixtures, keep)
    for mixture, experts in zip(mixtures, own, strict=True):
        if len(experts) < mixture.fewest:
            raise ValueError(f"{mixture.name} would keep {len(experts)} experts, and a token goes through {mixture.fewest}.")
    for mixture, experts in zip(mixtures, own, strict=True):
        _keep(mixture, experts)


def split(mixtures: Sequence[Mixture], keep: Tensor) -> list[Tensor]:
    """Which of its experts each block keeps, in their old order."""
    mask = torch.zeros(sum(mixture.units for mixture in mixtures), dtype=torch.bool, device="cpu")
    mask[keep.cpu()] = True
    return [own.nonzero().flatten() for own in torch.split(mask, [mixture.units for mixture in mixtures])]


def fewest(model: Any) -> Tensor:
    """As few experts as there can be: the first of each block."""
    parts, first = [], 0
    for mixture in find_mixtures(model):
        parts.append(torch.arange(first, first + mixture.fewest, device="cpu"))
        first += mixture.units
    return torch.cat(parts)


def counts(model: Any) -> list[int]:
    """How many experts each block has, of those that have some."""
    return [mixture.units for mixture in find_mixtures(model)]


@torch.no_grad()
def _keep(mixture: Mixture, keep: Tensor) -> None:
    if len(keep) == mixture.units:
        return
    router: Any = mixture.router
    for name, value in list(router._parameters.items()):
        if value is not None:
            setattr(router, name, nn.Parameter(value[keep.to(value.device)].clone(), value.requires_grad))
    keep_stacked(mixture.group.experts, keep)
    for module in (router, mixture.group.experts):
        if getattr(module, EXPERT_COUNT, None) == mixture.units:
            setattr(module, EXPERT_COUNT, len(keep))


def _is_router(router: nn.Module, units: int) -> bool:
    """Whether it is rows, and perhaps biases, of experts and nothing else."""
    parameters = {name: value for name, value in router.named_parameters() if value is not None}
    rows = all(len(value) == units for value in parameters.values())
    plain = type(getattr(router, "top_k", None)) is int and not list(router.buffers())
    return rows and plain and "weight" in parameters and parameters.keys() <= {"weight", "bias"}
