"""What a report says of a run's cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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


def test_forward_passes_are_counted_at_the_pace_of_before_and_after_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock ticks three times as fast once the model has been measured; a pruned model is no yardstick."""
    ticks, pace = [0.0], [1.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: ticks[0])
    pruner = STATPruner.from_pretrained(tiny("llama"), STATConfig(keep=0.6))
    rank = STATPruner.rank

    def tick(*_: Any) -> None:
        ticks[0] += pace[0]

    def ranked(self: STATPruner, *args: Any) -> Any:
        pace[0] = 3.0
        return rank(self, *args)

    pruner.model.register_forward_pre_hook(tick)
    monkeypatch.setattr(STATPruner, "rank", ranked)
    pruner.prune(many())
    batches = make_batches(many(), pruner.model.config, STATConfig(), causal=True)
    assert pruner.report.forward_seconds == pytest.approx(2 * len(small_parts(batches)))
    assert report.pace_again(pruner, batches) == pruner.report.forward_seconds


def test_a_forward_pass_is_timed_on_about_two_thousand_tokens_also_of_short_examples() -> None:
    """And on a first part that does not count."""
    model, seen = tiny("llama"), list[int]()
    short = [{"input_ids": torch.arange(1, 17).repeat(4, 1), "attention_mask": torch.ones(4, 16, dtype=torch.int64)}] * 128
    data = make_batches(short, model.config, STATConfig(), causal=True)
    assert data.num_tokens == 8192
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    report.forward_seconds(model, data)
    assert sum(seen[1:]) == report.FORWARD_TOKENS
