"""The gates of VTrans on layers and residual dimensions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import batches, many, outputs, tiny
from torch import Tensor

from optimum_stat import VIBConfig, VIBPruner
from optimum_stat.budget import model_cost
from optimum_stat.families import find_blocks, find_groups
from optimum_stat.methods.vib_gates import STEEPNESS
from optimum_stat.slicing import slice_model
from optimum_stat.stream import narrow, shorten
from optimum_stat.training import masks_in
from optimum_stat.trunk_costs import TrunkCosts

ALL = ("heads", "neurons", "hidden", "layers")
FAMILIES = ["albert", "bert", "deberta", "electra", "gemma2", "gpt2", "llama", "modernbert", "nemotron", "olmo2", "opt"]


def gates_of(model: Any, keep: float = 0.5, structures: tuple[str, ...] = ALL, budget: str = "params") -> Any:
    pruner = VIBPruner.from_pretrained(model, VIBConfig(keep=keep, distill=1.0, round_to=4, structures=structures, budget=budget))
    data = pruner._start(keep, many(200), None, None)
    gates = pruner.make_masks(find_groups(model, structures), data)
    generator = torch.Generator().manual_seed(5)
    for value in gates.parameters():
        if value is not gates.multipliers:
            value.data += torch.randn(value.shape, generator=generator) * (1 if value.min() < 0 else 0.3)
    gates.step(1.0)
    return gates, pruner


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("family", ["bert", "llama", "falcon, one key head"])
def test_costs_are_linear_in_the_width_and_those_of_the_sliced_model(family: str, budget: str):
    model = tiny(family, num_hidden_layers=3)
    costs = TrunkCosts.of(model, find_groups(model), budget, 12)
    counts: dict[str, Any] = {group.name: group.units for group in find_groups(model)}
    assert costs.spent(counts, [1, 1, 1], 32) == pytest.approx(model_cost(model, budget, 12))
    counts |= {"0.neurons": 7, "2.heads": 1}
    slice_model(model, {name: torch.arange(count) for name, count in counts.items()})
    shorten(model, [0, 2])
    narrow(model, torch.arange(13))
    assert costs.spent(counts, [1, 0, 1], 13) == pytest.approx(model_cost(model, budget, 12))


@pytest.mark.parametrize("structures", [("hidden",), ("neurons", "layers"), ALL])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_masked_model_is_the_sliced_one(family: str, structures: tuple[str, ...]):
    if family == "albert" and "layers" in structures:
        return  # one block for all layers
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    more = {name: 3, **({"layer_types": ["full_attention", "sliding_attention"] * 2} if family == "modernbert" else {})}
    more = {} if family == "albert" else {**more, **({"layer_types": more["layer_types"][:3]} if family == "modernbert" else {})}
    model = tiny(family, **more)
    gates, pruner = gates_of(model, 0.6, structures)
    plan = gates.plan
    for kind, dense in (("layers", 3), ("hidden", 32)):
        assert kind not in structures or 0 < len(plan[kind]) <= dense
    with masks_in(model, gates.eval()), torch.no_grad():
        masked = [outputs(model, batch) for batch in batches()]
    small = copy.deepcopy(model)
    other, _ = gates_of(small, 0.6, structures)
    other.bake()
    slice_model(small, plan)
    if "layers" in plan:
        shorten(small, plan["layers"].tolist())
    if "hidden" in plan:
        narrow(small, plan["hidden"])
    for batch, expected in zip(batches(), masked, strict=True):
        torch.testing.assert_close(outputs(small, batch), expected, rtol=1e-3, atol=1e-3)
    assert model_cost(small, "params", 1) <= 0.6 * pruner.currency.dense.block_params


def test_the_trunk_follows_the_threshold():
    """Noisy layers and dimensions go; everything that stays has a higher score than everything of its kind that goes."""
    gates, _ = gates_of(tiny("llama", num_hidden_layers=4), 0.5)
    scores, plan = gates.shared_scores(), gates.plan
    for name, own in scores.items():
        gone = torch.ones(len(own), dtype=torch.bool).index_fill_(0, plan[name], False)
        assert not gone.any() or own[gone].max() <= own[plan[name]].min()
    assert len(plan["hidden"]) % 4 == 0
    assert 0 in plan["layers"]
    assert {name.partition(".")[0] for name in plan if "." in name} == {str(block) for block in plan["layers"].tolist()}


def test_the_expected_share_is_that_of_all_gates_when_none_is_noisy_and_pulls_noise_up():
    gates, _ = gates_of(tiny("llama", num_hidden_layers=3), 0.5)
    for name, value in gates.named_parameters():
        value.data.fill_(-60.0 if "noise" in name or "variance" in name else 1.0)
    assert gates.expected_share().item() == pytest.approx(1.0, abs=1e-4)
    gates, _ = gates_of(tiny("llama", num_hidden_layers=3), 0.5)
    gates.expected_share().backward()
    assert (gates.trunk.log_noises.grad[1:] < 0).all()
    assert (gates.trunk.log_variances.grad < 0).all()
    assert STEEPNESS > 0


def test_noise_is_fresh_and_reaches_the_gates():
    model = tiny("bert", num_hidden_layers=3)
    gates, _ = gates_of(model, 0.9)
    with masks_in(model, gates.train()):
        first, second = (outputs_of_training(model, gates) for _ in range(2))
    assert not torch.equal(first, second)
    first.square().mean().backward()
    gone = torch.ones(32, dtype=torch.bool).index_fill_(0, gates.plan["hidden"], False)
    assert (gates.trunk.means.grad[~gone] != 0).all()
    assert not gates.trunk.means.grad[gone].any()
    assert gates.trunk.log_noises.grad[gates.plan["layers"]][1:].ne(0).all()


def outputs_of_training(model: Any, gates: Any) -> Tensor:
    batch = batches()[0]
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_run_with_all_gates_keeps_the_budget_and_loads_again(family: str, tmp_path):
    model = tiny(family, num_hidden_layers=3)
    config = VIBConfig(keep=0.5, distill=1.0, batch_size=4, round_to=4, structures=ALL, finetune_epochs=1)
    pruner = VIBPruner.from_pretrained(model, config)
    pruner.prune(many(400))
    kept = {group.name: group.kept for group in pruner.report.groups}
    assert kept["layers"] == len(find_blocks(model)) == model.config.num_hidden_layers
    assert 0.3 < pruner.report.reached <= 0.5
    pruner.save_pretrained(tmp_path / "small")
    loaded = type(model).from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(loaded, batches()[0]), outputs(model, batches()[0]))


def test_the_only_layer_there_is_has_no_gate():
    pruner = VIBPruner.from_pretrained(
        tiny("albert"), VIBConfig(keep=0.6, distill=1.0, structures=ALL)
    )  # all its layers share one block
    pruner.prune(many(200), training_args={"max_steps": 3})
    assert pruner.report.reached <= 0.6
    assert {line.name: line.kept for line in pruner.report.groups}["layers"] == 1


@pytest.mark.parametrize("structures", [("layers",), ("heads", "neurons", "layers")])
@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_a_model_that_lost_layers_loads_again(family: str, structures: tuple[str, ...], tmp_path):
    """Its config says how many are left, although training puts the config back."""
    model = tiny(family, num_hidden_layers=4)
    pruner = VIBPruner.from_pretrained(model, VIBConfig(keep=0.4, distill=1.0, batch_size=4, round_to=4, structures=structures))
    pruner.prune(many(200), training_args={"num_train_epochs": 1})
    kept = {group.name: group.kept for group in pruner.report.groups}
    assert kept["layers"] == len(find_blocks(model)) == model.config.num_hidden_layers
    assert structures != ("layers",) or kept["layers"] < 3
    pruner.save_pretrained(tmp_path / "small")
    loaded = type(model).from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(loaded, batches()[0]), outputs(model, batches()[0]))
