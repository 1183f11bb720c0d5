"""Several real processes over gloo: the same plan and weights as one, whatever their number; a lost one ends all."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import several
import torch
from safetensors.torch import load_file

from optimum_stat.processes import Processes

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """For the server of processes, which does not get this one's path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))
        yield


def launched(count: int, folder: Path, names: list[str], fate: str = "") -> list[int]:
    """So many processes, with the variables that torchrun and accelerate set; their exit codes."""
    environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    context = multiprocessing.get_context("forkserver")  # real processes, but transformers is imported once
    context.set_forkserver_preload(["several"])
    folder.mkdir(exist_ok=True)
    running = [context.Process(target=several.main, args=(rank, environment, folder, names, fate)) for rank in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
        process.kill()  # does nothing to one that has ended
    return [process.exitcode or 0 for process in running]


def pruned(count: int, folder: Path, names: list[str]) -> None:
    codes = launched(count, folder, names)
    assert codes == [0] * count, [path.read_text() for path in folder.glob("error*")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "1"
    pruned(1, folder, list(several.METHODS))
    return folder


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.full), 3])
def test_any_number_of_processes_gives_the_same_plan_and_weights(count: int, alone: Path, tmp_path: Path) -> None:
    found = tmp_path / "found"
    pruned(count, found, list(several.METHODS))
    for name in several.METHODS:
        for family in several.families_of(name):
            plans = [json.loads((folder / f"{name}-{family}.json").read_text()) for folder in (alone, found)]
            (kept, num_tokens), (again, num_again) = ([[g["kept"] for g in groups], tokens] for groups, tokens in plans)
            assert kept == again, name
            assert num_tokens == num_again, "every token counts once"
            expected = load_file(alone / name / family / "model.safetensors")
            written = load_file(found / name / family / "model.safetensors")
            assert expected.keys() == written.keys()
            for key, value in expected.items():
                scale = float(value.abs().max())
                torch.testing.assert_close(written[key], value, rtol=1e-6, atol=1e-6 * scale, msg=f"{name} {family} {key}")
            for rank in range(1, count):
                other = load_file(found / f"{name}-{family}-{rank}.safetensors")
                assert all(torch.equal(other[key], value) for key, value in written.items()), (name, family, rank)


def test_processes_train_together(tmp_path: Path) -> None:
    """One model, not one each; and saved whole, by the main one."""
    pruned(2, tmp_path / "two", list(several.TRAINED))
    pruned(1, tmp_path / "one", list(several.TRAINED))
    for name in several.TRAINED:
        written = load_file(tmp_path / "two" / name / "bert" / "model.safetensors")
        other = load_file(tmp_path / "two" / f"{name}-bert-1.safetensors")
        assert all(torch.equal(other[key], value) for key, value in written.items()), name
        alone = load_file(tmp_path / "one" / name / "bert" / "model.safetensors")
        assert not all(value.shape == alone[key].shape and torch.equal(value, alone[key]) for key, value in written.items()), name


def test_what_fails_in_the_main_process_fails_in_all(tmp_path: Path) -> None:
    (tmp_path / "found" / "stat, stream" / "llama").mkdir(parents=True)
    (tmp_path / "found" / "stat, stream" / "llama" / "mine").touch()
    assert launched(2, tmp_path / "found", ["stat, stream"]) == [1, 1]
    found = [(tmp_path / "found" / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert found[0].startswith("FileExistsError: ")
    assert found[1].startswith("FileExistsError: The main process failed: ")
    assert found[1].endswith("is not an empty folder; nothing was written. Choose another place.")


def test_every_example_is_read_by_one_process(tmp_path: Path) -> None:
    pruned(3, tmp_path / "found", ["stat, stream"])
    seen = [json.loads((tmp_path / "found" / f"seen-{rank}.json").read_text()) for rank in range(3)]
    wanted = sorted(ids.tolist() for item in several.examples() for ids in item["input_ids"])
    for walk in range(4):  # measuring and correcting, two families
        parts = [own[walk] for own in seen]
        assert sorted(ids for part in parts for ids in part) == wanted
        assert min(map(len, parts)) > 0.15 * len(wanted), "and nobody reads most of it"


def test_a_lost_process_ends_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    assert launched(3, tmp_path / "found", ["stat"], "killed") == [1, -9, 1]
    assert time.monotonic() - start < 60
    for rank in (0, 2):
        why = (tmp_path / "found" / f"error-{rank}.txt").read_text()
        assert why.startswith(f"ConnectionError: Process {rank} of 3 has lost another one and ends too; no model was written.")
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"error-0.txt", "error-2.txt"}


@pytest.mark.parametrize("name", ["stat", pytest.param("surgeon", marks=pytest.mark.full)])
def test_a_run_that_lost_a_process_goes_on(name: str, tmp_path: Path) -> None:
    """Whichever it was, and however far the others had come: in the end the model of a run in one piece, bit for bit."""
    pruned(2, tmp_path / "whole", [name])
    for start, dies in enumerate(("1 3", "0 4", "1 6", "")):
        folder = tmp_path / str(start)
        codes = launched(2, folder, [name], f"resumed {tmp_path / 'state'} {dies}")
        if dies:
            assert sorted(codes) == [-9, 1], (codes, [path.read_text() for path in folder.glob("error*")])
            assert codes[int(dies[0])] == -9
    assert codes == [0, 0], [path.read_text() for path in folder.glob("error*")]
    for family in several.FAMILIES:
        expected, found = (load_file(each / name / family / "model.safetensors") for each in (tmp_path / "whole", folder))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_command_under_a_launcher(tmp_path: Path) -> None:
    """One result on standard output, one folder, no temporary ones beside it."""
    model = several.tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    rows = [json.dumps({"input_ids": ids.tolist()}) for item in several.examples() for ids in item["input_ids"][:, :5]]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    port, script = str(free_port()), str(Path(sys.executable).parent / "optimum-stat")
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "--no-python"]
    asked = ["prune", "out", "-m", "dense", "-d", "data.jsonl", "--keep", "0.6", "--round-to", "1", "--seq-len", "5", "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, *start, script, *asked], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"]["method"] == "stat"
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "data.jsonl", "out"}


def test_what_is_wrong_is_said_once(tmp_path: Path) -> None:
    """By whichever process comes first; also what only the main one can find out."""
    several.tiny("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "data.jsonl").write_text('{"input_ids": [3, 4, 5, 6]}\n' * 40)
    (tmp_path / "table.json").write_text("{}")
    script, port = str(Path(sys.executable).parent / "optimum-stat"), str(free_port())
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "--no-python", script]
    asked = ["prune", "out", "-m", "dense", "-d", "data.jsonl", "--budget", "latency", "--latency-table", "table.json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([*start, *asked], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "it holds no table of latencies" in done.stderr


def test_others_are_told_of_an_error_that_no_message_alone_can_make(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(Processes, "_patient", lambda self: None)
    monkeypatch.setattr(Processes, "tell", lambda self, value, group: told.append(value) or value)
    with pytest.raises(UnicodeDecodeError):
        Processes(0, 2).as_main(lambda: b"\xff".decode())
    monkeypatch.setattr(Processes, "tell", lambda self, value, group: told[0])
    with pytest.raises(ValueError, match="The main process failed: 'utf-8' codec can't decode"):
        Processes(1, 2).as_main(lambda: None)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("items", [0, 1, 5, 9])
def test_shares_are_all_there_is(count: int, items: int) -> None:
    shares: list[Any] = [Processes(index, count).share(list(range(items))) for index in range(count)]
    assert [item for share in shares for item in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
