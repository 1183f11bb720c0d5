"""STAT (2406.00061): decompositions of activations choose heads and neurons; least squares corrects what reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor

from ..budget import Ranking
from ..card import Paper
from ..config import PruningConfig
from ..correction import corrected_consumer, cut_and_correct, put
from ..currency import Currency
from ..data import Batches
from ..elimination import backward_elimination, precise_enough
from ..families import Group, find_blocks, groups_of_block, weight
from ..gradients import output_worth
from ..probes import OVERFLOW, num_predictions
from ..pruner import Pruner
from ..slicing import Plan, slice_group
from ..walk import BlockWalk
from . import stat_published
from .stat_experts import corrected_experts, rank_in_experts
from .stat_inputs import inputs_of
from .stat_pairs import lose_pairs, rank_pairs, worth_of_pairs
from .stat_values import ValuesRanking, allocate_values, divide, rank_values

METRICS = ("stream", "fisher")


@dataclass(frozen=True)
class STATConfig(PruningConfig):
    """The best recipe measured within STAT's family; `STATConfig.paper()` is the published algorithm."""

    metric: str = "fisher"
    """What an error in a consumer's output is worth: "fisher", its effect on the model's own predictions, from a backward
    pass over about 2,048 tokens, half of them where there are 1,024 to 4,096 (no labels needed); "stream", gradient-free,
    its energy relative to that of the residual stream behind it, token by token."""
    ridge: float | None = None
    """Damping of every least-squares problem, relative to the diagonal of its Gram matrix. Ours, the paper damps nothing.
    None: for each correction what does best on tokens held out, and 0.01 where units are chosen."""
    published: bool = False
    """The published algorithm instead of ours; set by `paper()`."""

    divides_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse values that no run could honour."""
        PruningConfig.__post_init__(self)
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric!r} asked; it must be one of {', '.join(map(repr, METRICS))}.")
        if self.metric != "fisher" and "pairs" in self.structures:
            raise ValueError(
                f"'pairs' asked with metric={self.metric!r}; gradients alone say what they are worth: metric='fisher'."
            )
        if self.published and (self.metric != "stream" or self.ridge is None):
            raise ValueError(
                f"published=True asked with metric={self.metric!r} and ridge={self.ridge}, which the published algorithm does "
                "not have: use STATConfig.paper(), or ask for metric='stream' and ridge=0.0."
            )
        if self.published and {*self.structures} != {"heads", "neurons"}:
            raise ValueError(
                f"structures={self.structures!r} asked of the published algorithm, which divides between heads and neurons."
            )
        if self.published and self.budget == "latency":
            raise ValueError(
                "budget='latency' asked of the published algorithm, which only divides params, macs or memory: ask for macs."
            )
        if not 0 <= self.damping < 1:
            raise ValueError(f"ridge={self.ridge} asked; it is relative to a diagonal and must lie in [0, 1).")

    @property
    def damping(self) -> float:
        """The ridge with which units are chosen."""
        return 0.01 if self.ridge is None else self.ridge

    @classmethod
    def paper(cls, keep: float = 0.5, budget: str = "macs") -> STATConfig:
        """The published algorithm: pivoted QR, depth weights, two global thresholds, neurons before heads, no ridge.

        With four defects of the authors' early code fixed: residuals of heads are un-permuted before they meet the
        output weights, the share of heads in the MACs is computed for the model at hand instead of copied from one
        task, no block loses its last head, and no budget that heads could use is left unspent. Source: 2406.00061 and its
        authors' code of December 2023: that for BERT, for language models too (that for OPT sketches the activations, divides
        errors by a fit over depth and protects last heads). How much data is up to you; theirs: 512 examples, of OPT 128 of 2,048
        tokens.
        """
        return cls(keep=keep, budget=budget, round_to=1, metric="stream", ridge=0.0, published=True)


@dataclass(frozen=True)
class Moments:
    """Of one group's consumer: the Gram matrix of its inputs, and the metric of its outputs."""

    gram: Tensor
    """`stat_inputs.Inputs.gram`; of pairs, `worth_of_pairs`."""
    metric: Tensor
    """What a squared error of one in each output channel is worth: [out]."""


@final
class STATPruner(Pruner[STATConfig]):
    """Interpolative decompositions of activations, and least squares.

    For every consumer `y = z W^T` the units are ordered by backward elimination: the error of removing each, after the
    best correction of the others, exactly, from the Gram matrix of z. One allocation over all groups compares these
    error curves. Then, block by block, each consumer is corrected on the activations of the already pruned network:
    `W' = W_S + (G_SS + ridge diag G_SS)^-1 G_SE W_E`, S the kept and E the eliminated columns; a bias, where there is one, takes
    over the mean of what goes, and all second moments are then those about the mean.

    Differences from the source: elimination instead of pivoted QR, heads chosen by the error after the output projection,
    one allocation instead of two thresholds, ridges chosen on held-out tokens, and corrections that see the errors before them
    and change biases.
    """

    method: ClassVar[str] = "stat"
    config_class: ClassVar[type[PruningConfig]] = STATConfig
    paper: ClassVar[Paper] = Paper(
        title="STAT: Shrinking Transformers After Training",
        authors="Megan Flynn, Alexander Wang, Dean Edward Alvarez, Christopher De Sa, Anil Damle",
        year=2024,
        arxiv="2406.00061",
    )

    def nats(self, batches: Batches) -> float:
        """Half of a squared error in the metric of the Fisher information; unknown gradient-free."""
        return 0.5 / num_predictions(self.model, batches) if self.config.metric == "fisher" and not self.config.published else 1.0

    def measure(self, groups: list[Group], batches: Batches) -> Iterator[tuple[Group, Moments]]:
        """Gram matrices of every consumer's input, block by block in one forward pass."""
        if self.config.published and any(group.experts is not None for group in groups):
            raise ValueError("The published algorithm has one consumer a neuron, and experts have several: use STATConfig().")
        pairs = self._worth_of_pairs([group for group in groups if group.structure == "pairs"], batches)
        fisher = self._fisher(groups, batches) if self.config.metric == "fisher" else {}
        walk = BlockWalk(self.model, batches, self.journal)
        for index in walk.steps("Measuring"):
            own = [group for group in groups if group.block == index]
            readers = {group.consumer: group for group in own if group.name not in pairs}  # heads and values have the same
            inputs = inputs_of(walk, index, list(readers.values()), advance=True, centred=not self.config.published)
            grams = pairs | {name: own.gram for name, own in inputs.items()}
            worth = walk.inverse_energy()
            for group in own:
                source = group.name if group.name in pairs else readers[group.consumer].name
                gram = grams.pop(source) if source == group.name else grams[source]
                like = torch.ones(weight(group.consumer).shape[0], dtype=torch.float64, device=gram.device)
                metric = fisher.get(group.name, like * worth).to(gram.device)
                if math.isnan(worth) or not torch.isfinite(metric).all():
                    what = f"What block {index} gives" if math.isnan(worth) else f"The gradient at {group.name}"
                    raise ValueError(f"{what} is NaN or infinite; nothing can be decided from it. {OVERFLOW}")
                yield group, Moments(gram, metric)

    def _worth_of_pairs(self, groups: list[Group], batches: Batches) -> dict[str, Tensor]:
        found = self.journal.recall("pairs") if groups else {}
        if found is None:
            found = worth_of_pairs(self.model, groups, batches, self.config.seed)
            self.journal.keep("pairs", found.items())
        return found

    def _fisher(self, groups: list[Group], batches: Batches, what: str = "gradients") -> dict[str, Tensor]:
        """What an error in each channel of the consumers' outputs is worth."""
        found = self.journal.recall(what)
        if found is None:
            found = output_worth(self.model, groups, batches, self.config.seed)
            self.journal.keep(what, found.items())
        return found

    def rank(self, groups: list[Group], stats: Iterable[tuple[Group, Moments]]) -> Ranking:
        """Backward elimination per group (published: pivoted QR)."""
        if self.config.published:
            return stat_published.rank(stats, num_blocks=len(find_blocks(self.model)))
        order, error, within = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for group, moments in stats:
            if group.structure == "pairs":
                order[group.name], error[group.name] = rank_pairs(moments.gram)
                continue
            if group.structure == "values":
                whole = "heads" in self.config.structures
                found = rank_values(group, moments.gram, moments.metric, self.config.damping, with_heads=whole)
                order[group.name], error[group.name], curves = found
                within |= {} if curves is None else {group.name: curves}
                continue
            scaled, ridge = moments.metric.sqrt()[:, None] * weight(group.consumer), self.config.damping
            gram = precise_enough(moments.gram, ridge)
            if group.experts is not None:
                order[group.name], error[group.name] = rank_in_experts(group, gram, scaled, ridge)
                continue
            order[group.name], error[group.name] = backward_elimination(gram, scaled, group.width, ridge)
        return ValuesRanking(order, error, within) if "values" in self.config.structures else Ranking(order, error)

    def allocate(self, groups: list[Group], ranking: Ranking, keep: float, currency: Currency) -> dict[str, int]:
        """One allocation over all groups (published: a threshold for neurons, one for heads)."""
        if isinstance(ranking, stat_published.PublishedRanking):
            return stat_published.allocate(groups, ranking, currency.unit_costs(groups), currency.limit(keep))
        if isinstance(ranking, ValuesRanking) and ranking.within:
            return allocate_values(groups, ranking, keep, currency)
        return Pruner.allocate(self, groups, ranking, keep, currency)

    def repair(self, groups: list[Group], plan: Plan, batches: Batches) -> None:
        """Correct each consumer on what the network before it has become, and slice it.

        Published: all neurons first, on the dense network's activations; then all heads, chosen again, on those of the
        network with its neurons pruned and its heads still dense.
        """
        if not self.config.published:
            self._correct(groups, plan, batches)
            return
        self._correct([g for g in groups if g.structure == "neurons"], plan, batches, before_pruning=True)
        self._correct([g for g in groups if g.structure == "heads"], plan, batches, before_pruning=True)

    @torch.no_grad()
    def _correct(self, groups: list[Group], plan: Plan, batches: Batches, before_pruning: bool = False) -> None:
        """One walk that corrects and slices `groups`; `before_pruning`: each on activations as if no other were."""
        worth = self._worth_of_values(groups, plan, batches)
        walk = BlockWalk(self.model, batches, self.journal)
        for index in walk.steps("Correcting " + " and ".join(dict.fromkeys(group.structure for group in groups))):
            waiting = []
            for group in groups:
                if group.block != index or len(plan[group.name]) == group.units:
                    continue
                keep = plan[group.name]
                if group.structure == "values":
                    self._divide(walk, group.place, index, len(keep), worth)
                    continue
                if self.config.published and group.structure == "heads":
                    inputs = inputs_of(walk, index, [group], centred=False)[group.name]
                    keep = stat_published.choose_heads(inputs.gram, group, len(keep))
                if group.structure == "pairs" or (group.inexact and not before_pruning):
                    cut = lose_pairs if group.structure == "pairs" else slice_group
                    cut_and_correct(walk, group, partial(cut, group, keep), self.config.ridge)
                    continue
                waiting.append((group, keep, *self._corrected(walk, group, keep)))
                if not before_pruning:
                    put(*waiting.pop())
            if index + 1 < len(walk.blocks):
                walk.advance(index)
            for each in waiting:
                put(*each)

    def _corrected(self, walk: BlockWalk, group: Group, keep: Tensor) -> tuple[Tensor, Tensor | None]:
        """The consumer's new weight, and its new bias if that changes."""
        if group.experts is not None:
            return corrected_experts(walk, group, keep, self.config.ridge), None
        return corrected_consumer(walk, group, keep, self.config.ridge, with_bias=not self.config.published)

    def _worth_of_values(self, groups: list[Group], plan: Plan, batches: Batches) -> dict[str, Tensor]:
        """What an error is worth at the output of each group of values that is to be cut."""
        own = [group for group in groups if group.structure == "values" and len(plan[group.name]) < group.units]
        if not own or self.config.metric == "fisher":
            return self._fisher(own, batches, "gradients of values") if own else {}
        return {group.name: torch.ones(weight(group.consumer).shape[0], dtype=torch.float64) for group in own}

    def _divide(self, walk: BlockWalk, place: str, index: int, count: int, worth: dict[str, Tensor]) -> None:
        """Keep `count` values of the heads that are left."""
        (group,) = (each for each in groups_of_block(self.model, index, walk.blocks[index]) if each.place == place)
        if count < group.units:
            inputs = inputs_of(walk, index, [group])[group.name]
            divide(group, inputs, worth[group.name].to(inputs.gram.device), count, self.config.damping)
