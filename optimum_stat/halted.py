"""Forward passes that wait where a layer is about to read, so that the layer can change before they go on."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import greenlet
from torch import Tensor, nn

from .families import Group, weight
from .probes import on_consumer_input

ROOM = 2**28  # bytes: more is not held for the sake of time. The same everywhere, for passes that go on differ in rounding


class HaltedPasses:
    """Forward passes of one block, one a batch. `at` takes them to a consumer, `finish` to the end.

    A pass waits inside the model's own code, in a greenlet, so that no part of a block runs twice, whatever the block does. To
    give passes up, let go of them.
    """

    def __init__(self, passes: Iterable[Callable[[], Tensor]]) -> None:
        self._passes = [greenlet.greenlet(each) for each in passes]
        for each in self._passes:
            each.gr_context = contextvars.copy_context()

    @contextmanager
    def at(self, group: Group, columns: Tensor) -> Iterator[Iterator[Tensor]]:
        """What the group's consumer is about to read in one pass after the other, [..., width].

        Those that come after this in the forward pass alone. If the consumer is cut before the passes go on, it reads `columns`
        and no others.
        """
        caller = greenlet.getcurrent()

        def wait(_: Group, z: Tensor) -> Tensor | None:
            caller.switch(z)
            if weight(group.consumer).shape[1] == z.shape[-1]:
                return None
            return z.flatten(0, -2).index_select(1, columns).view(*z.shape[:-1], len(columns))  # of rows: a third of the time

        with on_consumer_input([group], wait):
            yield (each.switch() for each in self._passes)

    def finish(self) -> Iterator[Tensor]:
        """What one pass after the other returns."""
        while self._passes:
            yield self._passes.pop(0).switch()


def room_for(model: nn.Module, group: Group, num_tokens: int, seq_len: int) -> bool:
    """Whether passes over so many tokens, in examples of up to `seq_len`, may wait at the group's consumer.

    Of a token they hold what the consumer reads, the residual stream about six times (it, its norm, queries, keys, values, and
    what heads make of them), and, of eager attention, every head's scores.
    """
    out, columns = weight(group.consumer).shape
    eager = group.structure == "heads" and getattr(model.config, "_attn_implementation", None) == "eager"
    scores = group.units * group.query_heads * seq_len if eager else 0
    return num_tokens * (columns + 6 * out + scores) * weight(group.consumer).dtype.itemsize <= ROOM
