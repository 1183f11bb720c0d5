"""The flow that every method shares. Read this file first."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import checkpoint
from .budget import Ranking, allocate, model_cost, options, unit_cost
from .card import Paper
from .config import PruningConfig
from .data import Batches, make_batches
from .families import Group, check_finite, find_groups, is_causal
from .probes import device_of, quiet
from .report import Cost, GroupReport, PruningReport, Stage, timed
from .slicing import Plan, restored_on_error, slice_model
from .structure import write_record

logger = logging.getLogger(__name__)
TimedStage = Callable[[str], AbstractContextManager[None]]
C = TypeVar("C", bound=PruningConfig)
P = TypeVar("P", bound="Pruner[Any]")


class Pruner(ABC, Generic[C]):
    """Measure, rank, allocate, select, repair, slice.

    A method supplies `measure` and `rank`, and may replace `allocate`, `select` and `repair`.
    """

    method: ClassVar[str]
    """The name in commands, recipes and cards."""
    paper: ClassVar[Paper]
    """What it implements; goes into the model card."""
    config_class: ClassVar[type[PruningConfig]]

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

        While somebody else holds the model, its old weights are kept until pruning has succeeded, to put them back if it
        does not; that needs memory for a second model.
        """
        checkpoint.refuse_quantized(model)
        find_groups(model)  # an unknown family is refused here, before any data is read
        self._model: PreTrainedModel | None = model
        self.config, self.tokenizer, self.source = config, tokenizer, source
        self.metrics: list[dict[str, Any]] = []
        self._report: PruningReport | None = None
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

        `kwargs` (dtype, device_map, revision, gguf_file, ...) go to `AutoModel....from_pretrained`; which Auto class is
        decided by `task` ("text-generation", "text-classification", ...) or, without it, by `config.architectures`. A
        live model is pruned in place.
        """
        model, tokenizer, source = checkpoint.load(model_or_path, tokenizer=tokenizer, task=task, **kwargs)
        live = model is model_or_path
        return cls(model, config if config is not None else cls.config_class(), tokenizer, source, caller_holds_model=live)

    @final
    def prune(self, dataset: Any, *, text_columns: Sequence[str] | None = None) -> PreTrainedModel:
        """Prune the model in place and return it.

        dataset: a `datasets.Dataset` (raw text or tokenized), a list of strings, pairs or dicts, or ready batches.
        If anything goes wrong, a model that was handed in live is as it was before, bit for bit.
        """
        model, config = self.model, self.config
        check_finite(model)
        batches = make_batches(
            dataset, model.config, config, causal=is_causal(model), tokenizer=self.tokenizer, text_columns=text_columns
        )
        dense, stages, lines = self.cost(batches), dict[str, Stage](), list[tuple[GroupReport, ...]]()
        self.check(dense, batches)
        shots = self.schedule()
        # a caller's inference_mode would make the new weights unfit for training, and forbid the Fisher pass
        with torch.inference_mode(False), quiet(model), self._guard(model):
            for shot, keep in enumerate(shots, start=1):
                suffix = f" {shot}" if len(shots) > 1 else ""
                lines.append(self.shoot(keep, dense, batches, partial(_stage, stages, suffix, device_of(model))))
            write_record(model)
        self._report = self._make_report(lines, batches, dense, stages)
        return model

    def check(self, dense: Cost, batches: Batches) -> None:
        """Refuse, before any work, what cannot be reached. Default: a budget below the smallest plan."""
        self._limit(self.config.keep, dense, batches)

    def schedule(self) -> Sequence[float]:
        """The shares of the dense model to keep, shot after shot; the last is `config.keep`. Default: one shot."""
        return (self.config.keep,)

    def shoot(self, keep: float, dense: Cost, batches: Batches, stage: TimedStage) -> tuple[GroupReport, ...]:
        """Prune the model, as it is now, to `keep` of the dense one."""
        groups = find_groups(self.model)
        with stage("measure"):
            stats = self.measure(groups, batches)
            ranking = self.rank(groups, stats)
        kept = self.allocate(groups, ranking, self._limit(keep, dense, batches), batches)
        plan = self.select(ranking, kept)
        _warn_of_few_tokens(groups, kept, batches)
        with stage("repair"):
            self.repair(groups, plan, batches)
            slice_model(self.model, plan)
        return tuple(_line(group, ranking.error[group.name], kept[group.name]) for group in groups)

    @abstractmethod
    def measure(self, groups: list[Group], batches: Batches) -> Iterable[tuple[Group, Any]]:
        """What the data says of each group, lazily and block by block: never the statistics of all blocks at once."""

    @abstractmethod
    def rank(self, groups: list[Group], stats: Iterable[tuple[Group, Any]]) -> Ranking:
        """An order of each group's units and the error left after keeping the first k of them, for every k."""

    def allocate(self, groups: list[Group], ranking: Ranking, limit: float, batches: Batches) -> dict[str, int]:
        """How many units each group keeps. `limit` is what all kept units may cost together."""
        costs = self.unit_costs(groups, batches)
        sizes = {group.name: options(group, self.config.round_to) for group in groups}
        return allocate(ranking.error, costs, sizes, limit)

    def select(self, ranking: Ranking, kept: Mapping[str, int]) -> Plan:
        """Which units each group keeps: the first of its order, in their old order."""
        return {name: ranking.order[name][:count].sort().values for name, count in kept.items()}

    def repair(self, groups: list[Group], plan: Plan, batches: Batches) -> None:
        """Correct the weights that stay. May slice blocks itself where later statistics have to see them small."""

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
        """Push what `save_pretrained` writes to the Hub and return the commit's address.

        `kwargs`: private, token, commit_message, revision, create_pr, max_shard_size.
        """
        return checkpoint.push(self, repo_id, **kwargs)

    @contextmanager
    def _lost_on_error(self, model: PreTrainedModel) -> Iterator[None]:
        """Do not let a half-pruned model be pruned or saved."""
        try:
            yield
        except BaseException:
            self._model = None
            raise

    def _limit(self, keep: float, dense: Cost, batches: Batches) -> float:
        """What the kept units may cost together: the asked share of the dense blocks, less what no plan can remove."""
        groups, budget = find_groups(self.model), self.config.budget
        total = getattr(dense, f"block_{budget}")
        costs = self.unit_costs(groups, batches)
        smallest = sum(options(group, self.config.round_to)[0] * costs[group.name] for group in groups)
        fixed = model_cost(self.model, budget, batches.seq_len) - sum(group.units * costs[group.name] for group in groups)
        limit = keep * total - fixed
        if limit < smallest:
            raise ValueError(
                f"keep={keep} of {total:,} {budget} asked, but one head and "
                f"{self.config.round_to} neurons in every block already make {(smallest + fixed) / total:.4f}. "
                "Keep more, or lower round_to."
            )
        return limit

    def unit_costs(self, groups: list[Group], batches: Batches) -> dict[str, int]:
        """What one unit of each group costs in the budget's currency."""
        return {g.name: unit_cost(self.model, g, self.config.budget, batches.seq_len) for g in groups}

    def cost(self, batches: Batches) -> Cost:
        """The size of the model as it is now."""
        model = self.model
        params = sum(parameter.numel() for parameter in model.parameters())
        return Cost(params, *(model_cost(model, budget, batches.seq_len) for budget in ("params", "macs")))

    def _make_report(
        self, lines: list[tuple[GroupReport, ...]], batches: Batches, dense: Cost, stages: dict[str, Stage]
    ) -> PruningReport:
        pruned, budget = self.cost(batches), f"block_{self.config.budget}"
        groups = tuple(replace(last, units=first.units) for first, last in zip(lines[0], lines[-1], strict=True))
        reached = getattr(pruned, budget) / getattr(dense, budget)
        if self.counts == "weights":  # zeros of old are as good as new ones
            reached = sum(group.kept for group in groups) / sum(group.units for group in groups)
        return PruningReport(
            method=self.method,
            keep=self.config.keep,
            budget=self.config.budget,
            reached=reached,
            seq_len=batches.seq_len,
            num_tokens=batches.num_tokens,
            num_examples=batches.num_examples,
            data=batches.source,
            fingerprint=batches.fingerprint,
            dense=dense,
            pruned=pruned,
            groups=groups,
            counts=self.counts,
            stages=stages,
        )


def _stage(stages: dict[str, Stage], suffix: str, device: torch.device, name: str) -> AbstractContextManager[None]:
    return timed(stages, name + suffix, device)


def _line(group: Group, curve: Tensor, kept: int) -> GroupReport:
    return GroupReport(group.name, group.units, kept, float(curve[kept] / curve[0]) if curve[0] else 0.0)


def _warn_of_few_tokens(groups: list[Group], kept: Mapping[str, int], batches: Batches) -> None:
    widest = max(kept[group.name] * group.width for group in groups)
    if batches.num_tokens < 10 * widest:
        logger.warning(
            "%s calibration tokens for up to %s kept columns are %.1f tokens each; below 10 the corrections fit noise. "
            "Give more data, or raise num_tokens.",
            f"{batches.num_tokens:,}",
            f"{widest:,}",
            batches.num_tokens / widest,
        )
