"""What `keep` counts, on the model at hand: what all of it costs, and what each size of a group does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .budget import Cost, Lengths, largest, model_cost, options, unit_cost
from .config import C, PruningConfig
from .data import Batches
from .families import Group, find_groups, values_of
from .journal import Journal
from .latency import LatencyTable
from .latency_cache import latency_table
from .latency_timing import time_with
from .memory import Residents
from .probes import quiet
from .processes import Processes
from .timing import Setting

if TYPE_CHECKING:
    from .report import TimedStage

logger = logging.getLogger(__name__)
UNITS = {"params": "params", "macs": "macs", "memory": "bytes of memory"}


@dataclass(frozen=True)
class Currency:
    """Parameters, MACs, bytes or measured nanoseconds; shares are always of the dense model."""

    model: Any
    """As it is now, which may be after some shots."""
    budget: str
    round_to: int
    structures: tuple[str, ...]
    """Which groups may go."""
    seq_len: Lengths
    """Mean length of the calibration data's examples: what MACs are counted for."""
    dense: Cost
    """The size of the model before the first shot."""
    table: LatencyTable | None
    """The measured times that a latency budget is about; None under other budgets."""
    table_is_given: bool = False
    """By the config: then the times in it count, whatever they are here and now, and the same plan comes out again."""
    residents: Residents | None = None
    """What a memory budget is about; None under other budgets."""

    @classmethod
    def of(cls, model: Any, config: PruningConfig, batches: Batches, dense: Cost, stage: TimedStage) -> Currency:
        """Of a dense model; measures its latency if the budget is one. Of several processes the main one measures alone."""
        seq_len, table = batches.seq_len, None
        length = config.serve_seq_len or largest(batches.seq_len)  # several are refused below
        if config.budget == "latency":
            with quiet(model), stage("latency"):
                setting = Setting.of(model, config.serve_phase, config.serve_batch_size, length, config.serve_compiled)
                table = LatencyTable.from_dict(
                    batches.processes.as_main(
                        lambda: latency_table(model, config.round_to, setting, config.latency_table).to_dict()
                    )
                )
        residents = Residents.of(model, config.serve_batch_size, length) if config.budget == "memory" else None
        given = config.latency_table is not None
        return cls(model, config.budget, config.round_to, config.structures, seq_len, dense, table, given, residents)

    def asked(self, config: C, keep: float | None) -> C:
        """With the share that its `milliseconds` are, if there are any.

        Raises:
            ValueError: there are, and a share is asked for besides.
        """
        if self.table is None or config.milliseconds is None:
            return config
        if keep is not None:
            raise ValueError(f"milliseconds={config.milliseconds} asked of a sweep or plan, which has shares: leave it out.")
        share = config.milliseconds * 1e6 / self.table.total
        if share >= 1:
            logger.warning("%s ms asked; the model takes %.3f as it is.", config.milliseconds, self.table.total / 1e6)
        return replace(config, keep=min(1.0, share))

    def limit(self, keep: float) -> float:
        """What the kept units may cost together: the share `keep` of the dense model's cost, less what no plan can remove.

        Raises:
            ValueError: the smallest plan there is costs more.
        """
        return self.limits()(keep)

    def limits(self) -> Callable[[float], float]:
        """`limit`, as long as the model keeps its size: what does not depend on the share is found out once."""
        groups = find_groups(self.model, self.structures)
        costs, sizes = self.choices(groups)
        if self.table is not None:
            total, fixed = self.table.total, self.table.fixed(group.name for group in groups)
        elif self.residents is not None:
            total, fixed = self.residents.dense, self.residents.total(self.model) - sum(own[-1] for own in costs.values())
        else:
            total = getattr(self.dense, f"block_{self.budget}")
            fixed = model_cost(self.model, self.budget, self.seq_len) - sum(own[-1] for own in costs.values())
        least = fixed + sum(min(own) for own in costs.values())

        def limit(keep: float) -> float:
            allowed = keep * total if self.table is None else self.table.limit(keep * total)
            if allowed >= least:
                return float(allowed - fixed)
            made = least if self.table is None else self.table.taken(least)
            what = f"{total / 1e6:.3f} ms for {self.table.setting}" if self.table else f"{total:,} {UNITS[self.budget]}"
            raise ValueError(
                f"keep={keep} of {what} asked, but {self._fewest(groups, sizes)} in every block already make "
                f"{made / total:.4f}. Keep more, lower round_to, or let other structures go too."
            )

        return limit

    def _fewest(self, groups: Sequence[Group], sizes: Mapping[str, Sequence[int]]) -> str:
        """What the smallest plan leaves of a block, in words."""
        neurons = max((sizes[group.name][0] for group in groups if group.structure == "neurons"), default=0)
        fewest = {"heads": "one head", "neurons": f"{neurons} neurons"}
        for name in ("pairs", "values"):
            own = [sizes[group.name][0] for group in groups if group.structure == name]
            fewest |= {name: f"{max(own)} {name}"} if own else {}
        return " and ".join(own if name in self.structures else f"all {name}" for name, own in fewest.items())

    def reaches(self, keep: float) -> bool:
        """Whether there is a plan so small."""
        try:
            self.limit(keep)
        except ValueError:
            return False
        return True

    def kept_in(self, journal: Journal, entry: str) -> Currency:
        """With the times that a run which was stopped has counted with; those of one that was not are written down.

        Measured again they would be others, and blocks that are cut already would not fit what they say.
        """
        if self.table is None or entry not in journal:
            journal.keep(entry, (), note=self.table.to_dict()) if self.table else None
            return self
        return replace(self, table=LatencyTable.from_dict(journal.note(entry)))

    def timed(self, kept: Mapping[str, int], processes: Processes) -> Currency | None:
        """With a table that knows how long a model with these units takes; None if it was right, or asked for by name."""
        if self.table is None or self.table_is_given:
            return None
        table = self.table
        whole = processes.as_main(lambda: time_with(self.model, table, kept))
        return None if whole is None else replace(self, table=replace(self.table, whole=whole))

    def choices(self, groups: Sequence[Group]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """What each group may keep: the costs of all sizes to choose from, and these sizes.

        Under a latency budget only sizes that were timed; what costs nothing there is in `limit`.
        """
        if self.table is not None:
            return self.table.choices(groups)
        sizes = {group.name: options(group, self.round_to) for group in groups}
        costs = self.unit_costs(groups)
        return {name: [costs[name] * size for size in own] for name, own in sizes.items()}, sizes

    def unit_costs(self, groups: Sequence[Group]) -> dict[str, int]:
        """What one unit of each group costs, in parameters, MACs or bytes."""
        if self.residents is not None:
            params = self._costs(groups, "params")
            return {group.name: self.residents.unit_bytes(self.model, group, params[group.name]) for group in groups}
        return self._costs(groups, self.budget)

    def _costs(self, groups: Sequence[Group], budget: str) -> dict[str, int]:
        """Where its values are a group of their own, a head costs what is left without them."""
        costs = {group.name: unit_cost(group, budget, self.seq_len) for group in groups}
        for group in groups:
            values = values_of(group, groups) if group.structure == "heads" else None
            if values is not None:
                costs[group.name] -= values.head_width * costs[values.name]
        return costs

    def cost_of(self, kept: Mapping[str, int]) -> Cost:
        """The size that the model would have with these units: exactly that of the sliced model."""
        saved = dict.fromkeys(("params", "macs"), 0)
        groups = [group for group in find_groups(self.model, self.structures) if group.name in kept]
        for budget in saved:
            costs = self._costs(groups, budget)
            saved[budget] = sum(costs[group.name] * (group.units - kept[group.name]) for group in groups)
        now = Cost.of(self.model, self.seq_len)
        return Cost(now.params - saved["params"], now.block_params - saved["params"], now.block_macs - saved["macs"])
