"""What The LLM Surgeon claims, against plain autograd, least squares and brute force on whole Kronecker products."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import batches, many, outputs, takes_positions, tiny
from torch import Tensor, nn

from optimum_stat import SurgeonConfig, SurgeonPruner
from optimum_stat.budget import model_cost
from optimum_stat.data import Batches
from optimum_stat.families import Group, find_groups, weight
from optimum_stat.methods import surgeon_curvature, surgeon_published
from optimum_stat.methods.surgeon_curvature import Factors, factors_by_block, measure_factors
from optimum_stat.probes import quiet

FAMILIES = ["bert", "gpt2", "opt", "qwen2"]  # with and without biases, fused and separate projections, gates, shared heads


def data_for(model: nn.Module, seed: int = 0) -> Batches:
    items = batches((18, 11, 15, 7) * 6, batch_size=6, seed=seed)
    if not takes_positions(model):
        items = [{name: value for name, value in item.items() if name != "position_ids"} for item in items]
    tokens = sum(int(item["attention_mask"].sum()) for item in items)
    return Batches(tuple(items), tokens, 24, 13, "", "test")


def plain_moments(model: Any, linear: nn.Module, data: Batches) -> tuple[Tensor, Tensor]:
    """A with the constant, and G under the next-token loss: one example after the other, without padding."""
    inputs, grads = [], []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        inputs.append(args[0].detach().reshape(-1, args[0].shape[-1]))
        output.retain_grad()
        grads.append(output)

    handle = linear.register_forward_hook(watch)
    for item in data:
        for ids, mask in zip(item["input_ids"], item["attention_mask"], strict=True):
            real = ids[mask != 0][None]
            loss = F.cross_entropy(model(real).logits[0, :-1], real[0, 1:], reduction="sum")
            loss.backward()
            model.zero_grad()
            grads[-1] = grads[-1].grad.reshape(-1, grads[-1].shape[-1])
    handle.remove()
    rows, g = torch.cat(inputs), torch.cat(grads)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
    return rows.T @ rows / len(rows), g.T @ g / len(g)


def factors_of(model: Any, data: Batches, labels: str = "data", seed: int = 0) -> dict[str, Mapping[nn.Module, Factors]]:
    """The consumers' and silencing producers' factors, by group."""
    groups = find_groups(model)
    layers = {group.name: surgeon_published.layers(group) for group in groups}
    every = [layer for group in groups for layer in layers[group.name]]
    with quiet(model):
        found = measure_factors(model, 0, every, data, labels, seed)
    return {name: {layer: found[layer] for layer in own} for name, own in layers.items()}


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_factors_are_the_second_moments_of_inputs_and_gradients(family: str) -> None:
    model = tiny(family).double()
    data = data_for(model)
    for factors in factors_of(model, data).values():
        for linear, found in factors.items():
            a, g = plain_moments(model, linear, data)
            torch.testing.assert_close(found.inputs, a, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found.gradients, g, rtol=1e-9, atol=1e-12)


def test_layers_that_read_the_same_tensor_share_its_factor() -> None:
    factors = factors_of(tiny("llama"), data_for(tiny("llama")))
    _, gate, up = factors["0.neurons"].values()
    assert gate.inputs is up.inputs
    assert gate.gradients is not up.gradients


@pytest.mark.parametrize("labels", surgeon_curvature.LABELS)
def test_factors_do_not_depend_on_how_many_blocks_fit_into_memory(monkeypatch: pytest.MonkeyPatch, labels: str) -> None:
    model = tiny("llama", num_hidden_layers=3)
    linears = {i: [group.consumer for group in find_groups(model) if group.block == i] for i in range(3)}
    passes, found = [], []
    original = surgeon_curvature.measure_factors
    for free in (None, 2**40):  # unknown: one block at a time
        monkeypatch.setattr(surgeon_curvature, "free_bytes", lambda device, free=free: free)
        monkeypatch.setattr(surgeon_curvature, "measure_factors", lambda *args: (passes.append(args[1]), original(*args))[1])
        with quiet(model):
            found.append(dict(factors_by_block(model, linears, data_for(model), labels, 0)))
    assert passes == [0, 1, 2, 0]
    for block, own in found[0].items():
        for linear, factors in own.items():
            assert torch.equal(factors.inputs, found[1][block][linear].inputs)
            assert torch.equal(factors.gradients, found[1][block][linear].gradients)


def test_labels_of_the_model_differ_from_those_of_the_data_and_follow_the_seed() -> None:
    model = tiny("llama")
    data = data_for(model)
    name, linear = "1.neurons", find_groups(model)[-1].consumer
    g = [factors_of(model, data, *asked)[name][linear].gradients for asked in (("data",), ("data", 1), ("model",), ("model", 1))]
    assert torch.equal(g[0], g[1])
    assert not torch.equal(g[2], g[3])
    assert not torch.allclose(g[0], g[2], rtol=0.1)


def damped_rows(a: Tensor, ridge: float) -> Tensor:
    """R with R^T R = A + ridge diag(A)."""
    values, vectors = torch.linalg.eigh(a + ridge * torch.diag(a.diagonal()))  # a neuron may be dead
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def left_over(group: Group, factors: Factors, keep: list[int], ridge: float) -> float:
    """min over the consumer's weight and bias of half of tr(G D A D^T), all but the units `keep` forced to zero."""
    constant = isinstance(group.consumer.bias, Tensor)
    a = factors.inputs if constant else factors.inputs[:-1, :-1]
    if constant:
        mean = a[-1:, :-1]
        a = a[:-1, :-1] - mean.T @ mean  # the best bias takes the mean away
    rows, target = damped_rows(a, ridge), weight(group.consumer).detach().double()
    columns = [unit * group.width + i for unit in keep for i in range(group.width)]
    wanted = rows @ target.T
    if columns:
        wanted = wanted - rows[:, columns] @ torch.linalg.lstsq(rows[:, columns], wanted, driver="gelsd").solution
    return float(torch.einsum("ti,ij,tj->", wanted, factors.gradients, wanted) / 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_error_curves_are_the_quadratic_loss_after_the_best_correction(family: str) -> None:
    model = tiny(family).double()
    data, config = data_for(model), SurgeonConfig(shots=1, ridge=1e-3)
    pruner = SurgeonPruner.from_pretrained(model, config)
    groups = find_groups(model)
    with quiet(model):
        stats = list(pruner.measure(groups, data))
        ranking = pruner.rank(groups, stats)
    for group, factors in stats:
        order, error = ranking.order[group.name], ranking.error[group.name]
        assert sorted(order.tolist()) == list(range(group.units))
        for k in {0, 1, group.units // 2, group.units - 1}:
            exact = left_over(group, factors[group.consumer], order[:k].tolist(), config.ridge)
            assert float(error[k]) == pytest.approx(exact, rel=2e-3, abs=1e-6 * float(error[0]))
        if group.structure == "heads":  # few enough to try every first removal
            tries = [
                left_over(group, factors[group.consumer], [u for u in range(group.units) if u != v], 1e-3)
                for v in range(group.units)
            ]
            assert float(error[-2]) == pytest.approx(min(tries), rel=2e-3)


def brute(value: Tensor, g: Tensor, a: Tensor, gone: Tensor, damping: float) -> tuple[float, Tensor]:
    """Optimal brain surgeon on the inverse of the whole damped Kronecker product: (cost, weight left)."""
    damped = [m + damping * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype) for m in (g, a)]
    inverse = torch.linalg.inv(torch.kron(*damped))
    at = gone.flatten().nonzero().flatten()
    multipliers = torch.linalg.solve(inverse[at][:, at], value.flatten()[at])
    return float(value.flatten()[at] @ multipliers / 2), value - (inverse[:, at] @ multipliers).view_as(value)


def sides_of(group: Group, units: list[int]) -> list[tuple[nn.Module, Tensor, bool]]:
    """(layer, lines of `units`, whether they are columns), written down once more."""
    rows = [(p.linear, len(p.runs)) for p in (group.producers[-1:] if group.structure == "heads" else group.producers)]
    columns = torch.tensor([u * group.width + i for u in units for i in range(group.width)])
    found = [(group.consumer, columns, True)]
    for linear, parts in rows:
        per_part = len(weight(linear)) // parts
        block = per_part // group.units
        lines = [(parts - 1) * per_part + u * block + i for u in units for i in range(block)]
        found.append((linear, torch.tensor(lines), False))
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_published_costs_are_those_of_the_cheapest_side(family: str) -> None:
    sizes = {"gpt2": {"n_embd": 16, "n_inner": 12}, "llama": {"hidden_size": 16, "intermediate_size": 12}}[family]
    model = tiny(family, **sizes).double()
    damping = 1e-7  # published costs mix damped and undamped factors; the exact ones do not
    for (name, factors), group in zip(factors_of(model, data_for(model)).items(), find_groups(model), strict=True):
        order, error = surgeon_published.rank(group, factors, damping)
        own = (error[:-1] - error[1:]).detach()
        assert (own[:-1] >= own[1:] - 1e-12).all(), "best unit first"
        for position in (0, group.units - 1):
            costs = []
            for linear, lines, is_columns in sides_of(group, [int(order[position])]):
                value, found = weight(linear).detach(), factors[linear]
                a = found.inputs if linear.bias is not None else found.inputs[:-1, :-1]
                if linear.bias is not None:
                    value = torch.cat([value, linear.bias.detach()[:, None]], dim=1)
                gone = torch.zeros_like(value, dtype=torch.bool)
                gone[(slice(None), lines) if is_columns else lines] = True
                costs.append(brute(value, found.gradients, a, gone, damping)[0])
            assert float(own[position]) == pytest.approx(min(costs), rel=1e-3), name


def test_published_updates_are_exact_and_move_only_the_side_that_decides() -> None:
    model = tiny("gpt2", n_embd=16, n_inner=12).double()
    dense, data = copy.deepcopy(model), data_for(model)
    stats = [(group, factors_of(model, data)[group.name]) for group in find_groups(model)]
    plan = {group.name: torch.arange(1, group.units - 1) for group, _ in stats}
    costs = {group.name: surgeon_published._costs(group, factors, 0.01) for group, factors in stats}
    surgeon_published.update(stats, plan, 0.01)
    moved = 0
    for (group, factors), before in zip(stats, find_groups(dense), strict=True):
        for index, ((linear, _, is_columns), (old, _, _)) in enumerate(
            zip(sides_of(group, []), sides_of(before, []), strict=True)
        ):
            gone = [unit for unit in (0, group.units - 1) if int(costs[group.name][:, unit].argmin()) == index]
            found = factors[linear]
            value = torch.cat([weight(old).detach(), old.bias.detach()[:, None]], dim=1)
            after = torch.cat([weight(linear).detach(), linear.bias.detach()[:, None]], dim=1)
            if gone:
                _, lines, _ = sides_of(before, gone)[index]
                mask = torch.zeros_like(value, dtype=torch.bool)
                mask[(slice(None), lines) if is_columns else lines] = True
                torch.testing.assert_close(
                    after, brute(value, found.gradients, found.inputs, mask, 0.01)[1], rtol=1e-6, atol=1e-8
                )
                moved += 1
            else:
                assert torch.equal(after, value)
    assert moved >= len(stats)


def test_the_schedule_is_linear_and_ends_where_it_was_asked_to() -> None:
    pruner = SurgeonPruner.from_pretrained(tiny("llama"), SurgeonConfig(keep=0.6, shots=4))
    assert pruner.schedule() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert pruner.schedule()[-1] == 0.6
    one = SurgeonPruner.from_pretrained(tiny("llama"), SurgeonConfig(keep=0.3, shots=1))
    assert one.schedule() == [0.3]


@pytest.mark.parametrize(
    "config", [SurgeonConfig(keep=0.5, shots=3), SurgeonConfig.paper(0.5, shots=3, structure="units")], ids=["ours", "paper"]
)
def test_every_shot_measures_the_model_as_it_is_and_meets_its_share(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    model = tiny("llama")
    total, seen, units = model_cost(model, "params", 20), [], []
    pruner = SurgeonPruner.from_pretrained(model, config)
    survey = SurgeonPruner.survey

    def watch(self: Any, groups: list[Group], *arguments: Any) -> Any:
        seen.append(model_cost(model, "params", 20) / total)
        units.append([group.units for group in groups])
        assert all(
            len(factors[group.consumer].inputs) == group.units * group.width + 1 for group, factors in self.measure(groups, data)
        )
        return survey(self, groups, *arguments)

    data = Batches(tuple(many(200)), 200, 10, 20, "", "test")
    monkeypatch.setattr(SurgeonPruner, "survey", watch)
    pruner.prune(many())
    assert seen[0] == 1
    assert all(share <= wanted for share, wanted in zip(seen[1:], pruner.schedule(), strict=False))
    assert pruner.report.reached <= 0.5
    assert units[0] > units[1] > units[2]
    assert set(pruner.report.stages) == {f"{stage} {shot}" for stage in ("measure", "repair") for shot in (1, 2, 3)}


def test_a_budget_out_of_reach_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SurgeonPruner, "measure", None)
    with pytest.raises(ValueError, match=r"keep=0\.01 of .* one head and 8 neurons"):
        SurgeonPruner.from_pretrained(tiny("llama"), SurgeonConfig(keep=0.01, shots=5)).prune(many())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"shots": 0}, "shots=0 asked; it must be a whole number of at least 1"),
        ({"labels": "gold"}, "labels='gold' asked; it must be one of 'data', 'model'"),
        ({"ridge": 1.5}, r"ridge=1\.5 asked"),
        ({"ridge": None}, "ridge=None asked"),
        ({"structure": "elements", "structures": ("neurons",)}, "whose zeros are in all linear layers of the blocks"),
        ({"max_correlate": -3}, "max_correlate=-3 asked; it must be a whole number of at least 0"),
        ({"structure": "rows"}, "structure='rows' asked; it must be one of 'units', 'elements', '2:4', 'lines'"),
        ({"structure": "lines", "budget": "macs"}, "budget='macs' asked of lines: zeros are counted in params only"),
        ({"structure": "2:4", "keep": 0.4}, r"keep=0\.4 asked of 2:4, which leaves half of the weights"),
    ],
)
def test_values_that_no_run_could_honour_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SurgeonConfig(**asked)


def test_a_gradient_that_is_not_finite_names_its_layer() -> None:
    model = tiny("llama")
    state = copy.deepcopy(model.state_dict())

    class Explodes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * torch.inf

    name, block = next((n, m) for n, m in model.named_modules() if m is find_groups(model)[2].producers[0].linear)
    handle = block.register_forward_hook(lambda module, args, output: Explodes.apply(output))
    with pytest.raises(ValueError, match=r"gradients at the output of .*0.* are NaN or infinite; there is no curvature"):
        SurgeonPruner.from_pretrained(model, SurgeonConfig(keep=0.6)).prune(many())
    handle.remove()
    assert name
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_layers_too_large_for_the_memory_say_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgeon_curvature, "free_bytes", lambda device: 10_000)
    with pytest.raises(ValueError, match=r"curvature of block 0 alone takes .* about \d+ channels would fit"):
        SurgeonPruner.from_pretrained(tiny("llama"), SurgeonConfig(keep=0.6)).prune(many())


def test_published_costs_see_twins_only_after_one_of_them_is_gone() -> None:
    """Each costs nothing alone; a shot that takes both loses what they did, a shot that takes one loses nothing."""
    from test_methods import redundant

    def loss(shots: int) -> float:
        model = redundant("llama")
        pruner = SurgeonPruner.from_pretrained(model, SurgeonConfig.paper(0.75, "macs", shots, "units"))
        pruner.prune(many())
        held_out = batches((20,) * 10, seed=7)[0]
        return float((outputs(model, held_out) - outputs(redundant("llama"), held_out)).square().mean())

    assert loss(8) < 0.5 * loss(1)


def test_labels_of_the_data_count_where_it_has_some() -> None:
    items = [{**item, "labels": torch.arange(len(item["input_ids"])) % 3} for item in many()]
    others = [{**item, "labels": (item["labels"] + 1) % 3} for item in items]
    bare = [{name: value for name, value in item.items() if name != "labels"} for item in items]

    def errors(data: list[dict[str, Tensor]], labels: str) -> list[float]:
        pruner = SurgeonPruner(tiny("bert", "SequenceClassification"), SurgeonConfig(keep=0.6, shots=1, labels=labels))
        pruner.prune(data)
        return [group.error for group in pruner.report.groups]

    assert errors(items, "data") != errors(others, "data")
    assert errors(bare, "data") == errors(items, "model") == errors(others, "model")
