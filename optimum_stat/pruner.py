"""The flow that every method shares. Read this file first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import checkpoint
from .budget import Ranking, allocate, model_cost, options, unit_cost
from .card import Paper
from .config import PruningConfig
from .data import Batches, make_batches
from .families import Group, check_finite, find_groups, is_causal, task_of
from .knapsack import allocate_exactly
from .latency import LatencyTable, latency_table
from .probes import device_of, quiet
from .report import Cost, GroupReport, PruningReport, Stage, TimedStage, stage_timer, timed
from .slicing import Plan, restored_on_error, slice_model
from .structure import write_record

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
    def labels(self) -> str:
        """What the method does with labels: "none", "auto" (it uses those that the data has), or "data" (it needs them)."""
        return "none"

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
        self._latency: LatencyTable | None = None
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

    def prune(
        self, dataset: Any, *, text_columns: Sequence[str] | None = None, label_column: str | None = None
    ) -> PreTrainedModel:
        """Prune the model in place and return it.

        dataset: a `datasets.Dataset` (raw text or tokenized), a list of strings, pairs or dicts, or ready batches.
        text_columns, label_column: where its texts and labels stand, if not under one of the usual names.
        If anything goes wrong, a model that was handed in live is as it was before, bit for bit.
        """
        model = self.model
        check_finite(model)
        batches = self._read(dataset, text_columns, label_column)
        dense, stages, lines = self.cost(batches), dict[str, Stage](), list[tuple[GroupReport, ...]]()
        self._latency = self._measured_latency(batches, stages) if self.config.budget == "latency" else None
        self.check(dense, batches)
        # a caller's inference_mode would make the new weights unfit for training, and forbid the Fisher pass
        with torch.inference_mode(False), quiet(model), self._guard(model):
            for shot, keep in enumerate(self.schedule(), start=1):
                suffix = f" {shot}" if len(self.schedule()) > 1 else ""
                lines.append(self.shoot(keep, dense, batches, stage_timer(stages, suffix, device_of(model))))
            write_record(model)
        self._report = self._make_report(lines, batches, dense, stages)
        return model

    def check(self, dense: Cost, batches: Batches) -> None:
        """Refuse, before any work, what cannot be reached. Default: a budget below the smallest plan."""
        self.limit(self.config.keep, dense, batches)

    def schedule(self) -> Sequence[float]:
        """The shares of the dense model to keep, shot after shot; the last is `config.keep`. Default: one shot."""
        return (self.config.keep,)

    def shoot(self, keep: float, dense: Cost, batches: Batches, stage: TimedStage) -> tuple[GroupReport, ...]:
        """Prune the model, as it is now, to `keep` of the dense one."""
        groups = find_groups(self.model)
        with stage("measure"):
            stats = self.measure(groups, batches)
            ranking = self.rank(groups, stats)
        kept = self.allocate(groups, ranking, self.limit(keep, dense, batches), batches)
        plan = self.select(ranking, kept)
        batches.warn_if_few(max(kept[group.name] * group.width for group in groups))
        with stage("repair"):
            self.repair(groups, plan, batches)
            slice_model(self.model, plan)
        return tuple(GroupReport.of(group, ranking.error[group.name], kept[group.name]) for group in groups)

    @abstractmethod
    def measure(self, groups: list[Group], batches: Batches) -> Iterable[tuple[Group, Any]]:
        """What the data says of each group, lazily and block by block: never the statistics of all blocks at once."""

    @abstractmethod
    def rank(self, groups: list[Group], stats: Iterable[tuple[Group, Any]]) -> Ranking:
        """An order of each group's units and the error left after keeping the first k of them, for every k."""

    def allocate(self, groups: list[Group], ranking: Ranking, limit: float, batches: Batches) -> dict[str, int]:
        """How many units each group keeps. `limit` is what all kept units may cost together."""
        solve = allocate if self.latency is None else allocate_exactly  # measured times have steps
        return solve(ranking.error, *self.choices(groups, batches), limit)

    def select(self, ranking: Ranking, kept: Mapping[str, int]) -> Plan:
        """Which units each group keeps: the first of its order, in their old order."""
        return {name: ranking.order[name][:count].sort().values for name, count in kept.items()}

    def repair(self, groups: list[Group], plan: Plan, batches: Batches) -> None:
        """Correct the weights that stay. May slice blocks itself where later statistics have to see them small."""

    @property
    def latency(self) -> LatencyTable | None:
        """The measured times that a latency budget is about; None under other budgets."""
        return self._latency

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

    def _read(self, dataset: Any, text_columns: Sequence[str] | None, label_column: str | None, needs: str = "") -> Batches:
        model, use = self.model, needs or self.labels
        if use == "none" and label_column is not None:
            raise ValueError(f"label_column={label_column!r} asked, but {self.method} with this config reads no labels.")
        return make_batches(
            dataset,
            model.config,
            self.config,
            causal=is_causal(model) and task_of(model) in ("text-generation", "feature-extraction"),
            tokenizer=self.tokenizer,
            text_columns=text_columns,
            labels_for=None if use == "none" else model,
            label_column=label_column,
            labels_needed=use == "data",
        )

    def limit(self, keep: float, dense: Cost, batches: Batches) -> float:
        """What the kept units may cost together: the share `keep` of the dense model's, less what no plan can remove.

        Raises:
            ValueError: the smallest plan there is costs more.
        """
        groups, budget, table = find_groups(self.model), self.config.budget, self.latency
        costs, sizes = self.choices(groups, batches)
        if table is None:
            total = getattr(dense, f"block_{budget}")
            fixed = model_cost(self.model, budget, batches.seq_len) - sum(own[-1] for own in costs.values())
        else:
            total, fixed = table.total, table.fixed
        least = fixed + sum(min(own) for own in costs.values())
        if keep * total < least:
            what = f"{total:,} {budget}" if table is None else f"{total / 1e6:.3f} ms on {table.device}"
            neurons = max(sizes[group.name][0] for group in groups if group.structure == "neurons")
            raise ValueError(
                f"keep={keep} of {what} asked, but one head and {neurons} neurons in every block "
                f"already make {least / total:.4f}. Keep more, or lower round_to."
            )
        return keep * total - fixed

    def choices(self, groups: list[Group], batches: Batches) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """What each group may keep: the costs, in the budget's currency, of all sizes to choose from, and these sizes.

        Under a latency budget only sizes that were timed; what costs nothing there is in `limit`.
        """
        if self.latency is not None:
            return self.latency.choices(groups)
        sizes = {group.name: options(group, self.config.round_to) for group in groups}
        costs = self.unit_costs(groups, batches)
        return {name: [costs[name] * size for size in own] for name, own in sizes.items()}, sizes

    def _measured_latency(self, batches: Batches, stages: dict[str, Stage]) -> LatencyTable:
        config = self.config
        with quiet(self.model), timed(stages, "latency", device_of(self.model)):
            return latency_table(self.model, config.round_to, config.latency_batch_size, batches.seq_len, config.latency_table)

    def unit_costs(self, groups: list[Group], batches: Batches) -> dict[str, int]:
        """What one unit of each group costs in the budget's currency."""
        return {g.name: unit_cost(self.model, g, self.config.budget, batches.seq_len) for g in groups}

    def cost(self, batches: Batches) -> Cost:
        """The size of the model as it is now."""
        params = sum(parameter.numel() for parameter in self.model.parameters())
        return Cost(params, *(model_cost(self.model, budget, batches.seq_len) for budget in ("params", "macs")))

    def _make_report(
        self, lines: list[tuple[GroupReport, ...]], batches: Batches, dense: Cost, stages: dict[str, Stage]
    ) -> PruningReport:
        pruned, budget, latency = self.cost(batches), f"block_{self.config.budget}", None
        groups = tuple(replace(last, units=first.units) for first, last in zip(lines[0], lines[-1], strict=True))
        if self.latency is not None:
            with quiet(self.model):
                latency = self.latency.compare(self.model, self.config.keep, {group.name: group.kept for group in groups})
            reached = latency.predicted / latency.dense
        elif self.counts == "weights":  # zeros of old are as good as new ones
            reached = sum(group.kept for group in groups) / sum(group.units for group in groups)
        else:
            reached = getattr(pruned, budget) / getattr(dense, budget)
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
            latency=latency,
        )
