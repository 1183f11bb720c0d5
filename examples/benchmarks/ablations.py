"""STAT with one ingredient taken out: recipes of `encoder_glue.py` and `decoder_wikitext.py`, to see what each is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from optimum_stat import FisherConfig, FisherPruner, PruningConfig, STATConfig, STATPruner
from optimum_stat.budget import Ranking
from optimum_stat.currency import Currency
from optimum_stat.data import Batches
from optimum_stat.elimination import backward_elimination
from optimum_stat.families import Group, weight
from optimum_stat.gradients import outputs_of
from optimum_stat.linalg import error_curve, pivoted_cholesky
from optimum_stat.methods.stat import Moments
from optimum_stat.slicing import Plan


class ByEnergy(STATPruner):  # type: ignore[misc]
    """Selection: a unit is worth what it hands on by itself, as if no other could take over."""

    def rank(self, groups: list[Group], stats: Iterable[tuple[Group, Moments]]) -> Ranking:
        order, error = dict[str, Tensor](), dict[str, Tensor]()
        for group, moments in stats:
            scaled = (moments.metric.sqrt()[:, None] * weight(group.consumer)).view(-1, group.units, group.width)
            own = moments.gram.view(group.units, group.width, group.units, group.width).diagonal(dim1=0, dim2=2)
            lost = torch.einsum("ouw,wvu,ouv->u", scaled, own.to(scaled), scaled)
            order[group.name] = lost.argsort(descending=True)
            gone = lost[order[group.name]].flip(0).cumsum(0).flip(0)
            error[group.name] = torch.cat([gone, gone.new_zeros(1)])
        return Ranking(order, error)


class ByPivots(STATPruner):  # type: ignore[misc]
    """Selection: neurons in the order of a pivoted QR of the activations, whatever reads them; with the errors of that order."""

    def rank(self, groups: list[Group], stats: Iterable[tuple[Group, Moments]]) -> Ranking:
        order, error = dict[str, Tensor](), dict[str, Tensor]()
        for group, moments in stats:
            scaled = moments.metric.sqrt()[:, None] * weight(group.consumer)
            if group.structure == "neurons":
                order[group.name] = pivoted_cholesky(moments.gram)[0]
                error[group.name] = error_curve(moments.gram, scaled, order[group.name])
            else:
                order[group.name], error[group.name] = backward_elimination(
                    moments.gram, scaled, group.width, self.config.damping
                )
        return Ranking(order, error)


class Uniform(STATPruner):  # type: ignore[misc]
    """Allocation: the same share of the heads and of the neurons of every block."""

    def allocate(self, groups: list[Group], ranking: Ranking, keep: float, currency: Currency) -> dict[str, int]:
        costs, sizes = currency.choices(groups)
        limit = currency.limit(keep)
        for share in torch.linspace(1, 0, 1001).tolist():
            at = {g.name: max(i for i, size in enumerate(sizes[g.name]) if i == 0 or size <= share * g.units) for g in groups}
            if sum(costs[name][i] for name, i in at.items()) <= limit:
                return {name: sizes[name][i] for name, i in at.items()}
        raise ValueError(f"keep={keep} cannot be reached with the same share everywhere.")


class ByMasks(FisherPruner):  # type: ignore[misc]
    """Selection and allocation: Kwon et al.'s, by the Fisher information of masks, the labels' loss; the rest as it is."""

    def repair(self, groups: list[Group], plan: Plan, batches: Batches) -> None:
        STATPruner(self.model, STATConfig())._correct(groups, plan, batches)


class Uncorrected(STATPruner):  # type: ignore[misc]
    """Correction: none, what stays is as it was."""

    def repair(self, groups: list[Group], plan: Plan, batches: Batches) -> None:
        pass


class CorrectedOnDense(STATPruner):  # type: ignore[misc]
    """Correction: every consumer on the activations of the dense network."""

    def repair(self, groups: list[Group], plan: Plan, batches: Batches) -> None:
        self._correct(groups, plan, batches, before_pruning=True)


class TokensApart(STATPruner):  # type: ignore[misc]
    """Worth of errors: those of an example's tokens count each alone, however alike they are."""

    def _fisher(self, groups: list[Group], batches: Batches, what: str = "gradients") -> dict[str, Tensor]:
        found = outputs_of(self.model, {group.name: group.consumer for group in groups}, batches, self.config.seed)
        return {name: output.fisher for name, output in found.items()}


def ridge(value: float) -> Callable[..., PruningConfig]:
    return lambda **asked: STATConfig(ridge=value, **asked)


ABLATIONS: dict[str, tuple[Any, Callable[..., PruningConfig]]] = {
    "selection by masks": (ByMasks, FisherConfig),
    "selection by energy": (ByEnergy, STATConfig),
    "selection by pivoted QR": (ByPivots, STATConfig),
    "the same share everywhere": (Uniform, STATConfig),
    "no correction": (Uncorrected, STATConfig),
    "correction on the dense network": (CorrectedOnDense, STATConfig),
    "tokens apart": (TokensApart, STATConfig),
    "ridge 0.01": (STATPruner, ridge(0.01)),
    "ridge 0.1": (STATPruner, ridge(0.1)),
}
