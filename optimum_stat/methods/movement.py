"""Block movement pruning (2109.04838): scores learned beside the weights decide which blocks, heads and neurons stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..card import Paper
from ..config import PruningConfig
from ..data import Batches
from ..families import Group, find_groups, weight
from ..report import Lines, TimedStage
from ..slicing import Plan
from ..trained import TrainedPruner
from ..trained_config import TrainedConfig
from .movement_masks import MovementMasks, Schedule

VARIANTS = ("structured", "hybrid-filled", "hybrid", "block")


@dataclass(frozen=True)
class MovementConfig(TrainedConfig):
    """The best recipe measured within the method; `MovementConfig.paper()` is the published one."""

    variant: str = "structured"
    """What has scores: "structured", heads and neurons; "hybrid", blocks of the attention's matrices, and neurons; "block",
    blocks of all; "hybrid-filled", as hybrid, but what is left of the heads is filled again and trained on."""
    block_size: int = 32
    """Rows and columns of a block."""
    warmup: float = 0.05
    """Share of the steps before anything goes."""
    cooldown: float = 0.5
    """Share of the steps at the final size (the paper: one half for question answering, one third for MNLI)."""
    score_learning_rate: float = 0.01
    """Of the scores (the paper's)."""
    regularization: float | None = None
    """The paper's lambda: push all scores down so hard, and keep what stays above 0.1; `keep` is then an upper bound. None: no
    push, and a threshold that moves so that `keep` is what is left."""
    mlp_regularization: float = 1.0
    """How many times as hard to push the scores of MLPs as those of attention (the paper's results: 0.25 to 2, mostly 1)."""

    def __post_init__(self) -> None:
        """Refuse values that no run could honour."""
        TrainedConfig.__post_init__(self)
        self.refuse_trunk("movement pruning")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} asked; it must be one of {', '.join(map(repr, VARIANTS))}.")
        if self.variant in ("hybrid", "block") and self.budget != "params":
            raise ValueError(
                f"budget={self.budget!r} asked of {self.variant!r}, which leaves zeros: they are counted in params only."
            )
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size={self.block_size!r} asked; it must be a whole number of at least 1.")
        if min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup={self.warmup} and cooldown={self.cooldown} asked; together they are at most all steps, 1.")
        if self.score_learning_rate <= 0:
            raise ValueError(f"score_learning_rate={self.score_learning_rate} asked; it must be greater than 0.")
        if self.regularization is not None and self.regularization < 0:
            raise ValueError(f"regularization={self.regularization} asked; it must be at least 0.")
        if self.mlp_regularization < 0:
            raise ValueError(f"mlp_regularization={self.mlp_regularization} asked; it must be at least 0.")
        if self.variant == "hybrid-filled" and not self.finetune_epochs:
            raise ValueError("variant='hybrid-filled' asked with finetune_epochs=0: what is filled again has to be trained.")

    @classmethod
    def paper(cls, keep: float = 1.0, budget: str = "params", regularization: float = 10.0) -> MovementConfig:
        """The published recipe for question answering: hybrid-filled, 32 x 32, a fixed strength of the regulariser.

        20 epochs and 10 more after filling, at a learning rate of 3e-5: pass `training_args={"num_train_epochs": 20,
        "learning_rate": 3e-5}`, or `--training-args num_train_epochs=20 learning_rate=3e-5`. Source: 2109.04838 and its code.
        """
        return cls(
            keep,
            budget,
            round_to=1,
            batch_size=16,
            distill_layers=0.0,
            finetune_epochs=10.0,
            variant="hybrid-filled",
            warmup=0.05,
            cooldown=0.49,
            regularization=regularization,
        )


@final
class MovementPruner(TrainedPruner[MovementConfig]):
    """Weights train under masks whose scores follow the weights' movement, towards zero or away from it.

    `W' = W * [s(S) > threshold]`; the gradient goes straight through to the score: `dL/dS_b = sum over the block of W * dL/dW'`.
    A cubic schedule brings the size down from all to `keep`; then it stays for the cool-down, while the weights adapt to it.
    Heads that have become empty are removed, and neurons; biases of rows that are gone are gone.

    Differences from the source: the size is asked for, not found by a sweep of lambda; one score for all that belongs to a unit
    (the source has four for a head); dead heads and neurons are closed off while the masks train, so that nothing changes when
    they are sliced, and one of each stays in every block (the source keeps a share of every matrix, 0 in its runs); biases of
    grouped heads and gated MLPs alike; any family; no shares of each matrix by themselves (its "topK") and no l0 penalty.
    """

    method: ClassVar[str] = "movement"
    config_class: ClassVar[type[PruningConfig]] = MovementConfig
    paper: ClassVar[Paper] = Paper(
        title="Block Pruning For Faster Transformers",
        authors="François Lagunas, Ella Charlaix, Victor Sanh, Alexander M. Rush",
        year=2021,
        arxiv="2109.04838",
    )
    defaults: ClassVar[Mapping[str, Any]] = {"num_train_epochs": 3, "learning_rate": 5e-5, "warmup_steps": 0.05}

    _masks: MovementMasks

    @property
    def counts(self) -> str:
        """Units, or weights where they become zeros."""
        return "weights" if self.config.variant in ("hybrid", "block") else "units"

    def check(self, keep: float, batches: Batches) -> None:
        """Refuse a budget below the smallest plan, where units are counted."""
        if self.counts == "units":
            TrainedPruner.check(self, keep, batches)

    def make_masks(self, groups: list[Group], batches: Batches) -> MovementMasks:
        """One score a block or a unit, all 0."""
        config, block = self.config, self.config.block_size
        blocks = {"heads": 0 if config.variant == "structured" else block, "neurons": block if config.variant == "block" else 0}
        return MovementMasks(
            groups,
            blocks,
            self.size(groups),
            Schedule(config.warmup, config.cooldown),
            zeros=self.counts == "weights",
            regularization=config.regularization,
            learning_rate=config.score_learning_rate,
            of_neurons=config.mlp_regularization,
        )

    def repair(self, groups: list[Group], plan: Plan, batches: Batches) -> None:
        """Write the masks into the weights."""
        filled = self.config.variant == "hybrid-filled"
        self._masks.bake(torch.Generator().manual_seed(self.config.seed) if filled else None)

    def lines(self, keep: float, batches: Batches, stage: TimedStage) -> Lines:
        """Weights of every group's linears and how many are not zero, where these are what is counted."""
        before = {group.name: sum(w.numel() for w in _weights(group)) for group in find_groups(self.model)}
        lines = TrainedPruner.lines(self, keep, batches, stage)
        if self.counts == "units":
            return lines
        left = {group.name: sum(int(w.count_nonzero()) for w in _weights(group)) for group in find_groups(self.model)}
        return tuple(replace(line, units=before[line.name], kept=left[line.name]) for line in lines)

    @contextmanager
    def frozen_zeros(self) -> Iterator[None]:
        """Zeros get no gradient, and so they stay."""
        with ExitStack() as stack:
            if self.counts == "weights":
                for group in find_groups(self.model):
                    for linear in (*(p.linear for p in group.producers), group.consumer):
                        stored: Any = linear.weight
                        stored.requires_grad_(True)
                        mask = stored.detach() != 0
                        stack.callback(stored.register_hook(lambda g, mask=mask: g * mask).remove)
            yield


def _weights(group: Group) -> list[Tensor]:
    return [weight(linear) for linear in (*(p.linear for p in group.producers), group.consumer)]
