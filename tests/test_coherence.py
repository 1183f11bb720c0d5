"""How errors of an example's tokens add up: by hand, and example by example with autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_probes import _data
from tiny import batches, tiny
from torch import Tensor

from optimum_stat.coherence import Coherence
from optimum_stat.families import find_groups, weight
from optimum_stat.gradients import output_worth, outputs_of
from optimum_stat.methods.stat_pairs import by_pair, worth_of_pairs
from optimum_stat.probes import on_output_gradient, predicts_once, quiet


def by_hand(y: Tensor, g: Tensor, real: Tensor, centred: bool) -> float:
    """Channel by channel, example by example."""
    y = y - y[real].mean(0) if centred else y
    together = alone = 0.0
    for example, mask in enumerate(real):
        terms = (y * g)[example, mask]
        together, alone = together + float(terms.sum(0).square().sum()), alone + float(terms.square().sum())
    return together / alone


@pytest.mark.parametrize("centred", [True, False])
def test_it_is_what_it_says(centred: bool) -> None:
    y, g = torch.randn(6, 5, 4, dtype=torch.float64) + 2, torch.randn(6, 5, 4, dtype=torch.float64)
    real = torch.rand(6, 5) < 0.7
    found = Coherence(centred)
    for rows in torch.arange(6).split(2):  # in parts
        mask = real[rows]
        found.add(y[rows] * mask[..., None], g[rows] * mask[..., None], int(mask.sum()))
    assert found.value() == pytest.approx(by_hand(y, g, real, centred), rel=1e-10)


def test_tokens_that_err_alike_count_once_more_for_each_and_independent_ones_do_not() -> None:
    error, slope = torch.randn(500, 1, 3), torch.randn(500, 1, 3)
    for y, g, wanted in (
        (error.expand(-1, 8, -1), slope.expand(-1, 8, -1), 8.0),
        (torch.randn(500, 8, 3), slope.expand(-1, 8, -1), 1.0),
        (torch.cat([error, -error], 1), slope.expand(-1, 2, -1), 0.0),
    ):
        found = Coherence(centred=False)
        found.add(y, g, y.shape[:2].numel())
        assert found.value() == pytest.approx(wanted, rel=0.15, abs=1e-6)
    nothing = Coherence(centred=True)
    nothing.add(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), 2)
    assert nothing.value() == 1


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "SequenceClassification"), ("llama", "SequenceClassification"), ("bert", "QuestionAnswering")]
)
def test_of_a_model_with_one_prediction_an_example(family: str, head: str) -> None:
    """From the very gradients that are seen; neither padding nor batches matter."""
    model = tiny(family, head)
    groups, seen = find_groups(model), dict[str, list[tuple[Tensor, Tensor]]]()
    assert predicts_once(model)

    def watch(name: str, y: Tensor, g: Tensor) -> None:
        seen.setdefault(name, []).append((y.view(-1, 9, y.shape[-1]).double(), g.view(-1, 9, y.shape[-1]).double()))

    consumers: dict[str, Any] = {group.name: group.consumer for group in groups}
    with quiet(model):
        with on_output_gradient(consumers, watch):
            found = outputs_of(model, consumers, _data(model, batches((9,) * 12, 4)), seed=0)
        for name, parts in seen.items():
            y, g = (torch.cat(each) for each in zip(*parts, strict=True))
            centred = consumers[name].bias is not None
            assert found[name].coherence == pytest.approx(by_hand(y, g, torch.ones(12, 9, dtype=torch.bool), centred), rel=1e-6)
        assert len({round(output.coherence, 3) for output in found.values()}) > 1
        for output in found.values():
            torch.testing.assert_close(output.worth, output.fisher * output.coherence**0.5)
        worth = output_worth(model, groups, _data(model, batches()), 0)
        for change in ({"batch_size": 1}, {"extra": 3}):
            for name, value in output_worth(model, groups, _data(model, batches(**change)), 0).items():
                torch.testing.assert_close(value, worth[name], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("head", ["SequenceClassification", "CausalLM"])
def test_of_rotary_pairs(head: str) -> None:
    """What a pair of every token hands on adds up over the example that one prediction reads."""
    model = tiny("llama", head)
    groups, seen = find_groups(model, ("pairs",)), dict[str, list[Tensor]]()

    def watch(name: str, y: Tensor, g: Tensor) -> None:
        seen.setdefault(name, []).append((y.double() * g.double()).flatten(0, -2))

    with quiet(model), on_output_gradient({group.name: group.producers[0].linear for group in groups}, watch):
        found = worth_of_pairs(model, groups, _data(model, batches((9,) * 12, 4)), seed=0)
    ratios = []
    for group in groups:
        x = by_pair(group, torch.cat(seen[group.name]))
        ratio = x.view(12, 9, -1).sum(1).square().sum() / x.square().sum()
        ratios.append(abs(float(ratio) - 1))
        torch.testing.assert_close(found[group.name], x.T @ x * (ratio.sqrt() if predicts_once(model) else 1))
    assert max(ratios) > 0.05


def test_where_every_token_is_predicted_each_counts_alone() -> None:
    model = tiny("llama")
    groups = find_groups(model)
    with quiet(model):
        found = outputs_of(model, {group.name: group.consumer for group in groups}, _data(model, batches()), 0)
    assert {output.coherence for output in found.values()} == {1.0}
    assert all(torch.equal(output.worth, output.fisher) for output in found.values())
    assert weight(groups[0].consumer).shape[0] == len(found[groups[0].name].worth)
