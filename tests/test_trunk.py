"""Whole layers and residual dimensions: what they cost, which go, and what becomes of the rest."""

from __future__ import annotations

import argparse
import copy
import re
from itertools import product
from typing import Any

import pytest
import torch
from test_methods import pruner_for
from test_probes import _data
from tiny import batches, data_of, many, one_in_three, outputs, tiny
from torch import Tensor, nn

from optimum_stat import FisherConfig, MovementConfig, STATConfig, STATPruner, SurgeonConfig, calibration, trunk
from optimum_stat.budget import model_cost
from optimum_stat.command_options import add_config_options, given_config
from optimum_stat.families import find_blocks, find_groups, weight
from optimum_stat.gradients import outputs_of
from optimum_stat.narrowing import RIDGE, narrow_and_correct
from optimum_stat.probes import quiet
from optimum_stat.stream import find_stream, narrow
from optimum_stat.trunk import rank_trunk

ALL = ("heads", "neurons", "hidden", "layers")
RECIPES = ("stat-fisher", "fisher", "surgeon")


def inputs_of(model: nn.Module, modules: list[nn.Module], data: Any) -> list[Tensor]:
    """What modules read of real tokens, over all data: [tokens, width] each."""
    seen: list[list[Tensor]] = [[] for _ in modules]
    mask = torch.empty(0)

    def look(rows: list[Tensor]) -> Any:
        return lambda module, args: rows.append(args[0].detach().flatten(0, -2)[mask.flatten().bool()])

    handles = [module.register_forward_pre_hook(look(rows)) for module, rows in zip(modules, seen, strict=True)]
    with torch.no_grad():
        for batch in data:
            mask = batch["attention_mask"]
            model(**batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(rows).double() for rows in seen]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_error_of_a_width_is_what_all_readers_lose_after_least_squares(family: str):
    model = tiny(family)
    data = _data(model, many(400))
    stream = find_stream(model)
    readers = [group.consumer for site in stream.sites for group in site]
    with quiet(model):
        ranking = rank_trunk(model, ("hidden",), data, seed=0, nats=0.5)
        found = outputs_of(model, {**{str(i): each for i, each in enumerate(readers)}, "end": model.base_model}, data, 0)
    order, error = ranking.order["hidden"], ranking.error["hidden"]
    assert sorted(order.tolist()) == list(range(32))
    assert error[-1] == 0
    assert (error.diff() <= 0).all()
    read = inputs_of(model, readers, data)
    for count in (4, 17, 31):
        keep, gone = order[:count], order[count:]
        expected = (found["end"].fisher * found["end"].energy)[gone].sum() * data.num_tokens
        for i, (linear, x) in enumerate(zip(readers, read, strict=True)):
            y = x @ weight(linear).double().T
            best = x[:, keep] @ torch.linalg.lstsq(x[:, keep], y).solution
            expected += ((y - best).square() * found[str(i)].fisher).sum()
        torch.testing.assert_close(error[count], expected, rtol=1e-3, atol=0)


def test_the_error_of_a_layer_is_the_change_that_it_makes():
    model = tiny("llama", num_hidden_layers=4)
    data = _data(model, many(200))
    blocks = list(find_blocks(model))
    with quiet(model):
        ranking = rank_trunk(model, ("layers",), data, seed=0, nats=0.5)
        fisher = outputs_of(model, {str(i): block for i, block in enumerate(blocks)}, data, 0)
    states = inputs_of(model, [*blocks, model.model.norm], data)
    lost = [float(((states[i + 1] - states[i]).square() * fisher[str(i)].fisher).sum()) for i in range(4)]
    order, error = ranking.order["layers"], ranking.error["layers"]
    assert order.tolist() == [0, *sorted((1, 2, 3), key=lambda block: -lost[block])]
    assert error[0] == torch.inf
    torch.testing.assert_close(error[2], torch.tensor(sum(sorted(lost[1:])[:2]), dtype=torch.float64), rtol=1e-4, atol=0)


@torch.no_grad()
def idle(model: nn.Module, gone: Tensor) -> nn.Module:
    """Nothing is ever written to the dimensions `gone`."""
    model.get_input_embeddings().weight[:, gone] = 0
    for block in find_blocks(model):
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight[gone] = 0
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_idle_dimensions_go_first_and_are_not_missed(tied: bool):
    """Root mean squares grow without them, all alike: the corrections of readers and head make up for that."""
    gone = torch.tensor([1, 4, 7, 8, 15, 22, 29, 31])
    model = idle(tiny("llama", tie_word_embeddings=tied), gone)
    data = _data(model, many(600))
    with quiet(model):
        order = rank_trunk(model, ("hidden",), data, seed=0, nats=1.0).order["hidden"]
    assert sorted(order[-8:].tolist()) == gone.tolist()
    small, alone = copy.deepcopy(model), copy.deepcopy(model)
    keep = order[:-8].sort().values
    with quiet(small):
        narrow_and_correct(small, keep, data)
    narrow(alone, keep)
    expected = outputs(model, batches()[0])
    rest = [float((outputs(each, batches()[0]) - expected).norm() / expected.norm()) for each in (small, alone)]
    assert rest[0] < 1e-3 < 0.05 < rest[1]


def test_the_correction_is_the_ridge_solution():
    model = tiny("llama")
    data = _data(model, many(400))
    small, keep = copy.deepcopy(model), torch.arange(3, 27)
    with quiet(small):
        narrow_and_correct(small, keep, data)
    first, alone = small.model.layers[0].self_attn.q_proj, copy.deepcopy(model)
    narrow(alone, keep)
    (x,), (z,) = (inputs_of(each, [each.model.layers[0].self_attn.q_proj], data) for each in (model, alone))
    full = model.model.layers[0].self_attn.q_proj.weight.double()
    start = full[:, keep] * (x[:, keep] * z).sum(0) / z.square().sum(0)
    damp = (RIDGE * z.square().sum(0)).sqrt().diag()
    rest = torch.cat([x @ full.T - z @ start.T, torch.zeros(len(keep), len(full), dtype=torch.float64)])
    change = torch.linalg.lstsq(torch.cat([z, damp]), rest).solution.T
    torch.testing.assert_close(first.weight.double(), start + change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("structures", "recipe", "family"),
    one_in_three([("hidden",), ("neurons", "layers"), ALL], RECIPES, ["llama", "bert", "gpt2"]),
)
def test_every_method_keeps_the_budget_and_the_model_loads_again(recipe: str, family: str, structures: Any, tmp_path):
    shots = {"shots": 1} if recipe == "surgeon" else {}
    pruner = pruner_for(recipe, tiny(family, **layers(family)), keep=0.45, structures=structures, round_to=4, **shots)
    dense = model_cost(pruner.model, "params", 1)
    model = pruner.prune(many())
    assert 0.25 < model_cost(model, "params", 1) / dense <= 0.45
    kept = {group.name: group.kept for group in pruner.report.groups}
    record = model.config.stat_pruning
    assert kept.get("layers", 3) == model.config.num_hidden_layers == len(record["neurons"]) == len(find_blocks(model))
    assert kept.get("hidden", 32) == record.get("hidden", 32)
    assert sum(count > 0 for name, count in kept.items() if name.endswith("neurons")) in (0, kept.get("layers", 3))
    pruner.save_pretrained(tmp_path / "small")
    loaded = type(model).from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(loaded, batches()[0]), outputs(model, batches()[0]))
    card = (tmp_path / "small" / "README.md").read_text()
    assert ("layers are left" in card, "residual stream" in card) == ("layers" in kept, "hidden" in kept)


def layers(family: str) -> dict[str, int]:
    return {"n_layer" if family == "gpt2" else "num_hidden_layers": 3}


def test_the_trunk_chosen_is_the_best_of_all():
    """Against every number of layers and every width, each with the best allocation on it."""
    asked = {"keep": 0.4, "round_to": 8}
    pruner = STATPruner.from_pretrained(tiny("llama", num_hidden_layers=4), STATConfig(structures=ALL, **asked))
    (forecast,) = pruner.plan(many(), keep=[0.4])
    data, groups, found = calibration.read(pruner, many(), None, None), find_groups(pruner.model), {}
    with pruner.at_work():
        ranking = pruner.survey(groups, data, pruner.timer())
    for size in product(range(1, 5), range(8, 33, 8)):
        kept = dict(zip(("layers", "hidden"), size, strict=True))
        found[size] = trunk._error(pruner.allocate, kept, groups, ranking, 0.4, pruner.currency)
    best = min(found, key=lambda size: found[size])
    assert (forecast.kept["layers"], forecast.kept["hidden"]) == best
    assert forecast.error == pytest.approx(found[best] * pruner.nats(data))
    assert forecast.cost.block_params <= 0.4 * pruner.currency.dense.block_params


@pytest.mark.parametrize("structure", ["hidden", "layers"])
def test_an_error_half_way_puts_layers_and_widths_back(structure: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama", num_hidden_layers=3)
    before, config = {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()
    pruner = pruner_for("stat-fisher", model, keep=0.4, structures=(structure,))

    def fail(*_: Any) -> None:
        assert sum(p.numel() for p in model.parameters()) < sum(value.numel() for value in before.values())
        raise OSError("no more")

    monkeypatch.setattr(type(pruner), "repair", fail)
    with pytest.raises(OSError, match="no more"):
        pruner.prune(many())
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: STATConfig(structures=()),
            "must name some of 'heads', 'neurons', 'pairs', 'values', 'experts', 'hidden', 'layers'",
        ),
        (lambda: STATConfig(structures=("heads", "heads")), "must name some of"),
        (lambda: FisherConfig(structures=("head",)), "must name some of"),
        (lambda: FisherConfig(structures=ALL, budget="latency"), "under a latency budget"),
        (lambda: MovementConfig(structures=ALL), "movement pruning, which has no way to drop layers or hidden"),
        (lambda: SurgeonConfig(structures=ALL), "'layers' asked in 4 shots: whole layers go in one; set shots=1"),
        (
            lambda: SurgeonConfig(structure="elements", structures=("hidden",)),
            "structure='elements', which has no way to drop hidden",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(config: Any, message: str):
    with pytest.raises(ValueError, match=message):
        config()


def test_a_model_without_a_head_gives_its_stream_away():
    pruner = pruner_for("stat-fisher", tiny("llama", ""), structures=("hidden",))
    with pytest.raises(ValueError, match="has no head"):
        pruner.prune(many())


def test_the_command_that_a_card_names_asks_for_the_structures(tmp_path):
    pruner = pruner_for("stat-fisher", tiny("llama"), structures=("neurons", "hidden"))
    pruner.prune(many())
    pruner.save_pretrained(tmp_path / "small")
    (flags,) = re.findall(r"--structures (\S+)", (tmp_path / "small" / "README.md").read_text())
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    args = parser.parse_args(["--structures", flags])
    assert given_config(args)["structures"] == ("neurons", "hidden")


@pytest.mark.parametrize("family", ["vit", "dinov2", "wav2vec2"])
def test_layers_of_what_reads_images_or_sound(family: str, tmp_path):
    pruner = STATPruner.from_pretrained(tiny(family), STATConfig(keep=0.6, structures=("layers",)))
    model = pruner.prune(data_of(family, 8, 2))
    assert len(find_blocks(model)) == 1
    pruner.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    (batch, *_) = data_of(family)
    assert torch.equal(outputs(again, batch), outputs(model, batch))


@pytest.mark.parametrize(
    ("family", "structures", "message"),
    [
        ("bart", ("layers",), "several lists of blocks"),
        ("clip", ("heads", "hidden"), "several lists of blocks"),
        ("vit", ("hidden",), "'hidden' asked of a ViTForImageClassification: where its residual stream begins"),
        ("wav2vec2", ("hidden",), "'hidden' asked of a Wav2Vec2ForCTC: where"),
        ("dinov2", ("hidden",), "which has no head that reads its residual stream as it is"),
    ],
)
def test_streams_that_cannot_be_cut_are_refused(family: str, structures: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        STATPruner.from_pretrained(tiny(family), STATConfig(keep=0.6, structures=structures)).prune(data_of(family))
