"""Distillation: the loss's gradient, the rate, what it may touch, and that it helps."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from test_methods import TRAINED, WITHOUT_TRAINING, pruner_for
from tiny import HIDDEN, batches, many, outputs, tiny
from torch import Tensor, nn

from optimum_stat import STATConfig, STATPruner, SurgeonConfig, SurgeonPruner
from optimum_stat import distillation as own
from optimum_stat.data import Batches
from optimum_stat.distillation import distill, teacher_of
from optimum_stat.families import find_blocks, weight
from optimum_stat.probes import quiet

HEADS = ["CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", ""]


def data(items: list[dict[str, Tensor]]) -> Batches:
    tokens = sum(int(item["attention_mask"].sum()) for item in items)
    return Batches(tuple(items), tokens, sum(len(item["input_ids"]) for item in items), 10, "", "")


def divergence(model: Any, teacher: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The loss, written down once more: mean KL(teacher || model) over predictions, or half the mean squared difference."""
    total, count = summed_and_count(model, teacher, inputs)
    return total / count


def summed_and_count(model: Any, teacher: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The sum that this is the mean of, and the number of predictions."""
    found, wanted, mask = model(**inputs), teacher(**inputs), inputs["attention_mask"].bool()
    total, count = torch.zeros(()), 0
    for name in ("logits", "start_logits", "end_logits", "last_hidden_state"):
        if name not in found:
            continue
        a, b = found[name], wanted[name].detach()
        if name == "last_hidden_state":
            total, count = total + (a - b)[mask].square().sum() / 2, int(mask.sum())
            continue
        if name in ("start_logits", "end_logits"):
            a, b = (each.masked_fill(~mask, -1e30) for each in (a, b))
        elif a.dim() == 3:
            a, b = a[mask], b[mask]
        total, count = total + nn.functional.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="sum"), len(a)
    return total, count


@pytest.mark.parametrize("head", HEADS)
def test_the_gradient_is_that_of_the_divergence(head: str) -> None:
    model, teacher = tiny("llama", head), tiny("llama", head, seed=1)
    inputs = batches()[0]
    total = own._backward(model, teacher, inputs)
    found = [parameter.grad.clone() for parameter in find_blocks(model).parameters()]
    model.zero_grad()
    expected, count = summed_and_count(model, teacher, inputs)
    (expected / count).backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-3)
    for mine, parameter in zip(found, find_blocks(model).parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("recipe", WITHOUT_TRAINING)
def test_it_comes_closer_to_the_dense_model_on_data_it_has_not_seen(recipe: str) -> None:
    *seen, unseen = many(3000)
    divergences = []
    for epochs in (0, 4):
        pruner = pruner_for(recipe, tiny("bert"))
        pruner.config = dataclasses.replace(pruner.config, distill_epochs=epochs)
        divergences.append(float(divergence(pruner.prune(seen), tiny("bert"), unseen).detach()))
    assert divergences[1] < divergences[0]


def test_sizes_and_what_is_outside_the_blocks_do_not_change() -> None:
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    plain = pruner_for("stat-fisher", tiny("llama"))
    plain.prune(many())
    pruner = pruner_for("stat-fisher", model, distill_epochs=1)
    pruner.prune(many())
    assert [(g.name, g.kept) for g in pruner.report.groups] == [(g.name, g.kept) for g in plain.report.groups]
    assert set(pruner.report.stages) == {"measure", "repair", "distill"}
    inside = {f"model.layers.{name}" for name, _ in find_blocks(model).named_parameters()}
    for name, value in model.state_dict().items():
        assert name in inside or torch.equal(value, before[name]), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_live_model_is_whole_again_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert")
    before = copy.deepcopy(model.state_dict())
    steps = iter(range(3))

    def interrupted(*args: Any) -> float:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return backward(*args)

    backward = own._backward
    monkeypatch.setattr(own, "_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        STATPruner(model, STATConfig(keep=0.6, distill_epochs=3)).prune(many())
    assert set(before) == set(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_teacher_shares_every_tensor_and_outlives_the_slicing() -> None:
    model = tiny("gpt2")
    teacher: Any = teacher_of(model)
    assert all(a is b for a, b in zip(model.parameters(), teacher.parameters(), strict=True))
    before = outputs(teacher, batches()[0])
    STATPruner(model, STATConfig(keep=0.5, distill_epochs=1)).prune(many())
    assert torch.equal(outputs(teacher, batches()[0]), before)


@pytest.mark.parametrize("near", [math.inf, 0.0005, 0.0003])
def test_no_step_is_longer_than_the_rate(near: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's first step is the learning rate, in every entry that has a gradient; a model near its teacher takes shorter ones."""
    model, teacher, seen = tiny("llama"), tiny("llama", seed=1), batches()[:1]
    before = {name: value.detach().clone() for name, value in find_blocks(model).named_parameters()}
    rate = min(own.RATE, near * float(summed_and_count(model, teacher, seen[0])[0].detach()) ** 0.5)
    monkeypatch.setattr(own, "WARM_UP", 1e-9)
    monkeypatch.setattr(own, "NEAR", near)
    with quiet(model):
        distill(model, teacher, data(seen), 1, seed=0)
    for name, value in find_blocks(model).named_parameters():
        size = float(before[name].square().mean().sqrt())
        step = (value - before[name]).detach().abs()
        assert float(step.max()) == pytest.approx(rate * size, rel=1e-3), name


def test_a_model_like_its_teacher_learns_nothing() -> None:
    model = tiny("bert", "SequenceClassification")
    before = copy.deepcopy(model.state_dict())
    with quiet(model):
        distill(model, teacher_of(model), data(batches()), 2, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_texts_are_cut_where_a_piece_is_a_text(side: str) -> None:
    """Every real token is in one step; whole sequences where what stands behind a token counts, too."""
    ids = torch.arange(3 * 300).view(3, 300) % 60 + 5
    mask = torch.ones_like(ids)
    for row, length in enumerate((300, 90, 200)):
        mask[row] = torch.arange(300) < length if side == "right" else torch.arange(300) >= 300 - length
    batch = data([{"input_ids": ids, "attention_mask": mask}])
    batch = dataclasses.replace(batch, seq_len=300)
    pieces = own._lessons(tiny("llama"), batch)
    seen = torch.cat([piece["input_ids"][piece["attention_mask"].bool()] for piece in pieces])
    assert torch.equal(seen.sort().values, ids[mask.bool()].sort().values)
    assert all(piece["input_ids"].shape[1] <= own.STEP and piece["attention_mask"].any(1).all() for piece in pieces)
    for model in (tiny("bert"), tiny("llama", "SequenceClassification")):
        assert [piece["input_ids"].shape for piece in own._lessons(model, batch)] == [(1, 300)] * 3


def test_zeros_stay_zeros_and_half_precision_learns() -> None:
    model = tiny("llama").bfloat16()
    pruner = SurgeonPruner(model, SurgeonConfig(keep=0.5, structure="2:4", shots=1, distill_epochs=2))
    pruner.prune(many())
    for block in find_blocks(model):
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                assert (weight(linear).view(-1, 4) == 0).sum(1).ge(2).all()
                assert weight(linear).dtype == torch.bfloat16
    assert pruner.report.reached == pytest.approx(0.5)
    alone = SurgeonPruner(tiny("llama").bfloat16(), SurgeonConfig(keep=0.5, structure="2:4", shots=1))
    assert not torch.equal(outputs(alone.prune(many()), batches()[0]), outputs(model, batches()[0]))


def test_shared_blocks_learn_once() -> None:
    model = tiny("llama")
    layers = find_blocks(model)
    layers[1] = layers[0]
    with quiet(model):
        distill(model, tiny("llama", seed=1), data(batches()), 1, seed=0)
    assert weight(layers[0].mlp.down_proj) is weight(layers[1].mlp.down_proj)
    assert weight(layers[0].mlp.down_proj).shape[0] == HIDDEN


@pytest.mark.parametrize("wrong", [-1, 0.5, "2"])
def test_bad_epochs_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"distill_epochs=.* whole number"):
        STATConfig(distill_epochs=wrong)


@pytest.mark.parametrize("recipe", TRAINED)
def test_methods_that_train_have_a_teacher_of_their_own(recipe: str) -> None:
    with pytest.raises(ValueError, match="distill_epochs=2 asked; methods that train have a teacher all along"):
        pruner_for(recipe, tiny("bert"), distill_epochs=2)


def test_a_model_that_returns_tuples_learns_too() -> None:
    model = tiny("llama", return_dict=False)
    pruner = STATPruner(model, STATConfig(keep=0.6, distill_epochs=1))
    pruner.prune(many())
    assert "distill" in pruner.report.stages
    assert not model.config.return_dict
