"""What the configurations of the methods that train share."""

from __future__ import annotations

from dataclasses import dataclass

from .config import PruningConfig


@dataclass(frozen=True)
class TrainedConfig(PruningConfig):
    """How much to keep, and how to train towards it; what Trainer does is for `transformers.TrainingArguments` to say."""

    num_tokens: int | None = None
    """Stop reading training data after about this many real tokens. None reads everything."""
    batch_size: int = 32
    """Examples in one training step, where no `training_args` say otherwise."""
    distill: float = 0.9
    """The teacher's share of the loss; the labels have the rest. 0: no teacher; 1: no labels needed. Both sources: 0.9."""
    distill_layers: float = 1.0
    """Weight, within the teacher's share, of the relative squared distance between the hidden states after every layer and the
    teacher's, where it has as many layers as wide. VTrans: chosen layers; Block Pruning: 0."""
    finetune_epochs: float = 0.0
    """After slicing, train what is left for so many epochs more."""

    def __post_init__(self) -> None:
        """Refuse values that no run could honour."""
        PruningConfig.__post_init__(self)
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill={self.distill} asked; it is a share of the loss and must lie in [0, 1].")
        if self.distill_layers < 0:
            raise ValueError(f"distill_layers={self.distill_layers} asked; it must be at least 0.")
        if self.finetune_epochs < 0:
            raise ValueError(f"finetune_epochs={self.finetune_epochs} asked; it must be at least 0.")
        if self.distill_epochs:
            raise ValueError(
                f"distill_epochs={self.distill_epochs} asked; methods that train have a teacher all along, see distill, and "
                "finetune_epochs for what comes after slicing."
            )
        if "experts" in self.structures:
            raise ValueError("'experts' asked of a method that trains, and these take no mixtures of experts.")
        if self.budget == "latency":
            raise ValueError("budget='latency' asked; methods that train count params, macs or memory.")
