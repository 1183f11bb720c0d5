"""What the trained methods add to `transformers.Trainer`: masks that are learned beside the weights, and a teacher."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import is_progress_bar_enabled

from . import teacher_losses
from .families import Group, task_of
from .slicing import Plan
from .training_data import Collator, Example, metrics_of, scores

LOGGER = logging.getLogger(__name__)
MASKS = "stat_masks"
"""Where the masks hang in the model while it trains, so that Trainer's checkpoints hold them."""


class Diverged(RuntimeError):
    """The loss or a gradient is no number any more."""


class Masks(nn.Module, ABC):
    """What a method learns beside the weights: its parameters are the masks', and reach the model while they are attached."""

    plan: Plan
    """The units that the masks keep at the present step, where they have to decide."""

    @abstractmethod
    def attached(self) -> AbstractContextManager[None]:
        """Let the model compute with the masks."""

    @abstractmethod
    def step(self, progress: float) -> None:
        """Before every optimizer step: bring what depends on the schedule to `progress`, in [0, 1]. A function of it and of
        the parameters alone, so that a resumed run goes on as if it had not stopped."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """For the optimizer: "params", "lr" at the peak of Trainer's schedule, and what else differs from its defaults."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """What is added to the loss of one optimizer step."""

    @abstractmethod
    def scores(self, group: Group) -> Tensor:
        """How much each unit of `group` is worth, [units], float64 on the CPU; comparable between groups."""

    def shared_scores(self) -> dict[str, Tensor]:
        """The same for what all blocks share, by structure. Default: there are no masks on it."""
        return {}


class PruningTrainer(Trainer):
    """`Trainer` with masks and a teacher; its arguments, callbacks, checkpoints and devices are Trainer's own.

    The loss of a batch is `(1 - distill) CE + distill (T^2 KL(teacher || student) + layers D) + penalty`, D the hidden states'
    distance: means over the batch, which Trainer divides by the number of accumulated batches. So the penalty counts once for an
    optimizer step, however many batches it has.
    The loss that an evaluation reports is that of the labels alone (of the teacher, where there are none).
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train: Sequence[Example],
        evaluation: Sequence[Example] | None,
        *,
        pad_id: int,
        masks: Masks | None,
        teacher: nn.Module | None,
        distill: float,
        layers: float = 0.0,
    ):
        """`masks` are attached already; `distill` in [0, 1] is the teacher's share of the loss, `layers` the weight of D."""
        Trainer.__init__(
            self,
            model,
            args,
            data_collator=Collator(pad_id, next_tokens=task_of(model) == "text-generation"),
            train_dataset=train,
            eval_dataset=evaluation,
            compute_metrics=None if not metrics_of(model) else lambda prediction: scores(model, prediction),
            callbacks=[_Watch(masks)],
        )
        if not is_progress_bar_enabled():
            self.remove_callback(PrinterCallback)  # which takes the bar's place
        self._masks, self._distill, self._layers = masks, distill, layers
        own = set() if masks is None else set(masks.parameters())
        self._frozen = not any(p.requires_grad for p in model.parameters() if p not in own)
        self._teacher = None if teacher is None or not distill else teacher.to(args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Trainer's; but its sampler by length draws from where the generator happens to be, so a resumed epoch would differ."""
        sampler = Trainer._get_train_sampler(self, train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _ByLength(sampler.batch_size, sampler.lengths, seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Trainer's, but of all examples: it would drop an incomplete last batch here where it is asked to in training."""
        asked, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return Trainer.get_eval_dataloader(self, eval_dataset)
        finally:
            self.args.dataloader_drop_last = asked

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The masks are groups of their own: their learning rates, no weight decay."""
        learned = [] if self._masks is None else [p for p in self._masks.parameters() if p.requires_grad]
        for parameter in learned:
            parameter.requires_grad_(False)
        Trainer.create_optimizer(self, model)
        for parameter in learned:
            parameter.requires_grad_(True)
        for group in [] if self._masks is None else self._masks.parameter_groups():
            self.optimizer.add_param_group({"weight_decay": 0.0, **group})
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch, see the class."""
        training = model.training
        if training and self._masks is not None and self._frozen:
            model.eval()  # dropout would only hide from the masks what the weights do
            self._masks.train()
        taught = self._teacher is not None and (training or not any(name in inputs for name in self.label_names))
        hidden = {"output_hidden_states": True} if taught and self._layers else {}
        outputs = model(**inputs, **hidden)
        own = outputs.get("loss")
        if taught:
            loss = self._distill * self._distance(outputs, inputs, hidden)
            loss = loss if self._distill == 1 else loss + (1 - self._distill) * own
        else:
            loss = own
        if training and self._masks is not None:
            loss = loss + self._masks.penalty()
        return (loss, outputs) if return_outputs else loss

    def _distance(self, outputs: Any, inputs: Mapping[str, Any], asked: dict[str, Any]) -> Tensor:
        """From what the teacher says of the same inputs."""
        assert self._teacher is not None
        with torch.no_grad():
            wanted = self._teacher(**{name: value for name, value in inputs.items() if name not in self.label_names}, **asked)
        found = teacher_losses.of_outputs(self.model, outputs, wanted, inputs["attention_mask"])
        return found + self._layers * teacher_losses.of_layers(outputs, wanted, inputs["attention_mask"]) if asked else found

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One batch; stops where the loss is no number, before it reaches the weights."""
        loss: Tensor = Trainer.training_step(self, model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise _diverged(f"the loss is {float(loss)}", self.args, self.state)
        return loss


class _ByLength(LengthGroupedSampler):
    """Examples of like length together, drawn anew in every epoch, by its number."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        LengthGroupedSampler.__init__(self, batch_size, lengths=lengths)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self._seed + epoch)


class _Watch(TrainerCallback):
    """Moves the schedule before every step, looks at the gradients after it, and hands on what Trainer tells."""

    def __init__(self, masks: Masks | None):
        self._masks = masks

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self._masks is not None:
            self._masks.step(state.global_step / state.max_steps)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        told = {"step": state.global_step, "steps": state.max_steps, **(logs or {})}
        LOGGER.debug("training: step %s of %s", state.global_step, state.max_steps, extra={"progress": told})

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        # with a loss scaler, an overflow is an ordinary event: it skips the step
        if not args.fp16 and gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise _diverged("a gradient is NaN or infinite", args, state)


def _diverged(what: str, args: TrainingArguments, state: Any) -> Diverged:
    last = get_last_checkpoint(args.output_dir)
    kept = f"the last good state is {last}" if last else "no checkpoint was written (save_strategy, save_steps)"
    return Diverged(
        f"Training diverged in step {state.global_step + 1} of {state.max_steps}: {what}. The model is as it was; {kept}. Lower "
        f"learning_rate (now {args.learning_rate:g}) or that of the masks, or max_grad_norm (now {args.max_grad_norm:g})."
    )


def differing(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that differ from Trainer's defaults, as plain values, without those that say where things are."""
    defaults, found = TrainingArguments(args.output_dir).to_dict(), args.to_dict()
    places = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "disable_tqdm")
    return {
        name: value
        for name, value in found.items()
        if value != defaults.get(name) and name not in places and isinstance(value, (str, int, float)) and "hub_" not in name
    }


@contextmanager
def masks_in(model: nn.Module, masks: Masks) -> Iterator[None]:
    """The masks at work in the model and in its state, and gone afterwards."""
    with masks.attached():
        model.add_module(MASKS, masks)
        try:
            yield
        finally:
            del model._modules[MASKS]
