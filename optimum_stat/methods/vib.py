"""VTrans (2406.05276): variational gates learn what carries information; the rest goes, under a constraint on the size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch

from ..card import Paper
from ..config import PruningConfig
from ..data import Batches
from ..families import Group
from ..slicing import Plan
from ..trained import TrainedPruner
from ..trained_config import TrainedConfig
from ..training_data import Example, examples
from ..trunk_costs import TrunkCosts
from .vib_gates import Gates
from .vib_trunk import TrunkGates


@dataclass(frozen=True)
class VIBConfig(TrainedConfig):
    """The best recipe measured within the method; `fast` and `faster` are the paper's shorter forms."""

    masks_only: bool = False
    """Only the gates train, the weights stay as they are (Faster-VTrans)."""
    data_share: float = 1.0
    """Share of the training examples to train on, drawn under the seed (Fast-VTrans: 0.03)."""
    kl_weight: float = 0.1
    """Of the gates' divergence: its mean over units, 2.0 at first (with the source's start 4.5), summed over structures."""
    warmup: float = 0.5
    """Share of the steps in which the size asked of the constraint falls from all to `keep` (the released code: 0.1)."""
    mask_learning_rate: float = 0.05
    """Of the gates (the released code's) and of the constraint's multipliers (there twice as much)."""

    def __post_init__(self) -> None:
        """Refuse values that no run could honour."""
        TrainedConfig.__post_init__(self)
        if not 0 < self.data_share <= 1:
            raise ValueError(f"data_share={self.data_share} asked; it must lie in (0, 1].")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup} asked; it is a share of the steps and must lie in [0, 1].")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight={self.kl_weight} asked; it must be at least 0.")
        if self.mask_learning_rate <= 0:
            raise ValueError(f"mask_learning_rate={self.mask_learning_rate} asked; it must be greater than 0.")

    @classmethod
    def fast(cls, keep: float = 0.5, budget: str = "params") -> VIBConfig:
        """Fast-VTrans: weights and gates, on 3% of the data."""
        return cls(keep, budget, data_share=0.03)

    @classmethod
    def faster(cls, keep: float = 0.5, budget: str = "params") -> VIBConfig:
        """Faster-VTrans: the gates alone."""
        return cls(keep, budget, masks_only=True)

    @classmethod
    def paper(cls, keep: float = 0.5, budget: str = "params") -> VIBConfig:
        """The procedure of VTrans: weights and gates, also of layers and hidden dimensions, on all data; then what is left once
        more; no rounding of widths.

        Its own weights of the terms were not published for encoders; these keep the proportions of the code for language models.
        Gates start, and the constraint counts and pushes, as in all of ours: see the constants of `vib_gates`.
        """
        every = ("heads", "neurons", "layers", "hidden")
        return cls(keep, budget, round_to=1, finetune_epochs=1.0, kl_weight=0.3, warmup=0.1, structures=every)


@final
class VIBPruner(TrainedPruner[VIBConfig]):
    """A variational information bottleneck on every unit, trained like dropout whose rates are learned.

    A unit's gate is Gaussian; the objective charges for the information that passes it, so the noise of units that do not matter
    grows, and they go, those with the largest `variance / mean^2` first, until the size asked for is reached exactly. The means
    of the gates that stay are folded into the consumer's weights. A unit is one key/value head with the query heads that read it.

    Differences from the source: gates on layers and on the residual stream only if `structures` asks for them; one threshold for
    all groups that meets the budget, instead of `variance < mean^2` near it; every structure weighs the same in the divergence
    (there by constants for one model); gates start with more noise, and the constraint is less steep and pushes from the
    beginning, so that hundreds of steps are enough; whole layers instead of each half; in `masks_only`, no dropout.
    """

    method: ClassVar[str] = "vib"
    config_class: ClassVar[type[PruningConfig]] = VIBConfig
    paper: ClassVar[Paper] = Paper(
        title="VTrans: Accelerating Transformer Compression with Variational Information Bottleneck based Pruning",
        authors="Oshin Dutta, Ritvik Gupta, Sumeet Agarwal",
        year=2024,
        arxiv="2406.05276",
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_train_epochs": 1,
        "learning_rate": 5e-5,
        "warmup_steps": 0.05,
        "ddp_find_unused_parameters": False,  # multipliers reach the loss outside of the model's forward: not unused
    }

    _masks: Gates

    @property
    def trains_weights(self) -> bool:
        """Unless only the gates are asked for."""
        return not self.config.masks_only

    def make_masks(self, groups: list[Group], batches: Batches) -> Gates:
        """Gates that are open, with little noise."""
        config = self.config
        trunk = None
        if config.trunk:
            costs = TrunkCosts.of(self.model, groups, config.budget, batches.seq_len)
            trunk = partial(TrunkGates, self.model, config.trunk, costs, config.round_to)
        return Gates(
            groups,
            self.size(groups),
            kl=config.kl_weight,
            warmup=config.warmup,
            learning_rate=config.mask_learning_rate,
            seed=config.seed,
            trunk=trunk,
        )

    def rows(self, batches: Batches) -> list[Example]:
        """The share of the examples that is asked for, at least one."""
        rows = examples(batches)
        if self.config.data_share == 1:
            return rows
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.config.seed))
        return [rows[index] for index in drawn[: max(1, round(self.config.data_share * len(rows)))].tolist()]

    def repair(self, groups: list[Group], plan: Plan, batches: Batches) -> None:
        """Fold the means into the weights."""
        self._masks.bake()
