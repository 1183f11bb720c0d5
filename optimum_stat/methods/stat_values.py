"""STAT on single value dimensions: the basis they are turned into, how many of each block's heads stay, and what reads them.

A key/value head g hands `v_g` to its query heads, and what query head q makes of it, `z_gq`, is a mean of it over tokens. So for
any invertible A, `A v_g` instead of `v_g` and `W_gq A^-1` instead of the consumer's columns `W_gq` leave the model as it is, and
dimensions may go in any basis. Ours; MoDeGPT (2408.09632) decomposes values and outputs too, head by head, without the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from ..budget import Ranking, allocate
from ..correction import set_bias
from ..currency import Currency
from ..elimination import backward_elimination, precise_enough
from ..families import Group, values_of, weight
from ..few_values import narrow_values
from ..linalg import cholesky, damped, least_squares_map, solve_psd, unit_columns
from ..slicing import set_weight
from .stat_inputs import Inputs


@dataclass(frozen=True)
class ValuesRanking(Ranking):
    """`error` of values is what they add where all heads stay."""

    within: Mapping[str, Tensor]
    """Values -> what they add to their heads' error where k heads and r values stay: [heads + 1, values + 1]. Empty where
    heads may not go."""

    def given(self, kept: Mapping[str, int]) -> Ranking:
        """With the errors of values that go with the heads that stay."""
        own = {name: curves[kept[heads_of(name)]] for name, curves in self.within.items()}
        return replace(self, error={**self.error, **own})


def heads_of(values: str) -> str:
    """The name of the heads that a group of values belongs to."""
    block, _, place = values.partition(".")
    return f"{block}.{'cross' if place.startswith('cross') else 'heads'}"


@dataclass(frozen=True)
class Turned:
    """What a consumer reads in the bases of its key/value heads, and its weight: columns by head, dimension, query head."""

    bases: Tensor
    """A of each key/value head, the rows that carry most first: [heads, width, width]."""
    gram: Tensor
    weight: Tensor
    """[out, columns]"""

    @classmethod
    def of(cls, gram: Tensor, weight: Tensor, metric: Tensor, heads: int, queries: int, ridge: float) -> Turned:
        """gram: [columns, columns] of the plain input, columns by head, query head, dimension; metric: [out].

        With C the sum of the query heads' Gram matrices, `C = L L^T`, and `U diag U^T` the eigenvalues, largest first, of
        `L^T (sum over query heads of W_gq^T M W_gq) L`, the basis is `A = U^T L^-1`: dimensions that do not correlate, and, of
        a single query head, the best that any r of them can do.
        """
        width = len(gram) // (heads * queries)
        parts, columns = gram.view(heads, queries, width, -1), weight.view(-1, heads, queries, width)
        spread = damped(gram, ridge).view(heads, queries, width, heads, queries, width)
        bases, inverses = [], []
        for head in range(heads):
            factor = cholesky(spread[head, :, :, head].diagonal(dim1=0, dim2=2).sum(-1))
            read = (metric.sqrt()[:, None, None] * columns[:, head]).flatten(0, 1) @ factor
            vectors = torch.linalg.eigh(read.T @ read)[1].flip(1)
            most = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
            vectors = vectors * torch.where(most < 0, -1, 1)  # the same for any number of processes
            bases.append(torch.linalg.solve_triangular(factor.T, vectors, upper=True).T)
            inverses.append(factor @ vectors)
        basis, inverse = torch.stack(bases), torch.stack(inverses)
        half = torch.einsum("gjd,gqdn->gjqn", basis, parts).flatten(0, 2)
        both = torch.einsum("gjd,gqdn->gjqn", basis, half.T.reshape(heads, queries, width, -1)).flatten(0, 2)
        return cls(basis, (both + both.T) / 2, torch.einsum("ogqd,gdj->ogjq", columns, inverse).flatten(1))

    def order(self, metric: Tensor, queries: int, ridge: float) -> tuple[Tensor, Tensor]:
        """Backward elimination of dimensions, all heads together: as `linalg.backward_elimination`."""
        return backward_elimination(precise_enough(self.gram, ridge), metric.sqrt()[:, None] * self.weight, queries, ridge)


def rank_values(
    group: Group, gram: Tensor, metric: Tensor, ridge: float, *, with_heads: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(order, error) where all heads stay, and `ValuesRanking.within`: heads go first, as they do without values."""
    heads, queries, full = group.units // group.head_width, group.query_heads, weight(group.consumer).double()
    order, error = Turned.of(gram, full, metric, heads, queries, ridge).order(metric, queries, ridge)
    if not with_heads:
        return order, error, None
    each = queries * group.head_width
    best = backward_elimination(precise_enough(gram, ridge), metric.sqrt()[:, None] * full, each, ridge)[0]
    within = torch.zeros(heads + 1, group.units + 1, dtype=error.dtype, device=error.device)
    within[heads] = error
    for count in range(1, heads):
        columns = unit_columns(best[:count].sort().values, each)
        left = full @ least_squares_map(gram, columns, ridge).T
        turned = Turned.of(gram[columns][:, columns].contiguous(), left, metric, count, queries, ridge)
        within[count, : count * group.head_width + 1] = turned.order(metric, queries, ridge)[1]
    return order, error, within


def allocate_values(groups: Sequence[Group], ranking: ValuesRanking, keep: float, currency: Currency) -> dict[str, int]:
    """One allocation over all groups, in which the heads of a block and their values are one choice: (k heads, r values)."""
    costs, sizes = currency.choices(groups)
    error, shapes = dict(ranking.error), dict[str, list[tuple[int, int]]]()
    pairs = [(group, values_of(group, groups)) for group in groups if group.structure == "heads"]
    for heads, values in ((heads, values) for heads, values in pairs if values is not None):
        name, own, within = heads.name, values.name, ranking.within[values.name].tolist()
        alone = error[name].tolist()
        every = sorted(
            (costs[name][i] + costs[own][j], alone[k] + within[k][r], k, r)
            for (i, k), (j, r) in product(enumerate(sizes[name]), enumerate(sizes[own]))
            if k <= r <= k * values.head_width
        )
        front = every[:1]
        for each in every:
            front += [each] if each[1] < front[-1][1] and each[0] > front[-1][0] else []
        shapes[name], costs[name] = [(k, r) for _, _, k, r in front], [cost for cost, _, _, _ in front]
        error[name], sizes[name] = torch.tensor([lost for _, lost, _, _ in front]), list(range(len(front)))
        del costs[own], sizes[own], error[own]
    kept = allocate(error, costs, sizes, currency.limit(keep))
    both = {heads.name: shapes[heads.name][kept[heads.name]] for heads, values in pairs if values is not None}
    names = {heads.name: values.name for heads, values in pairs if values is not None}
    return {**kept, **{name: k for name, (k, _) in both.items()}, **{names[name]: r for name, (_, r) in both.items()}}


@torch.no_grad()
def divide(group: Group, inputs: Inputs, metric: Tensor, count: int, ridge: float) -> None:
    """Keep `count` value dimensions of a group, in place: choose them anew, and correct what reads them.

    inputs: what the consumer reads now. With z_S the dimensions that stay, in their bases, the consumer becomes
    `W_S + (G_SS + ridge diag G_SS)^-1 z_S^T (z W^T - z_S W_S^T)`. Those of each head are then turned once more, to be orthonormal
    in what the head had before: so weights stay as large as they were, and a head that loses nothing stays as it is. A bias takes
    over the mean of what is lost.
    """
    width, queries = group.head_width, group.query_heads
    heads, full = group.units // width, weight(group.consumer).double()
    turned = Turned.of(inputs.gram, full, metric, heads, queries, ridge)
    keep = turned.order(metric, queries, ridge)[0][:count].sort().values
    columns = unit_columns(keep, queries)
    start, own = turned.weight[:, columns], turned.gram[columns]
    rest = own @ turned.weight.T - own[:, columns] @ start.T
    corrected = start + solve_psd(damped(own[:, columns], ridge), rest).T
    parts = corrected.view(-1, count, queries)
    rotations, read, kept = [], full.new_zeros(len(full), heads, queries, width), []
    for head in range(heads):
        mine = (keep // width == head).nonzero().flatten()
        rows = turned.bases[head, keep[mine] % width]
        turn = torch.eye(width).to(rows) if len(rows) == width else torch.linalg.qr(rows.T, mode="complete").Q
        rotations.append(turn.T)
        kept.append(len(rows))
        read[:, head, :, : len(rows)] = torch.einsum("ojq,ji->oqi", parts[:, mine], rows @ turn[:, : len(rows)])
    turn_values(group.producers[0].linear, torch.stack(rotations))
    bias = group.consumer.bias
    if inputs.mean is not None and isinstance(bias, Tensor):
        now = torch.einsum("gij,gqj->gqi", torch.stack(rotations).to(inputs.mean), inputs.mean.view(heads, queries, width))
        lost = full @ inputs.mean - read.flatten(1) @ now.flatten()
        set_bias(group.consumer, (bias + lost).to(bias.dtype))
    set_weight(group.consumer, read.flatten(1).to(weight(group.consumer).dtype))
    narrow_values(group.producers[0].linear, group.consumer, kept)


def turn_values(linear: nn.Module, rotations: Tensor) -> None:
    """Have `linear` make `rotation v` of each head instead of v: [heads, width, width]."""
    for value, give in ((weight(linear), set_weight), (linear.bias, set_bias)):
        if isinstance(value, Tensor):
            parts = value.to(rotations).view(*rotations.shape[:2], -1)
            give(linear, (rotations @ parts).view(value.shape).to(value.dtype))
