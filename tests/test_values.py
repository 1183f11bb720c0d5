"""Single value dimensions of heads: what is left computes what the masked model does, and the best is left."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from test_slicing import divide_at_random
from tiny import ROWS, batches, data_of, many, one_in_three, outputs, plenty, tiny
from torch import Tensor, nn

from optimum_stat import (
    FisherConfig,
    MovementConfig,
    STATConfig,
    STATPruner,
    SurgeonConfig,
    VIBConfig,
)
from optimum_stat.budget import Cost, model_cost
from optimum_stat.families import find_groups, values_of, weight
from optimum_stat.few_values import FewValues, OfFewValues, narrow_values
from optimum_stat.linalg import unit_columns
from optimum_stat.methods.stat_values import Turned, ValuesRanking, heads_of, rank_values
from optimum_stat.slicing import slice_group, slice_model

ALL = ("heads", "neurons", "values")
WHOLE = {"bloom", "deberta", "falcon", "gpt2", "gpt_neox", "modernbert", "phi3"}
"""Families whose heads cannot be divided: one linear makes queries, keys and values."""
DIVIDED = [family for family in ROWS if family.split(",")[0] not in WHOLE and "one key head" not in family]
SOME = ("llama", "qwen2", "mistral", "gemma2", "bert", "whisper")


@torch.no_grad()
def masked(model: Any, kept: list[tuple[int, ...]]) -> Any:
    """The dense model whose heads hand on zeros where dimensions are gone."""
    heads = [group for group in find_groups(model) if group.structure == "heads"]
    for group, own in zip(heads, kept, strict=True):
        values = group.producers[-1].linear
        width = len(weight(values)) // len(own)
        for head, count in enumerate(own):
            gone = slice(head * width + count, (head + 1) * width)
            weight(values)[gone] = 0
            if values.bias is not None:
                values.bias[gone] = 0
    return model


@pytest.mark.parametrize("family", DIVIDED)
def test_divided_heads_compute_what_the_masked_ones_do(family: str):
    model = tiny(family)
    dense = copy.deepcopy(model)
    kept = divide_at_random(model, 3)
    wanted = masked(copy.deepcopy(dense), kept)
    assert kept
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        for each in (model, wanted):
            each.set_attn_implementation(attention)
        for batch in data_of(family):
            torch.testing.assert_close(outputs(model, batch), outputs(wanted, batch), atol=2e-4, rtol=1e-4)
    assert (outputs(wanted, data_of(family)[0]) - outputs(dense, data_of(family)[0])).abs().max() > 0.01


@pytest.mark.parametrize("family", [family for family in ROWS if family not in DIVIDED])
def test_heads_that_cannot_be_divided_are_refused(family: str):
    with pytest.raises(
        ValueError, match=r"'values' asked of .*: 0\.heads (makes queries, keys and values in one|has one key/value)"
    ):
        STATPruner.from_pretrained(tiny(family), STATConfig(structures=ALL))


def some_inputs(columns: int, rows: int = 400, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mixed


def test_of_one_head_the_order_is_the_best_of_all_bases():
    """Against the singular values of what is to be approximated (Eckart and Young)."""
    z, generator = some_inputs(12), torch.Generator().manual_seed(1)
    w = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    metric = torch.rand(20, generator=generator, dtype=torch.float64)
    turned = Turned.of(z.T @ z, w, metric, 1, 1, 0.0)
    order, error = turned.order(metric, 1, 0.0)
    assert order.tolist() == list(range(12))
    spectrum = torch.linalg.svdvals(z @ w.T * metric.sqrt()).square()
    rest = torch.cat([spectrum.flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)])[: len(error)]
    torch.testing.assert_close(error, rest, rtol=1e-6, atol=1e-6 * float(rest[0]))
    both = turned.bases[0] @ z.T @ z @ turned.bases[0].T
    torch.testing.assert_close(both, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-8)


def group_of(heads: int, queries: int, width: int, seed: int = 0) -> tuple[Any, Any, Tensor, Tensor]:
    """(heads, values) of a random block; what the consumer reads; what its outputs are worth."""
    sizes = {"num_attention_heads": heads * queries, "num_key_value_heads": heads, "head_dim": width, "hidden_size": 48}
    groups = find_groups(tiny("llama", seed=seed, **sizes), ALL)
    values = values_of(groups[0], groups)
    metric = torch.rand(48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return groups[0], values, some_inputs(heads * queries * width, seed=seed), metric


def residual(z: Tensor, y: Tensor, metric: Tensor) -> Tensor:
    best = z @ torch.linalg.lstsq(z, y).solution
    return ((y - best).square() * metric).sum()


@torch.no_grad()
@pytest.mark.parametrize(("heads", "queries", "width"), [(2, 3, 4), (3, 1, 6)])
def test_every_error_is_that_of_least_squares(heads: int, queries: int, width: int):
    """With all heads and with some, for every number of values: on the inputs themselves."""
    group, values, z, metric = group_of(heads, queries, width)
    w, gram = weight(group.consumer).double(), z.T @ z
    order, error, within = rank_values(values, gram, metric, 0.0, with_heads=True)
    assert within is not None
    torch.testing.assert_close(within[heads], error)
    assert (error.diff() <= 0).all()
    y = z @ w.T
    turned = Turned.of(gram, w, metric, heads, queries, 0.0)
    parts = z.view(-1, heads, queries, width)
    read = torch.einsum("gjd,tgqd->tgjq", turned.bases, parts).flatten(1)
    for count in (1, width, heads * width - 1):
        own = read[:, unit_columns(order[:count], queries)]
        torch.testing.assert_close(error[count], residual(own, y, metric), rtol=1e-6, atol=1e-8)
    every = [unit_columns(torch.tensor([head]), queries * width) for head in range(heads)]
    alone, at = min((residual(z[:, columns], y, metric), at) for at, columns in enumerate(every))
    for count in (1, width - 1, width):  # of the best single head: another basis, another order, errors on top of its own
        assert within[1, count] >= 0
    torch.testing.assert_close(within[1, width], torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-8)
    lost = residual_after_division(z[:, every[at]], y, metric, queries, width - 1)
    if heads == 2:  # then backward elimination of heads finds the best single one
        torch.testing.assert_close(alone + within[1, width - 1], lost, rtol=1e-6, atol=1e-8)


def residual_after_division(z: Tensor, y: Tensor, metric: Tensor, queries: int, count: int) -> Tensor:
    """Of one head, after its own elimination."""
    w = torch.linalg.lstsq(z, y).solution.T
    turned = Turned.of(z.T @ z, w, metric, 1, queries, 0.0)
    order, _ = turned.order(metric, queries, 0.0)
    parts = z.view(len(z), queries, -1)
    read = torch.einsum("jd,tqd->tjq", turned.bases[0], parts).flatten(1)
    return residual(read[:, unit_columns(order[:count], queries)], y, metric)


@torch.no_grad()
def poor(family: str, rank: int = 3) -> Any:
    """The values of each head lie in `rank` dimensions, in any direction."""
    model, generator = tiny(family), torch.Generator().manual_seed(5)
    for group in find_groups(model, ("values",)):
        values, width = group.producers[0].linear, group.head_width
        basis = torch.linalg.qr(torch.randn(group.units // width, width, rank, generator=generator)).Q
        for parameter in values.parameters():
            parts = parameter.view(len(basis), width, -1)
            parameter.copy_((basis @ basis.mT @ parts).view(parameter.shape))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "bert", "whisper"])
def test_values_that_lie_in_few_dimensions_lose_none(family: str):
    """Whatever these are: the rotations find them, biases come along, and nothing changes but the sizes."""
    model = poor(family)
    wanted, dense = [outputs(model, batch) for batch in data_of(family)], sum(p.numel() for p in model.parameters())
    pruner = STATPruner.from_pretrained(model, STATConfig(keep=0.9, structures=("values",), round_to=1, ridge=1e-6))
    pruner.allocate = lambda groups, *_: {group.name: 3 * (group.units // group.head_width) for group in groups}
    pruner.prune(plenty(family))
    for group in find_groups(model):
        if group.structure == "heads":
            assert group.consumer.kept == (3,) * group.units
            assert type(group.producers[-1].linear) is FewValues
    for batch, expected in zip(data_of(family), wanted, strict=True):
        torch.testing.assert_close(outputs(model, batch), expected, atol=2e-3, rtol=2e-3)
    assert sum(p.numel() for p in model.parameters()) < dense


def pruner_for(family: str, **asked: Any) -> STATPruner:
    """For a model whose values can spare some dimensions."""
    return STATPruner.from_pretrained(poor(family), STATConfig(**{"keep": 0.5, "structures": ALL, "round_to": 4, **asked}))


ASKED = [{"budget": "params"}, {"budget": "macs"}, {"metric": "stream"}, {"structures": ("values", "neurons"), "keep": 0.6}]


@pytest.mark.parametrize(("family", "asked"), one_in_three(SOME, ASKED))
def test_within_the_budget_and_the_model_loads_again(family: str, asked: dict[str, Any], tmp_path: Any):
    pruner = pruner_for(family, **asked)
    config, dense = pruner.config, copy.deepcopy(pruner.model)
    (forecast,) = pruner.plan(plenty(family), keep=[config.keep])
    model = pruner.prune(plenty(family))
    report = pruner.report
    costs = [model_cost(each, config.budget, report.seq_len) for each in (model, dense)]
    assert 0.9 * config.keep < costs[0] / costs[1] <= config.keep
    assert forecast.cost == report.pruned == Cost.of(model, report.seq_len), "what is planned is what is left"
    assert forecast.error == pytest.approx(report.error)
    kept = {group.name: group.kept for group in report.groups}
    heads = [group for group in find_groups(model) if group.structure == "heads"]
    for group in heads:
        own = (
            group.consumer.kept if isinstance(group.consumer, OfFewValues) else (group.width // group.query_heads,) * group.units
        )
        assert sum(own) == kept[group.name.replace("cross", "cross_values").replace("heads", "values")]
        assert len(own) == kept.get(group.name, group.units)
    assert any(isinstance(group.consumer, OfFewValues) for group in heads)
    pruner.save_pretrained(tmp_path / "small")
    loaded = type(model).from_pretrained(tmp_path / "small")
    assert all(torch.equal(outputs(loaded, batch), outputs(model, batch)) for batch in data_of(family))
    card = (tmp_path / "small" / "README.md").read_text()
    assert "Each head has its own number of them" in card
    assert "| values kept |" in card


def test_memory_counts_weights_alone():
    """The cache keeps the zeros."""
    pruner = pruner_for("llama", budget="memory", keep=0.7, structures=("values", "neurons"))
    pruner.prune(many())
    memory, (dense,) = pruner.report.memory, [pruner.currency.residents.cache_bytes(tiny("llama"))]
    assert memory is not None
    assert memory.cache == dense
    assert memory.reached <= 0.7 * memory.dense


def test_heads_and_values_are_one_choice():
    """Against every pair of sizes in two blocks, with the neurons whole: nothing that fits is better."""
    pruner = STATPruner.from_pretrained(tiny("llama"), STATConfig(structures=("heads", "values"), round_to=4))
    groups = find_groups(pruner.model, pruner.config.structures)
    data = pruner._start(0.8, many(), None, None)
    with pruner.at_work():
        ranking = pruner.survey(groups, data, pruner.timer())
    assert isinstance(ranking, ValuesRanking)
    every = [(k, r) for k in (1, 2) for r in range(4, 8 * k + 1, 4)]
    currency = pruner.currency
    for keep in (0.76, 0.84, 0.92):
        kept = pruner.allocate(groups, ranking, keep, currency)
        shapes = [{"0.heads": a, "0.values": b, "1.heads": c, "1.values": d} for (a, b), (c, d) in product(every, every)]
        cost = {id(shape): currency.cost_of(shape).block_params for shape in [*shapes, kept]}
        limit = keep * currency.dense.block_params
        error = {id(shape): ranking.given(shape).total(shape) for shape in [*shapes, kept]}
        best = min(error[id(shape)] for shape in shapes if cost[id(shape)] <= limit)
        step = max(error[id(shape)] - best for shape in shapes if cost[id(shape)] <= limit)
        assert cost[id(kept)] <= limit
        assert error[id(kept)] <= best + 0.25 * step  # the hull's segments are few in so small a model


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generation_with_every_cache_equals_generation_without(family: str):
    model = pruner_for(family).prune(many()).eval()
    prompt = torch.arange(3, 14)[None]
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    plain = model.generate(prompt, use_cache=False, **asked)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(prompt, **asked, **options), plain)


def test_compiled_and_exported():
    torch._dynamo.reset()
    model, batch = pruner_for("llama").prune(many()).eval(), {"input_ids": batches()[0]["input_ids"]}
    model.config.use_cache = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = model(**batch).logits
        exported = torch.export.export(model, (), batch, strict=False).module()
        for other in (compiled, exported):
            torch.testing.assert_close(other(**batch).logits, wanted, atol=1e-4, rtol=1e-4)
        half = copy.deepcopy(model).bfloat16()(**batch).logits
    assert torch.nn.functional.cosine_similarity(half.float(), wanted, dim=-1).min() > 0.99


# peft asks transformers by the old name; ours does not
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_train_on_top_and_load_again(tmp_path: Any):
    from peft import LoraConfig, PeftModel, get_peft_model

    pruner = pruner_for("llama")
    pruner.prune(many())
    pruner.save_pretrained(tmp_path / "base")
    load = type(pruner.model).from_pretrained
    adapted = get_peft_model(load(tmp_path / "base"), LoraConfig(r=2, target_modules=["v_proj", "o_proj"]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves B alone
        adapted(**batches()[0]).logits.square().mean().backward()
        optimizer.step()
    trained = outputs(adapted, batches()[0])
    assert not torch.equal(trained, outputs(load(tmp_path / "base"), batches()[0]))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(outputs(loaded, batches()[0]), trained)


def test_an_error_half_way_makes_heads_whole_again(monkeypatch: pytest.MonkeyPatch):
    check_an_error_half_way(pruner_for("llama"), OfFewValues, monkeypatch)


def check_an_error_half_way(pruner: STATPruner, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes when the model has modules of this kind leaves it as it was."""
    model = pruner.model
    before, kinds = {name: value.clone() for name, value in model.state_dict().items()}, [type(each) for each in model.modules()]

    def fail(*_: Any) -> None:
        assert any(isinstance(module, kind) for module in model.modules())
        raise OSError("no more")

    monkeypatch.setattr(type(pruner), "finish", fail)
    with pytest.raises(OSError, match="no more"):
        pruner.prune(many())
    assert [type(each) for each in model.modules()] == kinds
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_with_narrower_streams_and_fewer_layers(tmp_path: Any):
    model = tiny("llama", num_hidden_layers=3)
    pruner = STATPruner.from_pretrained(model, STATConfig(keep=0.4, structures=(*ALL, "hidden", "layers"), round_to=4))
    pruner.prune(many())
    assert pruner.report.reached <= 0.4
    pruner.save_pretrained(tmp_path / "small")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "small"), batches()[0]), outputs(model, batches()[0]))


def test_a_family_of_sizes_from_one_calibration():
    pruner = pruner_for("llama")
    for each, share in zip(pruner.sweep(many(), [0.7, 0.5]), (0.7, 0.5), strict=True):
        alone = pruner_for("llama", keep=share).prune(many())
        assert torch.equal(outputs(each.model, batches()[0]), outputs(alone, batches()[0]))


def test_distilled_afterwards():
    plain, taught = (pruner_for("llama", distill_epochs=epochs).prune(many()) for epochs in (0, 1))
    assert not torch.equal(outputs(plain, batches()[0]), outputs(taught, batches()[0]))
    assert plain.config.stat_pruning == taught.config.stat_pruning


def test_divided_heads_cannot_be_cut_again():
    pruner = pruner_for("llama")
    model = pruner.prune(many())
    for again in (lambda: pruner.prune(many()), lambda: STATPruner.from_pretrained(model, STATConfig())):
        with pytest.raises(ValueError, match="have lost single dimensions, and what is left of them cannot be cut again"):
            again()
    group = next(group for group in find_groups(model) if isinstance(group.consumer, OfFewValues) and group.units > 1)
    with pytest.raises(ValueError, match=r"heads has fewer dimensions in some heads"):
        slice_group(group, torch.tensor([0]))
    slice_model(model, {group.name: torch.arange(group.units)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: FisherConfig(structures=ALL),
            "'values' asked of FisherConfig, whose heads go or stay whole; STAT can divide them",
        ),
        (lambda: SurgeonConfig(structures=ALL), "'values' asked of SurgeonConfig"),
        (lambda: MovementConfig(structures=ALL), "'values' asked of MovementConfig"),
        (lambda: VIBConfig(structures=ALL), "'values' asked of VIBConfig"),
        (lambda: STATConfig(structures=ALL, budget="latency"), "'values' asked under a latency budget"),
        (lambda: STATConfig(structures=("value",)), "must name some of 'heads', 'neurons', 'pairs', 'values'"),
    ],
)
def test_what_cannot_be_done_is_refused(config: Any, message: str):
    with pytest.raises(ValueError, match=message):
        config()


def test_only_linears_can_be_divided():
    with pytest.raises(TypeError, match="Fewer values asked of a Identity and a Linear"):
        narrow_values(nn.Identity(), nn.Linear(2, 2), [1])


def test_names():
    assert [heads_of(name) for name in ("3.values", "12.cross_values")] == ["3.heads", "12.cross"]
