"""What every method has to keep, for every family: one table, METHODS x FAMILIES."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_table import CANNOT, SILENT, STATIC, check_cache, generates_with_a_static_cache
from tiny import (
    INEXACT,
    OTHERS,
    ROWS,
    batches,
    checkpoint_activations,
    combinations,
    data_of,
    one_in_three,
    outputs,
    plenty,
    tiny,
)
from torch import Tensor
from transformers import PreTrainedModel

from optimum_stat import (
    FisherConfig,
    FisherPruner,
    MovementConfig,
    MovementPruner,
    STATConfig,
    STATPruner,
    SurgeonConfig,
    SurgeonPruner,
    VIBConfig,
    VIBPruner,
)
from optimum_stat.budget import model_cost, options, unit_cost
from optimum_stat.config import PruningConfig
from optimum_stat.experts import opened
from optimum_stat.families import FAMILIES, find_blocks, find_groups, weight
from optimum_stat.methods import METHODS
from optimum_stat.pruner import Pruner
from optimum_stat.slicing import NoBias, OwnHeads, producer_rows
from optimum_stat.trained import TrainedPruner

RECIPES: dict[str, tuple[type[Pruner[Any]], Callable[..., PruningConfig]]] = {
    "stat-stream": (STATPruner, lambda **asked: STATConfig(metric="stream", **asked)),
    "stat-fisher": (STATPruner, lambda **asked: STATConfig(metric="fisher", **asked)),
    "stat-paper": (STATPruner, STATConfig.paper),
    "fisher": (FisherPruner, FisherConfig),
    "fisher-paper": (FisherPruner, lambda **asked: dataclasses.replace(FisherConfig.paper(**asked), labels="auto")),
    "surgeon": (SurgeonPruner, lambda **asked: SurgeonConfig(**{"shots": 2, **asked})),
    "surgeon-paper": (SurgeonPruner, lambda **asked: SurgeonConfig.paper(**{"shots": 2, "structure": "units", **asked})),
    "movement": (MovementPruner, lambda **asked: MovementConfig(distill=1.0, **asked)),
    "movement-filled": (
        MovementPruner,
        lambda **asked: MovementConfig(distill=1.0, variant="hybrid-filled", block_size=8, finetune_epochs=1, **asked),
    ),
    "vib": (VIBPruner, lambda **asked: VIBConfig(distill=1.0, batch_size=2, **asked)),
    "vib-faster": (VIBPruner, lambda **asked: VIBConfig(distill=1.0, batch_size=2, masks_only=True, **asked)),
}
"""Every way of pruning that must hold the promises below; a new method adds its lines here."""
TRAINED = [recipe for recipe, (pruner, _) in RECIPES.items() if issubclass(pruner, TrainedPruner)]
WITHOUT_TRAINING = [recipe for recipe in RECIPES if recipe not in TRAINED]
ALL_WITH_TWO = pytest.mark.parametrize(("recipe", "family"), combinations(RECIPES, TRAINED, core=("bert", "llama")))
ALL_WITH_ONE = pytest.mark.parametrize(("recipe", "family"), combinations(RECIPES, TRAINED, core=("llama",)))
ONE_FAMILY = pytest.mark.parametrize(
    ("recipe", "family"),
    [
        pytest.param(*each.values, marks=[] if each.values[1] == "llama" else pytest.mark.full)
        for each in combinations(RECIPES, TRAINED, core=("llama",))
    ],
)
"""What the method keeps or breaks, whatever the family: by default with one of them."""
EACH_RECIPE = pytest.mark.parametrize("recipe", RECIPES)
HEADS = ("", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
HEADS_OF = [("bert", head) for head in HEADS] + [("llama", head) for head in (*HEADS[:1], "CausalLM", *HEADS[2:])]


def pruner_for(recipe: str, model: PreTrainedModel, **asked: Any) -> Any:
    pruner, config = RECIPES[recipe]
    return pruner.from_pretrained(model, config(**{"keep": 0.6, **asked}))


def prune(recipe: str, family: str, data: list[dict[str, Tensor]] | None = None, **asked: Any) -> Any:
    """A pruner that has pruned a tiny model."""
    pruner = pruner_for(recipe, tiny(family), **asked)
    pruner.prune(plenty(family) if data is None else data)
    return pruner


def kept(pruner: Any) -> dict[str, int]:
    return {group.name: group.kept for group in pruner.report.groups}


def test_every_method_and_every_family_is_in_the_table():
    assert {pruner for pruner, _ in RECIPES.values()} == set(METHODS)
    assert set(FAMILIES) == {name.split(",")[0] for name in ROWS}


@ALL_WITH_TWO
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_within_the_budget_and_no_further_below_than_one_unit(recipe: str, family: str, budget: str):
    dense, model = tiny(family), tiny(family)
    # in several shots a group cannot grow again, so that less than one unit below the budget is promised of the last shot only
    pruner = pruner_for(recipe, model, budget=budget, **({"shots": 1} if "surgeon" in recipe else {}))
    pruner.prune(data_of(family))
    report = pruner.report
    before, after = (model_cost(one, budget, report.seq_len) for one in (dense, model))
    assert after < before
    assert report.reached == after / before
    spare = 0.6 * before - after
    steps = []
    for group in find_groups(dense):
        sizes = options(group, pruner.config.round_to)
        now = sizes.index(kept(pruner)[group.name])
        if now + 1 < len(sizes):
            steps.append(unit_cost(group, budget, report.seq_len) * (sizes[now + 1] - sizes[now]))
    if recipe == "stat-paper":  # its thresholds move a head, or a neuron, in every block at once
        steps = [len(find_blocks(dense)) * max(unit_cost(group, budget, report.seq_len) for group in find_groups(dense))]
    assert 0 <= spare < min(steps)
    if recipe != "stat-paper":
        cut = [group for group in report.groups if group.kept < group.units and "neurons" in group.name]
        assert all(group.kept % pruner.config.round_to == 0 for group in cut)


@ONE_FAMILY
def test_the_same_run_gives_the_same_model(recipe: str, family: str):
    state = torch.random.get_rng_state()
    one, other = prune(recipe, family), prune(recipe, family)
    assert torch.equal(torch.random.get_rng_state(), state)
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def redundant(family: str) -> PreTrainedModel:
    """Every unit of the second half computes what its twin in the first half does; only the consumers tell them apart."""
    model = tiny(family)
    with opened(model):
        for group in find_groups(model):
            half = torch.arange(group.units // 2)
            for producer in group.producers:
                rows = producer_rows(group, producer, half), producer_rows(group, producer, half + len(half))
                for values in (weight(producer.linear), producer.linear.bias):
                    if values is not None:
                        values[rows[1]] = values[rows[0]]
            for module, name in group.vectors:
                shares = getattr(module, name).view(group.units, -1)
                shares[len(half) :] = shares[: len(half)]
            if group.handed_on is not None and group.biased is not None:
                table = getattr(group.handed_on.attentions[0], group.handed_on.table).weight
                table[:, len(half) :] = table[:, : len(half)]
    return model


@pytest.mark.parametrize(
    ("recipe", "family"), combinations(recipe for recipe in RECIPES if recipe.startswith("stat") or recipe == "surgeon")
)
# factors alone cannot do that; and the published Surgeon costs each unit alone, and of twins both cost nothing:
# tests/test_surgeon.py shows what many shots make of that
def test_what_is_there_twice_is_removed_without_loss(recipe: str, family: str):
    """Half the cost goes, and the predictions stay: the methods see which units are redundant, and correct their twins."""
    if family in INEXACT:
        return
    model = redundant(family)
    pruner = pruner_for(recipe, model, keep=0.5, budget="macs", **({"shots": 1} if recipe == "surgeon" else {}))
    # the published thresholds compare sizes of a different kind, and need not meet at one half; and where one key/value head
    # stays in any case, half of the cost is less than half of the units
    if recipe == "stat-paper" or "one key head" in family:
        pruner.allocate = lambda groups, *_: {group.name: group.units // 2 for group in groups}
    if recipe != "stat-paper":
        pruner.config = dataclasses.replace(pruner.config, round_to=1, ridge=1e-6)
    pruner.prune(plenty(family))
    held_out = data_of(family, 10, 10, seed=7)[0] if family in OTHERS else batches((20,) * 10, seed=7)[0]
    wanted = outputs(redundant(family), held_out)
    share = 2e-3 if "albert" in family else 1e-3  # a correction of a shared layer changes what all its applications read
    assert (outputs(model, held_out) - wanted).square().mean() < share * wanted.var()


@ALL_WITH_ONE
def test_saved_and_loaded_equals_in_memory(recipe: str, family: str, tmp_path):
    pruner = prune(recipe, family)
    pruner.save_pretrained(tmp_path / "pruned")
    loaded = type(pruner.model).from_pretrained(tmp_path / "pruned")
    for batch in data_of(family):
        assert torch.equal(outputs(loaded, batch), outputs(pruner.model, batch))


OTHERS_THAN_IN_THE_TABLE = [recipe for recipe in RECIPES if recipe not in ("stat-fisher", "fisher", "surgeon")]


@pytest.mark.parametrize(
    ("recipe", "family"),
    combinations(OTHERS_THAN_IN_THE_TABLE, TRAINED, of=[family for family in ROWS if family not in SILENT], core=()),
)
def test_generation_with_a_cache_equals_generation_without(recipe: str, family: str):
    model = prune(recipe, family).model.eval()
    assert model.config.use_cache
    check_cache(model, family, {})
    if family not in CANNOT[generates_with_a_static_cache]:
        check_cache(model, family, STATIC)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def marks(model: Any) -> dict[str, Any]:
    """Everything that a run may borrow from the model and from torch, and has to give back."""
    modules = dict(model.named_modules())
    return {
        "hooks": {
            # one that stays is part of the model: it knows which heads' biases are left
            name: [sum(not isinstance(hook, (OwnHeads, NoBias)) for hook in getattr(m, hooks).values()) for hooks in HOOKS]
            for name, m in modules.items()
        },
        "training": {name: module.training for name, module in modules.items()},
        "own forward": {name: "forward" in module.__dict__ for name, module in modules.items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "leaf": {name: p.is_leaf and type(p) is torch.nn.Parameter for name, p in model.named_parameters()},
        "use_cache": getattr(model.config, "use_cache", None),
        "precision": torch.get_float32_matmul_precision(),
        "grad_enabled": torch.is_grad_enabled(),
    }


def disturbed(family: str) -> Any:
    """A model in an unusual mixture of modes."""
    model = tiny(family).train()
    torch.set_float32_matmul_precision("medium")
    groups = find_groups(model)
    groups[0].consumer.eval()
    for parameter in (*groups[0].producers[0].linear.parameters(), groups[-1].consumer.weight):
        parameter.requires_grad_(False)
    return model


@pytest.fixture(autouse=True)
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@ONE_FAMILY
def test_nothing_is_left_behind(recipe: str, family: str):
    model = disturbed(family)
    before = marks(model)
    assert len(set(before["requires_grad"].values())) == len(set(before["training"].values())) == 2
    pruner_for(recipe, model).prune(data_of(family))
    assert marks(model) == before


class Interrupted(Exception):
    """Somebody pressed a key."""


@ONE_FAMILY
def test_an_exception_leaves_the_model_as_it_was(recipe: str, family: str):
    """The last MLP's activation raises: in every forward pass of the run once, so every stage is interrupted."""
    dense, calls = tiny(family).state_dict(), 0
    at, reached = 1, True
    while reached:
        model, calls, reached = disturbed(family), 0, False
        before, record = marks(model), model.config.to_dict()

        def count(module: Any, arguments: Any, at: int = at) -> None:
            nonlocal calls, reached
            calls += 1
            if calls == at:
                reached = True
                raise Interrupted

        last = [group for group in find_groups(model) if group.experts is None][-1]
        handle = last.consumer.register_forward_pre_hook(count)
        try:
            pruner_for(recipe, model, keep=0.4).prune(data_of(family))  # so little that every group loses units
        except Interrupted:
            handle.remove()
            assert marks(model) == before
            assert model.config.to_dict() == record
            after = model.state_dict()
            assert all(torch.equal(after[name], dense[name]) for name in dense)
            assert torch.equal(outputs(model, data_of(family)[0]), outputs(tiny(family), data_of(family)[0]))
        at += 2 if at < 3 else 3
    assert at > 6


@pytest.mark.parametrize(("recipe", "family"), combinations(WITHOUT_TRAINING, of=FAMILIES))
def test_keeping_all_gives_the_dense_model(recipe: str, family: str):
    pruner = prune(recipe, family, data_of(family), keep=1.0)
    assert pruner.report.reached == 1
    assert torch.equal(outputs(pruner.model, data_of(family)[1]), outputs(tiny(family), data_of(family)[1]))


LAYOUTS = {
    "one by one": {"batch_size": 1},
    "all at once": {"batch_size": 26},
    "more padding": {"extra": 9},
    "padding in front": {"left": True},
}


@pytest.mark.parametrize(
    ("recipe", "family"),  # what a training step sees is a batch
    one_in_three(WITHOUT_TRAINING, ["bert", "distilbert", "gpt2", "opt", "qwen2"]),
)
def test_neither_padding_nor_batch_size_matters(recipe: str, family: str):
    data = tuple(range(8, 21)) * 2
    plain = prune(recipe, family, batches(data, batch_size=13))
    for layout, changes in LAYOUTS.items():
        if family == "distilbert" and "left" in changes:
            continue  # it counts positions from the left edge, padding or not
        other = prune(recipe, family, batches(data, **{"batch_size": 13, **changes}))
        assert kept(other) == kept(plain), layout
        assert other.report.fingerprint == plain.report.fingerprint
        assert other.report.num_tokens == plain.report.num_tokens
        for one, two in zip(plain.model.parameters(), other.model.parameters(), strict=True):
            assert torch.allclose(one, two, atol=2e-3, rtol=1e-3), layout


@pytest.mark.parametrize(("recipe", "of"), one_in_three(RECIPES, HEADS_OF))
def test_every_head(recipe: str, of: tuple[str, str], tmp_path):
    family, head = of
    model = tiny(family, head)
    wanted = outputs(model, data_of(family)[0])
    pruner = pruner_for(recipe, model, keep=0.7)
    assert pruner.prune(plenty(family)) is model
    assert model.base_model.get_input_embeddings().weight.shape == (67, 32)
    after = outputs(model, data_of(family)[0])
    assert after.shape == wanted.shape
    assert not torch.equal(after, wanted)
    pruner.save_pretrained(tmp_path / "pruned")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "pruned"), data_of(family)[0]), after)


@pytest.mark.parametrize(("recipe", "family"), one_in_three(RECIPES, ["bert", "gpt2", "llama"]))
def test_pruning_the_pruned(recipe: str, family: str, tmp_path):
    once = prune(recipe, family, keep=0.8)
    first = kept(once)
    twice = pruner_for(recipe, once.model, keep=0.6)
    twice.prune(plenty(family))
    assert all(kept(twice)[name] <= first[name] for name in first)
    assert twice.report.dense == once.report.pruned
    twice.save_pretrained(tmp_path / "twice")
    loaded = pruner_for(recipe, type(once.model).from_pretrained(tmp_path / "twice"), keep=0.9)
    assert torch.equal(outputs(loaded.model, data_of(family)[0]), outputs(twice.model, data_of(family)[0]))
    loaded.prune(plenty(family))
    loaded.save_pretrained(tmp_path / "thrice")
    again = type(once.model).from_pretrained(tmp_path / "thrice")
    assert torch.equal(outputs(again, data_of(family)[0]), outputs(loaded.model, data_of(family)[0]))


@pytest.mark.parametrize(
    ("recipe", "dtype", "family"),
    one_in_three(RECIPES, [torch.bfloat16, torch.float16, torch.float64], ["bert", "gpt2", "llama"]),
)
def test_other_precisions(recipe: str, dtype: torch.dtype, family: str, tmp_path):
    tiny(family).save_pretrained(tmp_path / "dense")
    pruner = RECIPES[recipe][0].from_pretrained(tmp_path / "dense", RECIPES[recipe][1](keep=0.6), dtype=dtype)
    pruner.prune(plenty(family))
    assert {parameter.dtype for parameter in pruner.model.parameters()} == {dtype}
    pruner.save_pretrained(tmp_path / "pruned")
    loaded = type(pruner.model).from_pretrained(tmp_path / "pruned")
    assert loaded.dtype == dtype
    assert torch.equal(outputs(loaded, data_of(family)[0]), outputs(pruner.model, data_of(family)[0]))


@pytest.mark.parametrize(("recipe", "family"), one_in_three(RECIPES, ["llama", "bert"]))
def test_settings_of_the_caller_do_not_disturb(recipe: str, family: str):
    """Gradients switched off, tuples instead of dicts, more outputs than needed, gradient checkpointing, training mode."""
    plain = prune(recipe, family)
    model = tiny(family).train()
    model.config.return_dict, model.config.output_hidden_states = False, True
    checkpoint_activations(model)
    with torch.no_grad():
        pruner_for(recipe, model).prune(plenty(family))
    wanted = plain.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert getattr(model, "is_activation_checkpointing", True)
    assert (model.config.return_dict, model.config.output_hidden_states) == (False, True)


@EACH_RECIPE
def test_a_copy_and_the_dense_model_beside_it_are_left_alone(recipe: str):
    model = tiny("llama")
    dense = copy.deepcopy(model)
    pruner_for(recipe, model).prune(batches())
    assert torch.equal(outputs(dense, batches()[0]), outputs(tiny("llama"), batches()[0]))
    assert getattr(dense.config, "stat_pruning", None) is None


@EACH_RECIPE
def test_the_pruned_model_trains(recipe: str):
    model = prune(recipe, "llama").model.train()
    loss = model(**batches()[0], labels=batches()[0]["input_ids"]).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
