"""Runs that are killed go on, end in the same model bit for bit, and do nothing twice that was finished."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batches, many, tiny

from optimum_stat import FisherConfig, FisherPruner, STATConfig, STATPruner, SurgeonConfig, SurgeonPruner
from optimum_stat.commands import main
from optimum_stat.journal import INDEX, Journal
from optimum_stat.locks import InUse, refuse_in_use, take
from optimum_stat.processes import ALONE
from optimum_stat.walk import BlockWalk

RUNS: dict[str, tuple[Any, Any]] = {
    "stat": (STATPruner, STATConfig(keep=0.6, round_to=1)),
    "stat, paper": (STATPruner, STATConfig.paper(keep=0.6)),
    "stat, values": (STATPruner, STATConfig(keep=0.5, round_to=1, structures=("heads", "neurons", "values"))),
    "stat, pairs and values": (STATPruner, STATConfig(keep=0.5, round_to=1, structures=("neurons", "pairs", "values"))),
    "fisher": (FisherPruner, FisherConfig(keep=0.6, round_to=1)),
    "surgeon": (SurgeonPruner, SurgeonConfig(keep=0.6, round_to=1, shots=3)),
    "surgeon, paper": (SurgeonPruner, SurgeonConfig.paper(keep=0.6, shots=2, structure="units")),
}


class Stop(Exception):
    """In place of a kill, where it must come at a certain moment."""


def deep(family: str) -> Any:
    """Three blocks: a first, one in the middle, a last."""
    return tiny(family, **{"n_layer" if family == "bloom" else "num_hidden_layers": 3})


def pruned(run: str, family: str, folder: Path | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    method, config = RUNS[run]
    pruner = method(deep(family), config)
    pruner.prune(many(), resume_from_checkpoint=folder)
    report = pruner.report.to_dict()
    for name in ("stages", "forward_seconds", "forward_passes"):
        del report[name]
    return pruner.model.state_dict(), report


def same(one: Any, other: Any) -> bool:
    return one[1] == other[1] and one[0].keys() == other[0].keys() and all(torch.equal(v, other[0][k]) for k, v in one[0].items())


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Call it with the number of entries after which the next one stops the run."""
    left, plain = [10**9], Journal.keep

    def keep(self: Journal, *args: Any, **kwargs: Any) -> None:
        if self.folder is not None:
            if not left[0]:
                raise Stop
            left[0] -= 1
        plain(self, *args, **kwargs)

    monkeypatch.setattr(Journal, "keep", keep)
    return lambda count: left.__setitem__(0, count)


MIXTURES = [(run, family) for run in RUNS if run != "stat, paper" for family in ("mixtral", "gpt_oss", "qwen2_moe")]
FEW = [("stat", "gpt_oss"), ("fisher", "qwen2_moe"), ("surgeon", "mixtral")]


@pytest.mark.parametrize(
    ("run", "family"),
    [
        *((run, family) for run in RUNS for family in ("llama", "bloom")),
        *FEW,
        *(pytest.param(run, "bert", marks=pytest.mark.full) for run in RUNS),
        *(pytest.param(*each, marks=pytest.mark.full) for each in MIXTURES if each not in FEW),
    ],
)
def test_stopped_at_every_entry(run: str, family: str, tmp_path: Path, stop_after: Callable[[int], None]) -> None:
    """Each start gets a few entries further; at the end nothing but the model is different from a run in one piece."""
    family = "qwen2" if "values" in run and family == "bloom" else family  # one linear makes all of it there
    family = "gemma2" if "pairs" in run and family == "bert" else family  # which turns nothing
    expected = pruned(run, family)
    for start in range(60):
        stop_after(2 + start % 2)
        try:
            found = pruned(run, family, tmp_path)
            break
        except Stop:
            pass
    assert start >= 2
    assert same(found, expected)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    stop_after(0)
    assert same(pruned(run, family, tmp_path), expected), "a finished run writes nothing and is as it was"
    assert size == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))


def test_no_finished_block_is_done_again(
    tmp_path: Path, stop_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    run, advance = BlockWalk.run, BlockWalk.advance
    monkeypatch.setattr(BlockWalk, "run", lambda self, index, *args: seen.append(("run", index)) or run(self, index, *args))
    monkeypatch.setattr(BlockWalk, "advance", lambda self, index: seen.append(("advance", index)) or advance(self, index))
    pruned("stat", "llama")
    whole, starts = list(seen), 0
    seen.clear()
    for starts in range(20):  # noqa: B007
        stop_after(3)
        try:
            pruned("stat", "llama", tmp_path)
            break
        except Stop:
            pass
    repeated = [step for step in set(seen) if seen.count(step) > whole.count(step)]
    assert len(seen) <= len(whole) + 2 * starts, "what was under way when it stopped, and no more"
    assert starts > 2
    assert all(seen.count(step) <= whole.count(step) + starts for step in repeated)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "index"])
@pytest.mark.parametrize("which", [0, -1, 3])
def test_damage_is_noticed_and_done_again(damage: str, which: int, tmp_path: Path, stop_after: Callable[[int], None]) -> None:
    expected = pruned("stat", "llama")
    stop_after(9)
    with pytest.raises(Stop):
        pruned("stat", "llama", tmp_path)
    path = sorted(tmp_path.rglob("*.safetensors"))[which]
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        raw[-3] ^= 1
        path.write_bytes(raw)
    elif damage == "gone":
        path.unlink()
    else:
        (path.parent / INDEX).write_text("{")
    stop_after(1000)
    assert same(pruned("stat", "llama", tmp_path), expected)


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=() if run == "fisher" else pytest.mark.full) for run in RUNS if "values" not in run]
)
def test_of_a_block_that_is_half_lost_nothing_counts(run: str, tmp_path: Path, stop_after: Callable[[int], None]) -> None:
    """Whatever the last file held, and whatever was written before it that counts only together with it."""
    expected, entries = pruned(run, "bert"), 2
    while True:
        stop_after(entries)
        try:
            pruned(run, "bert", tmp_path / str(entries))
            break
        except Stop:
            pass
        max((tmp_path / str(entries)).rglob("*.safetensors")).unlink()
        stop_after(1000)
        assert same(pruned(run, "bert", tmp_path / str(entries)), expected), entries
        entries += 1
    assert entries >= 6


def test_an_index_that_is_odd_is_a_damaged_one(tmp_path: Path) -> None:
    """Well-formed JSON, and a journal by its looks: the run starts anew."""
    expected = pruned("stat", "llama", tmp_path)
    (index,) = tmp_path.rglob(INDEX)
    whole = json.loads(index.read_text())
    without_files = {name: {"note": None} for name in whole["entries"]}
    odd: tuple[dict[str, Any], ...] = ({"run": None}, {"entries": []}, {"entries": without_files}, {"checksum": None})
    for change in odd:
        index.write_text(json.dumps({**whole, **change}))
        assert same(pruned("stat", "llama", tmp_path), expected)
        assert json.loads(index.read_text()) == whole


def test_what_somebody_else_keeps_in_the_folder_stays(tmp_path: Path) -> None:
    pruned("stat", "llama", tmp_path)
    (own,) = tmp_path.iterdir()
    (own / "notes.txt").write_text("mine")
    (own / "more").mkdir()
    (own / "000099-000.part").touch()
    pruned("stat", "llama", tmp_path)
    assert (own / "notes.txt").read_text() == "mine"
    assert (own / "more").is_dir()
    assert not (own / "000099-000.part").exists()


def test_another_run_is_refused(tmp_path: Path) -> None:
    pruned("stat", "llama", tmp_path)
    with pytest.raises(ValueError, match=r"holds what another run has done: its keep was 0\.6, now 0\.7 is asked"):
        STATPruner(deep("llama"), STATConfig(keep=0.7)).prune(many(), resume_from_checkpoint=tmp_path)
    with pytest.raises(ValueError, match="its data was"):
        STATPruner(deep("llama"), RUNS["stat"][1]).prune(batches(), resume_from_checkpoint=tmp_path)
    with pytest.raises(ValueError, match="its weights was"):
        STATPruner(tiny("llama", seed=1, num_hidden_layers=3), RUNS["stat"][1]).prune(many(), resume_from_checkpoint=tmp_path)
    classifier = tiny("bert", "SequenceClassification")
    config = FisherConfig(labels="data")
    first, other = ([{**batch, "labels": torch.full((len(batch["input_ids"]),), of)} for batch in many(400)] for of in (0, 1))
    FisherPruner(copy.deepcopy(classifier), config).prune(first, resume_from_checkpoint=tmp_path / "labelled")
    with pytest.raises(ValueError, match="its labels of the data was"):
        FisherPruner(copy.deepcopy(classifier), config).prune(other, resume_from_checkpoint=tmp_path / "labelled")
    elements = SurgeonPruner(deep("llama"), SurgeonConfig(structure="elements"))
    with pytest.raises(ValueError, match="makes zeros, trains adapters"):
        elements.prune(many(), resume_from_checkpoint=tmp_path)


@pytest.mark.parametrize("entries", [0, 4, 9])
def test_a_full_disk_says_so_and_can_be_resumed(
    entries: int, tmp_path: Path, stop_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: a limit on the size of files, which the system enforces as a full disk does."""
    expected = pruned("stat", "llama")
    if entries:
        stop_after(entries)
        with pytest.raises(Stop):
            pruned("stat", "llama", tmp_path / "state")
    stop_after(1000)
    process = os.fork()
    if not process:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
            pruned("stat", "llama", tmp_path / "state")
        except OSError as error:
            (tmp_path / "why").write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    why = (tmp_path / "why").read_text()
    assert "] What is finished could not be written to" in why
    assert why.endswith("make room, and go on with the same command.")
    assert not list(tmp_path.rglob("*.part"))
    assert same(pruned("stat", "llama", tmp_path / "state"), expected)


def test_the_journal_keeps_what_others_may_still_need(tmp_path: Path) -> None:
    """An entry that was replaced goes only when the next one is written, and its end is remembered."""
    journal = Journal.open(tmp_path, {"a": 1}, ALONE)
    value = {"x": torch.arange(5)}
    journal.keep("first", value.items(), note=[1])
    journal.keep("second", value.items(), replaces="first")
    assert torch.equal((journal.recall("first") or {})["x"], value["x"])
    journal.keep("third", (), complete=False)
    assert len(Journal.open(tmp_path, {"a": 1}, ALONE)._entries) == 2
    journal = Journal.open(tmp_path, {"a": 1}, ALONE)
    assert "third" not in journal
    journal.keep("third", ())
    assert journal.recall("first") == {}
    assert journal.note("first") == [1]
    assert journal.recall("fourth") is None
    (path,) = [path for path in tmp_path.rglob("000001-000.safetensors")]
    path.write_bytes(b"")
    assert not Journal.open(tmp_path, {"a": 1}, ALONE)._entries, "what the first entry was replaced by is lost, so both are"


def test_what_counts_only_with_the_next_goes_with_it(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, {}, ALONE)
    for key, complete in (("first", True), ("second", False), ("third", False), ("fourth", True)):
        journal.keep(key, {"x": torch.arange(5)}.items(), complete=complete)
    max(tmp_path.rglob("*.safetensors")).unlink()
    assert list(Journal.open(tmp_path, {}, ALONE)._entries) == ["first"]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_large_entries_are_written_and_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_stat.journal.PIECE", 1000)
    values = ((str(index), torch.full((150,), float(index))) for index in range(6))
    Journal.open(tmp_path, {}, ALONE).keep("many", values)
    journal, files = Journal.open(tmp_path, {}, ALONE), sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    found = list(journal.read("many"))
    assert [name for name, _ in found] == list("012345")
    assert all(torch.equal(value, torch.full((150,), float(name))) for name, value in found)
    files[1].unlink()
    assert "many" not in Journal.open(tmp_path, {}, ALONE)
    assert not list(tmp_path.rglob("*.safetensors")), "what is left of it goes too"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny("llama", num_hidden_layers=6, hidden_size=64, intermediate_size=256).save_pretrained(folder / "dense")
    rows = [json.dumps({"input_ids": ids.tolist()}) for item in many(4000) for ids in item["input_ids"]]
    (folder / "data.jsonl").write_text("\n".join(rows))
    return folder


def command(dense: Path, output: Path, method: str, *more: str) -> list[str]:
    asked = [
        "prune",
        str(output),
        "-m",
        str(dense / "dense"),
        "-d",
        str(dense / "data.jsonl"),
        "--keep",
        "0.6",
        "--method",
        method,
    ]
    return [*asked, "--seq-len", "20", "--quiet", *more]


@pytest.mark.parametrize(
    ("method", "kills"),
    [("stat", 4), *(pytest.param(method, 30, marks=pytest.mark.full) for method in ("stat", "fisher", "surgeon"))],
)
def test_killed_at_random_moments(method: str, kills: int, dense: Path, tmp_path: Path) -> None:
    """`kill -9`, and the same command again, until it ends: the same files as from a run in one piece."""
    main(command(dense, tmp_path / "whole", method))
    generator, killed, output = random.Random(kills), 0, tmp_path / "out"
    while killed < kills:
        process = os.fork()
        if not process:  # a copy of this one: it has imported everything
            signal.alarm(120)
            code = 1
            try:
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                main(command(dense, output, method, *(["--resume"] if killed else [])))
                code = 0
            finally:
                os._exit(code)
        time.sleep(generator.random() * 1.5)
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        killed += 1
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            if killed < kills:
                shutil.rmtree(output)  # it was faster; from the beginning
    if not output.exists() or (tmp_path / "out.resume").exists():
        main(command(dense, output, method, "--resume"))
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (output / "config.json").read_text() == (tmp_path / "whole" / "config.json").read_text()


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_killed_while_the_parts_are_moved(moved: int, dense: Path, tmp_path: Path) -> None:
    """Into a folder that was there: what is left is moved, and nothing that somebody has put beside it goes."""
    asked, output = command(dense, tmp_path / "out", "stat", "--max-examples", "200"), tmp_path / "out"
    output.mkdir()
    process = os.fork()
    if not process:
        rename, left = Path.rename, [moved + 1]  # the whole folder is renamed first

        def counted(self: Path, to: Any) -> Path:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= "out" in Path(to).parts
            return rename(self, to)

        Path.rename = counted  # type: ignore[method-assign]
        try:
            main(asked)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    assert len([path for path in output.iterdir() if not path.name.startswith(".")]) == moved
    (output / "notes.txt").touch()
    main([*asked, "--resume"])
    (output / "notes.txt").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    main(command(dense, tmp_path / "whole", "stat", "--max-examples", "200"))
    assert {path.name for path in output.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.fixture
def at_work() -> Iterator[Callable[[Path], int]]:
    """Call it with a folder: the number of a process that is at work in it, until it is killed."""
    started: list[int] = []

    def start(folder: Path) -> int:
        reading, writing = os.pipe()
        process = os.fork()
        if not process:
            try:
                journal = Journal.open(folder, {}, ALONE)
                os.write(writing, b".")
                while journal:
                    time.sleep(60)
            finally:
                os._exit(1)
        started.append(process)
        assert os.read(reading, 1) == b"."
        os.close(reading)
        os.close(writing)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def test_two_at_once(at_work: Callable[[Path], int], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is told, before any work, and takes nothing away from the first; a process that was killed is none."""
    process = at_work(tmp_path / "out.resume")
    asked = command(dense, tmp_path / "out", "stat", "--max-examples", "200")
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit):
            main([*asked, *more])
        found = capsys.readouterr().err
        assert f"error: {tmp_path / 'out.resume'} is in use: process {process} on " in found
        assert found.endswith("is at work in it. Nothing was done; wait until it ends.\n")
    assert (tmp_path / "out.resume" / "1-of-1").is_dir()
    with pytest.raises(InUse):
        pruned("stat", "llama", tmp_path / "out.resume")
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with pytest.raises(SystemExit):
        main([*asked, "--resume"])
    assert "holds what another run has done" in capsys.readouterr().err


def test_those_that_only_look_are_not_at_work(tmp_path: Path) -> None:
    """All processes of a launcher look at the same time."""
    (tmp_path / "lock").touch()
    looking, ready, end = take(tmp_path, to_look=True), os.pipe(), os.pipe()
    assert looking is not None
    process = os.fork()
    if not process:
        held = take(tmp_path, to_look=True)
        os.write(ready[1], b"." if held else b"!")
        os.read(end[0], 1)
        os._exit(0)
    assert os.read(ready[0], 1) == b"."
    refuse_in_use(tmp_path)
    with pytest.raises(InUse):
        take(tmp_path)
    os.write(end[1], b".")
    os.waitpid(process, 0)


def test_a_copy_of_a_journal_does_not_close_its_lock(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, {}, ALONE)
    assert journal._lock is not None
    copy.deepcopy(journal)
    os.fstat(journal._lock._handle)


@pytest.mark.parametrize("fails", [False, True])
def test_who_comes_second_deletes_nothing_of_the_first(
    fails: bool, at_work: Callable[[Path], int], dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were started at the same time, and found nothing; also where the second fails before it looks again."""
    read = STATPruner.from_pretrained
    if fails:
        monkeypatch.setattr("optimum_stat.calibration.read", lambda *_: int("not data"))
    monkeypatch.setattr(
        STATPruner, "from_pretrained", lambda *args, **more: (at_work(tmp_path / "out.resume"), read(*args, **more))[1]
    )
    with pytest.raises(SystemExit):
        main(command(dense, tmp_path / "out", "stat", "--max-examples", "200"))
    assert (tmp_path / "out.resume" / "1-of-1" / INDEX).is_file()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("disk"), ValueError("not again")])
def test_what_a_stopped_run_leaves(
    stop: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run needs no flag; the next needs it, or is told of it. What would fail again leaves nothing."""
    asked = command(dense, tmp_path / "out", "stat", "--max-examples", "200")
    with monkeypatch.context() as patch:
        patch.setattr(STATPruner, "repair", lambda *_: (_ for _ in ()).throw(stop))
        with pytest.raises(SystemExit):
            main(asked)
    left = [] if isinstance(stop, ValueError) else ["out.resume"]
    assert [path.name for path in tmp_path.iterdir()] == left
    if not left:
        return
    with pytest.raises(SystemExit):
        main(asked)
    assert "holds what a run that was stopped has finished; nothing was done" in capsys.readouterr().err
    measure, measured = STATPruner.measure, []
    monkeypatch.setattr(STATPruner, "measure", lambda self, groups, *_: measured.append(len(groups)) or measure(self, groups, *_))
    main([*asked, "--resume"])
    assert not measured, "nothing is left to measure"
    main([*command(dense, tmp_path / "whole", "stat", "--max-examples", "200")])
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_journal_of_other_processes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "2-of-2").mkdir()
    with pytest.raises(ValueError, match="holds what a run of 2 processes has done; here are 1"):
        STATPruner(deep("llama"), STATConfig()).prune(many(), resume_from_checkpoint=tmp_path)
