"""What Kwon et al. claim: exact gradients of masks, an optimal search, exchanges that never lose, least-squares factors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import batches, many, outputs, tiny
from torch import Tensor, nn

from optimum_stat import FisherConfig, FisherPruner
from optimum_stat.budget import options, unit_cost
from optimum_stat.currency import Currency
from optimum_stat.data import Batches
from optimum_stat.families import Group, find_groups, weight
from optimum_stat.gradients import Sensitivity, output_worth, sensitivities
from optimum_stat.journal import Journal
from optimum_stat.labels import IGNORED
from optimum_stat.methods import fisher_tuning
from optimum_stat.methods.fisher import FisherRanking, estimated_shrinkage, rearranged
from optimum_stat.probes import quiet
from optimum_stat.slicing import consumer_columns

FAMILIES = ["bert", "gpt2", "opt", "llama"]


def data(items: list[dict[str, Tensor]], labels: list[dict[str, Tensor]] | None = None) -> Batches:
    tokens = sum(int(item["attention_mask"].sum()) for item in items)
    examples = sum(len(item["input_ids"]) for item in items)
    return Batches(tuple(items), tokens, examples, 12, "", "test", None if labels is None else tuple(labels))


class Masked:
    """A model whose units are multiplied by factors, one for each example: plain hooks, nothing of ours."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.groups = model, find_groups(model)
        self.factors: dict[str, Tensor] = {}

    def __call__(self, item: dict[str, Tensor]) -> Any:
        handles = [g.consumer.register_forward_pre_hook(self._hook(g, item["input_ids"].shape)) for g in self.groups]
        try:
            return self.model(**item)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, group: Group, shape: torch.Size) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            columns = self.factors[group.name].repeat_interleave(group.width, dim=-1)[:, None].expand(*shape, -1)
            return (args[0] * columns.reshape(args[0].shape), *args[1:])

        return hook


def labelled(head: str) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]] | None]:
    items = batches()
    if head == "SequenceClassification":
        generator = torch.Generator().manual_seed(5)
        return items, [{"labels": torch.randint(3, (3,), generator=generator)} for _ in items]
    return items, None


@pytest.mark.parametrize(("family", "head"), [("bert", "SequenceClassification"), *((f, "CausalLM") for f in FAMILIES[1:])])
def test_gradients_of_masks_are_those_of_autograd(family: str, head: str) -> None:
    """Against a factor on every unit of every example, and transformers' own loss, example by example."""
    model = tiny(family, head).double()
    items, labels = labelled(head)
    with quiet(model):
        found = sensitivities(model, find_groups(model), data(items, labels), 0, from_labels=True)
    masked, row = Masked(model), 0
    for at, item in enumerate(items):
        for i in range(len(item["input_ids"])):
            one = {name: value[i : i + 1] for name, value in item.items()}
            own = one["input_ids"].masked_fill(one["attention_mask"] == 0, IGNORED)
            if labels:
                own = labels[at]["labels"][i : i + 1]
            counted = 1 if labels else int(one["attention_mask"].sum()) - 1
            masked.factors = {g.name: torch.ones(1, g.units, dtype=torch.float64, requires_grad=True) for g in masked.groups}
            loss = masked({**one, "labels": own}).loss * counted
            wanted = torch.autograd.grad(loss, list(masked.factors.values()))
            for group, gradient in zip(masked.groups, wanted, strict=True):
                torch.testing.assert_close(found[group.name].masks[row], gradient[0], rtol=1e-4, atol=1e-7)
            row += 1


def test_drawn_labels_give_the_exact_fisher_information_on_average() -> None:
    """Enough draws against the sum over all classes of p (d log p / d mask)^2."""
    model = tiny("bert", "SequenceClassification").double()
    items, groups = batches((7, 7, 7), batch_size=3), find_groups(model)
    repeated = [{name: value.repeat(400, 1) for name, value in item.items()} for item in items]
    with quiet(model):
        drawn = sensitivities(model, groups, data(repeated), 0, from_labels=False)
    masked = Masked(model)
    masked.factors = {g.name: torch.ones(3, g.units, dtype=torch.float64, requires_grad=True) for g in masked.groups}
    log_p = masked(items[0]).logits.log_softmax(-1)
    for group in groups:
        wanted = torch.zeros(group.units, dtype=torch.float64)
        for i, label in itertools.product(range(3), range(3)):
            (gradient,) = torch.autograd.grad(log_p[i, label], masked.factors[group.name], retain_graph=True)
            wanted += log_p[i, label].exp().detach() * gradient[i] ** 2
        found = drawn[group.name].masks.square().sum(0) / 400
        torch.testing.assert_close(found, wanted, rtol=0.2, atol=0.02 * float(wanted.max()))


def test_published_gradients_are_means_of_batches() -> None:
    model = tiny("bert", "SequenceClassification")
    items, labels = labelled("SequenceClassification")
    pruners = [FisherPruner(model, FisherConfig(batch_size=4, per_example=each)) for each in (True, False)]
    groups = find_groups(model)
    with quiet(model):
        single, mean = (pruner.rank(groups, pruner.measure(groups, data(items, labels))).gradients for pruner in pruners)
    for name, own in single.items():
        torch.testing.assert_close(mean[name], torch.stack([own[:4].mean(0), own[4:].mean(0)]))


def test_means_of_batches_expect_about_the_loss_that_single_gradients_expect() -> None:
    items = many(4000)
    expected = []
    for per_example in (True, False):
        config = FisherConfig(keep=0.9, per_example=per_example, batch_size=20, rearrange=False, tune=False)
        pruner = FisherPruner.from_pretrained(tiny("llama"), config)
        pruner.prune([{name: value[:20] for name, value in item.items()} for item in items])
        expected.append(pruner.report.error)
    assert expected[1] == pytest.approx(expected[0], rel=0.5)


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("keep", [0.5, 0.6, 0.8])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_search_is_optimal_for_the_diagonal(family: str, keep: float, budget: str) -> None:
    """Against every number of heads and of neurons in every block; within them, the largest."""
    model = tiny(family, intermediate_size=8)
    pruner = FisherPruner(model, FisherConfig(keep=keep, budget=budget, round_to=1))
    groups, items = find_groups(model), data(batches())
    with quiet(model):
        stats = {group.name: own for group, own in pruner.measure(groups, items)}
        ranking = pruner.rank(groups, [(group, stats[group.name]) for group in groups])
    currency = Currency(model, budget, 1, ("heads", "neurons"), items.seq_len, pruner.cost(items), None)
    limit = currency.limit(keep)
    kept = pruner.allocate(groups, ranking, keep, currency)
    own = {name: found.masks.square().sum(0) for name, found in stats.items()}
    costs = {group.name: unit_cost(group, budget, items.seq_len) for group in groups}
    best = min(
        sum(float(own[g.name].sort().values[: g.units - k].sum()) for g, k in zip(groups, plan, strict=True))
        for plan in itertools.product(*(options(group, 1) for group in groups))
        if sum(costs[g.name] * k for g, k in zip(groups, plan, strict=True)) <= limit
    )
    lost = sum(float(own[g.name].sum() - own[g.name][ranking.order[g.name][: kept[g.name]]].sum()) for g in groups)
    assert sum(costs[name] * k for name, k in kept.items()) <= limit
    assert lost == pytest.approx(best, rel=1e-9, abs=1e-12)


def objective(gradients: Tensor, keep: Tensor, shrinkage: float = 0.0) -> float:
    """`(1 - m)^T I (1 - m)`, with I's entries off the diagonal shrunk."""
    fisher = gradients.T @ gradients
    fisher = (1 - shrinkage) * fisher + shrinkage * fisher.diagonal().diag()
    gone = torch.ones(len(fisher), dtype=fisher.dtype).index_fill_(0, keep, 0)
    return float(gone @ fisher @ gone)


def test_shrinkage_is_the_ratio_of_noise_to_what_is_there() -> None:
    """Against every pair of units, one by one; and it vanishes with many examples of the same."""
    gradients = torch.randn(7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.3
    noise = there = 0.0
    for i, j in itertools.permutations(range(5), 2):
        products = gradients[:, i] * gradients[:, j]
        noise += float(products.var(correction=1)) / 7  # the variance of their mean
        there += float(products.mean()) ** 2
    assert estimated_shrinkage(gradients) == pytest.approx(min(1.0, noise / there))
    assert estimated_shrinkage(gradients.repeat(500, 1)) < 0.01
    assert estimated_shrinkage(torch.randn(200, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)) > 0.9
    assert estimated_shrinkage(gradients[:1]) == estimated_shrinkage(torch.zeros(3, 4)) == 1.0


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_exchanges_never_raise_their_objective_nor_change_the_number(
    units: int, examples: int, seed: int, share: float, shrinkage: float
) -> None:
    gradients = torch.randn(examples, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = gradients.square().sum(0).argsort(descending=True)
    keep = order[: 1 + int(share * (units - 1))].sort().values
    after = rearranged(gradients, keep, shrinkage)
    assert len(after) == len(keep) == len(set(after.tolist()))
    assert after.tolist() == sorted(after.tolist())
    assert objective(gradients, after, shrinkage) <= objective(gradients, keep, shrinkage) * (1 + 1e-9) + 1e-12


def test_exchanges_are_those_of_the_published_pass() -> None:
    """To the letter: ascending units that stay, each joins those that go, and the best to return is found by trying all."""
    for seed in range(30):
        gradients = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        own = gradients.square().sum(0)
        ascending = own.argsort().tolist()
        gone = ascending[:4]
        for unit in ascending[4:]:
            gone.append(unit)
            tries = [objective(gradients, torch.tensor([u for u in range(10) if u not in gone or u == back])) for back in gone]
            gone.pop(tries.index(min(tries)))
        keep = torch.tensor(sorted(ascending[4:]))
        assert sorted({*range(10)} - {*rearranged(gradients, keep, 0.0).tolist()}) == sorted(gone)


def test_exchanges_see_units_that_cancel() -> None:
    """Two units that do the opposite of each other can go together, though neither can alone."""
    gradients = torch.tensor([[2.0, 0.0, -3.0, 9.0], [0.0, 3.0, 0.5, 9.0]], dtype=torch.float64)
    assert rearranged(gradients, torch.tensor([2, 3]), 0.0).tolist() == [1, 3]
    assert rearranged(gradients, torch.tensor([2, 3]), 1.0).tolist() == [2, 3]


def streams(model: Any, group: Group, item: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of the real tokens: what the consumer reads, and the residual stream that its output is added to."""
    rows: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: rows.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, module in (("z", group.consumer), ("x", group.stream))
    ]
    with torch.no_grad():
        model(**item)
    for hook in hooks:
        hook.remove()
    real = item["attention_mask"].flatten().bool()
    return rows["z"][real], rows["x"][real]


@torch.no_grad()
def scaled(group: Group, factors: Tensor) -> None:
    weight(group.consumer).mul_(factors.repeat_interleave(group.width))


@pytest.mark.parametrize("ridge", [1e-12, 0.05])
@pytest.mark.parametrize("family", FAMILIES)
def test_factors_are_constrained_least_squares_towards_the_teacher(
    family: str, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer, against `lstsq` on the columns `vec(z_u W_u^T)`, with everything before the layer already tuned."""
    monkeypatch.setattr(fisher_tuning, "RIDGES", (ridge,))
    model = tiny(family, use_cache=False).double()
    items = many(500)
    pruner = FisherPruner(copy.deepcopy(model), FisherConfig(keep=0.6, round_to=1, rearrange=False))
    kept: dict[str, Tensor] = {}
    pruner.select = lambda ranking, sizes: kept.update(FisherPruner.select(pruner, ranking, sizes)) or kept  # type: ignore[method-assign,func-returns-value]
    pruner.prune(items)
    teacher, student = copy.deepcopy(model), copy.deepcopy(model)
    for network, plan in ((teacher, pruner._teacher), (student, kept)):
        for group in find_groups(network):
            scaled(group, torch.zeros(group.units, dtype=torch.float64).index_fill_(0, plan[group.name], 1.0))
    assert any(len(kept[name]) < len(pruner._teacher[name]) for name in kept)
    whole = {name: torch.cat([item[name] for item in items]) for name in ("input_ids", "attention_mask")}
    for wanted, own, after in zip(find_groups(teacher), find_groups(student), find_groups(pruner.model), strict=True):
        (z_teacher, x_teacher), (z, x) = streams(teacher, wanted, whole), streams(student, own, whole)
        root = pruner._metric[own.name].sqrt()
        target = ((z_teacher @ weight(wanted.consumer).T + x_teacher - x) * root).flatten()
        units = kept[own.name]
        parts = [z[:, consumer_columns(own, u[None])] @ weight(own.consumer)[:, consumer_columns(own, u[None])].T for u in units]
        design = torch.stack([(part * root).flatten() for part in parts], 1).detach()
        damping = ridge**0.5 * torch.diag(design.norm(dim=0))
        left, right = torch.cat([design, damping]), torch.cat([target.detach(), damping.diagonal()])
        factors = torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0]
        scaled(own, torch.ones(own.units, dtype=torch.float64).index_put_((units,), factors))
        columns = consumer_columns(own, units)
        torch.testing.assert_close(weight(after.consumer), weight(own.consumer)[:, columns], rtol=1e-5, atol=1e-6)


def test_the_ridge_is_the_one_that_fits_the_other_half_best() -> None:
    """Against solving, and then measuring on rows that were not solved for, ridge by ridge."""
    generator = torch.Generator().manual_seed(0)
    for noise, wanted in ((0.0, 0.01), (50.0, 100.0)):
        rows = [torch.randn(12, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
        ends = [z @ torch.ones(6).double() * 1.5 + noise * torch.randn(12, generator=generator).double() for z in rows]
        errors = {}
        for ridge in fisher_tuning.RIDGES:
            errors[ridge] = 0.0
            for (z, y), (other, wish) in (((rows[0], ends[0]), (rows[1], ends[1])), ((rows[1], ends[1]), (rows[0], ends[0]))):
                damping = ridge**0.5 * torch.diag(z.norm(dim=0))
                left, right = torch.cat([z, damping]), torch.cat([y, damping.diagonal()])
                factors = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
                errors[ridge] += float((other @ factors - wish).square().sum())
        best = min(errors, key=lambda ridge: errors[ridge])
        assert best == wanted
        z, y = torch.cat(rows), torch.cat(ends)
        normal = z.T @ z
        expected = torch.linalg.solve(normal + best * normal.diagonal().diag(), z.T @ y - normal.sum(1))
        systems = [(z.T @ z, z.T @ y - (z.T @ z).sum(1)) for z, y in zip(rows, ends, strict=True)]
        torch.testing.assert_close(fisher_tuning._change(systems), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_brings_the_network_closer_on_tokens_it_has_not_seen(family: str) -> None:
    held_out, ratios = batches((20,) * 12, batch_size=12, seed=9)[0], []
    for seed in range(3):
        dense = tiny(family, seed=seed)
        off = []
        for tune in (False, True):
            model = FisherPruner(tiny(family, seed=seed), FisherConfig(keep=0.6, tune=tune, rearrange=False)).prune(many(1000))
            off.append(float((outputs(model, held_out) - outputs(dense, held_out)).square().mean()))
        ratios.append(off[1] / off[0])
    assert sorted(ratios)[1] < 1, ratios


def test_only_the_last_mlp_of_a_published_classifier_is_fitted_to_first_tokens() -> None:
    model, journal = tiny("bert", "SequenceClassification"), Journal()
    tunings = [
        fisher_tuning.Tuning(model, find_groups(model, structures), data(batches()), None, journal)
        for structures in (("heads", "neurons"), ("heads",))
    ]
    assert [tuning.first_token_only for tuning in tunings] == ["1.neurons", None]


def test_a_failed_layer_ends_the_tuning_and_leaves_the_rest_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FisherPruner(tiny("bert"), FisherConfig(tune=False)).prune(many())
    monkeypatch.setattr(fisher_tuning, "LIMIT", 0.0)  # every factor is beyond it
    tuned = FisherPruner(tiny("bert"), FisherConfig()).prune(many())
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (plain, tuned)]
    assert shapes[0] == shapes[1]
    untouched = FisherPruner(tiny("bert"), FisherConfig(tune=False, rearrange=True)).prune(many())
    assert torch.equal(outputs(tuned, batches()[0]), outputs(untouched, batches()[0]))


def test_masks_leave_nothing_but_smaller_weights() -> None:
    """The pruned model equals the dense one with its units scaled: heads by their factor, those that go by zero."""
    dense = tiny("llama")
    pruner = FisherPruner(copy.deepcopy(dense), FisherConfig(keep=0.5, round_to=1, rearrange=False))
    model = pruner.prune(many())
    groups, kept = find_groups(dense), {group.name: group.kept for group in pruner.report.groups}
    with torch.no_grad():
        for group, after in zip(groups, find_groups(model), strict=True):
            first = group.producers[0].linear.weight.view(group.units, -1)
            rows = after.producers[0].linear.weight.view(after.units, -1)
            units = torch.tensor([int((first == row).all(1).nonzero()[0, 0]) for row in rows])
            assert len(units) == kept[group.name]
            factors = torch.zeros(group.units)
            columns = consumer_columns(group, units)
            ratio = weight(after.consumer) / weight(group.consumer)[:, columns]
            per_unit = ratio.view(len(ratio), len(units), group.width)
            factors[units] = per_unit.mean((0, 2))
            torch.testing.assert_close(per_unit, factors[units][None, :, None].expand_as(per_unit), rtol=1e-3, atol=1e-4)
            scaled(group, factors)
    torch.testing.assert_close(outputs(model, batches()[0]), outputs(dense, batches()[0]), rtol=1e-3, atol=1e-3)


def test_gradients_that_are_not_finite_are_refused_with_the_layer() -> None:
    model = tiny("bert", "SequenceClassification")
    with torch.no_grad():
        model.classifier.weight.fill_(3e38)
    items, labels = labelled("SequenceClassification")
    pruner = FisherPruner(model, FisherConfig())
    with pytest.raises(ValueError, match=r"The gradient at 0\.heads is NaN or infinite.*dtype=torch.float32"):
        pruner.prune([{**item, **own} for item, own in zip(items, labels or [], strict=True)])


@pytest.mark.parametrize("wrong", [{"labels": "task"}, {"serve_batch_size": 0}, {"keep": 0.0}])
def test_a_config_that_no_run_could_honour_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="asked"):
        replace(FisherConfig(), **wrong)


def test_drawn_labels_need_none_of_the_data_and_agree_with_the_outputs_fisher() -> None:
    """Both are Fisher information of the same predictions: units without any part in the output have none in either."""
    model = tiny("bert")
    with torch.no_grad():
        weight(find_groups(model)[1].consumer)[:, :5] = 0
    with quiet(model):
        found = sensitivities(model, find_groups(model), data(batches()), 0, from_labels=False)
        assert output_worth(model, find_groups(model), data(batches()), 0)["0.neurons"].min() > 0
    assert not found["0.neurons"].masks[:, :5].any()
    assert found["0.neurons"].masks[:, 5:].abs().sum(0).min() > 0


def test_ranking_is_the_sum_of_what_goes() -> None:
    groups = [Group("0.neurons", 0, "neurons", (), nn.Identity(), 3, nn.Identity())]
    pruner = FisherPruner(tiny("bert"), FisherConfig())
    ranking = pruner.rank(groups, [(groups[0], Sensitivity(torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, 2.0]]), torch.ones(2)))])
    assert isinstance(ranking, FisherRanking)
    assert ranking.order["0.neurons"].tolist() == [1, 2, 0]
    assert ranking.error["0.neurons"].tolist() == [19.0, 9.0, 1.0, 0.0]
