"""What all blocks share: how many there are, and how wide the residual stream is that they read and write.

`PruningConfig.structures` says which of both may shrink. They are decided together with heads and neurons, of which a smaller
trunk leaves more in the same budget, and cut before them. Errors are in the Fisher information of the model's own predictions,
whatever the method: none of the papers ranks whole blocks or dimensions after training. Ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from .budget import Ranking
from .config import PruningConfig
from .currency import Currency
from .data import Batches
from .families import Group, find_blocks, find_groups, weight
from .gradients import outputs_of
from .linalg import add_to_gram, cholesky, damped, error_curve, sums_of_what_goes, symmetrize
from .mixtures import EXPERTS, rank_experts, refuse_without
from .narrowing import narrow_and_correct
from .parts import HIDDEN as HIDDEN
from .probes import real_rows
from .processes import is_main
from .report import GroupReport, Lines
from .routers import Mixture, fewest, find_mixtures, keep_experts, split
from .slicing import Plan
from .stream import Stream, check_stream, find_stream, shorten, without_weights
from .walk import BlockWalk

if TYPE_CHECKING:
    from .pruner import Pruner

LAYERS = "layers"
RIDGE = 0.01  # relative to the diagonal
TIMED = 3  # models, at most, before the sizes for a latency are settled
LEARNED = "learned"  # in the journal
Allocate = Callable[[list[Group], Ranking, float, Currency], dict[str, int]]


@dataclass(frozen=True)
class Shape:
    """A trunk, and what heads and neurons keep on it."""

    sizes: Mapping[str, int]
    """How many "layers", "experts" and "hidden" dimensions stay, if they are to be decided."""
    plan: Mapping[str, Tensor]
    """Which ones, where some go."""
    currency: Currency
    """With a model of that shape, without weights."""
    groups: list[Group]
    ranking: Ranking
    """Of the groups that are left, under the names that they then have."""
    kept: Mapping[str, int]
    """Units of these groups."""
    error: float
    """What all that costs, in the unit of the ranking."""

    def lines(self, groups: list[Group], ranking: Ranking, nats: float) -> Lines:
        """What a report says of the trunk and of `groups`, under the names that they had before."""
        lines = [trunk_line(name, ranking.error[name], count, nats) for name, count in self.sizes.items()]
        blocks = self.plan[LAYERS].tolist() if LAYERS in self.plan else sorted({group.block for group in groups})
        for group in groups:
            now = f"{blocks.index(group.block)}.{group.place}" if group.block in blocks else ""
            curve = self.ranking.error[now] if now else ranking.error[group.name]
            left = GroupReport.of(group, curve, self.kept.get(now, 0), nats)
            lines.append(left if now else replace(left, error=0.0, expected=0.0))
        return tuple(lines)


def join(ranking: Ranking, model: Any, config: PruningConfig, batches: Batches, nats: float) -> Ranking:
    """`ranking` with "layers" and "hidden" too, if they may go. nats: what an error of 1 in it stands for."""
    if not config.trunk:
        return ranking
    of_stream = [name for name in config.trunk if name != EXPERTS]
    parts = [rank_trunk(model, of_stream, batches, config.seed, nats)] if of_stream else []
    parts += [rank_experts(model, batches, config.seed, nats)] if EXPERTS in config.trunk else []
    order = {name: own for part in (ranking, *parts) for name, own in part.order.items()}
    return replace(ranking, order=order, error={name: own for part in (ranking, *parts) for name, own in part.error.items()})


@torch.no_grad()
def rank_trunk(model: Any, structures: Sequence[str], batches: Batches, seed: int, nats: float) -> Ranking:
    """Orders and errors of "layers" and "hidden", those of the two that `structures` asks for.

    A block's error is `sum over tokens of F (y - x)^2`, x what it reads and y what it hands on, F what errors are worth
    at y; blocks go one by one, without correction, and their errors add up. The first never goes: it stands at
    infinity.

    A dimension's error is what all linears that read the stream lose, after each was corrected, plus what the head reads:
    with G the Gram matrix of what is read, W the weight and F the worth of errors at a linear's output, dimensions are
    ordered by `sum over linears of |F^(1/2) W_j|^2 / (G + ridge diag G)^-1_jj`, then the errors of that order are exact.
    Two passes over the data and one backward over `some_examples`. nats: what an error of 1 in the result stands for.
    """
    stream = find_stream(model)
    blocks = {_name(index): block for index, block in enumerate(find_blocks(model))}
    linears = {group.name: group.consumer for site in stream.sites for group in site}
    found = outputs_of(model, {**linears, **blocks, "end": model.base_model}, batches, seed)
    worth = {name: 0.5 / nats * output.worth for name, output in found.items()}
    scaled = {site[0].name: torch.cat([_scaled(group, worth[group.name]) for group in site]) for site in stream.sites}
    end = worth["end"] * found["end"].energy * batches.num_tokens  # a head whose weight is tied cannot be corrected
    cost, lost = end.clone(), torch.zeros(len(blocks), dtype=torch.float64)
    walk = BlockWalk(model, batches)
    for index in walk.steps("Measuring the trunk"):
        before = list(walk.hidden)
        for site, gram in _grams(walk, stream, index):
            inverse = torch.cholesky_inverse(cholesky(damped(gram, RIDGE)))
            cost += (scaled[site.name].to(gram.device).square().sum(0) / inverse.diagonal()).cpu()
        for x, y, mask in zip(before, walk.hidden, walk.masks, strict=True):
            lost[index] += (real_rows(y - x, mask).double().square().sum(0).cpu() * worth[_name(index)]).sum()
    batches.processes.add_up(lost)
    lost[0] = torch.inf
    order, error = {LAYERS: lost.argsort(descending=True, stable=True)}, {}
    error[LAYERS] = sums_of_what_goes(lost[order[LAYERS]])
    if HIDDEN in structures:
        order[HIDDEN] = cost.argsort(descending=True, stable=True)
        error[HIDDEN] = sums_of_what_goes(end[order[HIDDEN]])
        walk = BlockWalk(model, batches)
        for index in walk.steps("Comparing widths"):
            for site, gram in _grams(walk, stream, index):
                error[HIDDEN] += error_curve(gram, scaled[site.name].to(gram.device), order[HIDDEN].to(gram.device)).cpu()
    return Ranking({name: order[name] for name in structures}, {name: error[name] for name in structures})


def settle(pruner: Pruner[Any], groups: list[Group], ranking: Ranking, keep: float, batches: Batches) -> tuple[Shape, Currency]:
    """`choose`, and what was counted in. Under a latency budget, models of the sizes chosen are timed, until one takes about as
    long as its blocks' times said: they are chosen anew with what was learned. A run that goes on learns nothing new."""
    journal, currency = pruner.journal, pruner.currency
    pick = partial(choose, pruner.allocate, pruner.config.trunk, groups, ranking, keep)
    if LEARNED in journal:
        currency = currency.kept_in(journal, LEARNED)
        return pick(currency), currency
    shape = pick(currency)
    for _ in range(TIMED):
        if (learned := currency.timed(shape.kept, batches.processes)) is None:
            break
        currency = learned
        shape = pick(currency)
    return shape, currency.kept_in(journal, LEARNED)


def choose(
    allocate: Allocate, structures: Sequence[str], groups: list[Group], ranking: Ranking, keep: float, currency: Currency
) -> Shape:
    """The trunk that leaves the smallest error together with the best allocation on it: `keep` of the dense model in all.

    One axis after the other, from the whole trunk down, each once and all but the last once more; along an axis no further than
    the trunk's own error stays below the best sum so far.
    """
    at = {name: len(ranking.order[name]) for name in structures}
    best, least = at, _error(allocate, at, groups, ranking, keep, currency) if structures else 0.0
    for axis in (*structures, *structures[:-1]):
        sizes = _sizes(axis, ranking, currency)
        for size in tqdm(sizes, desc=f"Trying {axis}", unit="size", leave=False, disable=None if is_main() else True):
            tried = {**at, axis: size}
            if sum(float(ranking.error[name][count]) for name, count in tried.items()) >= least:
                break
            found = _error(allocate, tried, groups, ranking, keep, currency)
            if found < least:
                best, least = tried, found
        at = best
    return _shape(allocate, best, groups, ranking, keep, currency)


def smallest(structures: Sequence[str], currency: Currency) -> Currency:
    """With a model of the smallest trunk there is.

    Raises:
        ValueError: there is none, because the model has no head: what it gives is its residual stream.
    """
    if not structures:
        return currency
    if {LAYERS, HIDDEN} & {*structures}:
        check_stream(currency.model, narrows=HIDDEN in structures)
    least: dict[str, Tensor] = {}
    if EXPERTS in structures:
        refuse_without(currency.model)
        least[EXPERTS] = fewest(currency.model)
    if LAYERS in structures:
        least[LAYERS] = torch.zeros(1, dtype=torch.long)
    if HIDDEN in structures:
        width = int(weight(find_groups(currency.model)[0].consumer).shape[0])
        least[HIDDEN] = torch.arange(min(currency.round_to, width))
    return replace(currency, model=_small(currency.model, least))


def _small(model: Any, plan: Plan) -> Any:
    """A copy without weights, of the trunk that `plan` keeps."""
    blocks = plan[LAYERS].tolist() if LAYERS in plan else list(range(len(find_blocks(model))))
    small = without_weights(model, blocks, plan.get(HIDDEN))
    if EXPERTS in plan:
        keep_experts(small, plan[EXPERTS])
    return small


def cut(model: Any, plan: Plan, batches: Batches) -> None:
    """Drop blocks and experts, then narrow the stream and correct what reads it."""
    if EXPERTS in plan:
        keep_experts(model, plan[EXPERTS])
    if LAYERS in plan:
        shorten(model, plan[LAYERS].tolist())
    if HIDDEN in plan:
        narrow_and_correct(model, plan[HIDDEN], batches)


def trunk_line(name: str, curve: Tensor, kept: int, nats: float) -> GroupReport:
    """What a report says of "layers", "experts" or "hidden"; curve: the error for every number kept."""
    most = float(curve[curve.isfinite()].max()) or 1.0  # what must stay stands at infinity
    return GroupReport(name, len(curve) - 1, kept, float(curve[kept]) / most, nats * float(curve[kept]))


def _name(index: int) -> str:
    return f"block {index}"


def _scaled(reader: Group, worth: Tensor) -> Tensor:
    full = weight(reader.consumer)
    return worth.sqrt().to(full.device)[:, None] * full.double()


def _grams(walk: BlockWalk, stream: Stream, index: int) -> Iterator[tuple[Group, Tensor]]:
    """What each site of one block reads, as a Gram matrix, in one run that goes on to the next block."""
    sites = [site[0] for site in stream.sites if site and site[0].block == index]
    device = weight(sites[0].consumer).device
    grams = {site.name: torch.zeros(stream.width, stream.width, dtype=torch.float64, device=device) for site in sites}
    walk.run(index, sites, lambda site, z: add_to_gram(grams[site.name], z), advance=True)
    for site in sites:
        gram = grams.pop(site.name)
        walk.processes.add_up(gram)
        yield site, symmetrize(gram)


def _sizes(axis: str, ranking: Ranking, currency: Currency) -> range:
    units = len(ranking.order[axis])
    step = {LAYERS: 1, EXPERTS: max(1, units // 128)}.get(axis, currency.round_to)
    return range(units, 0, -step)


def _error(allocate: Allocate, kept: Mapping[str, int], *work: Any) -> float:
    """That of the best model with this trunk; infinite if none fits."""
    try:
        return _shape(allocate, kept, *work).error
    except ValueError:
        return float("inf")


def _shape(
    allocate: Allocate, kept: Mapping[str, int], groups: list[Group], ranking: Ranking, keep: float, currency: Currency
) -> Shape:
    """The best model with this trunk."""
    trunk = ranking
    plan = {name: ranking.order[name][:count].sort().values for name, count in kept.items()}
    if kept:
        blocks = plan.get(LAYERS, torch.arange(len(find_blocks(currency.model)))).tolist()
        ranking = _of_experts(ranking, find_mixtures(currency.model), plan[EXPERTS]) if EXPERTS in plan else ranking
        currency = replace(currency, model=_small(currency.model, plan))
        ranking = _renamed(
            ranking,
            {group.name: f"{blocks.index(group.block)}.{group.place}" for group in groups if group.block in blocks},
        )
        groups = find_groups(currency.model, currency.structures)
    currency.limit(keep)  # refuses what does not fit, also where there is nothing left to allocate
    own = allocate(groups, ranking, keep, currency) if groups else {}
    ranking = ranking.given(own)
    gone = {name: units for name, units in plan.items() if len(units) < len(trunk.order[name])}
    error = sum(float(trunk.error[name][count]) for name, count in kept.items())
    return Shape(dict(kept), gone, currency, groups, ranking, own, error + ranking.total(own))


def _of_experts(ranking: Ranking, mixtures: Sequence[Mixture], keep: Tensor) -> Ranking:
    """Without the orders that neurons have in the experts that go, where each expert has its own."""
    left = {mixture.group.name: own for mixture, own in zip(mixtures, split(mixtures, keep), strict=True)}
    order = {name: own[:, left[name]] if own.dim() == 2 else own for name, own in ranking.order.items()}
    return replace(ranking, order=order)


def _renamed(ranking: Ranking, names: Mapping[str, str]) -> Ranking:
    """Only the groups in `names`, under their new names, in everything that a method's ranking holds by group."""
    own = {field.name: getattr(ranking, field.name) for field in dataclasses.fields(ranking)}
    return replace(ranking, **{name: {names[old]: value[old] for old in names if old in value} for name, value in own.items()})
