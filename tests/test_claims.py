"""What STAT claims, against plain least squares and pivoted QR on activations that a forward hook has seen."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from tiny import batches, outputs, takes_positions, tiny
from torch import Tensor, nn

from optimum_stat import STATConfig, STATPruner
from optimum_stat.budget import Ranking, model_cost
from optimum_stat.data import Batches
from optimum_stat.families import Group, find_blocks, find_groups, weight
from optimum_stat.gradients import output_worth
from optimum_stat.methods.stat_published import PublishedRanking, allocate
from optimum_stat.probes import quiet
from optimum_stat.slicing import slice_model

FAMILIES = ["bert", "gpt2", "opt", "qwen2"]  # fused and separate projections, with and without gates and shared heads
HEAD_COST, NEURON_COST = 400, 70
CHANGES = {"qwen2": {"num_attention_heads": 8, "num_key_value_heads": 4}}


def _items(model: nn.Module, seed: int = 0, examples: int = 36) -> list[dict[str, Tensor]]:
    items = batches((18, 11, 15, 7) * (examples // 4), batch_size=6, seed=seed)
    if not takes_positions(model):
        items = [{name: value for name, value in item.items() if name != "position_ids"} for item in items]
    return items


def _data(items: list[dict[str, Tensor]]) -> Batches:
    tokens = sum(int(item["attention_mask"].sum()) for item in items)
    return Batches(tuple(items), tokens, sum(len(item["input_ids"]) for item in items), 13, "", "test")


@torch.no_grad()
def _seen(model: nn.Module, module: nn.Module, items: list[dict[str, Tensor]]) -> Tensor:
    """The real tokens' inputs of `module` in a plain forward pass of the whole model."""
    rows: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda m, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    for item in items:
        model(**item, use_cache=False) if "use_cache" in model.config.to_dict() else model(**item)
    hook.remove()
    return torch.cat([row[item["attention_mask"].flatten() != 0] for row, item in zip(rows, items, strict=True)])


def _kept(dense: Group, pruned: Group) -> list[int]:
    """The units that `pruned` still has, found by their unchanged weights."""
    last = [(group.producers[-1], group.units) for group in (dense, pruned)]
    old, new = (weight(producer.linear)[producer.rows(units)].flatten(1) for producer, units in last)
    return [int((old == row).all(1).nonzero()[0, 0]) for row in new]


def _columns(group: Group, units: list[int]) -> list[int]:
    return [unit * group.width + i for unit in units for i in range(group.width)]


def _prune(family: str, config: STATConfig, **changes: Any) -> tuple[Any, Any, list[dict[str, Tensor]]]:
    dense = tiny(family, **CHANGES.get(family, {}), **changes).double()
    items = _items(dense)
    return dense, STATPruner.from_pretrained(copy.deepcopy(dense), config).prune(items), items


def _lost(z: Tensor, target: Tensor, columns: list[int]) -> float:
    if not columns:
        return target.square().sum().item()
    return (target - z[:, columns] @ torch.linalg.lstsq(z[:, columns], target, driver="gelsd").solution).square().sum().item()


@torch.no_grad()
def _with_copies(model: nn.Module) -> None:
    """Make the second half of every block's heads and neurons copies of the first, as far as they can be seen."""
    for group in find_groups(model):
        for producer in group.producers:
            for tensor in (weight(producer.linear), producer.linear.bias):
                if tensor is not None:
                    rows, half = producer.rows(group.units), group.units // 2
                    tensor[rows[half:]] = tensor[rows[:half]]  # of a view: writes go through
        for module, name in group.vectors:
            shares = getattr(module, name).view(group.units, -1)
            shares[group.units // 2 :] = shares[: group.units // 2]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "llama", "qwen3", "phi3", "gpt_neox", "falcon", "modernbert", "albert"])
def test_copies_are_removed_without_a_trace(family: str, published: bool) -> None:
    model = tiny(family)
    _with_copies(model)
    items = _items(model)
    expected = [outputs(model, item) for item in items]
    # the published rule trades heads against neurons by their errors, not by what is left: it needs room to see no error
    keep = 0.85 if published else 0.6
    config = STATConfig.paper(keep, "macs") if published else STATConfig(keep=keep, round_to=1, ridge=1e-9)
    pruner = STATPruner.from_pretrained(model, config)
    small = pruner.prune(items)
    assert pruner.report.reached <= keep
    for item, before in zip(items, expected, strict=True):
        torch.testing.assert_close(outputs(small, item), before, rtol=1e-3, atol=1e-4 * max(1, float(before.abs().max())))


@pytest.mark.parametrize("family", FAMILIES)
def test_published_rankings_are_pivoted_qr_of_the_activations(family: str) -> None:
    model = tiny(family).double()
    items, groups = _items(model), find_groups(model)
    pruner = STATPruner.from_pretrained(model, STATConfig.paper())
    with quiet(model):
        ranking = pruner.rank(groups, pruner.measure(groups, _data(items)))
    assert isinstance(ranking, PublishedRanking)
    for group in groups:
        z, w, depth = _seen(model, group.consumer, items), weight(group.consumer).detach(), 1 + math.sqrt(2 + 1 - group.block)
        order, error = ranking.order[group.name].tolist(), ranking.error[group.name]
        if group.structure == "neurons":
            r, pivots = scipy.linalg.qr((z * w.norm(dim=0)).numpy(), mode="r", pivoting=True)
            assert order == pivots.tolist()
            np.testing.assert_allclose(error[:-1], depth * np.abs(np.diag(r)), rtol=1e-6)
            tails = [np.linalg.norm(r[k : group.units, k:]) for k in range(group.units + 1)]
            np.testing.assert_allclose(ranking.residual[group.name], tails, rtol=1e-6, atol=1e-9)
        else:
            stacked = z.view(len(z), group.units, group.width).transpose(1, 2).reshape(-1, group.units)
            assert order == scipy.linalg.qr(stacked.numpy(), mode="r", pivoting=True)[1].tolist()
            losses = [_lost(z, z @ w.T, _columns(group, order[:k])) for k in range(group.units + 1)]
            np.testing.assert_allclose(error, depth * np.sqrt(losses), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("metric", "ridge", "rtol"), [("stream", 0.0, 1e-5), ("fisher", 0.0, 1e-5), ("fisher", 0.01, 1e-3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_error_curves_are_least_squares_residuals_for_every_size(family: str, metric: str, ridge: float, rtol: float) -> None:
    model = tiny(family, use_cache=False).double()
    items, groups = _items(model), find_groups(model)
    pruner = STATPruner.from_pretrained(model, STATConfig(metric=metric, ridge=ridge))
    with quiet(model):
        ranking: Ranking = pruner.rank(groups, pruner.measure(groups, _data(items)))
        fisher = output_worth(model, groups, _data(items), pruner.config.seed)
        stream = [_inverse_energy(model, block, items) for block in find_blocks(model)]
    for group in groups:
        z, order, error = _seen(model, group.consumer, items), ranking.order[group.name], ranking.error[group.name]
        z = z if group.consumer.bias is None else z - z.mean(0)  # a bias makes up for what does not vary
        z = torch.cat([z, ridge**0.5 * torch.diag(z.norm(dim=0))])  # the ridge, as rows
        worth = fisher[group.name] if metric == "fisher" else torch.full((32,), stream[group.block]).double()
        target = z @ weight(group.consumer).T * worth.sqrt()
        losses = [_lost(z, target, _columns(group, order[:k].tolist())) for k in range(group.units + 1)]
        np.testing.assert_allclose(error, losses, rtol=rtol, atol=rtol * 0.01 * losses[0])
        if group.structure == "heads":  # few enough to try every removal
            for k in range(1, group.units):
                left = order[: k + 1].tolist()
                tries = [_lost(z, target, _columns(group, [u for u in left if u != gone])) for gone in left]
                assert losses[k] <= min(tries) * (1 + 1e-6)


@torch.no_grad()
def _inverse_energy(model: nn.Module, block: nn.Module, items: list[dict[str, Tensor]]) -> float:
    """Mean of 1 / squared norm of a block's output over real tokens."""
    states: list[Tensor] = []
    hook = block.register_forward_hook(lambda m, args, out: states.append(out if isinstance(out, Tensor) else out[0]))
    for item in items:
        model(**item)
    hook.remove()
    rows = torch.cat([state[item["attention_mask"] != 0] for state, item in zip(states, items, strict=True)])
    return float((1 / rows.square().sum(1)).mean())


def _solved(z: Tensor, w: Tensor, columns: list[int], ridge: float) -> Tensor:
    """W' [out, kept]: least squares towards the old output, with the ridge's rows towards the old weight."""
    damping = ridge**0.5 * torch.diag(z[:, columns].norm(dim=0))
    left = torch.cat([z[:, columns], damping])
    return torch.linalg.lstsq(left, torch.cat([z @ w.T, damping @ w[:, columns].T]), driver="gelsd").solution.T


@torch.no_grad()
def _rewrite(group: Group, columns: list[int], solved: Tensor) -> None:
    """Columns that are gone read nothing any more: as good as pruned, without slicing anything."""
    value = torch.zeros_like(weight(group.consumer))
    value[:, columns] = solved
    weight(group.consumer).copy_(value)


@pytest.mark.parametrize("ridge", [0.0, 0.02])
@pytest.mark.parametrize("family", FAMILIES)
def test_corrections_are_least_squares_on_the_already_pruned_network(family: str, ridge: float) -> None:
    dense, small, items = _prune(family, STATConfig(keep=0.6, round_to=1, ridge=ridge))
    pruned_some = set()
    for group, after in zip(find_groups(dense), find_groups(small), strict=True):
        kept = _kept(group, after)
        columns, z, w = _columns(group, kept), _seen(dense, group.consumer, items), weight(group.consumer)
        if len(kept) < group.units:
            pruned_some.add(group.structure)
            if group.consumer.bias is not None:  # the weight of one more input, which is always one
                z, w = torch.cat([z, z.new_ones(len(z), 1)], 1), torch.cat([w, w.new_zeros(len(w), 1)], 1)
                solved = _solved(z, w, [*columns, w.shape[1] - 1], ridge)
                group.consumer.bias.data += solved[:, -1]
                _rewrite(group, columns, solved[:, :-1])
            else:
                _rewrite(group, columns, _solved(z, w, columns, ridge))
        torch.testing.assert_close(after.consumer.bias, group.consumer.bias, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(weight(after.consumer), weight(group.consumer)[:, columns], rtol=1e-6, atol=1e-7)
    assert pruned_some == {"heads", "neurons"}
    torch.testing.assert_close(outputs(small, items[0]), outputs(dense, items[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_corrections_take_neurons_on_the_dense_network_then_heads(family: str) -> None:
    dense, small, items = _prune(family, STATConfig.paper(keep=0.55))
    pairs = list(zip(find_groups(dense), find_groups(small), strict=True))
    for structure in ("neurons", "heads"):
        solved = []
        for group, after in pairs:
            if group.structure == structure:
                kept, z = _kept(group, after), _seen(dense, group.consumer, items)
                if structure == "heads":
                    stacked = z.view(len(z), group.units, group.width).transpose(1, 2).reshape(-1, group.units)
                    order = scipy.linalg.qr(stacked.numpy(), mode="r", pivoting=True)[1]
                    assert kept == sorted(order[: len(kept)].tolist())
                columns = _columns(group, kept)
                solved.append((group, after, columns, _solved(z, weight(group.consumer), columns, 0.0)))
        for group, after, columns, expected in solved:  # only now: none of these groups has seen another one pruned
            torch.testing.assert_close(weight(after.consumer), expected, rtol=1e-6, atol=1e-7)
            _rewrite(group, columns, expected)
        assert any(len(columns) < weight(group.consumer).shape[1] for group, _, columns, _ in solved)


@pytest.mark.parametrize("config", [STATConfig(keep=0.5, round_to=1), STATConfig.paper(keep=0.5)], ids=["default", "paper"])
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_corrections_help_on_tokens_they_have_not_seen(family: str, config: STATConfig) -> None:
    ratios = []
    for seed in range(3):
        dense, corrected, _ = _prune(family, config, seed=seed)
        plan = {a.name: torch.tensor(_kept(a, b)) for a, b in zip(find_groups(dense), find_groups(corrected), strict=True)}
        plain = copy.deepcopy(dense)
        slice_model(plain, plan)
        new = _items(dense, seed=99, examples=12)
        off = [sum((outputs(m, i) - outputs(dense, i)).square().sum().item() for i in new) for m in (corrected, plain)]
        ratios.append(off[0] / off[1])
    assert math.prod(ratios) ** (1 / 3) < 0.9, ratios


def test_the_published_algorithm_needs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "backward", None)
    _prune("bert", STATConfig.paper(keep=0.5))
    _prune("bert", STATConfig(keep=0.5, metric="stream"))


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("keep", [0.35, 0.5, 0.8])
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_the_published_sizes_stay_within_the_budget(family: str, keep: float, budget: str) -> None:
    dense, small, items = _prune(family, STATConfig.paper(keep, budget))
    seq_len = round(sum(int(item["attention_mask"].sum()) for item in items) / sum(len(item["input_ids"]) for item in items))
    reached = model_cost(small, budget, seq_len) / model_cost(dense, budget, seq_len)
    assert keep - 0.1 < reached <= keep


@pytest.mark.parametrize("family", ["bert", "qwen2"])  # qwen2: heads of its two blocks cost differently
def test_the_published_algorithm_can_keep_everything(family: str) -> None:
    dense, small, items = _prune(family, STATConfig.paper(keep=1.0, budget="macs"))
    assert torch.equal(outputs(small, items[0]), outputs(dense, items[0]))


@pytest.mark.parametrize("own", [{}, {"metric": "stream"}, {"ridge": 0.0}])
def test_the_published_algorithm_is_not_half_ours(own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"published=True asked with metric='\w+' and ridge=.*: use STATConfig\.paper\(\)"):
        STATConfig(published=True, **own)


@pytest.mark.parametrize("structures", [("heads",), ("neurons",), ("heads", "values"), ("heads", "neurons", "hidden")])
def test_the_published_algorithm_divides_between_heads_and_neurons(structures: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="asked of the published algorithm, which divides between heads and neurons"):
        replace(STATConfig.paper(), structures=structures)


def _published_sizes(error: dict[str, list[list[float]]], tails: list[list[float]], limit: float) -> list[int]:
    """The published division of the budget: (heads, neurons) of block 0, then of block 1, ...

    To the letter but for one thing: a number of heads is passed over if all neurons stay and more heads could as well.
    """
    blocks, most_heads, most_neurons = len(tails), len(error["heads"][0]), len(error["neurons"][0])
    ordered = {name: [*sorted((e for curve in curves for e in curve), reverse=True), -1.0] for name, curves in error.items()}
    share = limit / (blocks * (most_heads * HEAD_COST + most_neurons * NEURON_COST))
    best, sizes = math.inf, []
    for h in range(max(1, math.floor(most_heads * share)), most_heads + 1):
        affordable = math.floor((limit - h * blocks * HEAD_COST) / NEURON_COST + 1e-9)
        left = min(affordable // blocks * blocks, blocks * most_neurons)
        unspent = (affordable - left) * NEURON_COST >= blocks * HEAD_COST and h < most_heads
        if left < blocks or unspent:
            continue
        k = [sum(e > ordered["neurons"][left] for e in curve) for curve in error["neurons"]]
        heads = [sum(e > ordered["heads"][h * blocks] for e in curve) for curve in error["heads"]]
        level = ordered["heads"][h * blocks - 1] if h < most_heads else 0.0
        mismatch = abs(level - 2 * sum(tail[n] for tail, n in zip(tails, k, strict=True)) / blocks)
        if mismatch < best:
            best, sizes = mismatch, [n for pair in zip(heads, k, strict=True) for n in pair]
    return sizes


def test_the_published_division_of_the_budget() -> None:
    for seed in range(100):
        random = np.random.default_rng(seed)
        blocks, h, m = random.integers(2, 5), random.integers(2, 7), random.integers(6, 21)
        # the first unit of a block is worth most, so that the floor of one unit a block has nothing to change
        error = {
            structure: [sorted([*random.gamma(0.5, 4, units - 1), 100 + random.random()], reverse=True) for _ in range(blocks)]
            for structure, units in (("heads", h), ("neurons", m))
        }
        tails = [[*np.sqrt(np.cumsum(np.square(curve[::-1]))[::-1]), 0.0] for curve in error["neurons"]]
        groups = [
            Group(f"{i}.{s}", i, s, (), nn.Identity(), len(error[s][0]), nn.Identity()) for i in range(blocks) for s in error
        ]
        curves = {group.name: torch.tensor([*error[group.structure][group.block], 0.0]) for group in groups}
        costs = {group.name: HEAD_COST if group.structure == "heads" else NEURON_COST for group in groups}
        limit = random.uniform(0.45, 0.95) * sum(costs[group.name] * group.units for group in groups)
        ranking = PublishedRanking({}, curves, {f"{i}.neurons": torch.tensor(tail) for i, tail in enumerate(tails)})
        kept = allocate(groups, ranking, costs, limit)
        assert [kept[group.name] for group in groups] == _published_sizes(error, tails, limit), seed
        assert sum(costs[name] * k for name, k in kept.items()) <= limit
