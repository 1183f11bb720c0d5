"""Latency tables: what is timed, what is remembered, what is predicted, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batches, many, outputs, tiny
from torch import nn

from optimum_stat import (
    FisherConfig,
    FisherPruner,
    STATConfig,
    STATPruner,
    SurgeonConfig,
    SurgeonPruner,
    journal,
    latency,
    latency_cache,
    latency_timing,
    timing,
)
from optimum_stat.budget import options
from optimum_stat.families import find_blocks, find_groups
from optimum_stat.latency import LatencyTable
from optimum_stat.latency_cache import latency_table
from optimum_stat.latency_timing import measure_table
from optimum_stat.probes import caches_in, quiet
from optimum_stat.profiling import profile
from optimum_stat.slicing import slice_model
from optimum_stat.speed import side_by_side
from optimum_stat.timing import Setting, Workload, longest

MS = 1_000_000


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tables are remembered in the test's own folder."""
    folder = tmp_path / "latencies"
    monkeypatch.setattr(latency, "cache_folder", lambda: folder)
    monkeypatch.setattr(timing, "PAIRS", (3, 3))  # what takes how long does not matter here, or the clock below decides
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
    monkeypatch.setattr(timing, "time", CLOCK)
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


def prefill(model: Any, batch_size: int, seq_len: int) -> Setting:
    return Setting.of(model, "prefill", batch_size, seq_len)


@pytest.fixture
def table(clock: Clock) -> LatencyTable:
    model = slow(tiny("bert"), 2, 0.2, 10)
    with quiet(model):
        return measure_table(model, 8, prefill(model, 1, 6))


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
    assert table.fixed(all_costs) == table.total - sum(own[-1] for own in all_costs.values())


def test_whole_models_say_how_the_times_add_up(clock: Clock) -> None:
    """What a large model costs more than its blocks do is not seen in any of them: here the square of its width."""

    def extra(model: Any, _: Any) -> None:
        CLOCK.now += round(5e-4 * sum(group.consumer.in_features for group in find_groups(model)) ** 2 * MS)

    model = slow(tiny("bert"), 2, 0.2, 10)
    model.register_forward_pre_hook(extra)
    with quiet(model):
        table = measure_table(model, 8, prefill(model, 1, 6))
    (full, total), width = table.whole[-1], 2 * (44 + 32)
    assert full == total == table.total == pytest.approx((10 + 2 * (4 * 2 + 44 * 0.2) + 5e-4 * width**2) * MS, rel=1e-3)
    assert len(table.whole) == 4  # a quarter of the units is as few as there may be
    for heads, neurons in ((4, 32), (3, 24), (2, 24), (2, 16), (1, 8)):
        taken = (10 + 2 * (heads * 2 + neurons * 0.2) + 5e-4 * (2 * (neurons + 8 * heads)) ** 2) * MS
        kept = {f"{block}.{name}": own for block in (0, 1) for name, own in (("heads", heads), ("neurons", neurons))}
        added = table.added(kept)
        assert added > 1.02 * taken
        assert table.predicted(kept) == pytest.approx(taken, rel=0.02)
        assert table.predicted(kept) == table.taken(added)
        assert table.limit(taken) == pytest.approx(added, rel=0.02)


def test_a_limit_is_the_most_that_takes_no_longer() -> None:
    setting = prefill(tiny("bert"), 1, 6)
    table = LatencyTable(setting, 90, {}, {}, [[10, 20], [30, 40], [50, 40], [60, 90]])
    assert [table.limit(each) for each in (20, 30, 40, 65, 90)] == [10, 20, 50, 55, 60]
    assert [table.taken(each) for each in (10, 20, 50, 55, 60)] == [20, 30, 40, 65, 90]
    assert table.limit(15) < 10  # less than any model takes: no plan has it
    assert table.limit(91) >= 60


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_timing_changes_nothing(phase: str) -> None:
    model = tiny("llama")
    state = copy.deepcopy(model.state_dict())
    with quiet(model):
        measure_table(model, 8, Setting.of(model, phase, 2, 5))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(outputs(model, batches()[0]), outputs(tiny("llama"), batches()[0]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("neurons", "round_to"), [(1536, 8), (3072, 64), (44, 8), (100, 1), (2752, 8)])
def test_at_most_32_numbers_of_neurons_are_tried_and_all_are_multiples(clock: Clock, neurons: int, round_to: int) -> None:
    model = slow(tiny("bert", num_hidden_layers=1, intermediate_size=neurons), 2, 0.2, 10)
    with quiet(model):
        sizes = measure_table(model, round_to, prefill(model, 1, 6)).sizes["0.neurons"]
    assert len(sizes) == min(32, len(options(find_groups(model)[1], round_to)))
    assert sizes[-1] == neurons
    assert list(sizes) == sorted(sizes)
    assert all(size % round_to == 0 for size in sizes[:-1])


def test_sizes_are_tried_where_the_steps_are(clock: Clock) -> None:
    """A device that takes 128 neurons at once: every step's last cheap size is found, of 192 that there are."""
    model = tiny("bert", num_hidden_layers=1, intermediate_size=1536)
    down = find_groups(model)[1].consumer
    down.register_forward_pre_hook(lambda _, args: setattr(CLOCK, "now", CLOCK.now + -(-args[0].shape[-1] // 128) * 10 * MS))
    with quiet(model):
        table = measure_table(model, 8, prefill(model, 1, 6))
    sizes, times = table.sizes["0.neurons"], dict(zip(table.sizes["0.neurons"], table.times["0.neurons"], strict=True))
    edges = [size for size in sizes if size % 128 == 0]
    assert len(edges) == 12, sizes
    assert len(sizes) < 33
    for edge in edges:
        assert times[edge] == pytest.approx(times[1536] * edge / 1536, rel=0.01)


def test_blocks_of_one_kind_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    plain = latency_timing._time_block
    monkeypatch.setattr(
        latency_timing, "_time_block", lambda work, index, *rest: timed.append(index) or plain(work, index, *rest)
    )
    for family, changes, wanted in (
        ("bert", {"num_hidden_layers": 3}, [0]),
        ("qwen2", {}, [0, 1]),
    ):  # a sliding window is another kind
        timed.clear()
        with quiet(model := tiny(family, **changes)):
            measure_table(model, 44, prefill(model, 1, 8))
        assert timed == wanted


def test_a_table_is_remembered_for_this_device_batch_and_shape(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Setting] = []

    def measure(model: Any, round_to: int, setting: Setting) -> LatencyTable:
        measured.append(setting)
        return LatencyTable(setting, 7, {"0.heads": [1]}, {"0.heads": [5]}, [[0, 0], [7, 7]])

    def look_up(phase: str = "prefill", compiled: bool = False, sizes: tuple[int, int] = (1, 6), round_to: int = 8, **model: Any):
        own = model.pop("model", None) or tiny("llama", **model)
        return latency_table(own, round_to, Setting.of(own, phase, *sizes, compiled))

    monkeypatch.setattr(latency_cache, "measure_table", measure)
    first = look_up()
    assert look_up(seed=1) == first
    assert len(measured) == 1
    others: list[dict[str, Any]] = [
        {"sizes": (2, 6)},
        {"sizes": (1, 7)},
        {"intermediate_size": 40},
        {"model": tiny("llama").double()},
        {"round_to": 4},
        {"phase": "decode"},
        {"compiled": True},
        {"attn_implementation": "eager"},
        {"vocab_size": 99},
        {"hidden_act": "gelu"},
    ]
    for other in others:
        look_up(**other)
        look_up(**other)
    assert len(measured) == len(list(memory.iterdir())) == 1 + len(others)


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
    assert recipe["latency_table"]["setting"] == own.currency.table.setting.to_dict()
    assert recipe["report"]["latency"]["batch_size"] == 1
    assert recipe["report"]["latency"]["phase"] == "prefill"
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert f"{found.asked:.2f} ms" in card
    assert "--budget latency" in card
    again = pruner(tiny("bert"), config(keep=0.7, budget="latency", latency_table=str(tmp_path / "pruned" / "stat_recipe.json")))
    again.prune(many())
    assert again.currency.table == own.currency.table


def test_milliseconds_are_a_share_of_what_the_model_takes(clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def pruned(config: FisherConfig) -> FisherPruner:
        pruner = FisherPruner(slow(tiny("bert"), 2, 0.2, 10), config)
        pruner.prune(many())
        return pruner

    found = pruned(FisherConfig(budget="latency", milliseconds=30.0))
    latency = found.report.latency
    assert latency is not None
    assert latency.asked == pytest.approx(30.0)
    assert 28 < latency.measured <= 30
    same = pruned(FisherConfig(budget="latency", keep=30.0 / latency.dense))
    assert [group.kept for group in found.report.groups] == [group.kept for group in same.report.groups]
    found.save_pretrained(tmp_path / "pruned")
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "--milliseconds 30.0" in card
    assert "--keep" not in card
    with pytest.raises(ValueError, match=r"keep=0\.\d+ of .* ms for .* asked, but one head and 8 neurons"):
        pruned(FisherConfig(budget="latency", milliseconds=11.0))
    with pytest.raises(ValueError, match=r"milliseconds=30.0 asked of a sweep"):
        list(FisherPruner(slow(tiny("bert"), 2, 0.2, 10), found.config).sweep(many(), [0.8]))
    assert "as it is" not in caplog.text
    assert pruned(FisherConfig(budget="latency", milliseconds=100.0)).report.reached == 1
    assert "100.0 ms asked; the model takes 43.6" in caplog.text


@pytest.mark.parametrize("asked", [{"milliseconds": 0.0, "budget": "latency"}, {"milliseconds": 20.0, "budget": "macs"}])
def test_milliseconds_without_a_latency_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"milliseconds=.*asked under budget=.*a time above 0, under budget=\"latency\""):
        STATConfig(**asked)


def test_models_are_timed_until_one_takes_as_long_as_was_predicted(clock: Clock, tmp_path: Path) -> None:
    """Here heads and neurons of one block share what they take: no sum of their times says so, nor what is small throughout."""

    def extra(model: Any, _: Any) -> None:
        heads, neurons = (sum(group.units for group in find_groups(model)[at::2]) for at in (0, 1))
        CLOCK.now += round(abs(heads / 8 - neurons / 88) * 20 * MS)

    model = slow(tiny("bert"), 2, 0.2, 10)
    model.register_forward_pre_hook(extra)
    pruner = FisherPruner(model, FisherConfig(keep=0.7, budget="latency"))
    pruner.prune(many())
    found, table = pruner.report.latency, pruner.currency.table
    assert found is not None
    assert table is not None
    assert table.whole != latency_table(tiny("bert"), 8, table.setting).whole, "nothing was learned: the test is none"
    assert found.measured == pytest.approx(found.predicted, rel=0.03)
    assert found.measured <= 1.03 * found.asked
    pruner.save_pretrained(tmp_path / "pruned")
    again = FisherPruner(
        tiny("bert"), FisherConfig(keep=0.7, budget="latency", latency_table=str(tmp_path / "pruned" / "stat_recipe.json"))
    )
    again.prune(many())
    assert [group.kept for group in again.report.groups] == [group.kept for group in pruner.report.groups]


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
    with pytest.raises(
        ValueError,
        match=r"keep=0.3 of \d+\.\d+ ms for a forward pass .* asked, but one head and 8 neurons .* make 0\.[89]",
    ):
        pruner.prune(many())
    assert model.config.to_dict().get("stat_pruning") is None


def saved(tmp_path: Path, model: nn.Module, /, **changes: Any) -> str:
    sizes = {group.name: options(group, 8) for group in find_groups(model)}
    times = {name: [100 * size for size in own] for name, own in sizes.items()}
    setting = prefill(model, 1, 6).to_dict()
    setting |= {name: changes.pop(name) for name in list(changes) if name in setting}
    total = changes.pop("total", 20_000)
    values = {"setting": setting, "total": total, "sizes": sizes, "times": times, "whole": [[0, 0], [total, total]]}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**values, **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"device": "cuda (NVIDIA H100)"},
            r"measured on cuda \(NVIDIA H100\), float32.*the model is on cpu.*leave latency_table out",
        ),
        ({"dtype": "bfloat16"}, r"measured on cpu .*, bfloat16.*; the model is on cpu .*, float32"),
        ({"batch_size": 32}, "are of a forward pass over 32 × 6 tokens, .* but a forward pass over 1 × 20 tokens, .* is asked"),
        ({"phase": "decode"}, "are of one token each behind 1 × 6 tokens"),
        ({"compiled": True}, "sdpa, compiled, but"),
        ({"sizes": {"0.heads": [1, 2]}}, r"another model's.*: of 0.heads it has the sizes \[1, 2\]"),
        (
            {
                "sizes": {f"{b}.{s}": [3, 4] if s == "heads" else [5, 44] for b in (0, 1) for s in ("heads", "neurons")},
                "times": {f"{b}.{s}": [1, 2] for b in (0, 1) for s in ("heads", "neurons")},
            },
            "of 0.neurons it has the sizes",
        ),
        ({"times": {}}, "another model's"),
        ({"model": "0123"}, "another model's: its weights have other shapes"),
        ({"total": 0}, "holds no table of latencies: the dense model takes 0 nanoseconds in it"),
        ({"total": "8"}, "holds no table of latencies"),
        ({"seq_len": "99"}, "holds no table of latencies: its seq_len is '99', no int"),
        ({"sizes": {"0.heads": [2, 1, 4]}}, r"of 0.heads it has the sizes \[2, 1, 4\]"),
        ({"times": {"0.heads": [float("nan")] * 4}}, "in .*nan.* nanoseconds"),
        ({"times": {"0.heads": [-5, 1, 2, 3]}}, r"in \[-5, 1, 2, 3\] nanoseconds"),
        ({"whole": []}, r"whole models take \[\] nanoseconds"),
        ({"whole": [[20_000, 20_000]]}, "whole models take"),
        ({"whole": [[20_000, 20_000], [0, 0]]}, "whole models take"),
        ({"whole": [[0, 0], [20_000, 19_000]]}, r"whole models take .*19000\]\] nanoseconds in it, the dense one 20000"),
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
    model = tiny("bert")
    path = saved(tmp_path, model, device="cuda (NVIDIA H100)")
    with pytest.raises(ValueError, match="which this machine does not have"):
        latency_table(model, 8, prefill(model, 1, 6), path)


@pytest.mark.parametrize("text", ["{", "{}", "null", "[]", '{"setting": 3}'])
def test_a_damaged_memory_is_measured_again(text: str, memory: Path, caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    model = slow(tiny("bert"), 2, 0.2, 10)
    with quiet(model):
        first = latency_table(model, 8, prefill(model, 1, 6))
        (file,) = memory.iterdir()
        file.write_text(text)
        assert latency_table(model, 8, prefill(model, 1, 6)) == first
    assert f"The latencies in {file} cannot be read and are measured again" in caplog.text
    assert json.loads(file.read_text()) == json.loads(json.dumps(first.to_dict()))


@pytest.mark.parametrize("text", [None, "[1, 2]", "{", '{"latency_table": 3}'])
def test_a_file_without_a_table_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="holds no table of latencies"):
        latency_table(tiny("bert"), 8, prefill(tiny("bert"), 1, 6), str(path))


def test_a_table_for_examples_of_another_length_is_said_to_be_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("bert")
    latency_table(model, 8, prefill(model, 1, 6), saved(tmp_path, model))
    assert caplog.text == ""
    latency_table(model, 8, prefill(model, 1, 20), saved(tmp_path, model))
    assert "are for 6 tokens an example; asked, or the mean of the calibration data, is 20" in caplog.text


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(latency, "cache_folder", lambda: tmp_path / "file" / "below")
    setting = prefill(tiny("bert"), 1, 6)
    table = LatencyTable(setting, 7, {"0.heads": [1]}, {"0.heads": [5]}, [[0, 0], [7, 7]])
    monkeypatch.setattr(latency_cache, "measure_table", lambda *_: table)
    assert latency_table(tiny("bert"), 8, setting) is table
    assert "could not be remembered" in caplog.text


def test_a_full_disk_leaves_nothing_behind(
    memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, setting = Path.write_bytes, prefill(tiny("bert"), 1, 6)

    def write_bytes(path: Path, content: bytes) -> None:
        original(path, content[:9])
        raise OSError(28, "No space left on device")

    table = LatencyTable(setting, 7, {"0.heads": [1]}, {"0.heads": [5]}, [[0, 0], [7, 7]])
    monkeypatch.setattr(latency_cache, "measure_table", lambda *_: table)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert latency_table(tiny("bert"), 8, setting) is table
    assert "No space left on device" in caplog.text
    assert list(memory.iterdir()) == []


class Stopped(Exception):
    """The power went off."""


@pytest.mark.parametrize("asked", [{"keep": 0.7}, {"milliseconds": 30.0}])
def test_a_run_that_goes_on_counts_with_the_times_it_had(
    asked: dict[str, float], clock: Clock, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that are cut already would not fit what others say: here heads take four times as long when it goes on."""

    def run(per_head: float, folder: str) -> tuple[Any, Any]:
        for file in memory.glob("*"):
            file.unlink()
        pruner = STATPruner(slow(tiny("bert"), per_head, 0.2, 10), STATConfig(budget="latency", round_to=1, **asked))
        pruner.prune(many(), resume_from_checkpoint=tmp_path / folder)
        return {group.name: group.kept for group in pruner.report.groups}, pruner.model.state_dict()

    original = journal.Journal.keep

    def keep(self: Any, key: str, *arguments: Any, **named: Any) -> None:
        original(self, key, *arguments, **named)
        if key.startswith("Correcting") and key.endswith("behind 0"):
            raise Stopped

    sizes, weights = run(2, "whole")
    assert run(8, "other")[0] != sizes, "the times do not matter: the test is none"
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "keep", keep)
        with pytest.raises(Stopped):
            run(2, "cut")
    found = run(8, "cut")
    assert found[0] == sizes
    assert all(torch.equal(found[1][name], value) for name, value in weights.items())


@pytest.mark.parametrize(("phase", "most"), [("prefill", 64), ("decode", 63)])
def test_no_more_positions_are_timed_than_there_are(phase: str, most: int) -> None:
    model = tiny("gpt2", n_positions=64)
    with quiet(model):
        Workload(model, Setting.of(model, phase, 1, most)).run_model()()
        with pytest.raises(ValueError, match=f"has positions for {most} tokens.*: lower serve_seq_len"):
            Workload(model, Setting.of(model, phase, 1, most + 1))
    assert side_by_side(model, model, 1, 500, phase).seq_len == most


def test_which_models_have_positions_for_so_many_tokens() -> None:
    found = {family: longest(tiny(family), "prefill") for family in ("bert", "roberta", "opt", "llama")}
    assert found == {family: most for family, most in found.items() if most is None or works(tiny(family), most)}
    assert [family for family, most in found.items() if most is None] == ["llama"]
    assert not any(works(tiny(family), most + 1) for family, most in found.items() if most is not None)


def works(model: Any, length: int) -> bool:
    try:
        model(torch.full((1, length), 5))
    except (IndexError, RuntimeError):
        return False
    return True


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bloom"])
def test_decoding_leaves_the_cache_as_it_was(family: str) -> None:
    """Run after run reads the same `seq_len` tokens from the cache, and the result is what the model generates with."""
    model = tiny(family)
    with quiet(model):
        work = Workload(model, Setting.of(model, "decode", 2, 5))
        (cache,) = caches_in(work._inputs).values()
        before = [(layer.keys.clone(), layer.get_seq_length()) for layer in cache.layers]
        run, calls = work.run_model(), work.calls()
        for _ in range(2):
            run()
            work.run_block(1, calls[1][0])()
            work.run_without_blocks(calls)()
        assert all(
            torch.equal(layer.keys, keys) and layer.get_seq_length() == length
            for layer, (keys, length) in zip(cache.layers, before, strict=True)
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon, one key head"])
def test_a_smaller_block_decodes_with_its_own_cache(family: str) -> None:
    model, seen = tiny(family), []
    with quiet(model):
        work = Workload(model, Setting.of(model, "decode", 2, 5))
        call = work.calls()[1][0]
        for group in find_groups(model)[2:]:
            for size in range(1, group.units + 1, 3):
                work.run_block(1, call, group.structure, size)()
                seen.append(size)
    assert len(seen) > 4


def test_decoding_costs_what_one_token_costs(clock: Clock) -> None:
    model = tiny("llama")
    for block in find_blocks(model):
        block.register_forward_pre_hook(
            lambda _, args: setattr(CLOCK, "now", CLOCK.now + args[0].shape[0] * args[0].shape[1] * MS)
        )
    with quiet(model):
        assert measure_table(model, 44, Setting.of(model, "decode", 3, 7)).total == 2 * 3 * MS
        assert measure_table(model, 44, prefill(model, 3, 7)).total == 2 * 3 * 7 * MS


def test_models_without_a_cache_do_not_decode() -> None:
    with pytest.raises(ValueError, match="Decoding asked of BertForMaskedLM, which keeps no keys and values"):
        FisherPruner(tiny("bert"), FisherConfig(budget="latency", serve_phase="decode")).prune(many())
    with pytest.raises(ValueError, match="serve_phase='generate' asked; it must be one of 'prefill', 'decode'"):
        FisherConfig(serve_phase="generate")


def test_a_latency_budget_for_decoding(clock: Clock) -> None:
    model = slow(tiny("llama"), 2, 0.2, 10)
    pruner = FisherPruner(
        model, FisherConfig(keep=0.7, budget="latency", serve_phase="decode", serve_seq_len=9, serve_batch_size=2)
    )
    pruner.prune(many())
    found = pruner.report.latency
    assert found is not None
    assert (found.phase, found.batch_size, found.seq_len) == ("decode", 2, 9)
    assert found.measured == pytest.approx(found.predicted, rel=1e-3)
    assert found.measured <= 0.7 * found.dense


def test_a_profile_is_remembered_for_prune(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "dense")
    found = profile(str(tmp_path / "dense"), FisherConfig(serve_seq_len=9), task=None, device=None)
    text = str(found)
    half = profile(str(tmp_path / "dense"), FisherConfig(serve_seq_len=9), task=None, device=None, dtype="bfloat16")
    assert str(half).endswith("--round-to 8 --dtype bfloat16")
    assert re.search(r"blocks +group +units +ms of a block +of dense +of the model\n0-1 +heads +4 ", text)
    assert text.endswith("--budget latency --serve-phase prefill --serve-batch-size 1 --serve-seq-len 9 --round-to 8")
    pruner = FisherPruner.from_pretrained(tmp_path / "dense", FisherConfig(keep=1.0, budget="latency", serve_seq_len=9))
    pruner.prune(many())
    assert pruner.currency.table == found.table
    (tmp_path / "table.json").write_text(json.dumps(found.to_dict()))
    setting = found.table.setting
    assert latency_table(tiny("bert"), 8, setting, str(tmp_path / "table.json")) == found.table


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from inside its compiler
def test_compiled_models_are_timed_compiled() -> None:
    model = tiny("llama", num_hidden_layers=1)
    with quiet(model):
        table = measure_table(model, 44, Setting.of(model, "prefill", 1, 5, compiled=True))
    assert table.setting.compiled
    assert 0 < table.times["0.heads"][-1] <= table.total
