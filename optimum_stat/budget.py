"""What a unit costs, and how many units of each group fit into the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor, nn

from .families import Group, Producer, find_blocks, find_groups, weight

Lengths = int | tuple[int, ...]
"""Tokens in an example: of every stack, or of one after the other."""
OF_EXPERTS = 8  # neurons


def in_words(lengths: Lengths) -> str:
    """Such as "13 tokens", or "1500 + 12 tokens" of an encoder and a decoder, or of two towers."""
    return f"{lengths if isinstance(lengths, int) else ' + '.join(map(str, lengths))} tokens"


@dataclass(frozen=True)
class Ranking:
    """The one contract between a method and the allocator."""

    order: Mapping[str, Tensor]
    """Group name -> its units, best first: [units]."""
    error: Mapping[str, Tensor]
    """Group name -> the loss if the first k units are kept: [units + 1], non-increasing, last entry 0, one unit for all."""

    def total(self, kept: Mapping[str, int]) -> float:
        """The loss with so many units of every group."""
        return float(sum(float(self.error[name][count]) for name, count in kept.items()))

    def given(self, kept: Mapping[str, int]) -> Ranking:
        """The same where `kept` stays, if the errors of some groups depend on how much of others does."""
        return self


def unit_cost(group: Group, budget: str, seq_len: Lengths) -> int:
    """What one unit of `group` costs.

    "params": its rows of the producers with their biases, its columns of the consumer (a pair has none), its share of other
    parameters.
    "macs": multiply-adds for one example of `seq_len` tokens: the same matrices once per token (those that read relative
    positions too) and application of the block, and for heads the two
    attention products, `2 * context * head_dim` per query head and token, where `context` is the mean number of tokens
    that a token attends to (`seq_len`; `(seq_len + 1) / 2` under a causal mask; fewer in a sliding window; the encoder's where
    it is these that a head sees).
    Norms, softmax and biases are not counted as MACs. Source: Kwon et al. 2022 (their released code), for encoders.
    """
    return _whole(group, budget, seq_len) // group.units


def _whole(group: Group, budget: str, seq_len: Lengths) -> int:
    """What all units of a group cost, which may be unequal where value dimensions have gone."""
    if budget == "params":
        matrices = sum(_rows(p) * weight(p.linear).shape[1] for p in group.producers) + _read(group)
        biases = sum(_rows(p) for p in group.producers if isinstance(p.linear.bias, Tensor))
        return matrices + biases + sum(getattr(module, name).numel() for module, name in group.vectors)
    products = sum(_rows(p) * weight(p.linear).shape[1] * length_of(seq_len, group, p.of_context) for p in group.producers)
    products += _read(group) * length_of(seq_len, group)
    products = products * group.active[0] // group.active[1]
    attended = attended_pairs(group, seq_len) if group.structure == "heads" else 0
    return group.applications * (products + 2 * group.units * group.width * attended)


def _read(group: Group) -> int:
    """Weights of the consumer that belong to units."""
    return 0 if group.structure == "pairs" else weight(group.consumer).numel()


def _rows(producer: Producer) -> int:
    """Output rows that belong to units."""
    return int(weight(producer.linear).shape[0]) - producer.fixed


def largest(seq_len: Lengths) -> int:
    """That of all stacks."""
    return seq_len if isinstance(seq_len, int) else max(seq_len)


def length_of(seq_len: Lengths, group: Group, of_context: bool = False) -> int:
    """How many tokens the consumer of `group` reads in one example, or the keys and values of heads that see another stack."""
    at = group.context if of_context and group.context is not None else group.stack
    return seq_len if isinstance(seq_len, int) else seq_len[at]


def attended_pairs(group: Group, lengths: Lengths) -> int:
    """Pairs (token, token it attends to) that a head of `group` sees in one example."""
    seq_len, limit, causal = length_of(lengths, group), group.window, group.causal
    if group.context is not None:
        return seq_len * length_of(lengths, group, of_context=True)
    # a window that looks both ways counts the tokens on each side of the one in the middle
    window = min(seq_len if limit is None else limit if causal else limit + 1, seq_len)
    back = window * (window + 1) // 2 + (seq_len - window) * window
    return back if causal else 2 * back - seq_len


def model_cost(model: nn.Module, budget: str, seq_len: Lengths) -> int:
    """What all transformer blocks cost: every unit, and what belongs to none: for "params" also norms, biases and the like."""
    if budget == "params":
        return sum(parameter.numel() for parameter in find_blocks(model).parameters())
    return sum(block_fixed(model, budget, seq_len)) + sum(_whole(group, budget, seq_len) for group in find_groups(model))


def block_fixed(model: nn.Module, budget: str, seq_len: Lengths) -> list[int]:
    """Of each block, what belongs to no unit: see `model_cost`."""
    blocks, groups = find_blocks(model), find_groups(model)
    if budget == "params":
        fixed = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
        for group in groups:
            fixed[group.block] -= _whole(group, budget, seq_len)
        return fixed
    fixed = [0] * len(blocks)
    for group in groups:
        for own in group.producers:
            length = length_of(seq_len, group, own.of_context)
            fixed[group.block] += own.fixed * weight(own.linear).shape[1] * group.applications * length
    return fixed


@dataclass(frozen=True)
class Cost:
    """Size of a model: all parameters, those of its blocks, and the blocks' multiply-adds for one example."""

    params: int
    block_params: int
    block_macs: int

    @classmethod
    def of(cls, model: nn.Module, seq_len: Lengths) -> Cost:
        """Of the model as it is now."""
        params = sum(parameter.numel() for parameter in model.parameters())
        return cls(params, *(model_cost(model, budget, seq_len) for budget in ("params", "macs")))


def options(group: Group, round_to: int) -> list[int]:
    """The sizes `group` may end with: all units, or fewer that make its width a multiple of `round_to`; never 0.

    Heads count one by one: their width is a matter of the dense model. Values and pairs also go by whole heads.
    """
    if group.experts is not None:  # kernels for stacked weights want rows of a multiple of 16 bytes
        round_to = math.lcm(round_to, OF_EXPERTS)
    step = 1 if group.structure == "heads" else min(round_to, group.units)
    heads = range(group.head_width, group.units, group.head_width) if group.head_width else ()
    return sorted({*range(step, group.units, step), *heads, group.units})


def allocate(
    error: Mapping[str, Tensor],
    costs: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Sequence[int]],
    limit: float,
) -> dict[str, int]:
    """Units to keep per group: minimise `sum error[g][k_g]` subject to `sum cost_g(k_g) <= limit`, costs rising with k.

    error: [units + 1] per group; sizes: the k to choose from; costs: one for each of these.
    Lagrangian relaxation on the lower convex hull of every group's error curve, solved exactly by taking the hull's
    segments in the order of error saved per cost; then the rest of the budget is filled (`fill`). So the result is never
    above the limit, and its error exceeds the optimum by no more than what one segment saves. `knapsack` is exact, and
    takes time for it.

    Raises:
        ValueError: even the smallest sizes cost more than the limit.
    """
    curves = _curves(error, costs, sizes)
    at = dict.fromkeys(curves, 0)  # position in each group's list of sizes
    spare = limit - sum(curve.cost[0] for curve in curves.values())
    if spare < 0:
        raise ValueError(
            f"The budget leaves {limit:,.0f} for heads and neurons, but the smallest plan costs {limit - spare:,.0f}: "
            "one head and one step of neurons in every block. Keep more."
        )
    segments = sorted(segment for group, curve in curves.items() for segment in curve.hull(group))
    for _, name, start, stop in segments:
        step = curves[name].cost[stop] - curves[name].cost[start]
        if step > spare:
            break
        at[name], spare = stop, spare - step
    return fill(error, costs, sizes, limit, at)


def fill(
    error: Mapping[str, Tensor],
    costs: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Sequence[int]],
    limit: float,
    at: Mapping[str, int],
) -> dict[str, int]:
    """Start from position `at[g]` in every group's sizes and take the best step up that still fits, until none does.

    What is left of the budget afterwards is less than the smallest next step of any group.
    """
    curves, at = _curves(error, costs, sizes), dict(at)
    spare = limit - sum(curve.cost[at[name]] for name, curve in curves.items())
    while best := max((c.best_step(name, at[name], spare) for name, c in curves.items()), default=None):
        _, name, stop = best
        if stop == at[name]:
            break
        spare -= curves[name].cost[stop] - curves[name].cost[at[name]]
        at[name] = stop
    return {name: int(curve.sizes[at[name]]) for name, curve in curves.items()}


@dataclass(frozen=True)
class _Curve:
    """One group's choices: sizes in ascending order, with what each costs and the error it leaves."""

    sizes: np.ndarray
    cost: np.ndarray
    error: np.ndarray

    def hull(self, name: str) -> list[tuple[float, str, int, int]]:
        """(minus error saved per cost, name, from, to) along the lower convex hull, steepest first."""
        points = [0]
        for i in range(1, len(self.sizes)):
            while len(points) > 1 and self._slope(points[-2], points[-1]) >= self._slope(points[-2], i):
                points.pop()
            points.append(i)
        return [(self._slope(a, b), name, a, b) for a, b in pairwise(points)]

    def best_step(self, name: str, now: int, spare: float) -> tuple[float, str, int]:
        """(error saved per cost, name, to) of the best larger size that costs at most `spare` more."""
        extra = self.cost[now + 1 :] - self.cost[now]
        fits = np.flatnonzero(extra <= spare)
        if not len(fits):
            return -np.inf, name, now
        saved = self.error[now] - self.error[now + 1 + fits]
        # a measured size may be faster than a smaller one: then it is taken whatever it saves
        gain = np.where(extra[fits] > 0, saved / np.maximum(extra[fits], 1e-300), np.inf)
        return float(gain.max()), name, now + 1 + int(fits[gain.argmax()])

    def _slope(self, a: int, b: int) -> float:
        return float((self.error[b] - self.error[a]) / (self.cost[b] - self.cost[a]))


def _curves(
    error: Mapping[str, Tensor], costs: Mapping[str, Sequence[float]], sizes: Mapping[str, Sequence[int]]
) -> dict[str, _Curve]:
    found = {}
    for name, own in sizes.items():
        at = np.asarray(own)
        found[name] = _Curve(at, np.asarray(costs[name]), error[name].double().cpu().numpy()[at])
    return found
