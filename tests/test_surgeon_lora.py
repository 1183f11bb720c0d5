"""Low-rank corrections between shots: they learn, they revive nothing, and they leave nothing behind."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import many, outputs, tiny
from torch import nn

from optimum_stat import SurgeonConfig, SurgeonPruner
from optimum_stat.data import Batches
from optimum_stat.families import Group, find_groups, weight
from optimum_stat.methods import surgeon_lora
from optimum_stat.probes import quiet

DATA = Batches(tuple(many(400)), 400, 20, 20, "", "test")


def linears_of(group: Group) -> list[nn.Module]:
    return [*(producer.linear for producer in group.producers), group.consumer]


@torch.no_grad()
def loss_of(model: Any) -> float:
    logits = [model(**item).logits[:, :-1].flatten(0, 1) for item in DATA]
    return float(F.cross_entropy(torch.cat(logits), torch.cat([item["input_ids"][:, 1:].flatten() for item in DATA])))


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_corrections_learn_the_data_and_keep_every_size(family: str) -> None:
    plain, corrected = (
        SurgeonPruner.from_pretrained(tiny(family), SurgeonConfig(keep=0.6, shots=2, lora_epochs=epochs)) for epochs in (0, 5)
    )
    small = [pruner.prune(many(400)) for pruner in (plain, corrected)]
    assert loss_of(small[1]) < loss_of(small[0]) - 0.02
    assert corrected.report.reached <= 0.6
    assert not [name for name, _ in small[1].named_parameters() if "lora" in name]
    assert {type(module) for module in small[1].modules()} == {type(module) for module in tiny(family).modules()}


def test_weights_that_are_zero_stay_zero() -> None:
    model = tiny("llama")
    linears = [linear for group in find_groups(model) for linear in linears_of(group)]
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(weight(linear).shape, generator=generator) < 0.5 for linear in linears]
    for linear, mask in zip(linears, masks, strict=True):
        weight(linear).detach()[mask] = 0
    before = [weight(linear).detach().clone() for linear in linears]
    with quiet(model):
        surgeon_lora.correct(model, linears, DATA, 1, 0)
    for linear, mask, old in zip(linears, masks, before, strict=True):
        assert not weight(linear)[mask].any()
        assert not torch.equal(weight(linear), old)


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    dense, modules = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: 1 / 0)
    state = torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        SurgeonPruner.from_pretrained(model, SurgeonConfig(keep=0.6, shots=2, lora_epochs=1)).prune(many(400))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_half_precision_is_trained_in_single_and_stays_half() -> None:
    model = tiny("llama").bfloat16()
    pruner = SurgeonPruner.from_pretrained(model, SurgeonConfig(keep=0.6, shots=1, lora_epochs=1))
    pruner.prune(many(400))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(outputs(model, many(400)[0])).all()


def test_models_that_predict_no_next_tokens_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = SurgeonPruner.from_pretrained(tiny("bert"), SurgeonConfig(keep=0.6, lora_epochs=1))
    with pytest.raises(ValueError, match=r"BertForMaskedLM has no next tokens to learn from.* Set lora_epochs=0"):
        pruner.prune(many(400))
    monkeypatch.setitem(sys.modules, "peft", None)
    pruner = SurgeonPruner.from_pretrained(tiny("llama"), SurgeonConfig(keep=0.6, lora_epochs=1))
    with pytest.raises(ImportError, match="needs PEFT: pip install peft, or set lora_epochs=0"):
        pruner.prune(many(400))
    with pytest.raises(ValueError, match="lora_epochs=-1 asked"):
        SurgeonConfig(lora_epochs=-1)
