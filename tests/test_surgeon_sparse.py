"""Zeros in a model of the old shape: where they are, that they stay, and that what is left was corrected as well as it can be."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from tiny import LAYERS, batches, many, outputs, tiny
from torch import Tensor, nn

from optimum_stat import SurgeonConfig, SurgeonPruner, to_sparse_semi_structured
from optimum_stat.data import Batches
from optimum_stat.families import find_groups, weight
from optimum_stat.methods import surgeon_curvature, surgeon_sparse
from optimum_stat.methods.surgeon_curvature import Factors, measure_factors
from optimum_stat.probes import quiet
from optimum_stat.semi_structured import is_two_of_four

STRUCTURES = ["elements", "2:4", "lines"]
RECIPES = {
    "ours": lambda **asked: SurgeonConfig(**{"shots": 2, **asked}),
    "paper": lambda **asked: SurgeonConfig.paper(**{"shots": 2, **asked}),
}
EACH = pytest.mark.parametrize("recipe", RECIPES)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [linear for group in find_groups(model) for linear in surgeon_sparse.linears_of(group)]


def kill(model: nn.Module) -> nn.Module:
    """A dead input column in one layer of every block, as an earlier pruning may leave it."""
    for group in find_groups(model):
        weight(group.consumer).detach()[:, 5] = 0
    return model


def prune(model: Any, recipe: str = "ours", **asked: Any) -> SurgeonPruner:
    pruner = SurgeonPruner.from_pretrained(model, RECIPES[recipe](**{"keep": 0.6, **asked}))
    pruner.prune(many(400))
    return pruner


@pytest.mark.parametrize("structure", STRUCTURES)
def test_expected_losses_are_those_of_a_prediction(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors are means over tokens: an example of 20 tokens with one prediction loses 20 times as much."""
    of_example = prune(tiny("bert", "SequenceClassification"), structure=structure, shots=1).report.error
    monkeypatch.setattr(SurgeonPruner, "nats", lambda *_: 1.0)
    of_token = prune(tiny("bert", "SequenceClassification"), structure=structure, shots=1).report.error
    assert of_token > 0
    assert of_example == pytest.approx(20 * of_token, rel=1e-6)


@EACH
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_share_is_met_and_everything_else_stays(family: str, structure: str, recipe: str, tmp_path) -> None:
    dense, model = kill(tiny(family)), kill(tiny(family))
    pruner = prune(model, recipe, structure=structure)
    weights = [weight(linear) for linear in layers_of(model)]
    share = sum(int(value.count_nonzero()) for value in weights) / sum(value.numel() for value in weights)
    assert pruner.report.reached == share
    assert 0.6 - (0.02 if structure == "lines" else 0.001) < share <= 0.6
    assert pruner.report.counts == "weights"
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        n: v.shape for n, v in dense.state_dict().items()
    }
    own = {id(parameter) for linear in layers_of(model) for parameter in linear.parameters()}
    for (name, one), two in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert id(one) in own or torch.equal(one, two), name
    pruner.save_pretrained(tmp_path / "sparse")
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "weights were set to zero and the others corrected" in card
    assert "attention weights kept" in card
    loaded = type(model).from_pretrained(tmp_path / "sparse")
    assert torch.equal(outputs(loaded, many(20)[0]), outputs(model, many(20)[0]))
    assert [int(weight(linear).count_nonzero()) for linear in layers_of(loaded)] == [int(v.count_nonzero()) for v in weights]


@EACH
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_two_of_four_holds_on_the_full_matrix_with_and_without_biases_and_dead_columns(family: str, recipe: str) -> None:
    model = kill(tiny(family))
    prune(model, recipe, structure="2:4", keep=0.5)
    for linear in layers_of(model):
        zeros = (weight(linear) == 0).view(len(weight(linear)), -1, 4).sum(-1)
        assert (zeros >= 2).all()
        assert (zeros == 2).float().mean() > 0.85


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_empty_stays_empty_in_later_shots(monkeypatch: pytest.MonkeyPatch, structure: str) -> None:
    model, empty = tiny("llama"), []
    original = surgeon_sparse.shoot

    def watch(*args: Any) -> Any:
        lines = original(*args)
        empty.append([weight(linear) == 0 for linear in layers_of(model)])
        return lines

    monkeypatch.setattr(surgeon_sparse, "shoot", watch)
    prune(model, structure=structure, shots=3, lora_epochs=1)
    assert len(empty) == 3
    for before, after in zip(empty, [*empty[1:], [weight(linear) == 0 for linear in layers_of(model)]], strict=True):
        assert all(bool(two[one].all()) for one, two in zip(before, after, strict=True))


def seen(model: Any, linear: nn.Module, data: Batches) -> Tensor:
    """A, with the constant, of what the layer reads in plain forward passes."""
    rows: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for item in data:
            model(**item)
    handle.remove()
    all_rows = torch.cat([*rows])
    all_rows = torch.cat([all_rows, all_rows.new_ones(len(all_rows), 1)], dim=1)
    return all_rows.T @ all_rows / len(all_rows)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_corrections_are_the_optimum_on_the_already_pruned_network(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """At the optimum the loss has no slope along any weight that is left: (G D A) vanishes there."""
    dense = tiny(family).double()
    model, data = copy.deepcopy(dense), Batches(tuple(many(400)), 400, 20, 20, "", "test")
    ridge = 0.01
    monkeypatch.setattr(surgeon_sparse.kfac, "remove_elements", partial(surgeon_sparse.kfac.remove_elements, max_steps=100))
    prune(model, structure="elements", shots=1, ridge=ridge)
    with quiet(dense):
        factors = measure_factors(dense, 0, layers_of(dense), data, "model", 0)
    for old, new in zip(layers_of(dense), layers_of(model), strict=True):
        a, g = seen(model, new, data), factors[old].gradients
        change, gone = weight(new).detach() - weight(old).detach(), weight(new) == 0
        nothing = -weight(old).detach() * gone
        if old.bias is None:
            a = a[:-1, :-1]
        else:
            change = torch.cat([change, (new.bias - old.bias).detach()[:, None]], dim=1)
            nothing, gone = (torch.cat([part, part.new_zeros(len(part), 1)], dim=1) for part in (nothing, gone))
        damped = [m + ridge * torch.diag(m.diagonal()) for m in (g, a)]
        slopes = [(damped[0] @ d @ damped[1])[~gone].norm() for d in (change, nothing)]
        assert slopes[0] < 0.02 * slopes[1]


@EACH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("structure", ["elements", "lines"])
def test_what_is_empty_costs_nothing_and_makes_up_for_nothing(structure: str, bias: bool, recipe: str) -> None:
    """Against the explicit Fisher information of the rest; the bias of a row, which goes with it, has its part in the cost."""
    linear, generator = nn.Linear(6, 5, bias=bias).double(), torch.Generator().manual_seed(0)
    g, a = (m @ m.T for m in (torch.randn(size, size, generator=generator, dtype=torch.float64) for size in (5, 7)))
    a[4], a[:, 4] = 0, 0  # an input that is always 0
    linear.weight.detach()[[0, 3]] = 0
    linear.weight.detach()[:, 1] = 0
    if bias:
        linear.bias.detach()[[0, 3]] = 0
    config = RECIPES[recipe](structure=structure)
    costs = surgeon_sparse._costs(linear, Factors(a, g), config)
    rows, columns = [1, 2, 4], [0, 2, 3, 5, 6] if bias else [0, 2, 3, 5]
    value = torch.cat([linear.weight, linear.bias[:, None]], dim=1) if bias else linear.weight
    value, g, a = value.detach()[rows][:, columns], g[rows][:, rows], a[columns][:, columns]
    damping = (0.1 if structure == "elements" and recipe == "paper" else 0.01, 0.01)
    units = [m.diagonal().mean() * torch.eye(len(m)) if recipe == "paper" else torch.diag(m.diagonal()) for m in (g, a)]
    damped = [m + by * unit for m, by, unit in zip((g, a), damping, units, strict=True)]
    at = torch.arange(value.numel()).view(value.shape)

    def cost(metric: list[Tensor], gone: Tensor) -> Tensor:
        inverse = torch.linalg.inv(torch.kron(*metric))
        return value.flatten()[gone] @ torch.linalg.solve(inverse[gone][:, gone], value.flatten()[gone]) / 2

    if structure == "elements":
        wanted = [torch.zeros(5, 6, dtype=torch.float64)]
        for i, j in [(i, j) for i in range(3) for j in range(4)]:
            wanted[0][rows[i], columns[j]] = cost(damped, at[i, j, None])
    else:
        wanted = [torch.zeros(size, dtype=torch.float64) for size in (5, 6)]
        wanted[0][rows] = torch.stack([cost([damped[0], a], at[i]) for i in range(3)])
        wanted[1][columns[:4]] = torch.stack([cost([g, damped[1]], at[:, j]) for j in range(4)])
    for found, expected in zip(costs, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_published_elements_are_brute_force_when_all_are_correlated() -> None:
    dense = tiny("gpt2", n_embd=8, n_inner=8, n_head=2).double()
    model, data = copy.deepcopy(dense), Batches(tuple(many(400)), 400, 20, 20, "", "test")
    prune(model, "paper", structure="elements", shots=1)
    with quiet(dense):
        factors = measure_factors(dense, 0, layers_of(dense), data, "data", 0)
    for old, new in zip(layers_of(dense), layers_of(model), strict=True):
        damped = [
            m + damping * m.diagonal().mean() * torch.eye(len(m)).double()
            for m, damping in ((factors[old].gradients, 0.1), (factors[old].inputs, 0.01))
        ]
        inverse = torch.linalg.inv(torch.kron(*damped))
        value = torch.cat([weight(old).detach(), old.bias.detach()[:, None]], dim=1)
        gone = torch.cat([weight(new) == 0, torch.zeros(len(value), 1, dtype=torch.bool)], dim=1)
        at = gone.flatten().nonzero().flatten()
        change = inverse[:, at] @ torch.linalg.solve(inverse[at][:, at], value.flatten()[at])
        expected = value - change.view_as(value)
        torch.testing.assert_close(weight(new).detach(), expected[:, :-1], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(new.bias.detach(), expected[:, -1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("structure", ["elements", "lines"])
def test_correlated_corrections_are_better_than_independent_ones_and_those_than_none(
    monkeypatch: pytest.MonkeyPatch, structure: str
) -> None:
    def off(size: int | None) -> float:
        total = 0.0
        for seed in range(3):
            model, dense = tiny("gpt2", seed=seed), tiny("gpt2", seed=seed)
            if size is None:
                monkeypatch.setattr(surgeon_sparse, "_corrected", emptied)
            prune(model, structure=structure, shots=1, keep=0.6, max_correlate=size or 0)
            held_out = batches((20,) * 10, seed=7)[0]
            wanted = outputs(dense, held_out)
            total += float((outputs(model, held_out) - wanted).square().mean() / wanted.var())
        return total

    def emptied(linear: nn.Module, gone: Tensor, *_: Any) -> Tensor:
        return torch.cat([weight(linear).detach().masked_fill(gone, 0), linear.bias.detach()[:, None]], dim=1)

    together, alone, none = off(0), off(1), off(None)
    assert together < alone < none


@pytest.mark.parametrize("structure", STRUCTURES)
def test_factors_kept_on_disk_give_the_same_model(monkeypatch: pytest.MonkeyPatch, structure: str) -> None:
    models = [tiny("llama"), tiny("llama")]
    prune(models[0], structure=structure)
    monkeypatch.setattr(surgeon_curvature, "free_bytes", lambda device: None)
    prune(models[1], structure=structure)
    assert all(torch.equal(one, two) for one, two in zip(*(model.parameters() for model in models), strict=True))


def test_two_of_four_refuses_other_widths_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgeon_sparse, "shoot", None)
    with pytest.raises(ValueError, match=r"structure='2:4' asked, but .*down_proj reads 42 channels, which is no multiple of 4"):
        prune(tiny("llama", intermediate_size=42), structure="2:4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's semi-structured tensors live on CUDA devices only")
def test_two_of_four_becomes_semi_structured_tensors() -> None:
    model = tiny("llama", hidden_size=128, intermediate_size=128)
    prune(model, structure="2:4", keep=0.5)
    model.to("cuda", torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = to_sparse_semi_structured(model)
    assert len(names) == LAYERS * 7
    for name in names:
        assert torch.equal(model.get_submodule(name).weight.to_dense(), before[f"{name}.weight"])


def test_semi_structured_tensors_are_refused_where_they_cannot_be() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"No linear layer .* has two zeros in every four"):
        to_sparse_semi_structured(model)
    prune(model, structure="2:4", keep=0.5)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj is torch.float32 on cpu; .* on CUDA"):
        to_sparse_semi_structured(model)


@pytest.mark.parametrize(
    ("rows", "so"),
    [
        ([[0, 1, 0, 2]], True),
        ([[0, 0, 0, 2]], True),
        ([[0, 1, 1, 2]], False),
        ([[1, 0, 0]], False),
        ([[1, 1, 0, 0, 0, 1, 1, 1]], False),
    ],
)
def test_what_is_two_of_four(rows: list[list[int]], so: bool) -> None:
    assert is_two_of_four(torch.tensor(rows)) is so
