"""What a report says of a run's cost."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import many, tiny

from optimum_stat import STATConfig, STATPruner, report
from optimum_stat.data import make_batches
from optimum_stat.probes import small_parts


def test_the_report_counts_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks once a forward pass over a part of the data."""
    ticks = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: ticks[0])
    model, data = tiny("llama"), make_batches(many(), tiny("llama").config, STATConfig(), causal=True)

    def tick(*_: Any) -> None:
        ticks[0] += 1

    model.register_forward_pre_hook(tick)
    parts = len(small_parts(data))
    assert report.forward_seconds(model, data) == pytest.approx(parts)
    pruner = STATPruner.from_pretrained(model, STATConfig(keep=0.6))
    pruner.prune(many())
    monkeypatch.undo()
    seconds = sum(stage.seconds for stage in pruner.report.stages.values())
    assert pruner.report.forward_seconds == pytest.approx(parts)
    assert pruner.report.forward_passes == pytest.approx(seconds / parts)
    assert pruner.report.to_dict()["forward_passes"] == round(seconds / parts, 1)
    assert f"in all the time of {seconds / parts:.1f} forward passes" in str(pruner.report)
