"""What `inspect --dry-run` says, against models that are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from made import FEW, pruned
from tiny import MIXTURES, ROWS, tiny
from transformers import SiglipTextModel

from optimum_stat.budget import model_cost
from optimum_stat.dry_run import BUDGETS, SEQ_LEN, GroupCost, dry_run
from optimum_stat.families import find_groups
from optimum_stat.few_values import narrow_values
from optimum_stat.inspection import from_config_alone, sizes
from optimum_stat.methods.stat_pairs import lose_pairs
from optimum_stat.routers import counts, fewest, find_mixtures, keep_experts
from optimum_stat.slicing import slice_model

OFTEN = ("bert", "clip", "phi3", "qwen2_moe", "qwen3")


def costs(model: Any, seq_len: Any) -> dict[str, int]:
    return {budget: model_cost(model, budget, seq_len) for budget in BUDGETS}


def drop_one(model: Any, group: GroupCost) -> None:
    if group.structure == "experts":
        mixtures = find_mixtures(model)
        first = sum(each.units for each in mixtures[: [each.name for each in mixtures].index(group.name)])
        keep_experts(model, torch.tensor([i for i in range(sum(counts(model))) if i != first]))
    elif group.structure == "pairs":
        (own,) = (each for each in find_groups(model, ("pairs",)) if each.name == group.name)
        lose_pairs(own, torch.arange(1, own.units))
    elif group.structure == "values":
        keep_values(model, {group.name: group.units - 1})
    else:
        slice_model(model, {group.name: torch.arange(1, group.units)})


def keep_values(model: Any, kept: dict[str, int]) -> None:
    """Of the first heads all, of the others nothing."""
    for group in find_groups(model, ("values",)) if kept else ():
        if group.name in kept:
            left = [kept[group.name] - first for first in range(0, group.units, group.head_width)]
            narrow_values(group.producers[0].linear, group.consumer, [min(max(own, 0), group.head_width) for own in left])


@pytest.mark.parametrize("family", [pytest.param(family, marks=[] if family in OFTEN else pytest.mark.full) for family in ROWS])
def test_units_and_the_smallest_size_cost_what_models_that_are_cut_cost(family: str, tmp_path: Path):
    config = tiny(family).config
    config.save_pretrained(tmp_path)
    found = dry_run(str(tmp_path))
    dense = costs(from_config_alone(config), found.seq_len)
    assert (found.params, found.macs) == (dense["params"], dense["macs"])
    for group in found.groups:
        model = from_config_alone(config)
        drop_one(model, group)
        now = costs(model, found.seq_len)
        saved = {budget: dense[budget] - now[budget] for budget in BUDGETS}
        assert saved == {budget: getattr(group, budget) for budget in BUDGETS}, group
    structures = {group.structure for group in found.groups}
    assert ("experts" in structures) == ("experts" in found.smallest_with) == (family in MIXTURES)
    assert ("pairs" in structures) == ("pairs" not in found.whole)
    assert ("values" in structures) == ("values" in found.smallest_with) == ("values" not in found.whole)
    for also, shares in {"": found.smallest, **found.smallest_with}.items():
        model = from_config_alone(config)
        if also == "experts":
            keep_experts(model, fewest(model))
        slice_model(model, {g.name: torch.arange(g.fewest) for g in found.groups if g.structure in ("heads", "neurons")})
        keep_values(model, {group.name: group.fewest for group in found.groups if group.structure == also == "values"})
        for budget, cost in costs(model, found.seq_len).items():
            assert shares[budget] == pytest.approx(cost / dense[budget], abs=1e-12), (also, budget)


@pytest.mark.parametrize(
    ("family", "seq_len"),
    [
        ("bert", SEQ_LEN),
        ("vit", 10),
        ("dinov2", 10),
        ("clip", (64, 10)),
        ("siglip", (64, 9)),
        ("wav2vec2", SEQ_LEN),
        ("t5", SEQ_LEN),
    ],
)
def test_images_are_counted_at_the_length_that_they_have(family: str, seq_len: Any, tmp_path: Path):
    tiny(family).config.save_pretrained(tmp_path)
    found = dry_run(str(tmp_path))
    assert found.seq_len == seq_len
    assert f" for {' + '.join(map(str, seq_len)) if isinstance(seq_len, tuple) else seq_len} tokens" in str(found)


def test_the_table_tells_experts_from_their_neurons_and_says_what_stays_whole(tmp_path: Path):
    tiny("qwen2_moe").config.save_pretrained(tmp_path / "mixture")
    table = [line.split() for line in str(dry_run(str(tmp_path / "mixture"))).splitlines()]
    assert ["0-1", "neurons", "of", "experts", "32", "8", "384", "24,576"] in table
    assert ["0-1", "experts", "4", "2", "3,104", "0"] in table
    assert [line[:3] for line in table[-2:]] == [["with", "values", "too:"], ["with", "experts", "too:"]]
    tiny("phi3").config.save_pretrained(tmp_path / "fused")
    assert str(dry_run(str(tmp_path / "fused"))).endswith("no values: 0.heads makes queries, keys and values in one Linear.")


def test_what_no_auto_class_knows_is_built_by_its_own(tmp_path: Path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    config = transformers.SiglipTextConfig(**sizes, architectures=["SiglipTextModel"])
    config.save_pretrained(tmp_path)
    model = SiglipTextModel(config)
    assert dry_run(str(tmp_path)).params == sum(p.numel() for p in model.encoder.layers.parameters())


def test_the_sizes_of_every_kind_of_model_have_a_line_where_they_are(tmp_path: Path):
    for family in FEW:
        pruned(family).config.save_pretrained(tmp_path / family)
    table = {family: [line.split() for line in str(sizes(str(tmp_path / family))).splitlines()[1:]] for family in FEW}
    record = sizes(str(tmp_path / "t5")).pruned
    assert [row[0] + ("+" if row[1] == "cross" else "") for row in table["t5"][:-1]] == ["0", "1", "2", "2+", "3", "3+"]
    own = [[int(number) for number in row if number.isdigit()][1::2] for row in table["t5"][:-1] if row[1] != "cross"]
    assert [numbers[2] for numbers in own] == record["neurons"]
    record = sizes(str(tmp_path / "mixtral")).pruned
    for block, row in enumerate(row for row in table["mixtral"] if row[1] == "experts"):
        kept = record["neurons"][block], record["experts"][block]
        assert row == f"{block} experts {kept[0]} of 48 in each of {kept[1]} of 4 experts".split()
