"""Whole experts: dropped with their rows of the router, the model is what it was with those experts' logits at minus infinity."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import MIXTURES, data_of, outputs, plenty, tiny
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from optimum_stat import FisherConfig, FisherPruner, STATConfig, STATPruner, SurgeonConfig, SurgeonPruner, VIBConfig
from optimum_stat.budget import model_cost
from optimum_stat.experts import opened
from optimum_stat.families import weight
from optimum_stat.mixtures import errors_without
from optimum_stat.routers import counts, find_mixtures, keep_experts, split

EACH = pytest.mark.parametrize("family", MIXTURES)
WITH_EXPERTS = ("heads", "neurons", "experts")
RECIPES = {
    "stat": (STATPruner, STATConfig),
    "fisher": (FisherPruner, FisherConfig),
    "surgeon": (SurgeonPruner, lambda **asked: SurgeonConfig(shots=2, **asked)),
}


class Never(TorchFunctionMode):
    """The logits of some experts at minus infinity."""

    def __init__(self, gone: dict[int, Tensor]):
        super().__init__()
        self.gone = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.linear and id(args[1]) in self.gone:
            return output.index_fill(1, self.gone[id(args[1])], -torch.inf)
        return output


def some(family: str) -> tuple[Any, Tensor]:
    """A model, and experts to keep: another number in each block."""
    model = tiny(family)
    return model, torch.tensor([expert for expert in range(sum(counts(model))) if expert not in (1, 4, 6)])


@EACH
@pytest.mark.parametrize("is_open", [False, True])
def test_sliced_equals_masked(family: str, is_open: bool):
    model, keep = some(family)
    mixtures = find_mixtures(model)
    own = split(mixtures, keep)
    gone = {
        id(mixture.router.weight): torch.tensor([i for i in range(mixture.units) if i not in experts])
        for mixture, experts in zip(mixtures, own, strict=True)
    }
    dense = outputs(model, data_of(family)[0])
    with Never(gone):
        wanted = [outputs(model, batch) for batch in data_of(family)]
    if is_open:
        with opened(model):
            keep_experts(model, keep)
    else:
        keep_experts(model, keep)
    assert counts(model) == [len(experts) for experts in own]
    for batch, values in zip(data_of(family), wanted, strict=True):
        torch.testing.assert_close(outputs(model, batch), values, atol=2e-4, rtol=1e-4)
    assert (wanted[0] - dense).abs().max() > 0.05
    keep_experts(model, torch.arange(sum(counts(model))))  # nothing more


@EACH
def test_the_error_of_an_expert_is_what_its_block_gives_without_it(family: str):
    model = tiny(family)
    for position, mixture in enumerate(find_mixtures(model)):
        x = torch.randn(70, weight(mixture.group.producers[0].linear).shape[1], generator=torch.Generator().manual_seed(0))
        worth = torch.rand(weight(mixture.group.consumer).shape[0], dtype=torch.float64)
        with opened(model):
            found = errors_without(find_mixtures(model)[position], x, worth)
        for expert in range(mixture.units):
            small = copy.deepcopy(model)
            first = sum(counts(model)[:position])
            keep_experts(small, torch.tensor([i for i in range(sum(counts(model))) if i != first + expert]))
            with torch.no_grad():
                before, after = (given(find_mixtures(one)[position], x) for one in (model, small))
            torch.testing.assert_close(found[expert], ((after - before).double().square() * worth).sum(), rtol=1e-4, atol=1e-6)


def given(mixture: Any, x: Tensor) -> Tensor:
    _, shares, chosen = mixture.router(x)
    return mixture.group.experts(x, chosen, shares)


@pytest.mark.parametrize("recipe", RECIPES)
@EACH
def test_experts_go_within_the_budget_and_the_model_loads_as_it_is(recipe: str, family: str, tmp_path):
    model, (pruner_class, config) = tiny(family), RECIPES[recipe]
    before = model_cost(model, "params", 8)
    pruner = pruner_class(model, config(keep=0.75, structures=("experts",) if recipe == "fisher" else WITH_EXPERTS))
    pruner.prune(data_of(family))
    after = model_cost(model, "params", 8)
    assert after <= 0.75 * before
    assert pruner.report.reached == after / before
    (line,) = [group for group in pruner.report.groups if group.name == "experts"]
    assert line.kept == sum(counts(model)) == sum(model.config.stat_pruning["experts"])
    assert all(mixture.units >= mixture.fewest for mixture in find_mixtures(model))
    pruner.save_pretrained(tmp_path / "pruned")
    loaded = type(model).from_pretrained(tmp_path / "pruned")
    for batch in data_of(family):
        assert torch.equal(outputs(loaded, batch), outputs(model, batch))


def test_experts_that_no_token_goes_to_are_the_first_to_go():
    model = tiny("gpt_oss")
    with torch.no_grad():
        for mixture, expert in zip(find_mixtures(model), (1, 2), strict=True):
            mixture.router.bias[expert] = -100.0
    wanted = outputs(model, data_of("gpt_oss")[0])
    pruner = STATPruner(model, STATConfig(keep=0.85, structures=WITH_EXPERTS))
    plan = pruner.plan(plenty("gpt_oss"), [0.85])[0]
    assert plan.kept["experts"] == 6
    pruner.prune(plenty("gpt_oss"))
    assert counts(model) == [3, 3]
    torch.testing.assert_close(outputs(model, data_of("gpt_oss")[0]), wanted, atol=1e-4, rtol=1e-4)


def test_what_cannot_be():
    model = tiny("mixtral")
    with pytest.raises(ValueError, match=r"0\.experts would keep 1 experts, and a token goes through 2"):
        keep_experts(model, torch.tensor([0, 4, 5]))
    assert counts(model) == [4, 4]
    with pytest.raises(ValueError, match="'experts' asked of a LlamaForCausalLM, which has none"):
        STATPruner(tiny("llama"), STATConfig(structures=WITH_EXPERTS)).prune(data_of("llama"))
    with pytest.raises(ValueError, match="'layers' and 'experts' asked together"):
        STATConfig(structures=("layers", "experts"))
    with pytest.raises(ValueError, match="'experts' asked of a method that trains"):
        VIBConfig(structures=WITH_EXPERTS)
    model.model.layers[1].mlp.gate.register_buffer("correction", torch.zeros(4))
    assert find_mixtures(model) == []  # a router that is more than rows
