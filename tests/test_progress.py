"""What a long run says of itself: on a terminal, in a log, as JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import many, tiny

from optimum_stat.commands import main
from optimum_stat.progress import each_block


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    tiny("llama", num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    rows = [json.dumps({"input_ids": ids.tolist()}) for item in many() for ids in item["input_ids"]]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    out, dense, data = (str(tmp_path / name) for name in ("out", "dense", "data.jsonl"))
    return ["prune", out, "-m", dense, "-d", data, "--keep", "0.6", "--seq-len", "20", "--json"]


def test_a_line_for_every_block_where_there_is_no_terminal(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(asked)
    found = capsys.readouterr()
    lines = re.findall(r"^note: (\w+).*: block (\d) of 3, [\d,]+ tokens/s, [\d.]+ GiB in use, .*\d s left$", found.err, re.M)
    assert lines == [(stage, str(block)) for stage in ("Measuring", "Correcting") for block in (1, 2, 3)]
    assert "it/s" not in found.err.replace("Loading weights", "")
    json.loads(found.out)


def test_progress_as_json(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*asked, "--log-json"])
    found = capsys.readouterr()
    lines = [json.loads(line) for line in found.err.splitlines() if line.startswith("{")]
    blocks = [line for line in lines if "block" in line]
    assert [line["block"] for line in blocks] == [1, 2, 3, 1, 2, 3]
    assert all(line["blocks"] == 3 and line["tokens_per_second"] > 0 and line["memory_bytes"] > 1e7 for line in blocks)
    assert blocks[2]["seconds_left"] == blocks[5]["seconds_left"] == 0
    assert {"time", "level", "message"} <= lines[0].keys()
    json.loads(found.out)


def test_time_left_and_speed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Two seconds a block, 100 tokens; three of ten blocks were there from an earlier run."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    caplog.set_level(logging.DEBUG, "optimum_stat.progress")
    for _ in each_block("Working", 3, 10, 100, torch.device("cpu"), shown=True):
        now[0] += 2
    told = [record.progress for record in caplog.records]  # type: ignore[attr-defined]
    assert [each["block"] for each in told] == list(range(4, 11))
    assert [each["seconds_left"] for each in told] == [12, 10, 8, 6, 4, 2, 0]
    assert {each["tokens_per_second"] for each in told} == {50}
    caplog.clear()
    list(each_block("Working", 0, 2, 100, torch.device("cpu"), shown=False))
    assert not caplog.records


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    caplog.set_level(logging.INFO, "optimum_stat.progress")
    assert list(each_block("Working", 0, 3, 10, torch.device("cpu"), shown=True)) == [0, 1, 2]
    assert not caplog.records
