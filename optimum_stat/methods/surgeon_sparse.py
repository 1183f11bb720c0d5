"""Zeros instead of smaller layers: single weights, 2 of every 4 in a row, or whole rows and columns of each layer on its own.

Every linear layer of the blocks takes part; its bias is corrected and goes with a row, but is not counted (the paper can prune
one like a column, or like a weight, and counts it). Masks are those of the full matrices, so that nothing dead can shift
the groups of four. The model keeps its shapes and is saved with its zeros; what is empty stays empty in later shots, because it
costs nothing. Every layer loses the same share of single weights and of groups of four (published: what costs least over all
layers goes, which was far worse, see CHANGELOG).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ..correction import set_bias
from ..data import Batches
from ..families import Group, find_groups, weight
from ..linalg import add_to_gram, cholesky, damped, square_part, symmetrize
from ..report import GroupReport, Lines, TimedStage
from ..slicing import set_weight
from ..walk import BlockWalk
from . import surgeon_kfac as kfac
from .surgeon_curvature import Factors, kept_factors
from .surgeon_threshold import ElementThreshold, LineThreshold

if TYPE_CHECKING:
    from .surgeon import SurgeonConfig

Threshold = LineThreshold | ElementThreshold
PUBLISHED_RATIO = {"lines": 1, "elements": 10, "2:4": 10}
"""Of the damping of G to that of A, in the scripts of the paper's authors."""
Load = Callable[[int], Mapping[nn.Module, Factors]]


def check(model: nn.Module) -> None:
    """Refuse widths that no groups of four fill."""
    names = {module: name for name, module in model.named_modules()}
    for linear in (linear for group in find_groups(model) for linear in linears_of(group)):
        width = weight(linear).shape[1]
        if width % 4:
            raise ValueError(
                f"structure='2:4' asked, but {names[linear]} reads {width:,} channels, which is no multiple of 4. "
                "Take structure='elements', or prune units first with a round_to that is a multiple of 4."
            )


def linears_of(group: Group) -> list[nn.Module]:
    """A group's layers in the order of the forward pass, but for those that read relative positions, too or alone."""
    return [*(producer.linear for producer in group.producers if producer.tokens_only), group.consumer]


def nonzeros(model: nn.Module) -> tuple[int, int]:
    """(weights that are not zero, all weights) of the blocks' linear layers."""
    lines = [_line(group, {}) for group in find_groups(model)]
    return sum(line.kept for line in lines), sum(line.units for line in lines)


def shoot(model: nn.Module, keep: float, batches: Batches, config: SurgeonConfig, stage: TimedStage) -> Lines:
    """Empty all but `keep` of the weights of the model as it is now, and correct the others."""
    groups, total = find_groups(model), nonzeros(model)[1]
    layers: dict[int, list[nn.Module]] = {}
    for group in groups:
        layers.setdefault(group.block, []).extend(linears_of(group))
    threshold = (
        LineThreshold() if config.structure == "lines" else ElementThreshold(config.structure == "2:4", not config.published)
    )
    with ExitStack() as stack:
        with stage("measure"):
            load = stack.enter_context(kept_factors(model, layers, batches, config.labels, config.seed))
            for block in tqdm(layers, desc="Ranking", unit="block", disable=None if batches.processes.is_main else True):
                for linear, factors in load(block).items():
                    threshold.see(*_costs(linear, factors, config))
            threshold.settle(total - int(keep * total))
        with stage("repair"):
            error = _repair(BlockWalk(model, batches), layers, load, threshold, config)
    return tuple(_line(group, error) for group in groups)


@torch.no_grad()
def _repair(
    walk: BlockWalk, layers: Mapping[int, Sequence[nn.Module]], load: Load, threshold: Threshold, config: SurgeonConfig
) -> dict[nn.Module, tuple[float, float]]:
    """Empty and correct every layer, on what the network before it has become (published: on the shot's factors).

    Returns what the emptied weights of each layer cost by themselves, and what all do.
    """
    error: dict[nn.Module, tuple[float, float]] = {}
    waiting: list[tuple[nn.Module, Tensor]] = []
    for block in walk.steps("Correcting"):
        factors = load(block)
        for readers in _readers(layers[block], factors):
            inputs = factors[readers[0]].inputs if config.published else _inputs(walk, block, readers[0])
            for linear in readers:
                gone, error[linear] = _chosen(linear, factors[linear], threshold, config)
                waiting.append((linear, _corrected(linear, gone, replace(factors[linear], inputs=inputs), config)))
            if not config.published:
                _put(waiting)
        if not config.published and block + 1 < len(walk.blocks):
            walk.advance(block)
    _put(waiting)
    return error


def _readers(linears: Sequence[nn.Module], factors: Mapping[nn.Module, Factors]) -> Iterator[list[nn.Module]]:
    """Layers that read the same tensor, together, in the order of the forward pass."""
    for first in linears:
        same = [linear for linear in linears if factors[linear].inputs is factors[first].inputs]
        if same[0] is first:
            yield same


def _inputs(walk: BlockWalk, block: int, linear: nn.Module) -> Tensor:
    """A [in + 1, in + 1] of what the layer reads now."""
    width = weight(linear).shape[1] + 1
    total = torch.zeros(width, width, dtype=torch.float64, device=weight(linear).device)
    walk.run(block, [Group("", block, "", (), linear, 1, stream=linear)], lambda _, a: add_to_gram(total, _with_one(a)))
    walk.processes.add_up(total)
    return symmetrize(total).div_(total[-1, -1].clone())


def _costs(linear: nn.Module, factors: Factors, config: SurgeonConfig) -> tuple[Tensor, ...]:
    """(costs of weights [out, in],) or, for lines, (those of rows [out], with their biases, those of columns [in]).

    Rows and columns that are empty, or whose gradients or inputs are, cost nothing; nor can they make up for what others lose.
    """
    value, a, g = _with_bias(linear), _own(linear, factors.inputs), factors.gradients
    width = weight(linear).shape[1]
    rows = (value.any(1) & (g.diagonal() > 0)).nonzero().flatten()
    columns = (value.any(0) & (a.diagonal() > 0))[:width].nonzero().flatten()
    with_bias = torch.cat([columns, torch.arange(width, len(a), device=a.device)])
    costs = [value.new_zeros(size) for size in ((len(value), width), len(value), width)]
    if len(rows) and len(columns):
        value, a, g = value[rows][:, with_bias], square_part(a, with_bias), square_part(g, rows)
        g_inverse, a_inverse = _inverse(g, config, of_gradients=True), _inverse(a, config)[: len(columns), : len(columns)]
        own = value[:, : len(columns)]
        if config.structure == "lines":
            costs[1][rows] = kfac.row_costs(value, a, g_inverse).clamp_min(0)
            costs[2][columns] = kfac.column_costs(own, g, a_inverse).clamp_min(0)
        else:
            costs[0][rows[:, None], columns] = kfac.element_costs(own, g_inverse, a_inverse)
    return tuple(costs[1:]) if config.structure == "lines" else (costs[0],)


def _chosen(
    linear: nn.Module, factors: Factors, threshold: Threshold, config: SurgeonConfig
) -> tuple[Tensor, tuple[float, float]]:
    """What goes, [out, in], and (what that costs, what all would)."""
    costs = _costs(linear, factors, config)
    masks = threshold.mask(*costs)
    gone = masks if isinstance(masks, Tensor) else masks[0][:, None] | masks[1]
    pairs = zip(costs, [masks] if isinstance(masks, Tensor) else masks, strict=True)
    return gone, (sum(float(cost[mask].sum()) for cost, mask in pairs), sum(float(cost.sum()) for cost in costs))


def _corrected(linear: nn.Module, gone: Tensor, factors: Factors, config: SurgeonConfig) -> Tensor:
    """The weight, with its bias as last column if there is one, without the elements `gone` [out, in]."""
    value, a, g = _with_bias(linear), _own(linear, factors.inputs), factors.gradients
    rows, columns = gone.all(1).nonzero().flatten(), gone.all(0).nonzero().flatten()
    gone = torch.cat([gone, gone.new_zeros(len(gone), value.shape[1] - gone.shape[1])], dim=1)
    size = config.max_correlate
    if config.structure == "lines":
        value = kfac.remove_rows(value, _inverse(g, config, of_gradients=True), rows, size)
        return kfac.remove_columns(value, _inverse(a, config), columns, size)
    if size:
        return kfac.remove_elements_in_runs(value, _inverse(g, config, of_gradients=True), _inverse(a, config), gone, size)
    g, a = (damped(factor, config.ridge).float() for factor in (g, a))
    return kfac.remove_elements(value.float(), g, a, gone)


def _put(waiting: list[tuple[nn.Module, Tensor]]) -> None:
    while waiting:
        linear, value = waiting.pop()
        value = value.to(weight(linear).dtype)
        if isinstance(linear.bias, Tensor):
            set_bias(linear, value[:, -1])
            value = value[:, :-1]
        set_weight(linear, value)


def _inverse(factor: Tensor, config: SurgeonConfig, of_gradients: bool = False) -> Tensor:
    if config.published:
        return kfac.damped_inverse(factor, config.ridge * (PUBLISHED_RATIO[config.structure] if of_gradients else 1))
    return torch.cholesky_inverse(cholesky(damped(factor, config.ridge)))


def _with_bias(linear: nn.Module) -> Tensor:
    """The weight, with its bias as last column if there is one; float64."""
    value = weight(linear).detach().double()
    return torch.cat([value, linear.bias.detach().double()[:, None]], dim=1) if isinstance(linear.bias, Tensor) else value


def _own(linear: nn.Module, inputs: Tensor) -> Tensor:
    """A with the constant only where there is a bias to multiply it."""
    return inputs if isinstance(linear.bias, Tensor) else inputs[:-1, :-1]


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _line(group: Group, error: Mapping[nn.Module, tuple[float, float]]) -> GroupReport:
    weights = [weight(linear) for linear in linears_of(group)]
    spent, every = (sum(error[linear][i] for linear in error.keys() & set(linears_of(group))) for i in range(2))
    units, kept = sum(value.numel() for value in weights), sum(int(value.count_nonzero()) for value in weights)
    return GroupReport(group.name, units, kept, spent / every if every else 0.0, spent)
