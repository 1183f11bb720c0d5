"""Probes read and replace what they say, leave nothing behind, and the drawn Fisher information is the exact one on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import HIDDEN, SIZES, batches, takes_positions, tiny
from torch import Tensor, nn

from optimum_stat.data import Batches
from optimum_stat.families import find_groups, weight
from optimum_stat.gradients import differentiable_from, first_blocks, output_worth, outputs_of
from optimum_stat.probes import FISHER_TOKENS, device_of, gradient_stride, on_consumer_input, on_output_gradient, quiet, real_rows


def _data(model: nn.Module, items: list[dict[str, Tensor]]) -> Batches:
    if not takes_positions(model):
        items = [{name: value for name, value in item.items() if name != "position_ids"} for item in items]
    tokens = sum(int(item["attention_mask"].sum()) for item in items)
    return Batches(tuple(items), tokens, sum(len(item["input_ids"]) for item in items), 9, "", "test")


def _assert_clean(model: nn.Module) -> None:
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
        assert not module._backward_hooks, name
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name


@torch.no_grad()
@pytest.mark.parametrize("family", SIZES)
def test_a_replaced_input_is_what_the_consumer_reads(family: str) -> None:
    model, batch = tiny(family), dict(_data(tiny(family), batches()).items[0])
    groups = find_groups(model)
    gates = {g.name: (torch.arange(g.units * g.width) % 3 > 0).float() for g in groups}
    seen: dict[str, Tensor] = {}
    with quiet(model), on_consumer_input(groups, lambda group, z: seen.update({group.name: z})):
        dense = model(**batch).logits
    with quiet(model), on_consumer_input(groups, lambda group, z: z * gates[group.name]):
        gated = model(**batch).logits
    _assert_clean(model)
    assert all(seen[group.name].shape[-1] == group.units * group.width for group in groups)
    for group in groups:  # a gate on the input is a gate on the columns
        weight(group.consumer).mul_(gates[group.name])
    with quiet(model):
        torch.testing.assert_close(model(**batch).logits, gated, rtol=1e-4, atol=1e-4)
    assert (gated - dense).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "qwen3"])
def test_output_gradients_are_those_of_the_consumers_output(family: str) -> None:
    model, batch = tiny(family), _data(tiny(family), batches()).items[0]
    groups, seen = find_groups(model), {}
    with quiet(model), differentiable_from(first_blocks(model)):
        with on_output_gradient({group.name: group.consumer for group in groups}, lambda name, y, g: seen.update({name: g})):
            model(**batch).logits.square().mean().backward()
        _assert_clean_but_first_block(model)
        for group in groups:
            nudge = torch.zeros_like(seen[group.name]).requires_grad_()
            handle = group.consumer.register_forward_hook(lambda m, a, output, nudge=nudge: output + nudge)
            model(**batch).logits.square().mean().backward()
            handle.remove()
            torch.testing.assert_close(seen[group.name], nudge.grad, rtol=1e-4, atol=1e-6)
    _assert_clean(model)


def _assert_clean_but_first_block(model: Any) -> None:
    for name, module in model.named_modules():
        assert module in first_blocks(model) or not (module._forward_hooks or module._forward_pre_hooks), name


def test_probes_are_removed_after_an_exception() -> None:
    model, batch = tiny("bert"), batches()[0]

    def fail(where: Any, *values: Tensor) -> None:
        raise KeyError(getattr(where, "name", where))

    groups = find_groups(model)
    consumers = {group.name: group.consumer for group in groups}
    with quiet(model):
        for probe in (on_consumer_input(groups, fail), on_output_gradient(consumers, fail)):
            embeddings = differentiable_from(first_blocks(model))
            with pytest.raises(KeyError, match=r"heads|neurons"), embeddings, probe:
                model(**batch).logits.sum().backward()
            _assert_clean(model)
        broken = _data(model, [{**batch, "input_ids": batch["input_ids"] + 10_000}])
        with pytest.raises(IndexError):
            output_worth(model, find_groups(model), broken, seed=0)
        _assert_clean(model)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_quiet_puts_everything_back(cache: bool, fails: bool) -> None:
    model = tiny("llama", use_cache=cache).train()
    model.model.layers[0].mlp.eval()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError) if fails else quiet(model), quiet(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert model.config.use_cache is False
            assert torch.get_float32_matmul_precision() == "highest"
            down = model.model.layers[0].mlp.down_proj
            down.weight = nn.Parameter(down.weight[:, :3].clone(), requires_grad=False)  # as slicing does
            if fails:
                raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert model.config.use_cache is cache


def test_real_rows() -> None:
    rows, mask = torch.arange(24.0).view(2, 4, 3), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    expected = torch.stack([rows[b, t] for b, t in [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3)]])
    assert torch.equal(real_rows(rows, mask), expected)
    assert torch.equal(real_rows(rows.view(8, 3), mask), expected)
    assert torch.equal(real_rows(rows, torch.ones(2, 4, dtype=torch.long)), rows.view(8, 3))


def test_device_of_a_partly_offloaded_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert device_of(model) == torch.device("cpu")


# The Fisher information, exactly: E over the model's own predictions of the squared gradient of their log-likelihood.

Terms = Callable[[Any, Tensor], list[tuple[Tensor, Tensor]]]


def _class_terms(output: Any, real: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(probability, log-likelihood) of every outcome of every independent prediction."""
    logs = output.logits.reshape(-1, output.logits.shape[-1]).log_softmax(-1)
    logs = logs[real] if len(logs) > 1 else logs
    return [(log.detach().exp(), log) for log in logs.flatten()]


def _span_terms(output: Any, real: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Start and end are each a softmax over the real tokens."""
    logs = [value[0][real].log_softmax(-1) for value in (output.start_logits, output.end_logits)]
    return [(log.detach().exp(), log) for log in torch.cat(logs)]


def _gaussian_terms(output: Any, real: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Unit variance: the Fisher information of a mean is one, so each squared derivative counts once."""
    value = output.logits if "logits" in output else output.last_hidden_state[0][real]
    return [(torch.ones(()), mean) for mean in value.flatten()]


def _exact_fisher(model: nn.Module, batch: dict[str, Tensor], terms: Terms) -> dict[str, Tensor]:
    """One example, outcome by outcome, with autograd: mean over real tokens of sum_o p_o (d log p_o / d y)^2."""
    groups, outputs, real = find_groups(model), [], batch["attention_mask"][0].bool()
    handles = [g.consumer.register_forward_hook(lambda m, a, output: outputs.append(output)) for g in groups]
    with torch.enable_grad(), differentiable_from(first_blocks(model)):
        found = terms(model(**batch), real)
        totals = [torch.zeros(HIDDEN, dtype=torch.float64) for _ in groups]
        for probability, log in found:
            for total, g in zip(totals, torch.autograd.grad(log, outputs, retain_graph=True), strict=True):
                total += probability * g.reshape(-1, HIDDEN)[real].double().square().sum(0)
    for handle in handles:
        handle.remove()
    return {group.name: total / int(real.sum()) for group, total in zip(groups, totals, strict=True)}


@pytest.mark.parametrize(
    ("family", "head", "changes", "terms"),
    [
        ("bert", "SequenceClassification", {"num_labels": 2}, _class_terms),
        ("distilbert", "SequenceClassification", {"num_labels": 3}, _class_terms),
        ("roberta", "SequenceClassification", {"num_labels": 1}, _gaussian_terms),
        ("electra", "TokenClassification", {"num_labels": 3}, _class_terms),
        ("bert", "QuestionAnswering", {}, _span_terms),
        ("gpt2", "CausalLM", {"vocab_size": 11}, _class_terms),
        ("llama", "CausalLM", {"vocab_size": 11}, _class_terms),
        ("opt", "CausalLM", {"vocab_size": 11}, _class_terms),
        ("bert", "", {}, _gaussian_terms),
        ("qwen2", "", {}, _gaussian_terms),
    ],
)
def test_the_drawn_fisher_information_is_unbiased(family: str, head: str, changes: dict[str, int], terms: Terms) -> None:
    model = tiny(family, head, **changes)
    one = _data(model, batches((5,), extra=2)).items[0]  # padded: that must not count
    one = {**one, "input_ids": torch.where(one["attention_mask"] > 0, one["input_ids"] % 8 + 3, one["input_ids"])}
    copies = _data(model, [{name: value.repeat(50, 1) for name, value in one.items()} for _ in range(3)])
    with quiet(model):
        exact = _exact_fisher(model, one, terms)
        consumers = {group.name: group.consumer for group in find_groups(model)}
        draws = [outputs_of(model, consumers, copies, seed) for seed in range(12)]
    _assert_clean(model)
    for name, expected in exact.items():
        each = torch.stack([draw[name].fisher for draw in draws])
        assert each.dtype == torch.float64
        z = (each.mean(0) - expected) / (each.std(0) / len(draws) ** 0.5)
        off = float(each.mean() / expected.mean()) - 1
        assert abs(off) < 0.15, f"{name}: {off:+.0%}"
        assert z.abs().max() < 6, f"{name}: {z}"


def test_the_fisher_information_is_drawn_by_seed_and_not_by_batch() -> None:
    model = tiny("llama")
    groups, data = find_groups(model), _data(model, batches())
    with quiet(model):
        first, again, other = (output_worth(model, groups, data, seed) for seed in (0, 0, 1))
        for change in ({"batch_size": 1}, {"batch_size": 6}, {"extra": 3}, {"left": True}):
            changed = output_worth(model, groups, _data(model, batches(**change)), 0)
            for name, value in first.items():
                torch.testing.assert_close(changed[name], value, rtol=1e-3, atol=1e-8, msg=f"{name} {change}")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.allclose(first[name], other[name], rtol=1e-2) for name in first)


@pytest.mark.parametrize(
    ("examples", "length", "batch_size"), [(64, 64, 8), (70, 32, 8), (400, 32, 8), (200, 60, 1), (90, 60, 90)]
)
def test_the_fisher_information_reads_examples_from_all_over_the_data(examples: int, length: int, batch_size: int) -> None:
    model, seen = tiny("bert", "SequenceClassification"), []
    items = batches((length,) * examples, batch_size)
    ids = torch.cat([item["input_ids"] for item in items])
    with quiet(model), on_consumer_input(find_groups(model)[:1], lambda group, z: seen.append(z.shape[:2].numel())):
        handle = model.get_input_embeddings().register_forward_pre_hook(lambda m, args: rows.extend(args[0].tolist()))
        rows: list[list[int]] = []
        output_worth(model, find_groups(model), _data(model, items), 0)
        handle.remove()
    places = [int((ids == torch.tensor(row)).all(1).nonzero()[0]) for row in rows]
    assert 1024 <= sum(seen) <= 2 * FISHER_TOKENS
    assert max(seen) <= max(1024, length)
    assert len(set(places)) == len(places)
    assert {place * 4 // examples for place in places} == {0, 1, 2, 3}, "no quarter of the data is left out"


@pytest.mark.parametrize(("tokens", "stride"), [(1, 1), (1023, 1), (1024, 2), (6143, 2), (6144, 3), (65536, 32)])
def test_the_fewer_tokens_the_more_of_them_get_gradients(tokens: int, stride: int) -> None:
    assert gradient_stride(tokens) == stride


@pytest.mark.parametrize("family", SIZES)
def test_every_family_has_a_fisher_information(family: str) -> None:
    model = tiny(family)
    with quiet(model):
        found = output_worth(model, find_groups(model), _data(model, batches()), seed=0)
    assert all(torch.isfinite(value).all() and (value > 0).all() for value in found.values())
    assert set(found) == {group.name for group in find_groups(model)}
    _assert_clean(model)
