"""Dense and pruned, timed in turn."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from tiny import tiny

from optimum_stat import speed, timing
from optimum_stat.families import find_blocks
from optimum_stat.speed import Spread, side_by_side

MS = 1_000_000


class Clock:
    """Time that only the models below spend; of each, every other timed pass takes a quarter longer."""

    now = 0

    def perf_counter_ns(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def slow(clock: Clock, milliseconds: float, family: str = "llama") -> Any:
    # A timed pass follows an untimed one: two of a kind.
    model, factors = tiny(family), itertools.cycle((1.0, 1.0, 1.25, 1.25))

    def spend(module: Any, args: Any) -> None:
        clock.now += round(milliseconds * args[0].shape[0] * args[0].shape[1] * MS * next(factors))

    find_blocks(model)[0].register_forward_pre_hook(spend)
    return model


@pytest.mark.parametrize(("phase", "tokens"), [("prefill", 3 * 7), ("decode", 3)])
def test_the_ratio_is_of_pairs_and_has_a_spread(clock: Clock, phase: str, tokens: int) -> None:
    found = side_by_side(slow(clock, 2), slow(clock, 1), 3, 7, phase)
    assert found.ratio == Spread(0.5, 0.5, 0.5)  # the slow passes are slow for both
    assert found.dense.low == pytest.approx(2 * tokens)
    assert found.dense.high == pytest.approx(2.5 * tokens)
    assert found.tokens == tokens
    values = found.to_dict()
    assert values["pruned_tokens_per_second"] == pytest.approx(1000 * tokens / found.pruned.median, rel=1e-3)
    assert values["repeats"] >= 7
    assert f"{phase} 3 x 7 tokens" in str(found)
    assert "ratio 0.50 (0.50 to 0.50)" in str(found)


def test_a_spread_are_the_quartiles() -> None:
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(2, 3, 4)


def test_models_are_left_as_they_were() -> None:
    dense, pruned = tiny("bert").train(), tiny("bert", intermediate_size=24)
    before = time.perf_counter()
    found = side_by_side(dense, pruned, 1, 5)
    assert time.perf_counter() - before < 20 * speed.SECONDS
    assert dense.training
    assert not pruned.training
    assert all(parameter.requires_grad for parameter in dense.parameters())
    assert 0 < found.pruned.low <= found.pruned.median <= found.pruned.high
    assert found.device.endswith("float32, sdpa")
