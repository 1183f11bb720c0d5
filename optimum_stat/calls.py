"""How a model calls its blocks: recorded once, so that a block can be run alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import find_stacks
from .families import applications_of
from .offload import brought_in

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""


@dataclass(frozen=True)
class Returned:
    """What a block returns."""

    rest: tuple[Any, ...] | None
    """Beside its hidden states; None: it returns these alone, not a tuple."""

    @classmethod
    def of(cls, output: Any) -> Returned:
        """The same with other hidden states is `with_hidden`."""
        return cls(output[1:] if isinstance(output, tuple) else None)

    def with_hidden(self, hidden: Tensor) -> Any:
        """What a block that makes `hidden` returns."""
        return hidden if self.rest is None else (hidden, *self.rest)

    @property
    def for_all(self) -> bool:
        """Whether it is the same for all inputs: no tensor stands beside the hidden states."""
        return not any(isinstance(each, Tensor) for each in self.rest or ())


def record_calls(
    model: nn.Module,
    inputs: dict[str, Tensor],
    position: int = 0,
    finished: Sequence[Any] = (),
    returned: Returned | None = None,
) -> tuple[list[list[Call]], Returned]:
    """How the model calls each block of one stack on this batch, and what its blocks return.

    The stacks before it are not run, but return what they have `finished` with. Of the stack itself only the first block is
    run, to see what it returns, and not even that if `returned` is known.

    Raises:
        ValueError: the model does something to what one block returns before the next reads it, or runs blocks in turn.
    """
    applications, stacks = applications_of(model), find_stacks(model)
    blocks = stacks[position].blocks
    order = [index for index in range(len(blocks)) for _ in range(applications)]
    calls: list[list[Call]] = [[] for _ in blocks]

    def record(index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal returned
        hidden, done = hidden_of((args, kwargs)), sum(map(len, calls))
        if index != order[done] or (done and not _same(hidden, hidden_of(calls[0][0]))):
            raise ValueError(f"Block {index} of {type(model).__name__} does not read what the block before it returns.")
        calls[index].append((args, kwargs))
        if returned is None:
            with brought_in(blocks[index]):
                returned = Returned.of(forward(*args, **kwargs))
        if done + 1 == len(order):
            raise Stop
        return returned.with_hidden(hidden)

    with torch.no_grad(), ExitStack() as stack:
        for before, output in zip(stacks, finished, strict=False):
            for block in before.blocks:
                stack.enter_context(replaced_forward(block, partial(_give, output)))
        for index, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block, partial(record, index, block.forward)))
        with suppress(Stop):
            model(**inputs)
    assert returned is not None
    return calls, returned


def stack_tokens(model: nn.Module, inputs: dict[str, Tensor]) -> list[int]:
    """How many real tokens each stack has of this batch; where no input says which are real, all places count."""
    counts: list[int] = []
    for position, stack in enumerate(find_stacks(model)):
        mask = inputs.get(stack.mask)
        hidden = mask if mask is not None else hidden_of(record_calls(model, inputs, position)[0][0][0])[..., 0]
        counts.append(int(hidden.sum()) if mask is not None else hidden.numel())
    return counts


def _give(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.allclose(one, other.to(one.device), rtol=0, atol=0, equal_nan=True)


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let `module` do something else meanwhile."""
    before = module.__dict__.get("forward")  # accelerate keeps its own forward there
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def hidden_of(call: Call) -> Tensor:
    """What the block reads."""
    args, kwargs = call
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def without_hidden(call: Call) -> Call:
    """The call as it is but for the hidden states."""
    args, kwargs = call
    return args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}
