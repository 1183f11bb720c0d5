"""Sliced equals masked: what is cut away is exactly what reads as zero in the dense model."""

from __future__ import annotations

import operator

import pytest
import torch
from tiny import INEXACT, ROWS, batches, data_of, outputs, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_stat.experts import opened
from optimum_stat.families import find_groups, weight
from optimum_stat.few_values import narrow_values
from optimum_stat.probes import on_consumer_input
from optimum_stat.slicing import consumer_columns, restored_on_error, slice_group, slice_model

EACH_FAMILY = pytest.mark.parametrize("family", ROWS)


def random_plan(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Other units and other sizes in every group, in any order."""
    generator = torch.Generator().manual_seed(seed)
    plan = {}
    for group in find_groups(model):
        size = int(torch.randint(1, group.units + (group.structure == "heads"), (1,), generator=generator))
        if group.experts is not None:
            size = max(8, size // 8 * 8)
        plan[group.name] = torch.randperm(group.units, generator=generator)[:size]
    return plan


def divide_at_random(model: PreTrainedModel, seed: int) -> list[tuple[int, ...]]:
    """Another number of values in every head; where heads cannot be divided, nothing. What stays, attention by attention."""
    try:
        groups = find_groups(model, ("heads", "values"))
    except ValueError:
        return []
    generator, kept = torch.Generator().manual_seed(seed), []
    for heads in (group for group in groups if group.structure == "heads"):
        width = heads.width // heads.query_heads
        sizes = torch.randint(0, width + 1, (heads.units,), generator=generator)
        sizes[0] = max(1, int(sizes[0]))
        narrow_values(heads.producers[-1].linear, heads.consumer, sizes.tolist())
        kept.append(tuple(sizes.tolist()))
    return kept


def masked(model: PreTrainedModel, plan: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """The dense model's output with zeros wherever `plan` drops something."""

    def gate(group, z: Tensor) -> Tensor:
        columns = consumer_columns(group, plan[group.name])
        return z * torch.zeros(z.shape[-1]).index_fill_(0, columns, 1)

    with opened(model), on_consumer_input(find_groups(model), gate):
        return outputs(model, batch)


@EACH_FAMILY
@pytest.mark.parametrize("seed", range(4))
def test_sliced_equals_masked(family: str, seed: int):
    model = tiny(family)
    plan = random_plan(model, seed)
    if family in INEXACT:
        plan |= {group.name: torch.arange(group.units) for group in find_groups(model) if group.inexact}
    wanted = [masked(model, plan, batch) for batch in data_of(family)]
    dense = outputs(model, data_of(family)[0])
    slice_model(model, plan)
    assert [group.units for group in find_groups(model)] == [len(units) for units in plan.values()]
    for batch, values in zip(data_of(family), wanted, strict=True):
        torch.testing.assert_close(outputs(model, batch), values, atol=2e-4, rtol=1e-4)
    assert (wanted[0] - dense).abs().max() > 0.05


def test_a_norm_over_all_heads_makes_heads_inexact_and_nothing_else():
    groups = {name: find_groups(tiny(name)) for name in ROWS}
    inexact = {(name, group.structure) for name, own in groups.items() for group in own if group.inexact}
    assert inexact == {(name, "heads") for name in INEXACT}
    model = tiny("olmo2")
    plan = {"0.heads": torch.tensor([1])}
    wanted = masked(model, {**plan, **{g.name: torch.arange(g.units) for g in groups["olmo2"][1:]}}, batches()[0])
    slice_model(model, plan)
    assert (outputs(model, batches()[0]) - wanted).abs().max() > 0.01
    for name in ("q_norm", "k_norm"):
        assert len(getattr(model.model.layers[0].self_attn, name).weight) == {"q_norm": 16, "k_norm": 8}[name]


@EACH_FAMILY
def test_slicing_in_two_steps_equals_slicing_at_once(family: str):
    once, twice = tiny(family), tiny(family)
    slice_model(once, {"0.neurons": torch.tensor([9, 3, 30]), "1.heads": torch.tensor([1])})
    slice_model(twice, {"0.neurons": torch.arange(43, 2, -1), "1.heads": torch.tensor([0, 1])})
    slice_model(twice, {"0.neurons": torch.tensor([34, 40, 13]), "1.heads": torch.tensor([1])})
    first, second = once.state_dict(), twice.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@EACH_FAMILY
def test_sizes_that_modules_remember_are_rewritten(family: str):
    model = tiny(family)
    slice_model(model, random_plan(model, 2))
    for group in find_groups(model):
        for module, name, per_unit in group.counts:
            assert operator.attrgetter(name)(module) == per_unit * group.units
        for linear in (*(producer.linear for producer in group.producers), group.consumer):
            shape = (linear.out_features, linear.in_features) if isinstance(linear, nn.Linear) else (linear.nf, linear.nx)
            assert shape == tuple(weight(linear).shape)
            assert linear.weight.is_contiguous()
            assert linear.bias is None or len(linear.bias) == len(weight(linear))


def test_dropped_weights_are_freed():
    """A slice that stays a view would keep the dense weight alive, and torch.save would write all of it."""
    model = tiny("llama")
    slice_model(model, random_plan(model, 3))
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def test_gradients_are_wanted_of_the_same_weights_as_before():
    model = tiny("bert")
    group = find_groups(model)[0]
    group.consumer.weight.requires_grad_(False)
    group.producers[0].linear.bias.requires_grad_(False)
    slice_group(group, torch.tensor([0, 2]))
    assert [p.requires_grad for p in (group.consumer.weight, group.producers[0].linear.bias)] == [False, False]
    assert all(p.requires_grad for p in (group.consumer.bias, group.producers[0].linear.weight, group.producers[1].linear.bias))


@pytest.mark.parametrize("units", [[], [44], [0, 99]])
def test_impossible_plans_are_refused(units: list[int]):
    model = tiny("bert")
    with pytest.raises(ValueError, match=r"0\.neurons has units 0 to 43; the plan keeps"):
        slice_model(model, {"0.neurons": torch.tensor(units, dtype=torch.long)})


def sizes_of(model: PreTrainedModel) -> list[tuple[int, list[int], str]]:
    return [
        (group.units, [operator.attrgetter(name)(module) for module, name, _ in group.counts], group.consumer.extra_repr())
        for group in find_groups(model)
    ]


@EACH_FAMILY
def test_an_error_restores_weights_sizes_and_identity(family: str):
    model = tiny(family)
    parameters = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    sizes = sizes_of(model)

    def fail() -> None:
        with restored_on_error(model):
            slice_model(model, random_plan(model, 5))
            assert any(p is not parameters[name] for name, p in model.named_parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert sizes_of(model) == sizes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not any(hasattr(module, "kept_heads") for module in model.modules())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(dict(model.named_parameters())) == list(parameters)
