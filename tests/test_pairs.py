"""Rotary pairs of queries and keys: what is left computes what the masked model does, and what is least missed goes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_values import check_an_error_half_way, poor
from tiny import ROWS, batches, data_of, many, one_in_three, outputs, plenty, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from optimum_stat import FisherConfig, STATConfig, STATPruner, SurgeonConfig
from optimum_stat.budget import Cost, model_cost, unit_cost
from optimum_stat.data import make_batches
from optimum_stat.families import Group, find_groups, pairs_of, weight
from optimum_stat.few_pairs import FewPairs, dimensions_of_pairs, narrow_pairs
from optimum_stat.methods.stat_pairs import by_pair, lose_pairs, rank_pairs, worth_of_pairs
from optimum_stat.probes import quiet
from optimum_stat.slicing import slice_group

ALL = ("neurons", "pairs", "values")


ROTATED = ("gemma", "gemma2", "glm", "granite", "llama", "mistral", "nemotron", "phi", "qwen2", "smollm3", "starcoder2")
ROTATED_MIXTURES = ("gpt_oss", "mixtral", "qwen2_moe")
OFTEN = ("llama", "glm", "phi", "gpt_oss")  # halves, neighbours, in part; other biases
EACH = pytest.mark.parametrize(
    "family", [pytest.param(each, marks=[] if each in OFTEN else pytest.mark.full) for each in (*ROTATED, *ROTATED_MIXTURES)]
)
"""Families whose queries and keys can lose pairs."""


def test_norms_are_looked_for_in_the_model_not_in_its_name():
    assert len(find_groups(tiny("cohere", use_qk_norm=False), ("pairs",))) == 2


def makers(group: Group) -> tuple[Any, Any]:
    return group.producers[0].linear, group.producers[1].linear


def test_families_that_cannot_lose_pairs_are_refused():
    for family in (row for row in ROWS if row not in (*ROTATED, *ROTATED_MIXTURES)):
        with pytest.raises(ValueError, match=r"'pairs' asked of .*: 0\.heads (makes queries|has one key/value|has no rotary)"):
            STATPruner.from_pretrained(tiny(family), STATConfig(structures=("neurons", "pairs")))


@torch.no_grad()
@EACH
def test_what_a_pair_of_queries_meets_is_that_pair_of_keys(family: str):
    """Queries with a pair alone and keys without it: tokens attend as if queries were zero, so no other pairing is right."""

    def alone(pair: Tensor, of_keys: Tensor) -> Tensor:
        model = tiny(family)
        for group in find_groups(model, ("pairs",)):
            for linear, stays in zip(makers(group), (pair, of_keys), strict=True):
                rows = (
                    torch.zeros(2 * group.head_width)
                    .index_fill_(0, stays, 1)
                    .repeat(len(weight(linear)) // 2 // group.head_width)
                )
                for parameter in linear.parameters():
                    parameter.mul_(rows.view(-1, *[1] * (parameter.dim() - 1)))
        return outputs(model, batches((9, 9))[0])

    group = find_groups(tiny(family), ("pairs",))[0]
    assert group.rotary is not None
    every = torch.arange(2 * group.head_width)
    assert group.rotary.flatten().sort().values.tolist() == every.tolist()
    silent = alone(every[:0], every)
    for pair in group.rotary[[0, -1]]:
        others = every[~torch.isin(every, pair)]
        torch.testing.assert_close(alone(pair, others), silent, atol=1e-6, rtol=1e-5)
    one, other = group.rotary[0]
    assert not torch.allclose(alone(one[None], every[every != one]), silent, atol=1e-5), f"{other} is turned with it"


@torch.no_grad()
def lose_at_random(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Other pairs in every head; what stays."""
    plan, generator = {}, torch.Generator().manual_seed(seed)
    for group in find_groups(model, ("pairs",)):
        plan[group.name] = (torch.rand(group.units, generator=generator) < 0.6).nonzero().flatten()
        lose_pairs(group, plan[group.name])
    return plan


@torch.no_grad()
def masked(model: Any, plan: dict[str, Tensor]) -> Any:
    """The dense model with zeros in the rows of pairs that are gone, found by loops."""
    for group in find_groups(model, ("pairs",)):
        per_head, width = group.head_width, 2 * group.head_width
        for unit in set(range(group.units)) - set(plan[group.name].tolist()):
            head, pair = divmod(unit, per_head)
            assert group.rotary is not None
            for dim in group.rotary[pair].tolist():
                queries, keys = makers(group)
                rows = [(queries, (head * group.query_heads + q) * width + dim) for q in range(group.query_heads)]
                for linear, row in [*rows, (keys, head * width + dim)]:
                    weight(linear)[row] = 0
                    if linear.bias is not None:
                        linear.bias[row] = 0
    return model


@EACH
def test_heads_without_pairs_compute_what_the_masked_ones_do(family: str, tmp_path: Any):
    model = tiny(family)
    dense, before = copy.deepcopy(model), Cost.of(model, 5)
    groups = find_groups(model, ("pairs",))
    each = {group.name: [unit_cost(group, budget, 5) for budget in ("params", "macs")] for group in groups}
    units = {group.name: group.units for group in groups}
    plan = lose_at_random(model)
    wanted = masked(copy.deepcopy(dense), plan)
    after, lost = Cost.of(model, 5), {name: units[name] - len(keep) for name, keep in plan.items()}
    assert before.block_params - after.block_params == sum(each[name][0] * count for name, count in lost.items()) > 0
    assert before.block_macs - after.block_macs == sum(each[name][1] * count for name, count in lost.items()) > 0
    for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        for other in (model, wanted):
            other.set_attn_implementation(attention)
        for batch in data_of(family):
            torch.testing.assert_close(outputs(model, batch), outputs(wanted, batch), atol=2e-4, rtol=1e-4)
    assert (outputs(wanted, data_of(family)[0]) - outputs(dense, data_of(family)[0])).abs().max() > 1e-3


def test_the_order_is_greedy_on_the_quadratic_form():
    """Against the same greedy written with sums over sets."""
    half = torch.randn(30, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, left, gone, errors = half.T @ half, list(range(7)), list[int](), [0.0]
    order, error = rank_pairs(matrix.clone())
    while left:
        cost = {unit: float(matrix[[*gone, unit]][:, [*gone, unit]].sum()) for unit in left}
        gone.append(min(left, key=cost.__getitem__))
        left.remove(gone[-1])
        errors.append(errors[-1] + max(0.0, cost[gone[-1]] - float(matrix[gone[:-1]][:, gone[:-1]].sum())))
    assert order.tolist() == gone[::-1]
    torch.testing.assert_close(error, torch.tensor(errors[::-1], dtype=torch.float64))
    assert (error.diff() <= 0).all()


@pytest.mark.parametrize("family", ["llama", "glm", "qwen2"])
def test_worth_is_the_derivative_by_a_factor(family: str):
    """Against the loss with a factor a little above and below one, on one key/value head's pair at every token: the sum of x."""
    model, batch = tiny(family).double(), batches((9, 9))[0]
    group = find_groups(model, ("pairs",))[0]
    queries, _ = makers(group)
    probe = torch.randn(67, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen: list[Tensor] = []

    def loss(factor: float, unit: int) -> Tensor:
        head, pair = divmod(unit, group.head_width)
        assert group.rotary is not None
        dims = group.rotary[pair]

        def scale(_: Any, __: Any, output: Tensor) -> Tensor:
            parts = output.view(*output.shape[:-1], -1, group.query_heads, 2 * group.head_width).clone()
            parts[..., head, :, dims] *= factor
            result = parts.flatten(-3)
            if result.requires_grad:
                result.retain_grad()
                seen.append(result)
            return result

        handle = queries.register_forward_hook(scale)
        try:
            return (model(**batch).logits * probe).sum()
        finally:
            handle.remove()

    loss(1.0, 0).backward()
    (output,) = seen
    assert output.grad is not None
    x = by_pair(group, (output * output.grad).detach().flatten(0, 1)).sum(0)
    with torch.no_grad():
        for unit in (0, group.units - 1):
            numeric = (loss(1.01, unit) - loss(0.99, unit)) / 0.02  # norms compute in single precision
            torch.testing.assert_close(x[unit], numeric, rtol=2e-3, atol=1e-5)


@torch.no_grad()
def idle(family: str) -> tuple[Any, dict[str, list[int]]]:
    """Keys of some pairs are zero: they say nothing. Which."""
    model, silent = tiny(family), dict[str, list[int]]()
    for number, group in enumerate(find_groups(model, ("pairs",))):
        silent[group.name] = [number, group.head_width + 1]
        assert group.rotary is not None
        for unit in silent[group.name]:
            head, pair = divmod(unit, group.head_width)
            rows = head * 2 * group.head_width + group.rotary[pair]
            for parameter in makers(group)[1].parameters():
                parameter[rows] = 0
    return model, silent


@pytest.mark.parametrize("family", ["llama", "qwen2", "glm", "phi"])
def test_pairs_that_say_nothing_go_first_and_nothing_is_lost(family: str):
    model, silent = idle(family)
    wanted = [outputs(model, batch) for batch in data_of(family)]
    pruner = STATPruner.from_pretrained(model, STATConfig(keep=0.9, structures=("pairs",), round_to=1, ridge=1e-6))
    pruner.allocate = lambda groups, *_: {group.name: group.units - 2 for group in groups}
    pruner.prune(plenty(family))
    for group in find_groups(model):
        if group.structure == "heads":
            keys = group.producers[-2].linear
            assert type(keys) is FewPairs
            lost = [head * len(group.rotary) + pair for head, own in enumerate(keys.gone) for pair in own]
            assert lost == silent[group.name.replace("heads", "pairs")]
    for batch, expected in zip(data_of(family), wanted, strict=True):
        torch.testing.assert_close(outputs(model, batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "asked"),
    one_in_three(
        ("llama", "smollm3", "gemma2", "glm", "qwen2"),
        ({"budget": "params"}, {"budget": "macs"}, {"structures": ("pairs", "neurons"), "keep": 0.7}),
    ),
)
def test_within_the_budget_and_the_model_loads_again(family: str, asked: dict[str, Any], tmp_path: Any):
    model = idle(family)[0]
    config = STATConfig(**{"keep": 0.6, "structures": ALL, "round_to": 4, **asked})
    pruner, dense = STATPruner.from_pretrained(model, config), copy.deepcopy(model)
    (forecast,) = pruner.plan(plenty(family), keep=[config.keep])
    model, report = pruner.prune(plenty(family)), pruner.report
    costs = [model_cost(each, config.budget, report.seq_len) for each in (model, dense)]
    assert 0.9 * config.keep < costs[0] / costs[1] <= config.keep
    assert forecast.cost == report.pruned == Cost.of(model, report.seq_len), "what is planned is what is left"
    kept = {group.name: group.kept for group in report.groups}
    heads = [group for group in find_groups(model) if group.structure == "heads"]
    assert any(type(group.producers[-2].linear) is FewPairs for group in heads)
    for group in heads:
        queries, keys = (producer.linear for producer in group.producers[-3:-1])
        count = kept[group.name.replace("heads", "pairs")]
        assert (len(weight(queries)), len(weight(keys))) == (2 * count * group.query_heads, 2 * count)
    pruner.save_pretrained(tmp_path / "small")
    loaded = type(model).from_pretrained(tmp_path / "small")
    assert all(torch.equal(outputs(loaded, batch), outputs(model, batch)) for batch in data_of(family))
    assert "| pairs kept |" in (tmp_path / "small" / "README.md").read_text()


def small_llama(**asked: Any) -> STATPruner:
    model = poor("llama")
    return STATPruner.from_pretrained(model, STATConfig(**{"keep": 0.6, "structures": ALL, "round_to": 4, **asked}))


def test_remote_code_knows_pairs_beside_the_package(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pruner = small_llama()
    model = pruner.prune(plenty("llama"))
    pruner.save_pretrained(tmp_path / "small")
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert type(remote).__module__.startswith("transformers_modules")
    assert any(type(module) is FewPairs for module in remote.modules())
    assert all(torch.equal(outputs(remote, batch), outputs(model, batch)) for batch in data_of("llama"))


def test_generation_with_every_cache_equals_generation_without():
    model = small_llama().prune(many()).eval()
    prompt = torch.arange(3, 14)[None]
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    plain = model.generate(prompt, use_cache=False, **asked)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(prompt, **asked, **options), plain)


@torch.no_grad()
def test_compiled_exported_and_in_half_precision():
    torch._dynamo.reset()
    model, batch = small_llama().prune(many()).eval(), {"input_ids": batches()[0]["input_ids"]}
    model.config.use_cache = False
    wanted = model(**batch).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (), batch, strict=False).module()
    for other in (compiled, exported):
        torch.testing.assert_close(other(**batch).logits, wanted, atol=1e-4, rtol=1e-4)
    half = copy.deepcopy(model).bfloat16()(**batch).logits
    assert torch.nn.functional.cosine_similarity(half.float(), wanted, dim=-1).min() > 0.99


def test_an_error_half_way_makes_heads_whole_again(monkeypatch: pytest.MonkeyPatch):
    check_an_error_half_way(small_llama(), FewPairs, monkeypatch)


def test_with_narrower_streams_fewer_layers_and_distilled(tmp_path: Any):
    model = tiny("llama", num_hidden_layers=3)
    asked = {"keep": 0.5, "structures": (*ALL, "hidden", "layers"), "round_to": 4, "distill_epochs": 1}
    pruner = STATPruner.from_pretrained(model, STATConfig(**asked))
    pruner.prune(many())
    assert pruner.report.reached <= 0.5
    pruner.save_pretrained(tmp_path / "small")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "small"), batches()[0]), outputs(model, batches()[0]))


def test_a_family_of_sizes_from_one_calibration():
    pruner = small_llama()
    for each, share in zip(pruner.sweep(many(), [0.8, 0.6]), (0.8, 0.6), strict=True):
        alone = small_llama(keep=share).prune(many())
        assert torch.equal(outputs(each.model, batches()[0]), outputs(alone, batches()[0]))


def test_they_cannot_be_cut_again():
    pruner = small_llama(structures=("pairs", "neurons"))
    model = pruner.prune(many())
    with pytest.raises(ValueError, match="have lost single dimensions, and what is left of them cannot be cut again"):
        STATPruner.from_pretrained(model, STATConfig())
    heads = [group for group in find_groups(model) if isinstance(group.producers[-2].linear, FewPairs)]
    with pytest.raises(ValueError, match=r"heads has fewer dimensions in some heads"):
        slice_group(heads[0], torch.tensor([0]))
    assert pairs_of(heads[0], find_groups(tiny("llama"), ALL)) is None


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ([None], "one entry for each of the 2 blocks' attentions"),
        ([[[0]], None], "must be a list of 2 lists"),
        ([[[0], [4]], None], "different numbers below 4"),
        ([[[1, 1], []], None], "different numbers below 4"),
        ([[["0"], []], None], "different numbers below 4"),
    ],
)
def test_a_record_that_was_edited_is_refused(gone: Any, message: str):
    config = tiny("llama").config
    config.stat_pruning = {**small_llama(keep=0.95).prune(many()).config.stat_pruning, "gone_pairs": gone, "values": [None, None]}
    with pytest.raises(ValueError, match=message):
        type(tiny("llama"))(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: FisherConfig(structures=ALL), "'values' asked of FisherConfig, whose heads go or stay whole"),
        (lambda: SurgeonConfig(structures=("pairs", "neurons")), "'pairs' asked of SurgeonConfig"),
        (lambda: STATConfig(structures=("heads", *ALL)), "'heads' and 'pairs' asked together"),
        (lambda: STATConfig(structures=ALL, metric="stream"), "'pairs' asked with metric='stream'"),
        (lambda: STATConfig(structures=ALL, budget="latency"), "'pairs' asked under a latency budget"),
    ],
)
def test_what_cannot_be_done_is_refused(config: Any, message: str):
    with pytest.raises(ValueError, match=message):
        config()


def test_only_linears_can_lose_pairs():
    with pytest.raises(TypeError, match="Fewer pairs asked of a Identity"):
        narrow_pairs(nn.Identity(), nn.Linear(4, 4), [[0]], dimensions_of_pairs(4, 4, False))


def test_worth_does_not_depend_on_padding_or_batches():
    model = tiny("llama")
    groups = find_groups(model, ("pairs",))
    found = []
    for size in (1, 4):
        data = make_batches(many(), model.config, STATConfig(batch_size=size), causal=True)
        with quiet(model):
            found.append(worth_of_pairs(model, groups, data, 0))
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-9)


def test_dimensions_that_make_no_pairs_do_not_stand_in_the_way_of_heads():
    model = tiny("phi", hidden_size=24, num_attention_heads=4, num_key_value_heads=4)  # 6 wide, of which 3 are turned
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.5
    assert {group.structure for group in find_groups(model)} == {"heads", "neurons"}
    with pytest.raises(ValueError, match="'pairs' asked of"):
        find_groups(model, ("pairs",))
