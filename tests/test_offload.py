"""A model whose blocks lie on the disk or the CPU is pruned with one block in memory at a time: the same model, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import many, outputs, tiny
from torch import nn
from transformers import AutoModelForCausalLM, modeling_utils

from optimum_stat import FisherConfig, FisherPruner, STATConfig, STATPruner, SurgeonConfig, SurgeonPruner
from optimum_stat.activations import Activations
from optimum_stat.blocks import find_blocks
from optimum_stat.commands import main
from optimum_stat.gradients import output_worth
from optimum_stat.offload import brought_in, is_offloaded
from optimum_stat.walk import BlockWalk

RUNS: dict[str, tuple[Any, Any]] = {
    "stat, stream": (STATPruner, STATConfig(keep=0.6, round_to=1, metric="stream")),
    "stat": (STATPruner, STATConfig(keep=0.6, round_to=1)),
    "stat, paper": (STATPruner, STATConfig.paper(keep=0.6)),
    "stat, values": (STATPruner, STATConfig(keep=0.5, round_to=1, structures=("heads", "neurons", "values"))),
    "stat, pairs and values": (STATPruner, STATConfig(keep=0.5, round_to=1, structures=("neurons", "pairs", "values"))),
    "fisher": (FisherPruner, FisherConfig(keep=0.6, round_to=1)),
    "surgeon": (SurgeonPruner, SurgeonConfig(keep=0.6, round_to=1, shots=2)),
    "surgeon, paper": (SurgeonPruner, SurgeonConfig.paper(keep=0.6, shots=2, structure="units")),
}


def dense(family: str, folder: Path) -> nn.Module:
    model = tiny(family, **{"n_layer" if family == "bloom" else "num_hidden_layers": 4})
    model.save_pretrained(folder)
    return model


def placed(model: Any, on_cpu: tuple[int, ...] = (1,)) -> dict[str, str]:
    """A device_map with all blocks on the disk but some, and everything else on the CPU."""
    path, found = next(name for name, module in model.named_modules() if module is find_blocks(model)), {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if name and parent in ("", *(path[:i] for i, letter in enumerate(path) if letter == ".")) and not path.startswith(name):
            found[name] = "cpu"
        elif parent == path:
            found[name] = "cpu" if int(name.rpartition(".")[2]) in on_cpu else "disk"
        elif name == path or not any(True for _ in module.parameters()):
            continue
    return found


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


COMBINED = [(run, family) for run in RUNS for family in ("llama", "bloom")]
IN_TURN = COMBINED[::4] + COMBINED[3::4]  # each run once, with either family
OF_EXPERTS = [(run, family) for run in RUNS if run != "stat, paper" for family in ("mixtral", "gpt_oss", "qwen2_moe")]
FEW = [("stat", "gpt_oss"), ("fisher", "mixtral"), ("surgeon", "qwen2_moe")]


@pytest.mark.parametrize(
    ("run", "family"),
    [
        *IN_TURN,
        *FEW,
        *(pytest.param(*each, marks=pytest.mark.full) for each in COMBINED if each not in IN_TURN),
        *(pytest.param(run, "bert", marks=pytest.mark.full) for run in RUNS),
        *(pytest.param(*each, marks=pytest.mark.full) for each in OF_EXPERTS if each not in FEW),
    ],
)
def test_the_result_is_that_of_a_model_in_memory(run: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, config = RUNS[run]
    family = "qwen2" if "values" in run and family == "bloom" else family  # one linear makes all of it there
    family = "gemma2" if "pairs" in run and family == "bert" else family  # which turns nothing
    placing: dict[str, Any] = {"device_map": placed(dense(family, tmp_path / "dense")), "offload_folder": tmp_path / "offload"}
    whole = method.from_pretrained(tmp_path / "dense", config)
    whole.prune(many())
    whole.save_pretrained(tmp_path / "whole")
    pruner = method.from_pretrained(tmp_path / "dense", config, **placing)
    most = _watched(monkeypatch)
    pruner.prune(many())
    assert max(most) == (run != "surgeon, paper"), "blocks on the disk that are in memory at the same time"
    assert is_offloaded(pruner.model)
    pruner.save_pretrained(tmp_path / "pruned")
    expected, found = written(tmp_path / "whole"), written(tmp_path / "pruned")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    timed = dict.fromkeys(("stages", "forward_seconds", "forward_passes"))
    assert pruner.report.to_dict() | timed == whole.report.to_dict() | timed
    assert torch.equal(outputs(pruner.model, many()[0]), outputs(whole.model, many()[0])), "and it runs where it is"


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many offloaded blocks are in memory whenever a block is run."""
    seen, forward = [0], BlockWalk._forward

    def count(self: BlockWalk, *args: Any) -> Any:
        away = [any(p.device.type == "meta" for p in block.parameters()) for block in self.blocks]
        seen.append(len(away) - 1 - sum(away))  # one has always been on the CPU
        return forward(self, *args)

    monkeypatch.setattr(BlockWalk, "_forward", count)
    return seen


def test_the_pruned_model_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is on the disk before the next is corrected, and is written as a shard of its own, of an ordinary repo."""
    placing: dict[str, Any] = {
        "device_map": placed(dense("llama", tmp_path / "dense"), ()),
        "offload_folder": tmp_path / "offload",
    }
    pruner = STATPruner.from_pretrained(tmp_path / "dense", RUNS["stat"][1], **placing)
    stored, forward, save = [0] * 4, BlockWalk._forward, modeling_utils.safe_save_file

    def count(self: BlockWalk, index: int, *args: Any) -> Any:
        stored[index] = len(list((tmp_path / "offload").rglob("block.safetensors")))
        return forward(self, index, *args)

    def written_alone(shard: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        assert all(p.device.type == "meta" for p in find_blocks(pruner.model).parameters())
        save(shard, *args, **kwargs)

    monkeypatch.setattr(BlockWalk, "_forward", count)
    pruner.prune(many())
    assert stored == [0, 1, 2, 3]
    monkeypatch.setattr(modeling_utils, "safe_save_file", written_alone)
    pruner.save_pretrained(tmp_path / "pruned")
    index = json.loads((tmp_path / "pruned" / "model.safetensors.index.json").read_text())
    shards = [load_file(tmp_path / "pruned" / name).values() for name in set(index["weight_map"].values())]
    most = max(sum(value.nbytes for value in shard) for shard in shards)
    weights = pruner.model.state_dict().values()
    blocks = [sum(p.nbytes for p in block.parameters()) for block in find_blocks(pruner.model)]
    assert most <= max(*blocks, *(value.nbytes for value in weights))
    assert len(shards) >= 4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(outputs(again, many()[0]), outputs(pruner.model, many()[0]))


@pytest.mark.full
def test_memory_does_not_grow_with_the_depth(tmp_path: Path) -> None:
    """In processes of their own, under a limit that the system enforces."""
    script = Path(__file__).parent.parent / "examples" / "benchmarks" / "offload_memory.py"
    sizes = ["--hidden", "512", "--neurons", "1376", "--heads", "8", "--vocabulary", "4096", "--num-tokens", "4096"]
    peaks = []
    for layers in (8, 24):
        asked = [*sizes, "--layers", str(layers), "--limit", "0.4", "--folder", str(tmp_path / str(layers))]
        done = subprocess.run([sys.executable, script, *asked], capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout)["peak_gb_above_imports"])
    assert peaks[1] < 1.1 * peaks[0]


def test_gradients_by_block_are_those_of_whole_passes(tmp_path: Path) -> None:
    """Also where the backward pass has to end early, and for what the head makes of offloaded weights."""
    model = dense("llama", tmp_path)
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={**placed(model, ()), "lm_head": "disk"}, offload_folder=tmp_path / "offload"
    )
    near = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = []
    for each in (near, away):
        pruner = STATPruner(each, STATConfig())
        batches = pruner._start(0.9, many(), None, None)
        with pruner.at_work():
            from optimum_stat.families import find_groups

            found.append(output_worth(each, find_groups(each), batches, seed=3))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_a_block_comes_in_and_goes_with_what_has_changed(tmp_path: Path) -> None:
    model = dense("llama", tmp_path)
    away = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=placed(model), offload_folder=tmp_path / "offload")
    block = away.model.layers[2]
    with brought_in(block):
        assert all(torch.equal(p, q) for p, q in zip(block.parameters(), model.model.layers[2].parameters(), strict=True))
        with brought_in(block):
            pass
        assert not any(p.device.type == "meta" for p in block.parameters()), "the inner one leaves it to the outer"
        block.mlp.down_proj.weight = nn.Parameter(torch.ones(32, 44), requires_grad=False)
    assert all(p.device.type == "meta" for p in block.parameters())
    assert not block.mlp.down_proj.weight.requires_grad
    with brought_in(block):
        assert bool((block.mlp.down_proj.weight == 1).all())
        assert torch.equal(block.mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight)
    with pytest.raises(KeyError), brought_in(block):
        raise KeyError
    assert all(p.device.type == "meta" for p in block.parameters())
    assert len(list((tmp_path / "offload").rglob("block.safetensors"))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activations_on_the_disk_are_what_they_were(dtype: torch.dtype) -> None:
    values = [torch.randn(3, 5, 2).to(dtype), torch.randn(1, 4, 2).to(dtype), torch.randn(2, 2).to(dtype)]
    stored = Activations([value.clone() for value in values], on_disk=True)
    assert [torch.equal(one, other) for one, other in zip(stored, values, strict=True)] == [True] * 3
    stored[1] = values[1] * 2
    assert torch.equal(stored[1], values[1] * 2)
    assert torch.equal(stored[0], values[0])
    assert torch.equal(stored[-1], values[-1])
    assert len(stored) == 3


def test_where_the_activations_are_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for share in (0.25, 0.0):
        monkeypatch.setattr("optimum_stat.activations.SHARE", share)
        found.append(STATPruner(tiny("llama"), RUNS["stat"][1]).prune(many()).state_dict())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (STATConfig(distill_epochs=1), "no distillation"),
        (STATConfig(budget="latency"), "a budget of params or macs"),
        (SurgeonConfig(structure="elements"), "only whole units can be pruned"),
    ],
)
def test_what_needs_all_weights_at_once_is_refused(config: Any, says: str, tmp_path: Path) -> None:
    method = STATPruner if isinstance(config, STATConfig) else SurgeonPruner
    placing: dict[str, Any] = {"device_map": placed(dense("llama", tmp_path)), "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match=says):
        method.from_pretrained(tmp_path, config, **placing).prune(many())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With `--resume` as well, and warnings as errors: nothing warns of what is as it should be."""
    dense("llama", tmp_path / "dense")
    rows = [json.dumps({"input_ids": ids.tolist()}) for item in many() for ids in item["input_ids"]]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    asked = ["-m", str(tmp_path / "dense"), "-d", str(tmp_path / "data.jsonl"), "--keep", "0.6", "--seq-len", "20", "--quiet"]
    away = ["--device-map", "auto", "--max-memory", "cpu=60KB", "--offload-folder", str(tmp_path / "offload"), "--resume"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        main(["prune", str(tmp_path / "out"), *asked, *away])
    main(["prune", str(tmp_path / "whole"), *asked])
    expected, found = written(tmp_path / "whole"), written(tmp_path / "out")
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["prune", str(tmp_path / "other"), *asked, "--max-memory", "cpu=1GB"])
    assert "--max-memory and --offload-folder go with --device-map" in capsys.readouterr().err
