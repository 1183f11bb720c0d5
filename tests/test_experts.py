"""Neurons that each expert chooses for itself: against brute force, and masked against sliced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import MIXTURES, data_of, outputs, plenty, tiny
from torch import Tensor

from optimum_stat import STATConfig, STATPruner
from optimum_stat.data import make_batches
from optimum_stat.experts import close, opened
from optimum_stat.families import Group, find_groups, weight
from optimum_stat.methods.stat_experts import corrected_experts, rank_in_experts
from optimum_stat.probes import quiet
from optimum_stat.slicing import consumer_columns, slice_group
from optimum_stat.walk import BlockWalk

EACH = pytest.mark.parametrize("family", MIXTURES)


def in_experts(model: Any) -> list[Group]:
    return [group for group in find_groups(model) if group.experts is not None]


def own_choice(group: Group, count: int) -> Tensor:
    """Other neurons in every expert: [count, experts]."""
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(group.units, generator=generator)[:count].sort().values for _ in range(group.width)]
    return torch.stack(chosen, dim=1)


def inputs_of(model: Any, family: str) -> tuple[BlockWalk, Group, Tensor]:
    """A walk before the first block with experts, their group, and what its consumer reads, float64."""
    walk = BlockWalk(model, make_batches(plenty(family), model.config, STATConfig(), causal=True))
    group = in_experts(model)[0]
    for index in range(group.block):
        walk.advance(index)
    seen: list[Tensor] = []
    walk.run(group.block, [group], lambda _, z: seen.append(z.double()))
    return walk, group, torch.cat(seen)


@pytest.mark.parametrize("is_open", [False, True])
@EACH
def test_sliced_equals_masked(family: str, is_open: bool):
    model, masked = tiny(family), tiny(family)
    with opened(masked):
        for group in in_experts(masked):
            columns = consumer_columns(group, own_choice(group, 20))
            with torch.no_grad():
                mask = torch.zeros(group.units * group.width).index_fill_(0, columns, 1)
                group.consumer.weight.copy_(weight(group.consumer) * mask)
        wanted = [outputs(masked, batch) for batch in data_of(family)]
    with opened(model):
        if not is_open:
            close(model)
        for group in in_experts(model):
            slice_group(group, own_choice(group, 20))
    assert {group.units for group in in_experts(model)} == {20}
    for batch, values in zip(data_of(family), wanted, strict=True):
        torch.testing.assert_close(outputs(model, batch), values, atol=2e-5, rtol=1e-4)
    assert (wanted[0] - outputs(tiny(family), data_of(family)[0])).abs().max() > 0.01


@EACH
def test_the_same_neurons_of_all_experts_are_a_special_case(family: str):
    one, other = tiny(family), tiny(family)
    keep = torch.tensor([0, 3, 5, 8, 13, 21])
    for group in in_experts(one):
        slice_group(group, keep)
    for group in in_experts(other):
        slice_group(group, keep[:, None].expand(-1, group.width))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@EACH
def test_errors_are_those_of_least_squares_on_each_experts_own_tokens(family: str):
    model = tiny(family).double()
    with quiet(model), opened(model):
        _, group, z = inputs_of(model, family)
        metric = torch.rand(weight(group.consumer).shape[0], dtype=torch.float64)
        scaled = metric.sqrt()[:, None] * weight(group.consumer)
        own = [z[:, expert :: group.width] for expert in range(group.width)]
        order, error = rank_in_experts(group, torch.stack([each.T @ each for each in own]), scaled, 0.0)
    assert order.shape == (group.units, group.width)
    assert not torch.equal(order[:, 0], order[:, 1])
    for count in (group.units, group.units - 3, group.units // 2, 5, 0):
        residual = 0.0
        for expert, each in enumerate(own):
            wanted, kept = each @ scaled[:, expert :: group.width].T, each[:, order[:count, expert]]
            residual += float((wanted - kept @ torch.linalg.lstsq(kept, wanted, driver="gelsd").solution).square().sum())
        assert float(error[count]) == pytest.approx(residual, rel=1e-5, abs=1e-7)


@EACH
def test_corrections_are_least_squares_on_each_experts_own_tokens(family: str):
    model = tiny(family).double()
    with quiet(model), opened(model):
        walk, group, z = inputs_of(model, family)
        keep, full = own_choice(group, group.units // 3), weight(group.consumer)
        found = corrected_experts(walk, group, keep, 0.0).view(len(full), len(keep), group.width)
        for expert in range(group.width):
            own = z[:, expert :: group.width]
            assert 0 < own.any(1).sum() < len(own)  # its router sends it some tokens
            wanted = own @ full[:, expert :: group.width].T
            kept = own[:, keep[:, expert]]
            best = torch.linalg.lstsq(kept, wanted, driver="gelsd").solution
            # what it gives, not the weights: an expert with fewer tokens than neurons has many that are as good
            torch.testing.assert_close(kept @ found[:, :, expert].T, kept @ best, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_what_each_expert_has_twice_goes_without_loss(family: str):
    """Half of each expert's neurons are copies of the other half, at other places in every expert."""
    model = tiny(family)
    with opened(model), torch.no_grad():
        for group in in_experts(model):
            half, up = group.units // 2, group.producers[0]
            rows = up.rows(group.units).view(group.units, group.width, -1)  # [unit, expert, its rows]
            for expert in range(group.width):
                places = torch.randperm(group.units, generator=torch.Generator().manual_seed(expert))
                first, second = places[:half], places[half : 2 * half]
                weight(up.linear)[rows[second, expert]] = weight(up.linear)[rows[first, expert]]
                if up.linear.bias is not None:
                    up.linear.bias[rows[second, expert]] = up.linear.bias[rows[first, expert]]
    wanted, small = outputs(model, data_of(family)[0]), copy.deepcopy(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    pruner = STATPruner(small, STATConfig(keep=0.9, structures=("neurons",), ridge=1e-6))
    pruner.prune(plenty(family))
    assert sum(parameter.numel() for parameter in small.parameters()) < before
    torch.testing.assert_close(outputs(small, data_of(family)[0]), wanted, atol=2e-3, rtol=1e-3)
