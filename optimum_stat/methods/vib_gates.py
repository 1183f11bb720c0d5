"""The gates of VTrans: a Gaussian factor on every unit, its divergence, and the constraint on the size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..families import Group, weight
from ..probes import on_consumer_input
from ..slicing import set_weight
from ..training import Masks
from ..training_sizes import Size

if TYPE_CHECKING:
    from .vib_trunk import TrunkGates

EPSILON = 1e-8
STEEPNESS = 1.0
"""Of the soft count of units. With the released code's 10 the count has no gradient until a gate is nearly all noise."""
START = -4.0
"""Logarithm of the variances at first; from the released code's -9 it takes hundreds of steps until anything can go."""
STRENGTH = 10.0
"""Of the squared term at first; the released code's 0 lets the linear one wind up until most of the model goes at once."""


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """`1/2 log(1 + mean^2 / variance)`: KL of `N(f mean, f^2 variance)` from `N(0, f^2 (mean^2 + variance))`, for any f.

    The latter is the prior whose variance is the best one. Source: VIBNet (1802.10399); the released code of VTrans.
    """
    return 0.5 * torch.log1p(mean.square() / (log_variance.exp() + EPSILON))


def log_noise(mean: Tensor, log_variance: Tensor) -> Tensor:
    """`log(variance / mean^2)`: above 0, a unit says more noise than signal."""
    return log_variance - torch.log(mean.square() + EPSILON)


class Gates(Masks):
    """`z -> z (mean + noise * deviation)` at the consumer's input, one mean and variance a unit, fresh noise everywhere.

    Training adds `kl * sum over structures of the mean divergence of their units`, so that few heads weigh as much as many
    neurons; and for the size `a (s - t) + b (s - t)^2`, s the expected share that is kept and t the share scheduled, in which a
    and b ascend. Evaluation takes the means of the units that fit into t, and zeros.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        size: Size,
        *,
        kl: float,
        warmup: float,
        learning_rate: float,
        seed: int,
        trunk: Callable[[torch.Generator], TrunkGates] | None = None,
    ):
        """kl: weight of the divergence. warmup: share of the steps in which t falls, linearly, to `size.keep`.

        trunk: makes the gates of layers and dimensions, if there are to be some.
        """
        nn.Module.__init__(self)
        self._groups, self._size, self._kl, self._warmup, self._learning_rate = list(groups), size, kl, warmup, learning_rate
        generator = torch.Generator().manual_seed(seed)
        drawn = [0.01 * torch.randn(2, group.units, generator=generator) for group in groups]
        self.means = nn.ParameterList(nn.Parameter(1 + own[0]) for own in drawn)
        self.log_variances = nn.ParameterList(nn.Parameter(START + own[1]) for own in drawn)
        self.multipliers = nn.Parameter(torch.tensor([0.0, STRENGTH]))
        self.trunk = trunk(generator) if trunk else None
        self._at = {group.name: index for index, group in enumerate(groups)}
        self._target = 1.0
        self.step(0.0)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """As hooks on the consumers."""
        with on_consumer_input(self._groups, self._gate), self.trunk.attached() if self.trunk else nullcontext():
            yield

    def _gate(self, group: Group, z: Tensor) -> Tensor:
        mean = self.means[self._at[group.name]]
        if not self.training:
            kept = self.plan.get(group.name, torch.arange(0)).to(mean.device)  # of a layer that is out, none is
            factor = torch.zeros_like(mean).index_put_((kept,), mean[kept])
            return z * factor.repeat_interleave(group.width).to(z.dtype)
        deviation = (0.5 * self.log_variances[self._at[group.name]]).exp()
        noise = torch.randn_like(z, dtype=mean.dtype)
        factor = torch.addcmul(mean.repeat_interleave(group.width), noise, deviation.repeat_interleave(group.width))
        return z * factor.to(z.dtype)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """The share to come down to, and the units that would stay."""
        self._target = 1 - (1 - self._size.keep) * (min(1.0, progress / self._warmup) if self._warmup else 1.0)
        scores = {group.name: self.scores(group) for group in self._groups}
        if self.trunk:
            self.plan = self.trunk.best(self._groups, scores, self._size, self._target)
        else:
            self.plan = self._size.best(scores, self._target)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Gates, and the constraint's multipliers, at the same rate."""
        return [{"params": list(self.parameters()), "lr": self._learning_rate}]

    def penalty(self) -> Tensor:
        """Divergence and constraint, see the class."""
        return self._kl * self.information() + self.constraint()

    def information(self) -> Tensor:
        """The mean divergence of a unit, summed over structures."""
        found: dict[str, list[Tensor]] = {}
        for group, mean, log_variance in zip(self._groups, self.means, self.log_variances, strict=True):
            found.setdefault(group.structure, []).append(divergence(mean, log_variance))
        for name, own in self.trunk.divergences().items() if self.trunk else ():
            found[name] = [own]
        return torch.stack([torch.cat(own).mean() for own in found.values()]).sum()

    def constraint(self) -> Tensor:
        """`a (s - t) + b (s - t)^2`. An optimizer that descends makes the multipliers ascend: their gradient is reversed."""
        over = self.expected_share() - self._target
        a, b = 2 * self.multipliers.detach() - self.multipliers
        return a * over + b * over.square()

    def expected_share(self) -> Tensor:
        """Of the dense model's cost, with every unit counted by `sigmoid(-log(variance / mean^2))`."""
        counts = [torch.sigmoid(-STEEPNESS * log_noise(*own)).sum() for own in zip(self.means, self.log_variances, strict=True)]
        if self.trunk:
            return self.trunk.expected_share(dict(zip(self._at, counts, strict=True)), STEEPNESS)
        costs, total = self._size.unit_costs, self._size.limit(1.0)
        fixed = total - sum(own[-1] for own in self._size.costs.values())
        spent = torch.stack([costs[group.name] * count for group, count in zip(self._groups, counts, strict=True)]).sum()
        return (spent + fixed) / total

    def scores(self, group: Group) -> Tensor:
        """`sigmoid(log(mean^2 / variance))`: 1 for a unit without noise."""
        at = self._at[group.name]
        own = [value.detach().double().cpu() for value in (self.means[at], self.log_variances[at])]
        return torch.sigmoid(-log_noise(*own))

    def shared_scores(self) -> dict[str, Tensor]:
        """Of dimensions and layers."""
        return self.trunk.scores() if self.trunk else {}

    @torch.no_grad()
    def bake(self) -> None:
        """Write the means into the columns of the consumers."""
        for group, mean in zip(self._groups, self.means, strict=True):
            w = weight(group.consumer)
            set_weight(group.consumer, w * mean.repeat_interleave(group.width).to(w.device, w.dtype))
        if self.trunk:
            self.trunk.bake()
