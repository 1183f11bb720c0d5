"""What a run would take, from the config alone, beside what is there and what runs take."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES, VOCAB, tiny

from optimum_stat import STATConfig, STATPruner, halted
from optimum_stat.budget import model_cost
from optimum_stat.commands import main
from optimum_stat.device_speed import Speeds
from optimum_stat.families import find_blocks, find_groups
from optimum_stat.run_plan import RunPlan, plan_run

FAST = Speeds("a device", forward=1e9, element=math.inf, gram=1e9, factor=1e9, elimination=1e9, unit=0.0)


def planned(model: Any, folder: Path, **asked: Any) -> RunPlan:
    """The plan of a model of which only the config is there."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    placing = {name: asked.pop(name) for name in ("max_memory", "dtype") if name in asked}
    return plan_run(str(folder), STATConfig(**{"round_to": 1, "num_tokens": 1000, "seq_len": 20, **asked}), **placing)


@pytest.fixture(autouse=True)
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speeds, "measure", lambda device, dtype: FAST)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "falcon, one key head"])
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_sizes_are_those_of_the_model(family: str, budget: str, tmp_path: Path) -> None:
    model = tiny(family)
    found = planned(model, tmp_path, keep=0.7, budget=budget)
    assert found.dense.params == sum(p.numel() for p in model.parameters())
    assert found.dense.block_params == sum(p.numel() for p in find_blocks(model).parameters())
    assert found.bytes_before == 4 * found.dense.params
    assert found.bytes_before - found.bytes_after == 4 * (found.dense.params - found.pruned.params)
    share = getattr(found.pruned, f"block_{budget}") / getattr(found.dense, f"block_{budget}")
    assert 0.45 < share <= 0.7  # two heads a block: a coarse choice


def test_images_are_planned_at_the_length_that_they_have(tmp_path: Path) -> None:
    found = planned(tiny("vit"), tmp_path, max_examples=30)
    assert (found.seq_len, found.num_tokens) == (10, 300)  # nine patches and one for all
    assert found.dense.block_macs == model_cost(tiny("vit"), "macs", 10)


def test_a_plan_is_as_small_as_what_is_pruned(tmp_path: Path) -> None:
    """Every group keeps another share, but all together the same."""
    model = tiny("llama", hidden_size=64, intermediate_size=400)
    found = planned(model, tmp_path, keep=0.7)
    data = torch.randint(3, VOCAB, (50, 20))
    pruner = STATPruner(model, STATConfig(keep=0.7, round_to=1))
    pruner.prune(data)
    assert pruner.report.pruned.params == pytest.approx(found.pruned.params, rel=0.02)


def test_statistics_and_activations(tmp_path: Path) -> None:
    found = planned(tiny("llama"), tmp_path, dtype="bfloat16")
    assert found.statistics_bytes == 8 * (32**2 + 44**2) + 16 * 44**2
    assert found.activation_bytes == 2 * 1000 * 32
    assert found.resident_bytes + 2 * found.block_bytes == found.bytes_before


def test_experts_have_statistics_of_their_own(tmp_path: Path) -> None:
    """One matrix an expert, and while they are open every token goes through all four, not through two."""
    model = tiny("mixtral")
    found = planned(model, tmp_path, metric="stream")
    experts, neurons, hidden = 4, 48, 32
    assert found.statistics_bytes == 8 * (32**2 + experts * neurons**2) + 16 * neurons**2
    stages = {stage.name: stage.macs for stage in found.stages}
    opened = 50 * found.dense.block_macs + 1000 * 2 * 2 * 3 * neurons * hidden  # two blocks, two experts more, three matrices
    assert stages["forward pass"] == pytest.approx(opened, rel=0.02)
    assert stages["Gram matrices"] == pytest.approx(0.58 * 1000 * 2 * (32**2 + 2 * neurons**2))
    assert min(stages.values()) > 0


def test_time_is_work_by_speed(tmp_path: Path) -> None:
    """One speed for everything: seconds are proportional to forward passes, and the floor is one pass and its blocks."""
    for family in ("llama", "bert"):
        found = planned(tiny(family), tmp_path, metric="stream")
        assert found.seconds == pytest.approx(found.forwards * found.forward_seconds)
        assert found.forward_seconds == pytest.approx((50 * found.dense.block_macs + 1000 * 32 * VOCAB) / 1e9)
        assert found.forwards > 1.5
        more = planned(tiny(family), tmp_path, metric="fisher")
        assert more.forwards == pytest.approx(found.forwards + 3)  # all tokens, as there are so few
        assert str(found.seconds)[:3] in str(found.to_dict()["seconds"])


def test_blocks_wait_while_they_are_corrected_or_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that waits all runs once, what goes included, but for the consumers, which read what stays."""
    model = tiny("llama")
    found = {stage.name: stage.macs for stage in planned(model, tmp_path, metric="stream", keep=0.5).stages}
    consumers = sum(group.consumer.weight.numel() for group in find_groups(model))
    waiting = found["forward pass"] - 1000 * consumers / 2
    assert found["forward passes of the corrections"] == pytest.approx(waiting, rel=0.02)
    monkeypatch.setattr(halted, "ROOM", 0)
    again = {stage.name: stage.macs for stage in planned(model, tmp_path, metric="stream", keep=0.5).stages}
    twice = found["forward pass"] / 2 + found["forward pass"] - 1000 * consumers
    assert twice < again.pop("forward passes of the corrections") < twice + found["forward pass"] / 2
    assert again == {name: macs for name, macs in found.items() if name in again}


def test_what_stands_between_the_linears_takes_time_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(tiny("llama"), tmp_path)
    monkeypatch.setattr(Speeds, "measure", lambda device, dtype: dataclasses.replace(FAST, element=1e6))
    slower = planned(tiny("llama"), tmp_path)
    elements = 2 * (2 * 4 * 32 + 44 + 32 + 3 * 32 + 4 * 20)  # two blocks: stream twice, neurons, heads, rotations, scores
    assert slower.forward_seconds - found.forward_seconds == pytest.approx(1000 * elements / 1e6)
    assert slower.seconds > found.seconds
    assert slower.forwards == found.forwards


def test_what_does_not_fit_is_placed_elsewhere(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=6)
    sizes = planned(model, tmp_path, max_memory={"cpu": 4 * 40_000})
    assert sum(sizes.placement.values()) == pytest.approx(sizes.bytes_before, abs=100)  # and the buffers
    assert sizes.placement["disk"] > sizes.block_bytes
    assert sizes.placement["cpu"] <= 160_000
    assert planned(model, tmp_path).placement == {}


def test_speeds_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("optimum_stat.device_speed.WIDTH", 256)
    found = Speeds.measure(torch.device("cpu"), torch.float32)
    assert min(found.forward, found.gram, found.factor, found.elimination) > 1e6
    assert "CPU" in found.device


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama")
    planned(model, tmp_path)
    asked = ["plan", "-m", str(tmp_path), "--keep", "0.7", "--round-to", "1", "--max-memory", "cpu=40000"]
    main([*asked, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["dense"]["params"] == sum(p.numel() for p in model.parameters())
    assert {"disk"} <= found["placement"].keys()
    main(asked)
    text = capsys.readouterr().out
    assert "weights with this max_memory: " in text
    assert f"{found['dense']['params']:,}" in text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--max-memory", "8GiB"], 2, "--max-memory 8GiB asked; it takes DEVICE=SIZE"),
        (["--keep", "0.0001"], 1, "keep=0.0001 of"),
        (["--dtype", "int8"], 1, "dtype='int8' asked"),
        (["--num-tokens", "none"], 1, "needs to know how many tokens"),
        (["--budget", "latency"], 1, "Only runs of our own recipe can be planned from the config alone"),
        (["--keep", "2"], 2, "keep=2.0 asked"),
    ],
)
def test_mistakes(arguments: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(tiny("llama"), tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["plan", "-m", str(tmp_path), *arguments])
    assert caught.value.code == code
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.full) for family in SIZES])
def test_every_family_has_a_plan(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    assert planned(model, tmp_path, keep=0.9).dense.params == sum(p.numel() for p in model.parameters())
