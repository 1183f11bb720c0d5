"""Corrections of consumers, against torch.linalg.lstsq."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import data_of, many, tiny
from torch import Tensor

from optimum_stat import STATConfig, STATPruner
from optimum_stat.config import PruningConfig
from optimum_stat.correction import RIDGES, LeastSquares, corrected_consumer, cut_and_correct
from optimum_stat.data import make_batches
from optimum_stat.families import Group, find_groups, weight
from optimum_stat.probes import quiet
from optimum_stat.processes import ALONE
from optimum_stat.slicing import set_weight, slice_group
from optimum_stat.walk import BlockWalk


def seen(walk: BlockWalk, group: Group) -> Tensor:
    rows: list[Tensor] = []
    walk.run(group.block, [group], lambda _, z: rows.append(z.double()))
    return torch.cat(rows)


def walk_of(model: Any) -> BlockWalk:
    return BlockWalk(model, make_batches(many(), model.config, PruningConfig(), causal=True))


@torch.no_grad()
def test_where_units_change_each_other_the_correction_is_fitted_to_what_is_read_afterwards():
    model, keep = tiny("olmo2"), torch.tensor([1])
    group = find_groups(model)[0]
    assert group.inexact
    with quiet(model):
        walk = walk_of(model)
        wanted = seen(walk, group) @ weight(group.consumer).double().T
        cut_and_correct(walk, group, lambda: slice_group(group, keep), ridge=0.0)
        read = seen(walk, group)
    found = weight(group.consumer).double()
    torch.testing.assert_close(found.T, torch.linalg.lstsq(read, wanted).solution, atol=1e-4, rtol=1e-3)
    plain = tiny("olmo2")
    other = find_groups(plain)[0]
    with quiet(plain):
        walk = walk_of(plain)
        corrected, _ = corrected_consumer(walk, other, keep, ridge=0.0)
        slice_group(other, keep)
        set_weight(other.consumer, corrected)
        blind = seen(walk, other) @ weight(other.consumer).double().T
    assert (read @ found.T - wanted).square().sum() < (blind - wanted).square().sum()


def by_rows(z: Tensor, y: Tensor, ridge: float) -> Tensor:
    damping = ridge**0.5 * torch.diag(z.norm(dim=0))
    return torch.linalg.lstsq(torch.cat([z, damping]), torch.cat([y, torch.zeros(len(damping), y.shape[1]).to(y)])).solution


@pytest.mark.parametrize("outputs", [3, 200])
@pytest.mark.parametrize(("noise", "wanted"), [(0.0, min(RIDGES)), (5.0, None), (1000.0, max(RIDGES))])
def test_the_ridge_is_the_one_that_fits_the_other_half_best(noise: float, wanted: float | None, outputs: int):
    """Against solving on the first half, and measuring on the second; all outputs, although few sums are looked at."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(80, 20, generator=generator, dtype=torch.float64)
    y = z @ torch.randn(20, outputs, generator=generator, dtype=torch.float64)
    y += noise * torch.randn(80, outputs, generator=generator, dtype=torch.float64)
    best = min(RIDGES, key=lambda ridge: float((z[40:] @ by_rows(z[:40], y[:40], ridge) - y[40:]).square().sum()))
    assert wanted in (None, best)
    assert wanted is not None or min(RIDGES) < best < max(RIDGES)
    system = LeastSquares(20, outputs, None, torch.device("cpu"))
    system.add(z, y)
    torch.testing.assert_close(system.solve(ALONE).T, by_rows(z, y, best / 2), rtol=1e-6, atol=1e-8)


def test_many_small_additions_are_halved_one_by_one():
    """And a half without any tokens decides nothing."""
    z = torch.randn(12, 4, dtype=torch.float64)
    one, other = (LeastSquares(4, 2, None, torch.device("cpu")) for _ in range(2))
    for rows in z.split(4):
        one.add(rows, rows[:, :2])
    first, second = (torch.cat([rows.split(2)[at] for rows in z.split(4)]) for at in range(2))
    other.add(torch.cat([first, second]), torch.cat([first, second])[:, :2])
    torch.testing.assert_close(one.sums, other.sums)
    alone = LeastSquares(4, 2, None, torch.device("cpu"))
    alone.add(z[:1], z[:1, :2])
    assert torch.isfinite(alone.solve(ALONE)).all()


def test_the_record_names_the_groups():
    pruner = STATPruner.from_pretrained(tiny("olmo2"), STATConfig(keep=0.6))
    pruner.prune(data_of("olmo2"))
    assert pruner.model.config.stat_pruning["inexact"] == ["0.heads", "1.heads"]
    assert "inexact" not in (tiny("llama").config.to_dict().get("stat_pruning") or {})
