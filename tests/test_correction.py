"""Corrections of consumers, against torch.linalg.lstsq."""

from __future__ import annotations

from typing import Any

import torch
from tiny import data_of, many, tiny
from torch import Tensor

from optimum_stat import STATConfig, STATPruner
from optimum_stat.config import PruningConfig
from optimum_stat.correction import corrected_consumer, cut_and_correct
from optimum_stat.data import make_batches
from optimum_stat.families import Group, find_groups, weight
from optimum_stat.probes import quiet
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


def test_the_record_names_the_groups():
    pruner = STATPruner.from_pretrained(tiny("olmo2"), STATConfig(keep=0.6))
    pruner.prune(data_of("olmo2"))
    assert pruner.model.config.stat_pruning["inexact"] == ["0.heads", "1.heads"]
    assert "inexact" not in (tiny("llama").config.to_dict().get("stat_pruning") or {})
