"""Memory budgets: weights as they are stored, and a cache as it is after reading so many tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_methods import WITHOUT_TRAINING, pruner_for
from tiny import DECODERS, many, tiny

from optimum_stat import FisherConfig, FisherPruner, MovementConfig, MovementPruner, STATConfig, STATPruner
from optimum_stat.families import find_groups
from optimum_stat.memory import Residents, weight_bytes
from optimum_stat.probes import caches_in
from optimum_stat.slicing import slice_model


@torch.no_grad()
def cached(model: Any, batch_size: int, seq_len: int) -> int:
    """Bytes of the cache that the model really makes."""
    ids = torch.randint(3, 60, (batch_size, seq_len))
    (cache,) = caches_in(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)).values()
    return sum(each.numel() * each.element_size() for layer in cache.layers for each in (layer.keys, layer.values))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("seq_len", [3, 11])
def test_the_cache_is_the_one_that_the_model_makes(family: str, seq_len: int) -> None:
    """Also after pruning; tiny models have sliding windows of 6 tokens, so 11 do not fit into them."""
    model = tiny(family)
    residents = Residents.of(model, 2, seq_len)
    for _ in range(2):
        assert residents.cache_bytes(model) == cached(model, 2, seq_len)
        slice_model(model, {group.name: torch.arange(1 + group.block) for group in find_groups(model)})


def test_encoders_have_no_cache() -> None:
    model = tiny("bert").half()
    assert Residents.of(model, 8, 100).dense == weight_bytes(model) == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("recipe", [recipe for recipe in WITHOUT_TRAINING if "paper" not in recipe])
@pytest.mark.parametrize("family", ["llama", "falcon, one key head"])
def test_the_model_fits_into_what_was_asked(recipe: str, family: str) -> None:
    model = tiny(family)
    before = weight_bytes(model) + cached(model, 4, 40)
    changes = {"structure": "units"} if "surgeon" in recipe else {}
    pruner = pruner_for(recipe, model, keep=0.8, budget="memory", serve_batch_size=4, serve_seq_len=40, round_to=1, **changes)
    pruner.prune(many())
    found = pruner.report.memory
    assert found is not None
    assert found.dense == before
    assert found.weights == weight_bytes(model)
    assert found.cache == cached(model, 4, 40)
    assert found.reached <= found.asked == int(0.8 * before)
    assert pruner.report.reached == found.reached / before > 0.7
    assert "MiB with 4 x 40 tokens in the cache" in str(pruner.report)


def test_a_long_context_costs_heads_and_a_short_one_neurons() -> None:
    kept = {}
    for seq_len in (1, 4000):
        pruner = FisherPruner(tiny("llama"), FisherConfig(keep=0.8, budget="memory", serve_seq_len=seq_len))
        pruner.prune(many())
        kept[seq_len] = {s: sum(g.kept for g in pruner.report.groups if g.name.endswith(s)) for s in ("heads", "neurons")}
    assert kept[4000]["heads"] < kept[1]["heads"]
    assert kept[4000]["neurons"] > kept[1]["neurons"]


def test_a_method_that_trains_keeps_it_too() -> None:
    model = tiny("llama")
    pruner = MovementPruner(model, MovementConfig(keep=0.9, budget="memory", serve_seq_len=40, round_to=1))
    pruner.prune(many(200), training_args={"max_steps": 4})
    assert pruner.report.memory is not None
    assert pruner.report.memory.reached <= pruner.report.memory.asked


def test_the_card_says_it(tmp_path: Any) -> None:
    pruner = STATPruner(tiny("llama"), STATConfig(keep=0.8, budget="memory", serve_seq_len=40))
    pruner.prune(many())
    pruner.save_pretrained(tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "Asked: 80.0% of the dense model's memory, 0.1 MiB of 0.1 MiB with 1 × 40 tokens in the cache." in card
    assert "--budget memory --round-to 8" in card
    assert "--serve-batch-size 1 --serve-seq-len 40" in card


def test_what_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep=0\.2 of [\d,]+ bytes of memory asked, but one head and 8 neurons"):
        STATPruner(tiny("llama"), STATConfig(keep=0.2, budget="memory")).prune(many())
