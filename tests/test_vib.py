"""What VTrans claims: the divergence, the constraint that ascends, and gates that can be folded into the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import batches, many, outputs, tiny
from torch import Tensor

from optimum_stat import VIBConfig, VIBPruner, calibration
from optimum_stat.budget import options, unit_cost
from optimum_stat.families import find_groups, weight
from optimum_stat.methods.vib_gates import Gates, divergence, log_noise
from optimum_stat.slicing import slice_model
from optimum_stat.training import masks_in
from optimum_stat.training_sizes import Size

FIXED = 700  # of the blocks' cost no unit has: norms and the like


def size_of(model: Any, keep: float, budget: str = "params", round_to: int = 1) -> Size:
    groups = find_groups(model)
    sizes = {group.name: options(group, round_to) for group in groups}
    costs = {group.name: [unit_cost(group, budget, 12) * k for k in sizes[group.name]] for group in groups}
    total = sum(own[-1] for own in costs.values()) + FIXED
    return Size(keep, costs, sizes, lambda share: share * total - (FIXED if share < 1 else 0))


def gates_of(model: Any, keep: float = 0.5, **asked: Any) -> Gates:
    how = {"kl": 0.1, "warmup": 0.1, "learning_rate": 0.05, "seed": 0, **asked}
    return Gates(find_groups(model), size_of(model, keep, round_to=how.pop("round_to", 1)), **how)


def roughened(gates: Gates) -> Gates:
    generator = torch.Generator().manual_seed(3)
    for mean, log_variance in zip(gates.means, gates.log_variances, strict=True):
        mean.data += torch.randn(mean.shape, generator=generator) / 2
        log_variance.data += 4 + 2 * torch.randn(mean.shape, generator=generator)
    gates.step(1.0)
    return gates


def test_the_divergence_is_that_of_two_gaussians():
    mean, log_variance, f = torch.randn(50), torch.randn(50), torch.randn(50).double()
    own = torch.distributions.Normal(f * mean.double(), (f * (log_variance.double() / 2).exp()).abs())
    best = torch.distributions.Normal(0.0, (f.square() * (mean.double().square() + log_variance.double().exp())).sqrt())
    wanted = torch.distributions.kl_divergence(own, best)
    torch.testing.assert_close(divergence(mean, log_variance).double(), wanted, rtol=1e-4, atol=1e-5)
    assert divergence(torch.ones(()), torch.tensor(-9.0)).item() == pytest.approx(4.5, abs=0.01)  # the source's start


def test_every_structure_weighs_the_same():
    gates = roughened(gates_of(tiny("bert")))
    means = []
    for structure in ("heads", "neurons"):
        own = [
            (m, v) for g, m, v in zip(gates._groups, gates.means, gates.log_variances, strict=True) if g.structure == structure
        ]
        every = torch.cat([divergence(*pair) for pair in own])
        means.append(every.mean().item())
    assert gates.information().item() == pytest.approx(sum(means), rel=1e-5)
    gates.multipliers.data.zero_()
    assert gates.penalty().item() == pytest.approx(0.1 * sum(means), rel=1e-5)


def test_the_multipliers_ascend_where_the_model_is_too_large_and_descend_where_it_is_too_small():
    for target, grows in ((0.3, True), (0.99, False)):
        gates = gates_of(tiny("bert"), keep=target)
        if not grows:
            for log_variance in list(gates.log_variances)[:2]:
                log_variance.data += 20  # the first block is all noise
        gates.step(1.0)
        optimizer, before = torch.optim.SGD([gates.multipliers], lr=1.0), gates.multipliers.detach().clone()
        over = gates.expected_share().item() - target
        assert (over > 0) == grows
        gates.penalty().backward()
        optimizer.step()
        assert (gates.multipliers.detach() - before).tolist() == pytest.approx([over, over**2], rel=1e-2, abs=1e-5)
        # and the gates are pushed the other way: noise grows where the model is too large
        gates.multipliers.data.fill_(abs(over))
        gates.zero_grad()
        gates.log_variances[3].data.fill_(0.01)
        gates.constraint().backward()
        assert (gates.log_variances[3].grad.sum() < 0) == grows


def test_the_expected_share_counts_softly():
    gates = gates_of(tiny("qwen2"))
    assert 0.97 < gates.expected_share().item() < 1
    roughened(gates)
    costs = [unit_cost(group, "params", 12) for group in find_groups(tiny("qwen2"))]
    spent = FIXED
    for cost, mean, log_variance in zip(costs, gates.means, gates.log_variances, strict=True):
        spent += cost * torch.sigmoid(mean.square().log() - log_variance).sum().item()
    assert gates.expected_share().item() == pytest.approx(spent / gates._size.limit(1.0), rel=1e-4)


def test_the_target_falls_linearly():
    gates = gates_of(tiny("bert"), keep=0.4, warmup=0.2)
    for progress, target in ((0.0, 1.0), (0.05, 0.85), (0.2, 0.4), (1.0, 0.4)):
        gates.step(progress)
        assert gates._target == pytest.approx(target)


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "opt", "llama", "qwen2", "qwen3"])
def test_the_model_with_gates_is_the_sliced_model(family: str):
    dense = tiny(family).double()
    for keep in (0.8, 0.5, 0.38):
        model = copy.deepcopy(dense)
        gates = roughened(gates_of(model, keep, round_to=4))
        gates.eval()
        with masks_in(model, gates):
            gated = outputs(model, batches()[0])
        assert torch.equal(outputs(model, batches()[0]), outputs(dense, batches()[0]))
        gates.bake()
        slice_model(model, gates.plan)
        torch.testing.assert_close(outputs(model, batches()[0]), gated, rtol=1e-5, atol=1e-5)
        before = {group.name: group.units for group in find_groups(dense)}
        assert any(group.units < before[group.name] for group in find_groups(model))
        for group in find_groups(dense):  # those with the least noise, group by group
            noise = log_noise(gates.means[gates._at[group.name]], gates.log_variances[gates._at[group.name]])
            kept = gates.plan[group.name]
            assert noise[kept].max() <= min([noise[i].item() for i in range(group.units) if i not in kept.tolist()] + [1e9])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gate_of_grouped_heads_reaches_the_query_heads_that_share_their_keys(family: str):
    model = tiny(family, num_attention_heads=8, num_key_value_heads=4, hidden_size=32)
    gates, seen = gates_of(model), []
    group = next(group for group in find_groups(model) if group.structure == "heads")
    for mean, log_variance in zip(gates.means, gates.log_variances, strict=True):
        mean.data.fill_(1.0)
        log_variance.data.fill_(-60.0)
    gates.means[0].data.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    gates.train()
    with masks_in(model, gates):
        handle = group.consumer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        outputs(model, batches()[0])
        handle.remove()
    gates.train()
    plain: list[Tensor] = []
    handle = group.consumer.register_forward_pre_hook(lambda m, args: plain.append(args[0]))
    outputs(model, batches()[0])
    handle.remove()
    head_dim = weight(group.consumer).shape[1] // 8
    factors = (seen[0] / plain[0]).view(-1, 8, head_dim)
    for head in range(8):  # head h reads key/value head h // 2
        assert torch.allclose(factors[:, head], torch.tensor(1.0 + head // 2), rtol=1e-4)


def test_noise_is_drawn_anew_for_every_token_and_its_size_is_the_gate_s():
    model = tiny("bert")
    gates = gates_of(model)
    gates.log_variances[0].data.copy_(torch.tensor([0.0, -2.0, -4.0, -60.0]))
    gates.means[0].data.fill_(1.5)
    gates.train()
    group = find_groups(model)[0]
    found = gates._gate(group, torch.ones(40, 50, 32))
    factors = found.view(-1, 4, 8).transpose(0, 1).flatten(1)
    assert factors.mean(1).tolist() == pytest.approx([1.5] * 4, abs=0.02)
    assert factors.std(1).tolist() == pytest.approx([1.0, 0.3679, 0.1353, 0.0], rel=0.03, abs=1e-6)
    assert len(found.unique()) > 0.7 * found.numel() * 3 / 4


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("masks_only", [False, True])
def test_the_size_is_the_one_asked_for(budget: str, masks_only: bool):
    sizes = {"hidden_size": 96, "num_attention_heads": 12, "intermediate_size": 384, "num_hidden_layers": 4}
    for keep in (0.7, 0.4):
        model = tiny("bert", **sizes)
        pruner = VIBPruner.from_pretrained(model, VIBConfig(keep, budget, 4, distill=1.0, masks_only=masks_only))
        pruner.prune(many())
        assert keep - 0.01 < pruner.report.reached <= keep


def test_masks_only_leaves_the_weights_as_they_are_but_for_the_folded_means():
    model = tiny("bert", "SequenceClassification")
    dense = copy.deepcopy(model)
    pruner = VIBPruner.from_pretrained(model, VIBConfig.faster(0.6))
    rows = [{"input_ids": list(range(3, 12)), "label": i % 3} for i in range(40)]
    pruner.prune(rows, training_args={"max_steps": 12})
    before = dict(dense.named_parameters())
    same = [name for name, p in model.named_parameters() if p.shape == before[name].shape and torch.equal(p, before[name])]
    untouched = [name for name in before if "embeddings" in name or "classifier" in name or "LayerNorm" in name]
    assert set(untouched) <= set(same)
    for old, new in zip(find_groups(dense), find_groups(model), strict=True):
        kept = pruner._masks.plan[old.name]
        mean = pruner._masks.means[pruner._masks._at[old.name]][kept].repeat_interleave(old.width)
        columns = weight(old.consumer).view(-1, old.units, old.width)[:, kept].flatten(1)
        torch.testing.assert_close(weight(new.consumer), columns * mean)
        assert (mean - 1).abs().max() > 0.05  # the means have learned


def test_a_share_of_the_data():
    model = tiny("bert", "SequenceClassification")
    pruner = VIBPruner.from_pretrained(model, VIBConfig(data_share=0.25))
    read = calibration.read(pruner, [{"input_ids": list(range(3, 12)), "label": i % 3} for i in range(40)], None, None)
    assert len(pruner.rows(read)) == 10
    assert VIBConfig.fast(0.3).data_share == 0.03


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_share": 0.0}, "data_share=0.0 asked"),
        ({"warmup": 2.0}, "warmup=2.0 asked"),
        ({"kl_weight": -0.1}, "kl_weight=-0.1 asked"),
        ({"mask_learning_rate": 0.0}, "mask_learning_rate=0.0 asked"),
        ({"budget": "latency"}, "count params, macs or memory"),
    ],
)
def test_impossible_configurations_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        VIBConfig(**fields)
