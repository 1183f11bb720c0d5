"""Families of models from one calibration, and plans that cut nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_methods import TRAINED, WITHOUT_TRAINING, pruner_for
from tiny import batches, many, outputs, tiny
from transformers import AutoModelForCausalLM

from optimum_stat import STATConfig, STATPruner, SurgeonConfig, SurgeonPruner
from optimum_stat.budget import Cost
from optimum_stat.elimination import backward_elimination
from optimum_stat.sweep import SHARES

KEEP = [0.6, 0.9, 0.75]


def sizes(report: Any) -> dict[str, int]:
    return {group.name: group.kept for group in report.groups}


@pytest.mark.parametrize("recipe", WITHOUT_TRAINING)
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_a_family_falls_in_size_keeps_its_budgets_and_leaves_the_model_alone(recipe: str, budget: str) -> None:
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    pruner = pruner_for(recipe, model, budget=budget)
    found = []
    for small in pruner.sweep(many(), KEEP):
        assert small.report.reached <= small.report.keep == small.config.keep
        assert small.model is not model
        found.append(small.report)
    assert [report.keep for report in found] == [0.9, 0.75, 0.6]
    costs = [getattr(report.pruned, f"block_{budget}") for report in found]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model.config, "stat_pruning")


@pytest.mark.parametrize("recipe", [recipe for recipe in WITHOUT_TRAINING if "surgeon" not in recipe])
def test_each_of_a_family_is_the_model_that_prune_makes(recipe: str) -> None:
    for small in pruner_for(recipe, tiny("llama")).sweep(many(), KEEP):
        alone = pruner_for(recipe, tiny("llama"), keep=small.config.keep)
        alone.prune(many())
        assert torch.equal(outputs(small.model, batches()[0]), outputs(alone.model, batches()[0]))
        assert small.report.groups == alone.report.groups


def test_one_measurement_serves_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    measure = STATPruner.measure
    monkeypatch.setattr(STATPruner, "measure", lambda *args: calls.append(1) or measure(*args))
    assert len(list(STATPruner(tiny("bert"), STATConfig()).sweep(many(), KEEP))) == 3
    assert len(calls) == 1


def test_the_surgeons_family_are_the_shots_of_one_run() -> None:
    """The shares asked for lie on its schedule: then the last is what prune makes, and each is a shot of it."""
    config = SurgeonConfig(keep=0.5, shots=2)
    small = list(SurgeonPruner(tiny("llama"), config).sweep(many(), [0.5, 0.75]))
    alone = SurgeonPruner(tiny("llama"), config)
    alone.prune(many())
    assert torch.equal(outputs(small[1].model, batches()[0]), outputs(alone.model, batches()[0]))
    assert set(small[0].report.stages) == {"measure 1", "repair 1"}
    assert set(small[1].report.stages) == set(alone.report.stages)
    assert all(sizes(small[1].report)[name] <= kept for name, kept in sizes(small[0].report).items())


def test_the_surgeons_family_is_distilled_as_single_models_are() -> None:
    model = tiny("bert").train()
    config = SurgeonConfig(keep=0.5, shots=2, distill_epochs=1, seed=3)
    *_, small = SurgeonPruner(model, config).sweep(many(), [0.5, 0.75])
    alone = SurgeonPruner(tiny("bert").train(), config)
    alone.prune(many())
    assert torch.equal(outputs(small.model.eval(), batches()[0]), outputs(alone.model.eval(), batches()[0]))
    assert [name for name, own in small.model.named_parameters() if own.grad is not None] == []


def test_zeros_come_in_families_too() -> None:
    config = SurgeonConfig(structure="elements", shots=1)
    shares = [small.report.reached for small in SurgeonPruner(tiny("llama"), config).sweep(many(), [0.8, 0.5])]
    assert shares == pytest.approx([0.8, 0.5], abs=0.01)


def test_each_of_a_family_saves_and_loads(tmp_path: Any) -> None:
    for small in STATPruner(tiny("llama"), STATConfig()).sweep(many(), KEEP):
        folder = tmp_path / str(small.config.keep)
        small.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(outputs(again, batches()[0]), outputs(small.model, batches()[0]))


@pytest.mark.parametrize("recipe", WITHOUT_TRAINING)
def test_a_plan_is_what_prune_would_do_and_changes_nothing(recipe: str) -> None:
    model = tiny("bert")
    before = copy.deepcopy(model.state_dict())
    plan = pruner_for(recipe, model, **({"shots": 1} if "surgeon" in recipe else {})).plan(many(), KEEP)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    errors = [forecast.error for forecast in plan]
    assert errors == sorted(errors)
    for forecast in plan:
        own = pruner_for(recipe, tiny("bert"), keep=forecast.keep, **({"shots": 1} if "surgeon" in recipe else {}))
        own.prune(many())
        assert forecast.kept == sizes(own.report)
        assert forecast.cost == own.report.pruned == Cost.of(own.model, own.report.seq_len)


def test_the_planned_error_is_the_sum_of_the_groups() -> None:
    """One group only loses anything: its error is what the elimination says, in the loss of the metric "stream"."""
    pruner = STATPruner(tiny("llama", num_hidden_layers=1), STATConfig(metric="stream", round_to=1))
    dense, *_, smallest = pruner.plan(many())
    assert dense.keep == 1
    assert dense.error == 0
    seen: list[Any] = []
    rank = pruner.rank
    pruner.rank = lambda groups, stats: rank(groups, [seen.append(each) or each for each in stats])  # type: ignore[method-assign]
    again = pruner.plan(many(), [smallest.keep])[0]
    total = 0.0
    for group, moments in seen:
        scaled = moments.metric.sqrt()[:, None] * group.consumer.weight.detach()
        _, error = backward_elimination(moments.gram.float(), scaled, group.width, 0.01)
        total += float(error[again.kept[group.name]])
    assert again.error == pytest.approx(total, rel=1e-6)
    assert total > 0


def test_a_plan_ends_where_no_smaller_model_is_possible() -> None:
    plan = STATPruner(tiny("bert"), STATConfig(round_to=44)).plan(many())
    shares = [forecast.keep for forecast in plan]
    assert shares == list(SHARES[: len(shares)])
    assert 1 < len(shares) < len(SHARES)
    with pytest.raises(ValueError, match=r"keep=0\.05 .* asked"):
        STATPruner(tiny("bert"), STATConfig(round_to=44)).plan(many(), [0.05])


def test_bad_shares_are_refused_before_any_work() -> None:
    pruner = STATPruner(tiny("bert"), STATConfig())
    with pytest.raises(ValueError, match=r"must be a list of shares in \(0, 1\], not 1\.5"):
        pruner.sweep(many(), [0.5, 1.5])
    with pytest.raises(ValueError, match="must be a list of shares"):
        pruner.plan(many(), [])
    with pytest.raises(ValueError, match=r"keep=0\.01 .* asked"):
        pruner.sweep(many(), [0.5, 0.01])
    with pytest.raises(ValueError, match="A plan asked of a method that makes zeros"):
        SurgeonPruner(tiny("bert"), SurgeonConfig(structure="elements")).plan(many())


@pytest.mark.parametrize("recipe", TRAINED)
def test_methods_that_train_make_one_size_at_a_time(recipe: str) -> None:
    model = tiny("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="trains towards one size: prune to each by itself"):
        next(pruner_for(recipe, model).sweep(many(), KEEP))
    with pytest.raises(ValueError, match="trains towards one size"):
        pruner_for(recipe, model).plan(many(), KEEP)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_sweep_after_a_run_with_a_journal_measures_anew(tmp_path: Any) -> None:
    pruner = STATPruner.from_pretrained(tiny("llama"), STATConfig(keep=0.8, round_to=1))
    pruner.prune(many(), resume_from_checkpoint=tmp_path)
    other = STATPruner.from_pretrained(pruner.model, STATConfig(keep=0.8, round_to=1))
    found, wanted = ([sizes(each.report) for each in own.sweep(many(), [0.7])] for own in (pruner, other))
    assert found == wanted
