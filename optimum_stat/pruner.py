"""The flow that every method shares. Read this file first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, final

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import calibration, checkpoint, experts, timestamps, trunk
from .budget import Cost, Ranking, allocate
from .card import Paper
from .config import PruningConfig
from .currency import Currency
from .data import Batches
from .distillation import distill, teacher_of
from .families import Group, check_finite, find_groups
from .journal import Journal
from .knapsack import allocate_exactly
from .probes import device_of, quiet
from .report import Forecast, Lines, PruningReport, Stage, TimedStage, forward_seconds, make_report, pace_again, stage_timer
from .slicing import Plan, restored_on_error, slice_model
from .structure import write_record
from .survey import survey
from .sweep import SHARES, descending, family, forecasts

C = TypeVar("C", bound=PruningConfig)
P = TypeVar("P", bound="Pruner[Any]")
Columns = Sequence[str] | None
Folder = str | Path | None


class Pruner(ABC, Generic[C]):
    """Measure, rank, allocate, select, repair, slice.

    A method supplies `measure` and `rank`, and may replace `allocate`, `select` and `repair`.
    """

    method: ClassVar[str]
    """The name in commands, recipes and cards."""
    paper: ClassVar[Paper]
    """What it implements; goes into the model card."""
    config_class: ClassVar[type[PruningConfig]]

    nested: ClassVar[bool] = False
    """Whether `sweep` makes each model from the next larger one instead of the dense one."""

    @property
    def labels(self) -> str:
        """What the method does with labels: "none", "auto" (it uses those that the data has), or "data" (it needs them)."""
        return "none"

    @property
    def resumable(self) -> bool:
        """Whether all that happens to the weights can be written down, block by block."""
        return not self.config.trunk or len(self.schedule()) == 1

    @property
    def counts(self) -> str:
        """What the report's groups count: "units" that are sliced away, or "weights" that become zeros."""
        return "units"

    def __init__(
        self,
        model: PreTrainedModel,
        config: C,
        tokenizer: PreTrainedTokenizerBase | None = None,
        source: str | None = None,
        *,
        caller_holds_model: bool = True,
    ):
        """Use `from_pretrained`. `source` is the Hub id or folder the model came from.

        While somebody else holds the model, its old weights are kept, to put them back if pruning fails: memory for two models.
        """
        calibration.refuse_unusable(type(self), model, config)
        find_groups(model, config.structures)  # an unknown family is refused here, before any data is read
        self._model: PreTrainedModel | None = model
        self.config, self.tokenizer, self.source = config, tokenizer, source
        self.metrics: list[dict[str, Any]] = []
        self._report: PruningReport | None = None
        self._currency: Currency | None = None
        self.journal = Journal()
        self.stages: dict[str, Stage] = {}
        self.forward_seconds: float | None = None
        self._dense: nn.Module | None = None
        self._guard = restored_on_error if caller_holds_model else self._lost_on_error

    @classmethod
    def from_pretrained(
        cls: type[P],
        model_or_path: str | Path | PreTrainedModel,
        config: C | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        task: str | None = None,
        **kwargs: Any,
    ) -> P:
        """A pruner for a Hub id, a folder or a live model.

        `kwargs` (dtype, device_map, revision, gguf_file, ...) go to `AutoModel....from_pretrained`; which Auto class is told by
        `task` ("text-generation", "text-classification", ...), or by `config.architectures`. A live model is pruned in place.
        """
        model, tokenizer, source = checkpoint.load(model_or_path, tokenizer=tokenizer, task=task, **kwargs)
        return cls(model, config or cls.config_class(), tokenizer, source, caller_holds_model=model is model_or_path)

    def prune(
        self,
        dataset: Any,
        *,
        text_columns: Columns = None,
        label_column: str | None = None,
        resume_from_checkpoint: Folder = None,
    ) -> PreTrainedModel:
        """Prune the model in place and return it.

        dataset: a `datasets.Dataset` (raw text or tokenized), a list of strings, pairs or dicts, or ready batches.
        text_columns, label_column: where its texts and labels stand, if not under one of the usual names.
        resume_from_checkpoint: a folder to write down what is finished, block by block; the same run, killed, goes on from
        there and ends in the same model. The folder stays: delete it when the model is saved.
        If anything goes wrong, a model that was handed in live is as it was before, bit for bit.
        """
        batches = self._start(None, dataset, text_columns, label_column, resume_from_checkpoint)
        schedule, lines = self.schedule(), []
        with self.at_work(), self._guard(self.model):
            for shot, keep in enumerate(schedule, start=1):
                self.journal.chapter = f"{shot} "
                lines.append(self.shoot(keep, batches, self.timer(shot if len(schedule) > 1 else None)))
            self.finish(lines, batches)
        return self.model

    @final
    def sweep(
        self: P, dataset: Any, keep: Sequence[float], *, text_columns: Columns = None, label_column: str | None = None
    ) -> Iterator[P]:
        """A family of models, one for each share in `keep`, from one calibration; `config.keep` does not matter.

        Yields pruners that have pruned copies of the model, the largest first: save or push each, look at its `model` and
        `report`. The model itself stays dense. Where a method is `nested`, each is made from the one before, in at
        least the shots that the smallest takes; else all are cut from the same measurement.
        """
        shares = descending(keep)
        return family(self, shares, self._start(shares[-1], dataset, text_columns, label_column))

    @final
    def plan(
        self, dataset: Any, keep: Sequence[float] = SHARES, *, text_columns: Columns = None, label_column: str | None = None
    ) -> tuple[Forecast, ...]:
        """What would be kept for each share, and the error that the method expects: one measurement, nothing is cut.

        Shares below the smallest plan there is are left out, if not all of them are. A nested method's first shot decides.
        """
        shares = descending(keep)
        return forecasts(self, shares, self._start(shares[0], dataset, text_columns, label_column))

    def nats(self, batches: Batches) -> float:
        """What an error of 1 in the ranking is expected to add to the loss of a prediction, in nats, if the method knows."""
        return 1.0

    def check(self, keep: float, batches: Batches) -> None:
        """Refuse, before any work, what cannot be reached. Default: a budget below the smallest plan."""
        trunk.smallest(self.config.trunk, self.currency).limit(keep)

    def schedule(self) -> Sequence[float]:
        """The shares of the dense model to keep, shot after shot; the last is `config.keep`. Default: one shot."""
        return (self.config.keep,)

    def shoot(self, keep: float, batches: Batches, stage: TimedStage) -> Lines:
        """Prune the model, as it is now, to `keep` of the dense one."""
        groups = find_groups(self.model, self.config.structures)
        return self.cut(groups, self.survey(groups, batches, stage), keep, batches, stage)

    def survey(self, groups: list[Group], batches: Batches, stage: TimedStage) -> Ranking:
        """What every group loses at every size; changes nothing."""
        with stage("measure"):
            return trunk.join(survey(self, groups, batches), self.model, self.config, batches, self.nats(batches))

    @final
    def cut(self, groups: list[Group], ranking: Ranking, keep: float, batches: Batches, stage: TimedStage) -> Lines:
        """Decide the sizes, correct what stays, slice the rest away: first of what all blocks share, if any of it may go."""
        self.forward_seconds = pace_again(self, batches)
        shape, self._currency = trunk.settle(self, groups, ranking, keep, batches)
        plan, nats = self.select(shape.ranking, shape.kept), self.nats(batches)
        batches.warn_if_few(max((shape.kept[group.name] * group.width // group.active[0] for group in shape.groups), default=0))
        with stage("repair"):
            trunk.cut(self.model, shape.plan, batches)
            self.repair(find_groups(self.model, self.config.structures), plan, batches)
            slice_model(self.model, plan)
            timestamps.renumber(self.model, shape.groups, plan)
        return shape.lines(groups, ranking, nats)

    @abstractmethod
    def measure(self, groups: list[Group], batches: Batches) -> Iterable[tuple[Group, Any]]:
        """What the data says of each group, lazily, in the order of `groups`: never the statistics of all blocks at once."""

    @abstractmethod
    def rank(self, groups: list[Group], stats: Iterable[tuple[Group, Any]]) -> Ranking:
        """An order of each group's units, and the error left with the first k of them. Asked block by block, see `survey`."""

    def allocate(self, groups: list[Group], ranking: Ranking, keep: float, currency: Currency) -> dict[str, int]:
        """How many units each group keeps, so that the model costs at most the share `keep` of the dense one."""
        solve = allocate if currency.table is None else allocate_exactly  # measured times have steps
        return solve(ranking.error, *currency.choices(groups), currency.limit(keep))

    def select(self, ranking: Ranking, kept: Mapping[str, int]) -> Plan:
        """Which units each group keeps: the first of its order, in their old order."""
        return {name: ranking.order[name][:count].sort(0).values for name, count in kept.items()}

    def repair(self, groups: list[Group], plan: Plan, batches: Batches) -> None:
        """Correct the weights that stay. May slice blocks itself where later statistics have to see them small."""

    @property
    def currency(self) -> Currency:
        """What `keep` counts in the run that is under way, or was the last."""
        if self._currency is None:
            raise RuntimeError("There is no budget yet: call prune(dataset) first.")
        return self._currency

    @property
    def model(self) -> PreTrainedModel:
        """The model: dense before `prune`, pruned after it."""
        if self._model is None:
            raise RuntimeError("An earlier prune() failed half way and the model is lost: make a new pruner.")
        return self._model

    @property
    def report(self) -> PruningReport:
        """What the last `prune` did."""
        if self._report is None:
            raise RuntimeError("There is no report yet: call prune(dataset) first.")
        return self._report

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write weights, config, tokenizer, recipe, model card and the remote-code loader into a new or empty folder.

        `kwargs` (max_shard_size, ...) go to `model.save_pretrained`. Nothing half-written is left behind on an error.
        """
        checkpoint.save(self, Path(folder), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push it; where it is. `kwargs`: private, token, commit_message, revision, create_pr, max_shard_size, variant."""
        return checkpoint.push(self, repo_id, **kwargs)

    def _start(
        self, keep: float | None, dataset: Any, text_columns: Columns, label_column: str | None, folder: Folder = None
    ) -> Batches:
        """Read the data, fix what is counted, and refuse what cannot be done; the model is not touched. No keep: the config's."""
        model = self.model
        calibration.refuse_unprunable(model)
        check_finite(model)
        calibration.refuse_offloaded(self)
        batches = calibration.read(self, dataset, text_columns, label_column)
        self.stages, self.metrics = {}, []
        self.journal = calibration.open_journal(self, folder, batches)
        currency = Currency.of(model, self.config, batches, self.cost(batches), self.timer())
        self._currency = currency.kept_in(self.journal, "latency")
        self.config, self.forward_seconds = self.currency.asked(self.config, keep), forward_seconds(model, batches)
        self.check(keep or self.config.keep, batches)
        self._dense = teacher_of(model) if self.config.distill_epochs else None
        return batches

    def cost(self, batches: Batches) -> Cost:
        """The size of the model as it is now."""
        return Cost.of(self.model, batches.seq_len)

    def finish(self, lines: Sequence[Lines], batches: Batches) -> None:
        """Let the dense model teach the pruned one, if asked to; write its record, and the report of the shots that made it."""
        experts.close(self.model)
        if self._dense is not None:
            with self.timer()("distill"):
                distill(self.model, self._dense, batches, self.config.distill_epochs, self.config.seed)
            self._dense = None
        write_record(self.model)
        self._report = make_report(self, lines, batches)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The model in the state that measuring and cutting need."""
        # a caller's inference_mode would make the new weights unfit for training, and forbid the Fisher pass
        with torch.inference_mode(False), quiet(self.model), experts.opened(self.model):
            yield

    @contextmanager
    def _lost_on_error(self, model: PreTrainedModel) -> Iterator[None]:
        """Do not let a half-pruned model be pruned or saved."""
        try:
            yield
        except BaseException:
            self._model = None
            raise

    def timer(self, shot: int | None = None) -> TimedStage:
        """A clock for the stages of this shot."""
        return stage_timer(self.stages, "" if shot is None else f" {shot}", device_of(self.model))
