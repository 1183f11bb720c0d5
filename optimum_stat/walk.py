"""Run a model one block at a time over the calibration data.

The inputs of the current block are kept for all batches, so a block can be run, changed and run again without the rest
of the model, and no more than one block's statistics need to exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from .data import Batches
from .families import Group, applications_of, find_blocks
from .probes import Visit, device_of, on_consumer_input, real_rows

CHUNK = 2048
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""


class BlockWalk:
    """The state of one pass: `hidden[b]` is what the next block will read from this process's batch b.

    Call `run` as often as wanted on block 0, then `advance(0)`, then go on with block 1, and so on. Call it inside
    `probes.quiet(model)`.
    """

    def __init__(self, model: nn.Module, batches: Batches):
        self.blocks, self.processes = find_blocks(model), batches.processes
        self.masks: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self._calls: list[list[list[Call]]] = []
        self._applications = applications_of(model)
        device, outputs = device_of(model), list[int]()
        for batch in self._own(batches):
            inputs = {name: value.to(device) for name, value in batch.items()}
            calls = record_calls(model, self.blocks, inputs, outputs)
            self.masks.append(inputs["attention_mask"])
            self.hidden.append(_hidden(calls[0][0]))
            self._calls.append([[_without_hidden(call) for call in own] for own in calls])

    def _own(self, batches: Batches) -> list[dict[str, Tensor]]:
        """This process's share, in whole chunks: what is summed in single precision is then the same for any number of them."""
        chunks: list[list[dict[str, Tensor]]] = []
        rows = CHUNK
        for batch in batches:
            if rows >= CHUNK:
                chunks.append([])
                rows = 0
            chunks[-1].append(batch)
            rows += int(batch["attention_mask"].sum()) * self._applications
        return [batch for chunk in self.processes.share(chunks) for batch in chunks[chunk]]

    @torch.no_grad()
    def run(self, index: int, groups: list[Group], visit: Visit, advance: bool = False) -> None:
        """Run one block on every batch and show `visit` the real tokens' inputs [tokens, width] of the groups' consumers.

        `groups` stand in the order of the forward pass. The block is left as soon as the last has been seen, unless
        `advance` asks to go on to the next block in the same run. Inputs in half precision are shown in float32, and those
        of short batches together, about CHUNK tokens at a time: many rows cost hardly more than few. A block that runs more
        than once shows the tokens of all its runs, one run of a batch after the other.
        """
        waiting: list[list[Tensor]] = []
        for batch in range(len(self.masks)):
            waiting.append(self._consumer_inputs(index, groups, batch, advance))
            if sum(len(rows[0]) for rows in waiting) >= CHUNK or batch == len(self.masks) - 1:
                for group, *parts in zip(groups, *waiting, strict=True):
                    visit(group, torch.cat(parts))
                waiting.clear()

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace every batch's hidden states by what block `index` makes of them."""
        for batch in range(len(self.masks)):
            self.hidden[batch] = self._forward(index, batch)

    def _consumer_inputs(self, index: int, groups: list[Group], batch: int, advance: bool) -> list[Tensor]:
        seen: dict[Group, list[Tensor]] = {group: [] for group in groups}
        missing = len(groups) * self._applications

        def see(group: Group, z: Tensor) -> None:
            nonlocal missing
            rows = real_rows(z, self.masks[batch])
            seen[group].append(rows if rows.dtype == torch.float64 else rows.float())
            missing -= 1
            if not advance and not missing:
                raise _Stop

        with on_consumer_input(groups, see), suppress(_Stop):
            output = self._forward(index, batch)
            if advance:
                self.hidden[batch] = output
        return [torch.cat(parts) for parts in seen.values()]

    def _forward(self, index: int, batch: int) -> Tensor:
        hidden = self.hidden[batch]
        for args, kwargs in self._calls[batch][index]:
            output = self.blocks[index](hidden, *args, **kwargs)
            hidden = output if isinstance(output, Tensor) else output[0]
        return hidden

    def steps(self, what: str) -> Iterator[int]:
        """The blocks' indices, under a progress bar."""
        return iter(tqdm(range(len(self.blocks)), desc=what, unit="block"))

    def inverse_energy(self) -> float:
        """Mean of 1 / ||x||^2 over all real tokens, x the current hidden states: what a squared error is worth after a norm.

        The mean of the inverse, not the inverse of the mean: a few tokens with massive activations would hide all others.
        NaN if a hidden state is not finite.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        for hidden, mask in zip(self.hidden, self.masks, strict=True):
            energy = real_rows(hidden, mask).double().square().sum(1)
            inverse = (1 / energy.clamp_min(torch.finfo(torch.float32).tiny)).sum()
            sums += torch.stack([inverse if torch.isfinite(energy).all() else inverse * torch.nan, mask.sum()]).cpu()
        self.processes.add_up(sums)
        return float(sums[0] / sums[1])


def record_calls(
    model: nn.Module, blocks: nn.ModuleList, inputs: dict[str, Tensor], outputs: list[int] | None = None
) -> list[list[Call]]:
    """How the model calls each of its blocks on this batch.

    Only the first block is run, to see how many values it returns (0: a tensor instead of a tuple), and only while `outputs`
    is empty; there the number is remembered for further batches.

    Raises:
        ValueError: the model does something to what one block returns before the next reads it, or runs blocks in turn.
    """
    applications, outputs = applications_of(model), [] if outputs is None else outputs
    order = [index for index in range(len(blocks)) for _ in range(applications)]
    calls: list[list[Call]] = [[] for _ in blocks]

    def record(index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, done = _hidden((args, kwargs)), sum(map(len, calls))
        if index != order[done] or (done and not _same(hidden, _hidden(calls[0][0]))):
            raise ValueError(f"Block {index} of {type(model).__name__} does not read what the block before it returns.")
        calls[index].append((args, kwargs))
        if done + 1 == len(order):
            raise _Stop
        if not outputs:
            returned = forward(*args, **kwargs)
            outputs.append(len(returned) if isinstance(returned, tuple) else 0)
        return (hidden, *[None] * (outputs[0] - 1)) if outputs[0] else hidden

    with torch.no_grad(), ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block, partial(record, index, block.forward)))
        with suppress(_Stop):
            model(**inputs)
    return calls


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


def _hidden(call: Call) -> Tensor:
    args, kwargs = call
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _without_hidden(call: Call) -> Call:
    args, kwargs = call
    return args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}
