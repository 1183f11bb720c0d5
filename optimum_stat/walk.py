"""Run a model one block at a time over the calibration data.

The inputs of the current block are kept for all batches, so a block can be run, changed and run again without the rest
of the model, and no more than one block's statistics need to exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from .data import Batches
from .families import Group, find_blocks
from .probes import Visit, device_of, on_consumer_input, real_rows

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""


class BlockWalk:
    """The state of one pass: `hidden[b]` is what the next block will read from batch b.

    Call `run` as often as wanted on block 0, then `advance(0)`, then go on with block 1, and so on. Call it inside
    `probes.quiet(model)`.
    """

    def __init__(self, model: nn.Module, batches: Batches):
        self.blocks = find_blocks(model)
        self.masks: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self._calls: list[list[Call]] = []
        device = device_of(model)
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            calls = _record_calls(model, self.blocks, inputs)
            self.masks.append(inputs["attention_mask"])
            self.hidden.append(_hidden(calls[0]))
            self._calls.append([_without_hidden(call) for call in calls])

    @torch.no_grad()
    def run(self, index: int, groups: list[Group], visit: Visit) -> None:
        """Run one block on every batch and show `visit` the real tokens' inputs [tokens, width] of the groups' consumers.

        `groups` stand in the order of the forward pass; the block is left as soon as the last has been seen. Inputs in
        half precision are shown in float32.
        """
        for batch, mask in enumerate(self.masks):

            def see(group: Group, z: Tensor, mask: Tensor = mask) -> None:
                rows = real_rows(z, mask)
                visit(group, rows if rows.dtype == torch.float64 else rows.float())
                if group is groups[-1]:
                    raise _Stop

            with on_consumer_input(groups, see), suppress(_Stop):
                self._forward(index, batch)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace every batch's hidden states by what block `index` makes of them."""
        for batch in range(len(self.masks)):
            self.hidden[batch] = self._forward(index, batch)

    def steps(self, what: str) -> Iterator[int]:
        """The blocks' indices, under a progress bar."""
        return iter(tqdm(range(len(self.blocks)), desc=what, unit="block"))

    def mean_energy(self) -> float:
        """Mean squared norm of the current hidden states, over real tokens."""
        total = sum(float(real_rows(h, m).float().square().sum()) for h, m in zip(self.hidden, self.masks, strict=True))
        return total / max(1, sum(int(mask.sum()) for mask in self.masks))

    def _forward(self, index: int, batch: int) -> Tensor:
        args, kwargs = self._calls[batch][index]
        output = self.blocks[index](self.hidden[batch], *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]


def _record_calls(model: nn.Module, blocks: nn.ModuleList, inputs: dict[str, Tensor]) -> list[Call]:
    """How the model calls each of its blocks on this batch; no block is run."""
    calls: list[Call] = []

    def record(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        if len(calls) == len(blocks):
            raise _Stop
        return _hidden((args, kwargs))

    with torch.no_grad(), ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_replaced_forward(block, record))
        with suppress(_Stop):
            model(**inputs)
    return calls


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Any:
    before = module.__dict__.get("forward")  # accelerate keeps its own forward there
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _hidden(call: Call) -> Tensor:
    args, kwargs = call
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _without_hidden(call: Call) -> Call:
    args, kwargs = call
    return args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}
