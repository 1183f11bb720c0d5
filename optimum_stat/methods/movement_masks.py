"""The masks of movement pruning: from scores to what stays, under a schedule, to the size asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..correction import set_bias
from ..families import Group, weight
from ..slicing import set_weight
from ..training import Masks
from ..training_sizes import Size, first, orders
from .movement_scores import Layer, MaskedBias, MaskedWeight, layers_of

THRESHOLD = 0.1
"""Of `sigmoid(score)` at the end of the schedule, where a fixed strength of the regulariser decides (the source's)."""


@dataclass(frozen=True)
class Schedule:
    """Cubic, between a warm-up and a cool-down; both are shares of the steps."""

    warmup: float
    cooldown: float

    def rest(self, progress: float) -> float:
        """What is still to go: 1 until the warm-up ends, 0 from the cool-down on, `(1 - p)^3` between. Source: its code."""
        between = (progress - self.warmup) / max(1e-9, 1 - self.warmup - self.cooldown)
        return float((1 - min(1.0, max(0.0, between))) ** 3)


class MovementMasks(Masks):
    """Scores, and the masks that they make at the present step.

    A unit is worth its score `s(S)`, s the sigmoid; where blocks have scores, the best block of each of its layers, of these the
    worst (a head without a query, key, value or output, a neuron that nothing feeds or reads, is dead; so its other blocks go
    too, and what is sliced away was zero). Units are kept by one threshold over the whole model, found anew at every step so that
    what stays has the scheduled size.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        blocks: Mapping[str, int],
        size: Size,
        schedule: Schedule,
        *,
        zeros: bool,
        regularization: float | None,
        learning_rate: float,
        of_neurons: float = 1.0,
    ):
        """blocks: structure -> size of its blocks, 0 for one score a unit. regularization: the final strength, or None.

        of_neurons: how many times as strong it is for MLPs.

        zeros: the share that is kept is one of the weights, those that are not zero, instead of the units' cost.
        """
        nn.Module.__init__(self)
        self._learning_rate = learning_rate
        self.layers = {group.name: layers_of(group, blocks[group.structure]) for group in groups}
        self.places: dict[Layer, int] = {}
        self.values = nn.ParameterList()
        for own in self.layers.values():
            for layer in own:
                if layer.block_size or layer is own[0]:
                    shape = layer.grid if layer.block_size else (layer.group.units,)
                    self.values.append(nn.Parameter(torch.zeros(shape)))
                self.places[layer] = len(self.values) - 1
        self._size, self._schedule, self._zeros = size, schedule, zeros
        self._regularization, self._strength, self._of_neurons = regularization, 0.0, of_neurons
        self._masks: dict[Layer, Tensor] = {}
        self.step(0.0)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """As parametrizations of the weights, and of the producers' biases."""
        done: list[tuple[nn.Module, str]] = []
        try:
            for layer in self.places:
                parametrize.register_parametrization(layer.linear, "weight", MaskedWeight(layer, self._look_up))
                done.append((layer.linear, "weight"))
                if not layer.is_consumer and isinstance(layer.linear.bias, Tensor):
                    parametrize.register_parametrization(layer.linear, "bias", MaskedBias(layer, self._look_up))
                    done.append((layer.linear, "bias"))
            yield
        finally:
            for linear, name in done:
                parametrize.remove_parametrizations(linear, name, leave_parametrized=False)

    def _look_up(self, layer: Layer) -> tuple[Tensor, Tensor]:
        return self.values[self.places[layer]], self._masks[layer]

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """The masks for `progress` of the schedule."""
        rest = self._schedule.rest(progress)
        self._strength = (self._regularization or 0.0) * (1 - rest)  # the source's: in step with the threshold
        if self._regularization is None:
            share, threshold = self._size.keep + (1 - self._size.keep) * rest, 1.0
        else:
            share, threshold = self._size.keep, THRESHOLD * (1 - rest)
        self.decide(share, threshold)

    def decide(self, share: float, threshold: float) -> None:
        """Keep what has `sigmoid(score) > threshold`, at most `share`; with a threshold of 1, exactly `share`."""
        values = [value.double().cpu().sigmoid() for value in self.values]
        (self._to_weights if self._zeros else self._to_units)(values, share, threshold)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One, with the scores."""
        return [{"params": list(self.values), "lr": self._learning_rate}]

    def penalty(self) -> Tensor:
        """`strength * 1/2 (mean of sigmoid(score) over attention + of_neurons * that over MLPs)`, of what may go in all layers.

        Source: the code of the paper; the strength follows the threshold. 0 where the size is controlled.
        """
        if not self._strength:
            return self.values[0].new_zeros(())
        means = []
        for structure, times in (("heads", 1.0), ("neurons", self._of_neurons)):
            places = {self.places[own] for own in self.places if own.group.structure == structure}
            if places:
                means.append(times * torch.cat([self.values[place].sigmoid().flatten() for place in sorted(places)]).mean())
        return self._strength * torch.stack(means).mean()

    def scores(self, group: Group) -> Tensor:
        """`s(S)` of every unit, see the class."""
        return self._of_units([value.detach().double().cpu().sigmoid() for value in self.values])[group.name]

    def _of_units(self, values: list[Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, own in self.layers.items():
            here = [values[self.places[layer]] for layer in own]
            if own[0].block_size:  # a layer whose rows serve all units alike says nothing of any of them
                pairs = zip(own, here, strict=True)
                here = [layer.units_best(value) for layer, value in pairs if (layer.unit_of < layer.group.units).any()]
            found[name] = torch.stack(here if own[0].block_size else here[:1]).amin(0)
        return found

    def _to_units(self, values: list[Tensor], share: float, threshold: float) -> None:
        """Units under the budget; in the layers with blocks, every block as good as the worst unit's that stays."""
        units, size = self._of_units(values), self._size
        if threshold < 1.0:
            above = {name: min(len(own), int((own > threshold).sum())) for name, own in units.items()}
            kept = {name: min(k for k in own if k >= above[name]) for name, own in size.sizes.items()}
            self.plan = first(orders(units), kept)
        if threshold == 1.0 or sum(size.unit_costs[name] * k for name, k in kept.items()) > size.limit(share):
            self.plan = size.best(units, share)
        with_blocks = [units[name][own].min() for name, own in self.plan.items() if self.layers[name][0].block_size]
        lowest = min([float(value) for value in with_blocks] + [threshold])
        alive = {name: _flags(len(own), self.plan[name]) for name, own in units.items()}
        self._set([value >= lowest for value in values], alive)

    def _to_weights(self, values: list[Tensor], share: float, threshold: float) -> None:
        """The best blocks and units, as many as leave no more than `share` of the weights once what is dead is gone too."""
        ranks, total = _ranks(values), sum(value.numel() for value in values)
        weights = sum(own.shape[0] * own.shape[1] for own in self.places)
        most = total if threshold == 1.0 else int(sum((value > threshold).sum() for value in values))
        low, high = 0, most
        if self._count(ranks, total - high) > share * weights:
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._count(ranks, total - middle) <= share * weights else (low, middle)
            high = low
        units = self._of_units(ranks)
        lowest = {name: _lowest(own, total - high) for name, own in units.items()}
        alive = {name: own >= lowest[name] for name, own in units.items()}
        self.plan = {}
        for name, own in units.items():
            count = min(k for k in self._size.sizes[name] if k >= int(alive[name].sum()))
            order = (own + total * alive[name]).argsort(descending=True, stable=True)
            self.plan[name] = order[:count].sort().values
        name_of = {place: layer.group.name for layer, place in self.places.items()}
        self._set([rank >= lowest[name_of[place]] for place, rank in enumerate(ranks)], alive)

    def _count(self, ranks: list[Tensor], lowest: int) -> int:
        count, units = 0, self._of_units(ranks)
        for name, own in self.layers.items():
            here = _lowest(units[name], lowest)
            alive = units[name] >= here
            for layer in own:
                if layer.block_size:
                    count += layer.count(ranks[self.places[layer]] >= here, alive)
                else:
                    count += int(alive.sum()) * layer.shape[0] * layer.shape[1] // len(alive)
        return count

    def _set(self, kept: list[Tensor], alive: Mapping[str, Tensor]) -> None:
        for layer, place in self.places.items():
            units = layer.by_unit(alive[layer.group.name])
            mask = units & layer.spread(kept[place]) if layer.block_size else units
            self._masks[layer] = mask.to(self.values[place].device)

    @torch.no_grad()
    def bake(self, fill: torch.Generator | None) -> None:
        """Write the masks into the weights: zeros; or, with `fill`, `mean + std / 100 * N(0, 1)`, to train on from.

        Mean and deviation are those of the compact matrix with its zeros. Source of the fill: the released code.
        """
        for layer, mask in self._masks.items():
            linear, w = layer.linear, weight(layer.linear)
            mask = mask.to(w.device)
            instead = torch.zeros((), dtype=w.dtype, device=w.device)
            if fill is not None and layer.block_size:
                noise = torch.randn(w.shape, generator=fill).to(w.device)
                alive = layer.by_unit(_flags(layer.group.units, self.plan[layer.group.name])).to(w.device)
                compact = (w * mask)[alive.expand_as(w)].float()  # zeros and all, without what is sliced away
                instead = (compact.mean() + compact.std() / 100 * noise).to(w.dtype)
            set_weight(linear, torch.where(mask, w, instead))
            if fill is None and not layer.is_consumer and isinstance(linear.bias, Tensor):
                set_bias(linear, linear.bias * mask.any(1))


def _flags(count: int, units: Tensor) -> Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, units, True)


def _lowest(units: Tensor, lowest: int) -> int:
    """The rank that stays in one group: `lowest`, or that of its best unit: a block without a head or a neuron is no block."""
    return min(lowest, int(units.max()))


def _ranks(values: list[Tensor]) -> list[Tensor]:
    """Every value replaced by its rank among all: 0 for the worst. Equal values get different ranks, so that any number fits."""
    flat = torch.cat([value.flatten() for value in values])
    ranks = torch.empty(len(flat), dtype=torch.int64)
    ranks[flat.argsort(stable=True)] = torch.arange(len(flat))
    return [part.view(value.shape) for part, value in zip(torch.split(ranks, [v.numel() for v in values]), values, strict=True)]
