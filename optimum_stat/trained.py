"""Methods that train: the flow of `Pruner`, whose measurement is a run of `transformers.Trainer`."""

from __future__ import annotations

import copy
import math
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, final

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from . import calibration, card, teachers, training_arguments, training_run, training_state
from .blocks import reads_tokens_alone
from .budget import Ranking
from .currency import Currency
from .data import Batches, pad_id_of
from .experts import opened_in
from .families import Group, find_groups
from .linalg import sums_of_what_goes
from .processes import Processes
from .pruner import Pruner
from .report import GroupReport, Lines, TimedStage
from .slicing import Plan, restored_on_error, slice_model
from .stream import narrow, shorten
from .trained_config import TrainedConfig
from .training import Masks, PruningTrainer, differing, masks_in
from .training_data import Example, examples, metrics_of, with_labels
from .training_sizes import Size, orders
from .trunk import HIDDEN, LAYERS, trunk_line

T = TypeVar("T", bound=TrainedConfig)


@dataclass(frozen=True)
class _Run:
    """What one `prune` was asked to do."""

    args: TrainingArguments
    evaluation: Batches | None
    teacher: Any
    """A model, or None where none is needed."""
    resume: str | Path | bool | None
    trainable: Sequence[str]
    """Names of the parameters that wanted gradients."""


class TrainedPruner(Pruner[T]):
    """Train the model with masks, decide by what they have learned, slice; then, if asked, train what is left.

    A method supplies `make_masks`, and `repair`, which writes into the weights what the masks did to them.
    """

    defaults: ClassVar[Mapping[str, Any]]
    """`TrainingArguments` where none are given, and where a dict gives others only."""

    @property
    def labels(self) -> str:
        """Needed, unless the teacher alone says what to predict."""
        return "auto" if self.config.distill == 1 else "data"

    @property
    def trains_weights(self) -> bool:
        """Whether the weights train beside the masks."""
        return True

    @abstractmethod
    def make_masks(self, groups: list[Group], batches: Batches) -> Masks:
        """Masks for `groups`, which come down to `self.size`."""

    def prune(  # the flow is Pruner's; what is needed for training comes in beside the data
        self,
        dataset: Any,
        eval_dataset: Any = None,
        training_args: TrainingArguments | Mapping[str, Any] | None = None,
        *,
        text_columns: Sequence[str] | None = None,
        label_column: str | None = None,
        teacher: str | Path | PreTrainedModel | None = None,
        resume_from_checkpoint: str | Path | bool | None = None,
    ) -> PreTrainedModel:
        """Train and prune the model in place and return it.

        dataset, eval_dataset: as for every method, with labels. With `eval_dataset`, which is read whole, the metric of the dense
        and of the pruned model go into `metrics`, and Trainer evaluates whenever `eval_strategy` says so.
        training_args: `transformers.TrainingArguments`, or a dict of those that differ from the method's defaults. Without an
        `output_dir` nothing is kept on the way, and an interrupted run cannot be resumed.
        teacher: a model, or the Hub id or folder of one, of the same outputs and vocabulary. None: the dense model itself.
        resume_from_checkpoint: True for the last checkpoint in `output_dir`, or a checkpoint's folder; with the same data,
        configuration and arguments the run ends as if it had never stopped.

        Raises:
            Diverged: the loss or a gradient became NaN or infinite. As after every error, a live model is as it was.
        """
        if not reads_tokens_alone(self.model) or opened_in(self.model):
            raise ValueError(
                f"{self.method} trains on token ids, and {type(self.model).__name__} reads something else, or more, or it has "
                "experts. Use a method that does not train."
            )
        wanted = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if self.config.finetune_epochs and not wanted:
            raise ValueError(
                f"finetune_epochs={self.config.finetune_epochs} asked, but no parameter of the model wants gradients."
            )
        taught = (teachers.name_of(teacher) or card.DENSE) if self.config.distill else None
        if teacher is not None and taught is None:
            raise ValueError("A teacher was passed, but distill=0 asks for none. Set distill, or leave teacher out.")
        # a caller's inference_mode would take the gradients away
        with tempfile.TemporaryDirectory() as spare, training_state.process_undisturbed(), torch.inference_mode(False):
            evaluation = None if eval_dataset is None else self._evaluation(eval_dataset, text_columns, label_column)
            args = self._arguments(training_args, spare)
            training_arguments.check(args, self.model, evaluation)
            resume = resume_from_checkpoint or args.resume_from_checkpoint
            training_run.begin(args, {"method": self.method, **self.config.to_dict()}, resume)
            # the teacher is taken before anything changes: it may be this very model
            own = None if taught is None else teachers.teacher_for(self.model, teacher)
            self._run = _Run(args, evaluation, own, resume, wanted)
            kept = training_state.values_restored_on_error(self.model) if self._guard is restored_on_error else nullcontext()
            try:
                with kept:
                    model = Pruner.prune(self, dataset, text_columns=text_columns, label_column=label_column)
            finally:
                del self._run
        self._report = replace(self.report, training={"teacher": taught, "arguments": differing(args)})
        return model

    def _evaluation(self, dataset: Any, text_columns: Sequence[str] | None, label_column: str | None) -> Batches:
        """All of it: `max_examples` and `num_tokens` say how much to train on."""
        config = replace(self.config, num_tokens=None, max_examples=None)
        try:
            return calibration.read(self, dataset, text_columns, label_column, "data", config)
        except ValueError as error:
            what = str(error).partition(" Or use labels=")[0]  # which an evaluation cannot do without
            raise ValueError(f"eval_dataset: {what} Or leave eval_dataset out.") from error

    def survey(self, groups: list[Group], batches: Batches, stage: TimedStage) -> Ranking:
        """Refused: what is learned on the way to one size says nothing of another."""
        raise ValueError(f"{self.method} trains towards one size: prune to each by itself, instead of sweep or plan.")

    def size(self, groups: list[Group]) -> Size:
        """What masks for `groups` have to come down to."""
        return Size(self.config.keep, *self.currency.choices(groups), self.currency.limits())

    @final
    def shoot(self, keep: float, batches: Batches, stage: TimedStage) -> Lines:
        """Train, prune to `keep`, train what is left."""
        with training_state.lent(self.model), torch.enable_grad():
            before = self._evaluate()
            lines = self.lines(keep, batches, stage)
            if self.config.finetune_epochs:
                with stage("finetune"), self.frozen_zeros():
                    self._finetune(self.rows(batches))
            after = self._evaluate()
        pairs = [(own, was["value"]) for own, was in zip(after, before, strict=True)]
        self.metrics += [{**own, "dense": was} for own, was in pairs if math.isfinite(own["value"]) and math.isfinite(was)]
        return lines

    def rows(self, batches: Batches) -> list[Example]:
        """What to train on. Default: everything that was read."""
        return examples(batches)

    def lines(self, keep: float, batches: Batches, stage: TimedStage) -> Lines:
        """Train and prune to `keep`; what the report says of every group."""
        groups = find_groups(self.model, self.config.structures)
        with stage("train"):
            ranking = self.rank(groups, self.measure(groups, batches))
        kept = self.allocate(groups, ranking, keep, self.currency)
        plan, nats = self.select(ranking, kept), self.nats(batches)
        with stage("slice"):
            self.repair(groups, plan, batches)
            slice_model(self.model, plan)
            if LAYERS in plan:
                shorten(self.model, plan[LAYERS].tolist())
            if HIDDEN in plan:
                narrow(self.model, plan[HIDDEN])
        trunk = (trunk_line(name, ranking.error[name], kept[name], nats) for name in self.config.trunk)
        # a layer that goes has no groups in the plan
        return (*trunk, *(GroupReport.of(group, ranking.error[group.name], kept.get(group.name, 0), nats) for group in groups))

    @contextmanager
    def frozen_zeros(self) -> Iterator[None]:
        """While what is left trains: keep what has to stay zero. Default: nothing has."""
        yield

    def measure(self, groups: list[Group], batches: Batches) -> Iterator[tuple[Group, Tensor]]:
        """Train; then what the masks say of each group's units, [units], the larger the better."""
        own, args = self._run, self._run.args
        masks = self.make_masks(groups, batches)
        finished = training_run.finished(args)
        names = own.trainable if self.trains_weights else []
        # in this order: masks may give the weights other names
        with training_state.trainable(self.model, names), masks_in(self.model, masks):
            for parameter in masks.parameters():
                parameter.requires_grad_(True)
            masks.to(args.device)
            if own.resume and finished.exists():
                load_model(self.model, finished)
            else:
                self._train(args, self.rows(batches), masks, own.resume)
                if self.config.finetune_epochs and args.save_strategy != "no" and args.should_save:
                    finished.parent.mkdir(parents=True, exist_ok=True)
                    save_model(self.model, str(finished))
            masks.step(1.0)
            self._masks = masks
        for group in groups:
            yield group, masks.scores(group)

    def rank(self, groups: list[Group], stats: Iterable[tuple[Group, Tensor]]) -> Ranking:
        """By score; `error[g][k]` is the sum of the scores of the units that go."""
        scores = {group.name: own for group, own in stats} | self._masks.shared_scores()
        order = orders(scores)
        return Ranking(order, {name: sums_of_what_goes(own[order[name]]) for name, own in scores.items()})

    def allocate(self, groups: list[Group], ranking: Ranking, keep: float, currency: Currency) -> dict[str, int]:
        """As many units as the masks kept in the last step."""
        return {name: len(units) for name, units in self._masks.plan.items()}

    def select(self, ranking: Ranking, kept: Mapping[str, int]) -> Plan:
        """The units that the masks kept in the last step."""
        return self._masks.plan

    def _finetune(self, rows: list[Example]) -> None:
        args = copy.copy(self._run.args)
        args.output_dir = str(training_run.finished(args).parent)
        args.num_train_epochs, args.max_steps = self.config.finetune_epochs, -1
        last = get_last_checkpoint(args.output_dir) if self._run.resume and Path(args.output_dir).is_dir() else None
        with training_state.trainable(self.model, self._run.trainable):
            self._train(args, rows, None, last)

    def _train(self, args: TrainingArguments, rows: list[Example], masks: Masks | None, resume: str | Path | bool | None) -> None:
        rows = rows if self.config.distill == 1 else with_labels(rows)
        with training_state.undisturbed(self.model):
            trainer = self._trainer(args, rows, masks)
            trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
        if not trainer.state.global_step:
            raise ValueError(f"Not one training step was made: {len(rows)} examples, {args.num_train_epochs} epochs asked.")

    def _trainer(self, args: TrainingArguments, rows: list[Example], masks: Masks | None) -> PruningTrainer:
        return PruningTrainer(
            self.model,
            args,
            rows,
            None if self._run.evaluation is None else examples(self._run.evaluation),
            pad_id=pad_id_of(self.tokenizer, self.model.config.get_text_config()),
            masks=masks,
            teacher=self._run.teacher,
            distill=self.config.distill,
            layers=self.config.distill_layers,
        )

    def _evaluate(self) -> list[dict[str, Any]]:
        """The model's metrics as it is now, as cards want them."""
        evaluation = self._run.evaluation
        if evaluation is None:
            return []
        with training_state.undisturbed(self.model):
            found = self._trainer(self._run.args, [], None).evaluate()
        names = metrics_of(self.model) or ("loss",)
        return [{"name": name, "dataset": evaluation.source, "value": round(found[f"eval_{name}"], 4)} for name in names]

    def _arguments(self, given: TrainingArguments | Mapping[str, Any] | None, spare: str) -> TrainingArguments:
        if isinstance(given, TrainingArguments):
            return given
        asked = dict(given or {})
        own = {
            "output_dir": spare,
            "save_strategy": "steps" if "output_dir" in asked else "no",
            "per_device_train_batch_size": self.config.batch_size,
            "per_device_eval_batch_size": self.config.batch_size,
            "seed": self.config.seed,
            "train_sampling_strategy": "group_by_length",
            "dataloader_pin_memory": torch.cuda.is_available(),
            **self.defaults,
        }
        if Processes.launched().count > 1 and not torch.accelerator.is_available():
            own["use_cpu"] = True  # or each process would train alone
        return TrainingArguments(**{**own, **asked})
