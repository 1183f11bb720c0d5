"""Latency tables: what is timed, what is remembered, what is predicted, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batches, many, outputs, tiny
from torch import nn

from optimum_stat import FisherConfig, FisherPruner, STATConfig, STATPruner, SurgeonConfig, SurgeonPruner, latency
from optimum_stat.families import find_blocks, find_groups
from optimum_stat.latency import LatencyTable, describe_device, latency_table, measure_table, sizes_to_try
from optimum_stat.probes import quiet
from optimum_stat.slicing import slice_model

MS = 1_000_000


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tables are remembered in the test's own folder."""
    folder = tmp_path / "latencies"
    monkeypatch.setattr(latency, "cache_folder", lambda: folder)
    return folder


class Clock:
    """The time that the models below take, whatever this machine does beside them."""

    now = 0

    def perf_counter_ns(self) -> int:
        return self.now

    def time_ns(self) -> int:
        return time.time_ns()


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(latency, "time", CLOCK)
    return CLOCK


def slow(model: Any, per_head: float, per_neuron: float, fixed: float) -> Any:
    """A model whose consumers take so many milliseconds for each of their units, and its embeddings `fixed`."""

    def spend(per_column: float) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            CLOCK.now += round(per_column * args[0].shape[-1] * MS)

        return hook

    for group in find_groups(model):
        per_unit = per_head if group.structure == "heads" else per_neuron
        group.consumer.register_forward_pre_hook(spend(per_unit / group.width))
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda *_: setattr(CLOCK, "now", CLOCK.now + round(fixed * MS)))
    return model


@pytest.fixture
def table(clock: Clock) -> LatencyTable:
    model = slow(tiny("bert"), 2, 0.2, 10)
    with quiet(model):
        return measure_table(model, 8, 1, 6)


def test_a_table_holds_the_times_of_every_size(table: LatencyTable) -> None:
    full = 4 * 2 + 44 * 0.2  # ms of one block
    assert table.total / MS == pytest.approx(10 + 2 * full, rel=1e-3)
    for block in range(2):
        assert table.sizes[f"{block}.heads"] == [1, 2, 3, 4]
        assert table.sizes[f"{block}.neurons"] == [8, 16, 24, 32, 40, 44]
        for size, own in zip(table.sizes[f"{block}.heads"], table.times[f"{block}.heads"], strict=True):
            assert own / MS == pytest.approx(full - 2 * (4 - size), rel=1e-3)
        for size, own in zip(table.sizes[f"{block}.neurons"], table.times[f"{block}.neurons"], strict=True):
            assert own / MS == pytest.approx(full - 0.2 * (44 - size), rel=1e-3)
    kept = {"0.heads": 1, "0.neurons": 8, "1.heads": 4, "1.neurons": 24}
    assert table.predicted(kept) / MS == pytest.approx(10 + (2 + 1.6) + (8 + 4.8), rel=1e-3)
    assert table.predicted({name: sizes[-1] for name, sizes in table.sizes.items()}) == table.total


def test_costs_are_what_a_size_takes_more_than_the_fastest(table: LatencyTable) -> None:
    model = tiny("bert")
    all_costs, all_sizes = table.choices(find_groups(model))
    for name, costs in all_costs.items():
        assert min(costs) == 0
        assert costs == sorted(costs)
        assert costs[-1] == table.times[name][-1] - table.times[name][0]
        assert all_sizes[name] == table.sizes[name]
    slice_model(model, {"0.neurons": torch.arange(24), "1.heads": torch.arange(3)})  # as after a first shot
    costs, sizes = table.choices(find_groups(model))
    assert (sizes["0.neurons"], sizes["1.heads"]) == ([8, 16, 24], [1, 2, 3])
    assert costs["0.neurons"] == all_costs["0.neurons"][:3]
    assert table.fixed == table.total - sum(own[-1] for own in all_costs.values())


def test_timing_changes_nothing() -> None:
    model = tiny("llama")
    state = copy.deepcopy(model.state_dict())
    with quiet(model):
        measure_table(model, 8, 2, 5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(outputs(model, batches()[0]), outputs(tiny("llama"), batches()[0]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_at_most_32_numbers_of_neurons_are_tried_and_all_are_multiples() -> None:
    for neurons, round_to in ((1536, 8), (3072, 64), (44, 8), (100, 1), (11008, 8)):
        model = tiny("bert", num_hidden_layers=1, intermediate_size=neurons)
        sizes = sizes_to_try(find_groups(model)[1], round_to)
        assert len(sizes) <= 33
        assert sizes[-1] == neurons
        assert all(size % round_to == 0 for size in sizes[:-1])


def test_blocks_of_one_kind_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    plain = latency._time_sizes
    monkeypatch.setattr(latency, "_time_sizes", lambda model, index, *rest: timed.append(index) or plain(model, index, *rest))
    for family, changes, wanted in (
        ("bert", {"num_hidden_layers": 3}, [0]),
        ("qwen2", {}, [0, 1]),
    ):  # a sliding window is another kind
        timed.clear()
        with quiet(model := tiny(family, **changes)):
            measure_table(model, 44, 1, 8)
        assert timed == wanted


def test_a_table_is_remembered_for_this_device_batch_and_shape(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, int]] = []

    def measure(model: Any, round_to: int, batch_size: int, seq_len: int) -> LatencyTable:
        measured.append((batch_size, seq_len))
        return LatencyTable("cpu", batch_size, seq_len, 7, {"0.heads": [1]}, {"0.heads": [5]})

    monkeypatch.setattr(latency, "measure_table", measure)
    first = latency_table(tiny("bert"), 8, 1, 6, None)
    assert latency_table(tiny("bert", seed=1), 8, 1, 6, None) == first
    assert measured == [(1, 6)]
    latency_table(tiny("bert"), 8, 2, 6, None)
    latency_table(tiny("bert"), 8, 1, 7, None)
    latency_table(tiny("bert", intermediate_size=40), 8, 1, 6, None)
    latency_table(tiny("bert").double(), 8, 1, 6, None)
    latency_table(tiny("bert"), 4, 1, 6, None)
    assert len(measured) == len(list(memory.iterdir())) == 6


@pytest.mark.parametrize(
    ("pruner", "config"), [(FisherPruner, FisherConfig), (STATPruner, STATConfig), (SurgeonPruner, SurgeonConfig)]
)
def test_a_model_takes_as_long_as_was_asked(pruner: Any, config: Any, tmp_path: Path, clock: Clock) -> None:
    model = slow(tiny("bert"), 2, 0.2, 10)
    own = pruner(model, config(keep=0.6, budget="latency"))
    own.prune(many())
    found = own.report.latency
    assert found is not None
    assert found.predicted <= found.asked == pytest.approx(0.6 * found.dense)
    assert found.measured == pytest.approx(found.predicted, rel=1e-3)
    assert found.measured > found.asked - 2 * 0.2 * 8  # less than a step of neurons in every block is left
    assert own.report.reached == found.predicted / found.dense <= 0.6
    assert "ms for 1 x 20 tokens on cpu" in str(own.report)
    for group in own.report.groups:
        assert group.kept in own.currency.table.sizes[group.name]
    own.save_pretrained(tmp_path / "pruned")
    recipe = json.loads((tmp_path / "pruned" / "stat_recipe.json").read_text())
    assert recipe["latency_table"]["total"] == own.currency.table.total
    assert recipe["report"]["latency"]["batch_size"] == 1
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert f"{found.asked:.2f} ms" in card
    assert "--budget latency" in card
    again = pruner(tiny("bert"), config(keep=0.7, budget="latency", latency_table=str(tmp_path / "pruned" / "stat_recipe.json")))
    again.prune(many())
    assert again.currency.table == own.currency.table


def test_a_prediction_that_fails_is_said(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("bert")
    pruner = FisherPruner(slow(model, 2, 0.2, 10), FisherConfig(keep=0.7, budget="latency"))
    pruner.prune(many())
    assert "were predicted" not in caplog.text
    again = FisherPruner(slow(tiny("bert"), 4, 0.4, 20), FisherConfig(keep=0.7, budget="latency"))
    again.prune(many())  # on times that were remembered from a faster machine of the same name
    assert "delete that folder, and prune the dense model again" in caplog.text
    assert str(latency.cache_folder()) in caplog.text


def test_keeping_all_of_the_latency_gives_the_dense_model() -> None:
    model = FisherPruner(tiny("bert"), FisherConfig(keep=1.0, budget="latency")).prune(many())
    assert torch.equal(outputs(model, batches()[0]), outputs(tiny("bert"), batches()[0]))


def test_a_budget_below_what_cannot_be_pruned_is_refused(clock: Clock) -> None:
    model = slow(tiny("bert"), 0.5, 0.02, 30)
    pruner = FisherPruner(model, FisherConfig(keep=0.3, budget="latency"))
    with pytest.raises(ValueError, match=r"keep=0.3 of \d+\.\d+ ms on cpu .* asked, but one head and 8 neurons .* make 0\.[89]"):
        pruner.prune(many())
    assert model.config.to_dict().get("stat_pruning") is None


def saved(tmp_path: Path, model: nn.Module, **changes: Any) -> str:
    sizes = {group.name: sizes_to_try(group, 8) for group in find_groups(model)}
    times = {name: [100 * size for size in own] for name, own in sizes.items()}
    values = {"device": describe_device(model), "batch_size": 1, "seq_len": 6, "total": 20_000, "sizes": sizes, "times": times}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**values, **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"device": "cuda (NVIDIA H100), float32"},
            r"measured on cuda \(NVIDIA H100\), float32.*the model is on cpu.*leave latency_table out",
        ),
        ({"batch_size": 32}, "batches of 32, but 1 is asked"),
        ({"sizes": {"0.heads": [1, 2]}}, r"another model's: of 0.heads it has the sizes \[1, 2\]"),
        ({"times": {}}, "another model's"),
        ({"colour": 1}, "holds no table of latencies"),
    ],
)
def test_a_table_that_does_not_belong_here_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = tiny("bert")
    pruner = FisherPruner(model, FisherConfig(budget="latency", latency_table=saved(tmp_path, model, **changes)))
    with pytest.raises(ValueError, match=said):
        pruner.prune(many())


def test_a_device_that_vanished_is_said_to_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = saved(tmp_path, tiny("bert"), device="cuda (NVIDIA H100), float32")
    with pytest.raises(ValueError, match="which this machine does not have"):
        latency_table(tiny("bert"), 8, 1, 6, path)


@pytest.mark.parametrize("text", [None, "[1, 2]", "{", '{"latency_table": 3}'])
def test_a_file_without_a_table_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="holds no table of latencies"):
        latency_table(tiny("bert"), 8, 1, 6, str(path))


def test_a_table_for_examples_of_another_length_is_said_to_be_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("bert")
    latency_table(model, 8, 1, 6, saved(tmp_path, model))
    assert caplog.text == ""
    latency_table(model, 8, 1, 20, saved(tmp_path, model))
    assert "are for 6 tokens an example; the mean of the calibration data is 20" in caplog.text


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(latency, "cache_folder", lambda: tmp_path / "file" / "below")
    table = LatencyTable("cpu", 1, 6, 7, {"0.heads": [1]}, {"0.heads": [5]})
    monkeypatch.setattr(latency, "measure_table", lambda *_: table)
    assert latency_table(tiny("bert"), 8, 1, 6, None) is table
    assert "could not be remembered" in caplog.text


def test_a_staircase_is_used_to_its_edges(tmp_path: Path) -> None:
    """Where 8 to 32 neurons take the same time, nobody ends with 8, 16 or 24."""
    model = tiny("bert")
    path = saved(tmp_path, model, times={n: [100, 100, 100, 100] if "heads" in n else [100, 100, 100, 100, 900, 1000] for n in
                                         ("0.heads", "0.neurons", "1.heads", "1.neurons")}, total=5000)  # fmt: skip
    pruner = FisherPruner(model, FisherConfig(keep=0.7, budget="latency", latency_table=path))
    pruner.prune(many())
    assert {g.name: g.kept for g in pruner.report.groups} == {"0.heads": 4, "0.neurons": 32, "1.heads": 4, "1.neurons": 32}
    assert len(find_blocks(model)) == 2


def test_the_published_stat_has_no_latency_budget() -> None:
    with pytest.raises(ValueError, match=r"budget='latency' asked of the published algorithm.*macs"):
        STATConfig.paper(budget="latency")


def test_tables_are_remembered_under_the_hubs_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.undo()
    from huggingface_hub import constants

    with caplog.at_level(logging.INFO):
        assert latency.cache_folder().is_relative_to(constants.HF_HOME)
