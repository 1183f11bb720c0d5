"""The LLM Surgeon (2312.17244): Kronecker-factored curvature decides what goes and moves what stays, in several shots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..budget import Cost, Ranking
from ..card import Paper
from ..config import PruningConfig
from ..correction import corrected_consumer, put
from ..data import Batches
from ..elimination import backward_elimination, precise_enough
from ..families import Group, find_blocks, find_groups, weight
from ..linalg import cholesky
from ..offload import brought_in
from ..probes import num_predictions
from ..pruner import Pruner
from ..report import Lines, TimedStage
from ..slicing import Plan
from ..walk import BlockWalk
from . import surgeon_lora, surgeon_published, surgeon_sparse
from .surgeon_curvature import LABELS, Factors, factors_by_block

STRUCTURES = ("units", "elements", "2:4", "lines")


@dataclass(frozen=True)
class SurgeonConfig(PruningConfig):
    """The best recipe measured within the Surgeon's family; `SurgeonConfig.paper()` is the published algorithm."""

    structure: str = "units"
    """What goes: "units", whole heads and neurons, so that the model gets smaller; or, as zeros in a model of the old shape,
    "elements", single weights; "2:4", two of every four in a row; "lines", rows and columns of each layer on its own."""
    shots: int = 4
    """How many times to measure, remove and correct; the share that is kept falls linearly. The paper takes 40 for one half."""
    labels: str = "model"
    """Whose labels the curvature is measured with: "model", drawn from the model's own predictions; "data", those of the
    calibration data, for language models its next tokens (the paper's empirical Fisher); drawn where the data has none."""
    ridge: float = 0.01
    """Damping of the factors: of their diagonals, or, where published, of the mean of their diagonals (the paper's value)."""
    max_correlate: int = 0
    """How many of a layer's removed lines or weights are corrected together; 0: all of a shot (the paper takes 2,000 weights)."""
    lora_epochs: int = 0
    """After every shot, train low-rank adapters for so many passes over the data and merge them: the paper's "first-order
    corrections". Needs PEFT, and a causal language model."""
    published: bool = False
    """The published algorithm instead of ours; set by `paper()`."""

    def __post_init__(self) -> None:
        """Refuse values that no run could honour."""
        PruningConfig.__post_init__(self)
        if not isinstance(self.shots, int) or self.shots < 1:
            raise ValueError(f"shots={self.shots!r} asked; it must be a whole number of at least 1.")
        for name in ("max_correlate", "lora_epochs"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} asked; it must be a whole number of at least 0.")
        if self.structure not in STRUCTURES:
            raise ValueError(f"structure={self.structure!r} asked; it must be one of {', '.join(map(repr, STRUCTURES))}.")
        if self.structure != "units" and self.budget != "params":
            raise ValueError(f"budget={self.budget!r} asked of {self.structure}: zeros are counted in params only.")
        if self.structure == "2:4" and self.keep < 0.5:
            raise ValueError(f"keep={self.keep} asked of 2:4, which leaves half of the weights; ask for 0.5 or more.")
        if self.labels not in LABELS:
            raise ValueError(f"labels={self.labels!r} asked; it must be one of {', '.join(map(repr, LABELS))}.")
        if self.ridge is None or not 0 <= self.ridge < 1:
            raise ValueError(f"ridge={self.ridge} asked; it is relative to a diagonal and must lie in [0, 1).")
        self._check_what_may_go()

    def _check_what_may_go(self) -> None:
        if self.structure != "units" or self.published:
            self.refuse_trunk(f"structure={self.structure!r}" + (" as published" if self.published else ""))
        if "layers" in self.structures and self.shots > 1:
            raise ValueError(f"'layers' asked in {self.shots} shots: whole layers go in one; set shots=1.")
        if self.structure != "units" and len({"heads", "neurons"} & {*self.structures}) < 2:
            raise ValueError(
                f"structures={self.structures!r} asked of structure={self.structure!r}, whose zeros are in all linear layers of "
                "the blocks: leave structures out."
            )

    @classmethod
    def paper(cls, keep: float = 0.5, budget: str = "params", shots: int = 40, structure: str = "lines") -> SurgeonConfig:
        """The published algorithm: costs of single lines or weights, one threshold, damping by the mean, 40 shots.

        `structure="units"` is its form for coupled heads and neurons, see `surgeon_published`. Source: 2312.17244 and its
        authors' code of May 2024, whose scripts correlate 2,000 weights at a time, and damp G ten times as much for them (so
        does this for single weights and groups of four).
        """
        run = 2000 if structure in ("elements", "2:4") else 0
        return cls(keep, budget, round_to=1, structure=structure, shots=shots, labels="data", max_correlate=run, published=True)


@final
class SurgeonPruner(Pruner[SurgeonConfig]):
    """Optimal brain surgeon with `F = G (x) A` for every layer, on units that make the model really smaller.

    A unit (a head with what reads it, a neuron) is gone once its columns of the consumer `y = W z` are, and its producers' rows
    then die for free, so its cost is that of the columns, `1/2 tr(W_B^T G W_B (A^-1_BB)^-1)`. Units go one after the other, each
    time the cheapest after the best correction of the others, which gives an error curve for every group; one allocation
    compares them. Then, block by block, each consumer is corrected by least squares (`W P_A`, G cancels) on the activations of
    the already pruned network, its bias too. All of that happens once per shot, with fresh curvature.

    Differences from the source: units instead of single rows and columns; costs that know what else goes, instead of those of
    each alone; corrections that see the errors before them; damping relative to each channel instead of the mean of all.
    """

    method: ClassVar[str] = "surgeon"
    config_class: ClassVar[type[PruningConfig]] = SurgeonConfig
    paper: ClassVar[Paper] = Paper(
        title="The LLM Surgeon",
        authors="Tycho F. A. van der Ouderaa, Markus Nagel, Mart van Baalen, Yuki M. Asano, Tijmen Blankevoort",
        year=2024,
        arxiv="2312.17244",
    )

    nested: ClassVar[bool] = True

    @property
    def labels(self) -> str:
        """The config's, in the words of `Pruner.labels`."""
        return "auto" if self.config.labels == "data" else "none"

    @property
    def counts(self) -> str:
        """Units, or weights where they become zeros."""
        return "units" if self.config.structure == "units" else "weights"

    @property
    def resumable(self) -> bool:
        """Units are; zeros and adapters are not."""
        return not self.config.trunk and self.counts == "units" and not self.config.lora_epochs

    def check(self, keep: float, batches: Batches) -> None:
        """Refuse what no shot could do."""
        if self.config.lora_epochs:
            surgeon_lora.check(self.model)
        if self.config.structure == "units":
            Pruner.check(self, keep, batches)
        elif self.config.structure == "2:4":
            surgeon_sparse.check(self.model)

    def cost(self, batches: Batches) -> Cost:
        """The size of the model as it is now; zeros do not count as parameters where they are the point."""
        cost = Pruner.cost(self, batches)
        if self.counts == "units":
            return cost
        left, every = surgeon_sparse.nonzeros(self.model)
        return replace(cost, params=cost.params - every + left, block_params=left)

    def shoot(self, keep: float, batches: Batches, stage: TimedStage) -> Lines:
        """Prune the model, as it is now, to `keep` of the dense one, and correct it."""
        if self.counts == "units":
            lines = Pruner.shoot(self, keep, batches, stage)
        else:
            nats, lines = self.nats(batches), surgeon_sparse.shoot(self.model, keep, batches, self.config, stage)
            lines = tuple(replace(line, expected=nats * line.expected) for line in lines)
        if self.config.lora_epochs:
            with stage("low-rank corrections"):
                linears = {linear: None for group in find_groups(self.model) for linear in surgeon_sparse.linears_of(group)}
                surgeon_lora.correct(self.model, linears, batches, self.config.lora_epochs, self.config.seed)
        return lines

    def schedule(self) -> Sequence[float]:
        """`1 - t (1 - keep) / shots` for t = 1 to `shots` (the paper's linear schedule)."""
        gone, shots = 1 - self.config.keep, self.config.shots
        return [*(1 - t * gone / shots for t in range(1, shots)), self.config.keep]

    def nats(self, batches: Batches) -> float:
        """The factors are means over tokens."""
        return batches.num_tokens / num_predictions(self.model, batches)

    def measure(self, groups: list[Group], batches: Batches) -> Iterator[tuple[Group, Mapping[nn.Module, Factors]]]:
        """Both factors of every consumer (published: and of the producers that decide), a few blocks in one pass."""
        layers = {group.name: surgeon_published.layers(group) if self.config.published else [group.consumer] for group in groups}
        by_block: dict[int, list[nn.Module]] = {}
        for group in groups:
            by_block.setdefault(group.block, []).extend(layers[group.name])
        for block, factors in factors_by_block(self.model, by_block, batches, self.config.labels, self.config.seed):
            with brought_in(find_blocks(self.model)[block]):
                for group in groups:
                    if group.block == block:
                        yield group, {layer: factors.pop(layer) for layer in layers[group.name]}

    def rank(self, groups: list[Group], stats: Iterable[tuple[Group, Mapping[nn.Module, Factors]]]) -> Ranking:
        """Backward elimination in the metric of G per group (published: each unit's own cost)."""
        order: dict[str, Tensor] = {}
        error: dict[str, Tensor] = {}
        for group, factors in stats:
            if self.config.published:
                order[group.name], error[group.name] = surgeon_published.rank(group, factors, self.config.ridge)
            else:
                order[group.name], error[group.name] = _elimination(group, factors[group.consumer], self.config.ridge)
        return Ranking(order, error)

    @torch.no_grad()
    def repair(self, groups: list[Group], plan: Plan, batches: Batches) -> None:
        """Correct each consumer on what the network before it has become, and slice it (published: on this shot's factors)."""
        if self.config.published:
            surgeon_published.update(self.measure(groups, batches), plan, self.config.ridge, self.config.max_correlate)
            return
        walk = BlockWalk(self.model, batches, self.journal)
        for index in walk.steps("Correcting"):
            for group in groups:
                if group.block == index and len(plan[group.name]) < group.units:
                    corrected, bias = corrected_consumer(walk, group, plan[group.name], with_bias=True)
                    put(group, plan[group.name], corrected, bias)
            if index + 1 < len(walk.blocks):
                walk.advance(index)


def _elimination(group: Group, factors: Factors, ridge: float) -> tuple[Tensor, Tensor]:
    """Order and error curve; a consumer with a bias can make up for what is constant, so only what varies counts."""
    a, mean = factors.inputs[:-1, :-1], factors.inputs[-1, :-1]
    gram = a - mean[:, None] * mean if isinstance(group.consumer.bias, Tensor) else a
    full = weight(group.consumer)
    full = full.to(torch.promote_types(full.dtype, torch.float32))
    scaled = cholesky(factors.gradients).T.to(full.dtype) @ full
    order, error = backward_elimination(precise_enough(gram, ridge), scaled, group.width, ridge)
    return order, error / 2
