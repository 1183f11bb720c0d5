"""Several sizes from one calibration: models, or what they would be."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from .data import Batches
from .families import find_groups
from .report import Forecast
from .trunk import choose, smallest

if TYPE_CHECKING:
    from .pruner import Pruner

P = TypeVar("P", bound="Pruner[Any]")
SHARES = tuple(round(0.05 * step, 2) for step in range(20, 1, -1))


def descending(keep: Iterable[float]) -> list[float]:
    """The shares asked for, largest first.

    Raises:
        ValueError: there are none, or one does not lie in (0, 1].
    """
    shares = sorted({keep} if isinstance(keep, (int, float)) else set(keep), reverse=True)
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong or not shares:
        raise ValueError(f"keep={shares} asked; it must be a list of shares in (0, 1]" + (f", not {wrong[0]}." if wrong else "."))
    return shares


def family(pruner: P, shares: list[float], batches: Batches) -> Iterator[P]:
    """A pruner for every share, with a model of its own. `shares` fall."""
    if pruner.nested:
        yield from _nested(pruner, shares, batches)
        return
    with pruner.at_work():
        ranking = pruner.survey(find_groups(pruner.model, pruner.config.structures), batches, pruner.timer())
    for share in shares:
        small = _copied(pruner, share)
        with small.at_work():
            lines = small.cut(find_groups(small.model, small.config.structures), ranking, share, batches, small.timer())
            small.finish([lines], batches)
        yield small


def _nested(pruner: P, shares: list[float], batches: Batches) -> Iterator[P]:
    """Shot after shot on one copy of the model, copied again at every share that was asked for."""
    working, lines = _copied(pruner, shares[-1]), []
    for shot, share in enumerate(sorted({*shares, *working.schedule()}, reverse=True), start=1):
        with working.at_work():
            lines.append(working.shoot(share, batches, working.timer(shot)))
        if share in shares:
            small = _copied(working, share)
            with small.at_work():
                small.finish(lines, batches)
            yield small


def _copied(pruner: P, keep: float) -> P:
    """The same work, in the state it is in, on a copy of the model."""
    model, config = copy.deepcopy(pruner.model), dataclasses.replace(pruner.config, keep=keep)
    other = type(pruner)(model, config, pruner.tokenizer, pruner.source, caller_holds_model=False)
    other._currency = dataclasses.replace(pruner.currency, model=model)
    other.stages, other._dense, other.forward_seconds = dict(pruner.stages), pruner._dense, pruner.forward_seconds
    return other


def forecasts(pruner: Pruner[Any], shares: list[float], batches: Batches) -> tuple[Forecast, ...]:
    """What would be kept at every share that can be reached. `shares` fall."""
    if pruner.counts == "weights":
        raise ValueError(
            "A plan asked of a method that makes zeros: what a weight costs depends on which others go with it. Ask for units, "
            "or cut (`sweep` with a folder, and shares to keep)."
        )
    found, nats, currency = list[Forecast](), pruner.nats(batches), pruner.currency
    with pruner.at_work():
        groups = find_groups(pruner.model, pruner.config.structures)
        ranking = pruner.survey(groups, batches, pruner.timer())
        for share in shares:
            if found and not smallest(pruner.config.trunk, currency).reaches(share):
                break
            shape = choose(pruner.allocate, pruner.config.trunk, groups, ranking, share, currency)
            found.append(Forecast(share, shape.currency.cost_of(shape.kept), nats * shape.error, {**shape.sizes, **shape.kept}))
    return tuple(found)
