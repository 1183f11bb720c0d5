"""Movement scores: where they stand on a weight, the straight-through gradient, and what they say of a unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..families import Group, Producer, weight


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear of a group, [out, in]: its rows belong to units (a producer), or its columns do (the consumer)."""

    linear: nn.Module
    group: Group
    unit_of: Tensor
    """The unit of every row, or of every column; for rows that belong to none and stay, the number of units: int64."""
    run_of: Tensor
    """The run of every row, of which a producer may have several (3 for a fused query, key, value): int64."""
    is_consumer: bool
    block_size: int
    """Of the grid of blocks that have scores of their own; 0: the group's units have, and all its layers share them."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        value = weight(self.linear)
        return value.shape[0], value.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks in a column and in a row; those at the edge may be smaller."""
        out, width = self.shape
        return -(-out // self.block_size), -(-width // self.block_size)

    def spread(self, values: Tensor) -> Tensor:
        """From one value a block [grid], or a unit [units], to one a weight; broadcasts to [out, in]."""
        if self.block_size:
            out, width = self.shape
            rows = values.repeat_interleave(self.block_size, 0)[:out]
            return rows.repeat_interleave(self.block_size, 1)[:, :width]
        return self.by_unit(values)

    def by_unit(self, values: Tensor) -> Tensor:
        """From one value a unit, [units], to one a row or column."""
        spread = torch.cat([values, values.new_ones(1)])[self.unit_of.to(values.device)]
        return spread[None] if self.is_consumer else spread[:, None]

    def gathered(self, values: Tensor) -> Tensor:
        """The sum of one value a weight [out, in] over every block or unit: what `spread` spreads, added up."""
        if self.block_size:
            size = self.block_size
            down, across = self.grid
            padded = pad(values, (0, across * size - values.shape[1], 0, down * size - values.shape[0]))
            return padded.view(down, size, across, size).sum((1, 3))
        lines = values.sum(0 if self.is_consumer else 1)
        return lines.new_zeros(self.group.units + 1).index_add(0, self.unit_of.to(lines.device), lines)[:-1]

    def units_best(self, values: Tensor) -> Tensor:
        """Of one value a block: for every unit the best of those on it; if it has rows in several runs, of its worst: [units]."""
        lines = values.amax(0 if self.is_consumer else 1).repeat_interleave(self.block_size)[: len(self.unit_of)]
        own, units = self.unit_of < self.group.units, self.group.units
        at = (self.run_of * units + self.unit_of)[own].to(lines.device)
        best = torch.full(((int(self.run_of.max()) + 1) * units,), -torch.inf, dtype=torch.float64, device=lines.device)
        best = best.scatter_reduce(0, at, lines[own.to(lines.device)].double(), "amax")
        return best.view(-1, units).amin(0).to(lines.dtype)

    def count(self, blocks: Tensor, alive: Tensor) -> int:
        """Weights that stay where `blocks` [grid] do, in the rows or columns of the units `alive` [units]."""
        size, (out, width) = self.block_size, self.shape
        lines = torch.cat([alive, alive.new_ones(1)])[self.unit_of].double()
        length = width if self.is_consumer else out
        live = pad(lines, (0, -length % size)).view(-1, size).sum(1)
        other = torch.full((self.grid[0 if self.is_consumer else 1],), float(size), dtype=torch.float64)
        other[-1] = (out if self.is_consumer else width) - size * (len(other) - 1)
        rows, columns = (other, live) if self.is_consumer else (live, other)
        return int(rows @ blocks.double() @ columns)


def layers_of(group: Group, block_size: int) -> list[Layer]:
    """All linears of a group: producers, then the consumer."""
    found = [_producer(group, producer, block_size) for producer in group.producers]
    columns = torch.arange(group.units).repeat_interleave(group.width)
    return [*found, Layer(group.consumer, group, columns, torch.zeros_like(columns), True, block_size)]


def _producer(group: Group, producer: Producer, block_size: int) -> Layer:
    rows, share = producer.rows(group.units), sum(producer.runs)
    run_of = torch.arange(len(producer.runs)).repeat_interleave(torch.tensor(producer.runs) * (rows.shape[1] // share))
    units = torch.full((weight(producer.linear).shape[0],), group.units)
    runs = torch.zeros_like(units)
    units[rows.flatten()] = torch.arange(group.units).repeat_interleave(rows.shape[1])
    runs[rows.flatten()] = run_of.repeat(group.units)
    return Layer(producer.linear, group, units, runs, False, block_size)


class _Masked(torch.autograd.Function):
    """`W' = W * mask`; `dL/dS` is the sum over a block of `W * dL/dW'`, as if the mask were the score: straight through."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, score: Tensor, mask: Tensor, gathered: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(w, mask)
        ctx.gathered = gathered
        return w * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        w, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_weight = gradient * mask if wanted[0] else None
        of_score = ctx.gathered(gradient * w).float() if wanted[1] else None
        return of_weight, of_score, None, None


class MaskedWeight(nn.Module):
    """A parametrization: the weight as the model sees it. The scores belong to the masks: they are looked up, not held."""

    def __init__(self, layer: Layer, look_up: Callable[[Layer], tuple[Tensor, Tensor]]):
        """`look_up(layer)`: its scores, and its mask, which broadcasts to [out, in]."""
        nn.Module.__init__(self)
        self._layer, self._look_up = layer, look_up

    def forward(self, stored: Tensor) -> Tensor:
        """`stored` as the linear keeps it."""
        score, mask = self._look_up(self._layer)
        is_linear = isinstance(self._layer.linear, nn.Linear)
        w = stored if is_linear else stored.T
        masked: Tensor = _Masked.apply(w, score, mask.to(w), self._layer.gathered)  # type: ignore[no-untyped-call]
        return masked if is_linear else masked.T


class MaskedBias(nn.Module):
    """A parametrization of a producer's bias: gone where the whole row is. Its gradient does not reach the scores."""

    def __init__(self, layer: Layer, look_up: Callable[[Layer], tuple[Tensor, Tensor]]):
        """`look_up`: as for `MaskedWeight`."""
        nn.Module.__init__(self)
        self._layer, self._look_up = layer, look_up

    def forward(self, bias: Tensor) -> Tensor:
        """[out]."""
        return bias * self._look_up(self._layer)[1].any(1).to(bias)
