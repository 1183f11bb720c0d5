"""Kwon et al. (2204.09656): the Fisher information of masks chooses heads and neurons; least squares scales what stays."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..budget import Ranking
from ..card import Paper
from ..config import PruningConfig
from ..currency import Currency
from ..data import Batches
from ..families import Group
from ..gradients import Sensitivity, sensitivities
from ..knapsack import allocate_exactly
from ..linalg import sums_of_what_goes
from ..probes import OVERFLOW, has_loss, num_predictions
from ..processes import is_main
from ..pruner import Pruner
from ..slicing import Plan
from . import fisher_tuning

logger = logging.getLogger(__name__)
LABELS = ("auto", "data", "model")


@dataclass(frozen=True)
class FisherConfig(PruningConfig):
    """The best recipe measured within the method; `FisherConfig.paper()` is the published algorithm."""

    labels: str = "auto"
    """Whose loss the gradients are of: "data", the task's labels (for causal language models the next tokens); "model",
    labels drawn from the model's own predictions, so the data needs none; "auto", the data's where there are some."""
    per_example: bool = True
    """One gradient an example. Off: the mean of each batch, as published; squares of means see less of what differs."""
    rearrange: bool = True
    """Exchange units within each layer by the whole Fisher matrix of the layer, not its diagonal alone."""
    tune: bool = True
    """Scale the heads and neurons that stay, layer by layer, towards a larger pruned network."""
    published: bool = False
    """The published rearrangement and tuning instead of ours; set by `paper()`."""

    def __post_init__(self) -> None:
        """Refuse values that no run could honour."""
        PruningConfig.__post_init__(self)
        if self.labels not in LABELS:
            raise ValueError(f"labels={self.labels!r} asked; it must be one of {', '.join(map(repr, LABELS))}.")

    @classmethod
    def paper(cls, keep: float = 0.5, budget: str = "macs") -> FisherConfig:
        """The published algorithm: 2,048 labelled examples in batches of 32, squares of the batches' mean gradients."""
        return cls(
            keep=keep,
            budget=budget,
            round_to=1,
            num_tokens=None,
            max_examples=2048,
            batch_size=32,
            labels="data",
            per_example=False,
            published=True,
        )


@dataclass(frozen=True)
class FisherRanking(Ranking):
    """`error[g][k]` is the sum of the diagonal Fisher information of the units that go."""

    gradients: Mapping[str, Tensor]
    """Group name -> gradients of the mask, one row an example or batch: [examples, units]."""
    metric: Mapping[str, Tensor]
    """Group name -> what a squared error of one in each channel of the consumer's output is worth: [out]."""


@final
class FisherPruner(Pruner[FisherConfig]):
    """Mask search, rearrangement and tuning, without retraining.

    Removing the units Z changes the loss by about `sum_i (sum_{u in Z} g_iu)^2 / 2`, g_i the gradient of example i with
    respect to factors on the units: the Fisher information of masks stands for the Hessian. Search: the diagonal alone,
    exactly, under the budget. Rearrangement: within each layer, with the whole matrix. Tuning: layer by layer, each unit that
    stays gets the factor that brings the residual stream closest to that of a network pruned half as far (see `fisher_tuning`);
    folded into the consumer's weights, so nothing is left of the masks.

    Differences from the source: per-example gradients, a shrunk Fisher matrix, and a tuning that weighs channels and damps
    factors, by default; one unit is one key/value head with its query heads; an exact knapsack, with at least one head and
    `round_to` neurons in every block, instead of a search that may leave the budget or empty a layer; latency from a measured
    table without fitting a line through it.
    """

    method: ClassVar[str] = "fisher"
    config_class: ClassVar[type[PruningConfig]] = FisherConfig
    paper: ClassVar[Paper] = Paper(
        title="A Fast Post-Training Pruning Framework for Transformers",
        authors="Woosuk Kwon, Sehoon Kim, Michael W. Mahoney, Joseph Hassoun, Kurt Keutzer, Amir Gholami",
        year=2022,
        arxiv="2204.09656",
    )

    _teacher: Plan
    """What the network keeps that the tuning takes as its target."""
    _metric: Mapping[str, Tensor]
    """In which the tuning compares with it."""

    @property
    def labels(self) -> str:
        """The config's, in the words of `Pruner.labels`."""
        return "none" if self.config.labels == "model" else self.config.labels

    def nats(self, batches: Batches) -> float:
        """Half of the squared gradients; those of means over n examples add up to n^2 times less."""
        return 0.5 * (1 if self.config.per_example else self.config.batch_size**2) / num_predictions(self.model, batches)

    def measure(self, groups: list[Group], batches: Batches) -> Iterator[tuple[Group, Sensitivity]]:
        """Gradients of masks and of outputs, from one forward and one backward pass."""
        from_labels = self.config.labels == "data" or (self.config.labels == "auto" and has_loss(self.model, batches))
        logger.info(
            "Gradients of the loss for %s.", "the labels" if from_labels else "labels drawn from the model's own predictions"
        )
        found = sensitivities(self.model, groups, batches, self.config.seed, from_labels=from_labels)
        for group in groups:
            own = found.pop(group.name)
            if not (torch.isfinite(own.masks).all() and torch.isfinite(own.output).all()):
                raise ValueError(f"The gradient at {group.name} is NaN or infinite; nothing can be decided from it. {OVERFLOW}")
            yield group, own

    def rank(self, groups: list[Group], stats: Iterable[tuple[Group, Sensitivity]]) -> FisherRanking:
        """By the diagonal of the Fisher information, summed over examples or batches."""
        order, error, gradients, metric = {}, {}, {}, {}
        for group, found in stats:
            own = found.masks
            if not self.config.per_example:
                own = torch.stack([part.mean(0) for part in torch.split(own, self.config.batch_size)])
            importance = own.square().sum(0)
            order[group.name] = importance.argsort(descending=True, stable=True)
            error[group.name] = sums_of_what_goes(importance[order[group.name]])
            gradients[group.name], metric[group.name] = own, found.output
        return FisherRanking(order, error, gradients, metric)

    def allocate(self, groups: list[Group], ranking: Ranking, keep: float, currency: Currency) -> dict[str, int]:
        """The exact optimum of the diagonal objective; and, for the tuning, that of the teacher.

        The teacher keeps the square root of the share: a network half as far pruned is a target that can be reached.
        Source: the released code.
        """
        assert isinstance(ranking, FisherRanking)
        choices = currency.choices(groups)
        if self.config.tune:
            wider = allocate_exactly(ranking.error, *choices, currency.limit(keep**0.5))
            self._teacher, self._metric = Pruner.select(self, ranking, wider), ranking.metric
        return allocate_exactly(ranking.error, *choices, currency.limit(keep))

    def select(self, ranking: Ranking, kept: Mapping[str, int]) -> Plan:
        """The units of the largest Fisher information, or what exchanging some of them makes of these."""
        assert isinstance(ranking, FisherRanking)
        plan = Pruner.select(self, ranking, kept)
        if not self.config.rearrange:
            return plan
        shrinkage = (lambda _: 0.0) if self.config.published else estimated_shrinkage
        hidden = None if is_main() else True
        gradients = tqdm(ranking.gradients.items(), desc="Rearranging", unit="group", disable=hidden)
        return {name: rearranged(own, plan[name], shrinkage(own)) for name, own in gradients}

    def repair(self, groups: list[Group], plan: Plan, batches: Batches) -> None:
        """Scale the columns of the consumers' weights that stay."""
        if self.config.tune and any(len(plan[group.name]) < group.units for group in groups):
            metric = None if self.config.published else self._metric
            fisher_tuning.Tuning(self.model, groups, batches, metric, self.journal).run(plan, self._teacher)


def estimated_shrinkage(gradients: Tensor) -> float:
    """How far to shrink the off-diagonal entries of `gradients^T gradients` towards 0, in [0, 1].

    A few hundred examples say little about the entries between a thousand units, and exchanges would pick out what is noise.
    The optimum in squared error is `sum_ij Var(I_ij) / sum_ij I_ij^2` over i != j, both estimated from the examples.
    Source: Schaefer and Strimmer 2005 (target D, unequal variances), for second moments; ours, Kwon et al. do not shrink.
    """
    count = len(gradients)
    if count < 2:
        return 1.0
    between = gradients @ gradients.T  # [examples, examples]: its norm is that of the matrix of all units
    diagonal = gradients.square().sum(0)
    squared_mean = float(between.square().sum() - diagonal.square().sum()) / count**2
    mean_square = float((between.diagonal().square() - gradients.pow(4).sum(1)).sum()) / count
    if squared_mean <= 0:
        return 1.0
    return min(1.0, max(0.0, (mean_square - squared_mean) / ((count - 1) * squared_mean)))


def rearranged(gradients: Tensor, keep: Tensor, shrinkage: float) -> Tensor:
    """`keep` [kept] after one pass of exchanges that lower `(1 - shrinkage) ||sum_u g_u||^2 + shrinkage sum_u ||g_u||^2`.

    Sums over the units that go; gradients: [examples, units], g_u its columns. From the least important unit that stays to the
    most important: it joins the units that go, and the one of these whose return leaves the least takes its place. Never worse
    than before, as that may be the unit itself.
    Source: 2204.09656 and the released code, without shrinkage.
    """
    units = gradients.shape[1]
    gone = torch.ones(units, dtype=torch.bool).index_fill_(0, keep.cpu(), False)
    if not gone.any() or gone.all():
        return keep
    own = gradients.square().sum(0)
    total = gradients[:, gone].sum(1)
    for unit in keep[own[keep].argsort(stable=True)].tolist():
        gone[unit] = True
        total = total + gradients[:, unit]
        candidates = gone.nonzero().flatten()
        # ||total - g_j||^2 = ||total||^2 - 2 total g_j + ||g_j||^2, for all j at once
        together = own[candidates] - 2 * (total @ gradients)[candidates]
        back = int(candidates[((1 - shrinkage) * together - shrinkage * own[candidates]).argmin()])
        gone[back] = False
        total = total - gradients[:, back]
    return (~gone).nonzero().flatten()
