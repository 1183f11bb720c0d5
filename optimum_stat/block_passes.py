"""Forward and backward passes of a model whose blocks are offloaded: one block in memory at a time.

What enters each block is stored on the way forward; on the way back a block is run again from what entered it, and handed
the gradient of what it returned. One forward pass more than in memory, and the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .activations import Activations
from .blocks import find_blocks
from .calls import Call, Returned, hidden_of, record_calls, replaced_forward, without_hidden
from .offload import brought_in


def passes_by_block(
    model: nn.Module,
    parts: Sequence[dict[str, Tensor]],
    start: Callable[[int, Any], tuple[list[Tensor], list[Tensor]]],
    at: Callable[[int], Any],
    hooks: Callable[[], AbstractContextManager[None]],
    first: int,
) -> None:
    """All passes over `parts`, the inputs, backward to block `first`.

    start: the predictions in what the model gives for a part, and the gradient at each; at: called before a part goes backward
    through a block, with `hooks` in place, which are to see that and nothing else.
    """
    blocks = find_blocks(model)
    calls, returned, hidden = [], list[Returned](), list[Tensor]()
    for inputs in parts:
        own, what = record_calls(model, inputs)
        hidden.append(hidden_of(own[0][0]))
        calls.append([[without_hidden(call) for call in each] for each in own])
        returned.append(what)
    entered: dict[int, Activations] = {}
    for index, block in enumerate(blocks):
        if index >= first:
            entered[index] = Activations(list(hidden), on_disk=True)  # of all blocks: their number must not matter
        with brought_in(block):
            hidden = [_run(block, each, calls[part][index])[1].detach() for part, each in enumerate(hidden)]
    ends = zip(parts, returned, hidden, strict=True)
    gradients = [_from_the_top(model, blocks, *end, partial(start, part)) for part, end in enumerate(ends)]
    for index in reversed(range(first, len(blocks))):
        with brought_in(blocks[index]), hooks():
            for part, gradient in enumerate(gradients):
                at(part)
                entry, output = _run(blocks[index], entered[index][part], calls[part][index])
                output.backward(gradient)  # type: ignore[no-untyped-call]
                assert entry.grad is not None
                gradients[part] = entry.grad
        del entered[index]


def _run(block: nn.Module, hidden: Tensor, calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    """(what enters, differentiable; what comes out). With gradients also forward: kernels may be others without."""
    entry = found = hidden.detach().requires_grad_()
    for args, kwargs in calls:
        output = block(found, *args, **kwargs)
        found = output if isinstance(output, Tensor) else output[0]
    return entry, found


def _from_the_top(
    model: nn.Module,
    blocks: nn.ModuleList,
    inputs: dict[str, Tensor],
    returned: Returned,
    hidden: Tensor,
    start: Callable[[Any], tuple[list[Tensor], list[Tensor]]],
) -> Tensor:
    """The gradient at what the last block returns."""
    last = hidden.detach().requires_grad_()
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, lambda *args, **kwargs: returned.with_hidden(last)))
        outputs, given = start(model(**inputs))
    torch.autograd.backward(outputs, given)
    assert last.grad is not None
    return last.grad
