"""Costs against counted parameters and operations; the allocation against every possible allocation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DECODERS, ENCODERS, SIZES, one_in_three, tiny
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from optimum_stat import budget
from optimum_stat.budget import attended_pairs, model_cost, options, unit_cost
from optimum_stat.families import Group, find_blocks, find_groups
from optimum_stat.slicing import slice_model

CASES = [*((family, {}) for family in SIZES), ("bert", {"is_decoder": True}), ("opt", {"enable_bias": False})]
OF_TOKENS = [case for case in CASES if "deberta" not in case[0]]
"""Where no layer reads relative positions, whose number is not that of the tokens: of them the multiply-adds are an estimate."""


def _model(family: str, **changes: Any) -> nn.Module:
    return tiny(family, "", attn_implementation="eager", **changes)


def _without_one_unit(family: str, changes: dict[str, Any], group: Group) -> nn.Module:
    model = _model(family, **changes)
    slice_model(model, {group.name: torch.arange(1, group.units)})
    return model


@torch.no_grad()
def _counted_macs(model: nn.Module, seq_len: int) -> int:
    """Of the blocks, by torch's counter; attention by the pairs that the softmax gives any weight."""
    ids = torch.arange(3, 3 + seq_len)[None]
    names = [name for name, module in model.named_modules() if module in list(find_blocks(model))]
    with FlopCounterMode(display=False) as counter:
        output = model(ids, attention_mask=torch.ones_like(ids), output_attentions=True)
    counts = counter.get_flop_counts()
    runs, total = len(output.attentions) // len(names), 0
    for index, name in enumerate(names):
        attention = torch.stack(output.attentions[index * runs : (index + 1) * runs])
        ops = {op.__name__: flops for op, flops in counts[f"{type(model).__name__}.{name}"].items()}
        products = ops.pop("bmm") + ops.pop("baddbmm", 0)
        per_pair = products // attention.numel()  # torch's counter knows no mask
        assert products % attention.numel() == 0
        total += (sum(ops.values()) + per_pair * int((attention > 0).sum())) // 2
    return total


@pytest.mark.parametrize(("of", "seq_len"), one_in_three(OF_TOKENS, [1, 4, 11]))
def test_macs_are_those_that_torch_counts(of: tuple[str, dict[str, Any]], seq_len: int) -> None:
    family, changes = of
    model = _model(family, **changes)
    counted = _counted_macs(model, seq_len)
    assert model_cost(model, "macs", seq_len) == counted
    for group in find_groups(model):
        smaller = _counted_macs(_without_one_unit(family, changes, group), seq_len)
        assert unit_cost(group, "macs", seq_len) == counted - smaller, group.name


@pytest.mark.parametrize("family", [family for family in ENCODERS if "deberta" not in family and family != "modernbert"])
def test_an_encoders_macs_are_all_that_its_blocks_compute(family: str) -> None:
    model, ids = _model(family), torch.arange(3, 12)[None]
    blocks = find_blocks(model)
    names = [name for name, module in model.named_modules() if module in list(blocks)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, attention_mask=torch.ones_like(ids))
    flops = sum(sum(counter.get_flop_counts()[f"{type(model).__name__}.{name}"].values()) for name in names)
    assert model_cost(model, "macs", 9) * 2 == flops


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_params_are_those_that_slicing_removes(family: str, changes: dict[str, Any]) -> None:
    model = _model(family, **changes)
    everything = sum(p.numel() for p in model.parameters())
    for group in find_groups(model):
        smaller = _without_one_unit(family, changes, group)
        removed = everything - sum(p.numel() for p in smaller.parameters())
        assert unit_cost(group, "params", 7) == removed, group.name
        assert model_cost(model, "params", 7) - model_cost(smaller, "params", 7) == removed
    if family.startswith("albert") or family == "modernbert":
        return  # more layers have no more parameters, or not so many more: the first has no norm
    longer = _model(family, **changes, **{"n_layers" if family == "distilbert" else "num_hidden_layers": 3})
    per_block = sum(p.numel() for p in longer.parameters()) - everything
    assert model_cost(model, "params", 7) == 2 * per_block


@pytest.mark.parametrize("family", DECODERS)
def test_attended_pairs_of_decoders(family: str) -> None:
    model, seq_len = _model(family), 9
    for block in range(2):
        local = family in ("mistral", "gemma3_text") or (family, block) in (("qwen2", 1), ("gemma2", 0))
        window = 6 if local else seq_len
        pairs = [(query, key) for query in range(seq_len) for key in range(query + 1) if query - key < window]
        assert attended_pairs(find_groups(model)[2 * block], seq_len) == len(pairs)


def test_options() -> None:
    heads, neurons = find_groups(_model("bert"))[:2]  # 4 heads of 8 columns, 44 neurons
    assert options(heads, 8) == options(heads, 1) == [1, 2, 3, 4]
    assert options(neurons, 8) == [8, 16, 24, 32, 40, 44]
    assert options(neurons, 11) == [11, 22, 33, 44]
    assert options(neurons, 64) == options(neurons, 44) == [44]
    assert options(neurons, 1) == list(range(1, 45))


def allocate(error: dict[str, Tensor], unit_costs: dict[str, int], sizes: dict[str, list[int]], limit: float) -> dict[str, int]:
    """Every unit of a group costs the same."""
    return budget.allocate(error, {name: [unit_costs[name] * k for k in sizes[name]] for name in sizes}, sizes, limit)


Problem = tuple[dict[str, Tensor], dict[str, int], dict[str, list[int]]]


@st.composite
def _problems(draw: st.DrawFn, convex: bool = False) -> Problem:
    """Up to four groups with non-increasing errors, last entry 0; `convex`: with equal costs and every size allowed."""
    error, costs, sizes = {}, {}, {}
    for i in range(draw(st.integers(1, 4))):
        units = draw(st.integers(1, 6))
        drops = draw(st.lists(st.floats(0, 100), min_size=units, max_size=units))
        if convex:
            drops.sort(reverse=True)
        name = f"{i}.group"
        error[name] = torch.tensor([*[*itertools.accumulate(drops[::-1])][::-1], 0.0], dtype=torch.float64)
        costs[name] = 7 if convex else draw(st.integers(1, 9))
        chosen = draw(st.sets(st.integers(1, units)))
        sizes[name] = list(range(1, units + 1)) if convex else sorted({*chosen, units})
    return error, costs, sizes


def _cost(problem: Problem, kept: dict[str, int]) -> int:
    return sum(problem[1][name] * k for name, k in kept.items())


def _loss(problem: Problem, kept: dict[str, int]) -> float:
    return sum(float(problem[0][name][k]) for name, k in kept.items())


def _limit(problem: Problem, share: float) -> int:
    """A whole number, so that a step may fit to the last unit."""
    smallest = _cost(problem, {name: sizes[0] for name, sizes in problem[2].items()})
    return smallest + int(share * (_cost(problem, {name: sizes[-1] for name, sizes in problem[2].items()}) - smallest))


def _optimum(problem: Problem, limit: float) -> float:
    plans = (dict(zip(problem[2], sizes, strict=True)) for sizes in itertools.product(*problem[2].values()))
    return min(_loss(problem, plan) for plan in plans if _cost(problem, plan) <= limit)


def _largest_segment(problem: Problem) -> float:
    """The most error that one segment of any lower convex hull saves; a hull point lies below every chord over it."""
    largest = 0.0
    for name, sizes in problem[2].items():
        e = problem[0][name]
        chord = {(a, k, b): e[a] + (e[b] - e[a]) * (k - a) / (b - a) for a, k, b in itertools.combinations(sizes, 3)}
        hull = [k for k in sizes if all(e[k] <= at + 1e-9 for (_, middle, _), at in chord.items() if middle == k)]
        largest = max([largest, *(float(e[a] - e[b]) for a, b in itertools.pairwise(hull))])
    return largest


@settings(max_examples=300, derandomize=True, deadline=None)
@given(_problems(), st.floats(0, 1))
def test_allocate_fills_the_budget_and_comes_close_to_the_optimum(problem: Problem, share: float) -> None:
    limit = _limit(problem, share)
    kept = allocate(*problem, limit)
    assert all(kept[name] in sizes for name, sizes in problem[2].items())
    assert _cost(problem, kept) <= limit
    for name, sizes in problem[2].items():
        if kept[name] < sizes[-1]:
            step = min(size for size in sizes if size > kept[name]) - kept[name]
            assert step * problem[1][name] > limit - _cost(problem, kept), f"{name} could have kept more"
    assert _loss(problem, kept) <= _optimum(problem, limit) + _largest_segment(problem) + 1e-9


@settings(max_examples=200, derandomize=True, deadline=None)
@given(_problems(convex=True), st.floats(0, 1))
def test_allocate_is_optimal_on_convex_curves_of_equal_cost(problem: Problem, share: float) -> None:
    limit = _limit(problem, share)
    assert _loss(problem, allocate(*problem, limit)) == pytest.approx(_optimum(problem, limit), rel=1e-9, abs=1e-9)


def test_allocate_takes_a_cliff_as_a_whole() -> None:
    # Keeping 3 of a's units saves nothing until the third; step by step, b would get everything.
    error = {"a": torch.tensor([90.0, 90.0, 90.0, 0.0]), "b": torch.tensor([30.0, 20.0, 10.0, 0.0])}
    sizes = {"a": [1, 2, 3], "b": [1, 2, 3]}
    assert allocate(error, {"a": 1, "b": 1}, sizes, 4) == {"a": 3, "b": 1}


def test_allocate_counts_error_saved_per_cost() -> None:
    error = {"a": torch.tensor([30.0, 20.0, 0.0]), "b": torch.tensor([13.0, 12.0, 0.0])}
    assert allocate(error, {"a": 10, "b": 5}, {"a": [1, 2], "b": [1, 2]}, 25) == {"a": 1, "b": 2}


def test_allocate_fills_with_what_saves_most_per_cost() -> None:
    # c's step saves most and never fits, which ends the Lagrangian part; of the 4 left, b's step is worth 4 each, a's 2.75.
    error = {"a": torch.tensor([20.0, 11.0, 0.0]), "b": torch.tensor([9.0, 4.0, 0.0]), "c": torch.tensor([9e3, 1e3, 0.0])}
    sizes = {name: [1, 2] for name in error}
    assert allocate(error, {"a": 4, "b": 1, "c": 100}, sizes, 109) == {"a": 1, "b": 2, "c": 1}


@pytest.mark.parametrize("flat", [False, True])
def test_the_whole_budget_keeps_everything(flat: bool) -> None:
    error = {name: torch.linspace(0 if flat else 1, 0, 13) for name in "ab"}
    sizes = {"a": [5, 10, 12], "b": list(range(1, 13))}
    assert allocate(error, {"a": 3, "b": 7}, sizes, 120) == {"a": 12, "b": 12}


def test_allocate_says_by_how_much_the_budget_is_missed() -> None:
    error = {name: torch.linspace(1, 0, 9) for name in "ab"}
    sizes = {"a": [4, 8], "b": [1, 2]}
    assert allocate(error, {"a": 1000, "b": 500}, sizes, 4500) == {"a": 4, "b": 1}
    with pytest.raises(ValueError, match=r"4,499 .* 4,500"):
        allocate(error, {"a": 1000, "b": 500}, sizes, 4499)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(4)), st.floats(0, 1))
def test_the_order_of_the_groups_does_not_matter(seed: int, shuffled: list[int], share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    curves = [torch.rand(7, generator=generator).sort(descending=True).values for _ in range(4)]
    costs = torch.randint(1, 9, (4,), generator=generator).tolist()
    names = "abcd"

    def solve(order: list[int]) -> list[int]:
        error = {names[at]: curves[i] - curves[i][-1] for at, i in enumerate(order)}
        sizes = {name: list(range(1, 7)) for name in error}
        unit_costs = {names[at]: costs[i] for at, i in enumerate(order)}
        kept = allocate(error, unit_costs, sizes, sum(costs) * (1 + 5 * share))
        return [kept[names[order.index(i)]] for i in range(4)]

    assert solve([0, 1, 2, 3]) == solve(list(shuffled))
