"""STAT as published: how it orders units and how it divides the budget. Used by `STATConfig.paper()` alone.

Source: 2406.00061 and its authors' code of December 2023 (BERT). What differs from that code are defects: residuals of heads
meet the rows of the output weight that belong to them, a block always keeps one head and one neuron, the share of heads in
the cost is the model's own, and no budget is left unspent that another head in every block could use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..budget import Ranking
from ..families import Group, weight
from ..linalg import error_curve, pivoted_cholesky, unit_columns


@dataclass(frozen=True)
class PublishedRanking(Ranking):
    """`error[g][k]` is not squared here: the k-th pivot |R_kk| (neurons) or the output error (heads), times the depth weight."""

    residual: Mapping[str, Tensor]
    """Neurons: `||R[k:, k:]||_F` for every k, without depth weight: [units + 1]."""


def rank(stats: Iterable[tuple[Group, Any]], num_blocks: int) -> PublishedRanking:
    """Pivoted QR of `z diag(||w_j||)` for neurons; of one column per head (all its channels stacked) for heads."""
    order: dict[str, Tensor] = {}
    error: dict[str, Tensor] = {}
    residual: dict[str, Tensor] = {}
    for group, moments in stats:
        depth = 1 + math.sqrt(num_blocks + 1 - group.block)
        output = weight(group.consumer).to(moments.gram)
        if group.structure == "heads":
            order[group.name] = head_order(moments.gram, group)
            columns = unit_columns(order[group.name].to(output.device), group.width)
            curve = error_curve(moments.gram, output, columns)[:: group.width].clamp_min(0).sqrt()
        else:
            scale = output.norm(dim=0)
            order[group.name], pivots, residual[group.name] = pivoted_cholesky(moments.gram * scale * scale[:, None])
            curve = torch.cat([pivots, pivots.new_zeros(1)])
        error[group.name] = depth * curve
    return PublishedRanking(order, error, residual)


def head_order(gram: Tensor, group: Group) -> Tensor:
    """Pivots of the matrix with one column per head: pivoted Cholesky of the traces of the Gram matrix's blocks."""
    blocks = gram.view(group.units, group.width, group.units, group.width)
    return pivoted_cholesky(blocks.diagonal(dim1=1, dim2=3).sum(-1))[0]


def choose_heads(gram: Tensor, group: Group, count: int) -> Tensor:
    """The heads to keep, chosen again on the network whose neurons are already pruned."""
    return head_order(gram, group)[:count].sort().values


def allocate(groups: list[Group], ranking: PublishedRanking, costs: Mapping[str, int], limit: float) -> dict[str, int]:
    """One global threshold on the errors of neurons, one on those of heads; the first unit of a block always stays.

    The number of heads (mean per block, at least their share of the budget) is the one where the smallest error of a head
    kept is closest to twice the mean residual of the neurons; neurons get what the heads leave, the same number on average
    in every block. A number of heads is passed over when all neurons stay and another head in every block could as well:
    the source would leave that part of the budget unspent.
    """
    heads = {group.name: group.units for group in groups if group.structure == "heads"}
    neurons = {group.name: group.units for group in groups if group.structure == "neurons"}
    if sum(group.units * costs[group.name] for group in groups) <= limit:
        return {**heads, **neurons}
    head_cost, neuron_cost = (max(costs[name] for name in names) for names in (heads, neurons))
    blocks, all_neurons = len(heads), sum(neurons.values())
    most_heads = sum(heads.values()) // blocks
    share = limit / sum(group.units * costs[group.name] for group in groups)
    best: tuple[float, dict[str, int]] | None = None
    for mean in range(max(1, math.floor(most_heads * share)), most_heads + 1):
        affordable = int((limit - mean * blocks * head_cost) // neuron_cost)
        if affordable < blocks:
            break
        if (affordable - all_neurons) * neuron_cost >= blocks * head_cost and mean < most_heads:
            continue
        some, threshold = _above_threshold(ranking, heads, mean * blocks)
        many, _ = _above_threshold(ranking, neurons, min(affordable // blocks * blocks, all_neurons))
        residual = sum(float(ranking.residual[name][k]) for name, k in many.items()) / blocks
        mismatch = abs((threshold if mean < most_heads else 0.0) - 2 * residual)
        if best is None or mismatch < best[0]:
            best = mismatch, {**some, **many}
    if best is None:
        raise ValueError(f"The budget of {limit:,.0f} is too small for one head and one neuron in every block. Keep more.")
    return best[1]


def _above_threshold(ranking: Ranking, units: Mapping[str, int], total: int) -> tuple[dict[str, int], float]:
    """Sizes that add up to `total`: the units with the largest errors over all blocks, and the smallest error among them."""
    # the first unit of every block comes before all others
    entries = sorted((k > 0, -float(ranking.error[name][k]), name) for name, n in units.items() for k in range(n))[:total]
    chosen = [name for _, _, name in entries]
    return {name: chosen.count(name) for name in units}, min(-error for _, error, _ in entries)
