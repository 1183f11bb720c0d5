"""Run a model one block at a time over the calibration data.

The inputs of the current block are kept for all batches, so a block can be run, changed and run again without the rest
of the model, and no more than one block's statistics need to exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from .blocks import TOKENS, find_stacks
from .data import Batches
from .families import Group, applications_of, find_blocks
from .probes import Visit, device_of, on_consumer_input, real_rows

CHUNK = 2048
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
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


class BlockWalk:
    """The state of one pass: `hidden[b]` is what the next block will read from this process's batch b.

    Call `run` as often as wanted on block 0, then `advance(0)`, then go on with block 1, and so on, from one stack to the
    next: what the encoder returns is what its blocks have become by then. Call it inside `probes.quiet(model)`.
    """

    def __init__(self, model: nn.Module, batches: Batches):
        self.blocks, self.processes = find_blocks(model), batches.processes
        self.masks: list[Tensor | None] = []
        """Of the stack at hand, which tokens of each batch are real; None: all are."""
        self.hidden: list[Tensor] = []
        self._model, self._stacks = model, find_stacks(model)
        self._starts = [sum(len(stack.blocks) for stack in self._stacks[:i]) for i in range(len(self._stacks))]
        self._applications = applications_of(model)
        self._calls: list[list[list[Call]]] = []
        self._finished: list[tuple[Returned, list[Tensor]]] = []  # stack after stack, what its last block returned
        self._returned: Returned | None = None
        self._batches = self._own(batches)
        self._enter(0)

    def _enter(self, position: int) -> None:
        """Stand before the first block of a stack."""
        device, self._calls, self.masks, hidden = device_of(self._model), [], [], list[Tensor]()
        self._returned = None
        for number, batch in enumerate(self._batches):
            inputs = {name: value.to(device) for name, value in batch.items()}
            finished = [returned.with_hidden(last[number]) for returned, last in self._finished]
            known: Returned | None = self._returned if self._returned is not None and self._returned.for_all else None
            calls, self._returned = record_calls(self._model, inputs, position, finished, known)
            self.masks.append(inputs.get(self._stacks[position].mask))
            hidden.append(_hidden(calls[0][0]))
            self._calls.append([[_without_hidden(call) for call in own] for own in calls])
        self.hidden = hidden

    def _own(self, batches: Batches) -> list[dict[str, Tensor]]:
        """This process's share, in whole chunks: what is summed in single precision is then the same for any number of them."""
        chunks: list[list[dict[str, Tensor]]] = []
        rows = CHUNK
        for batch in batches:
            if rows >= CHUNK:
                chunks.append([])
                rows = 0
            chunks[-1].append(batch)
            mask, longest = batch.get(TOKENS), batches.seq_len if isinstance(batches.seq_len, int) else max(batches.seq_len)
            rows += int(len(next(iter(batch.values()))) * longest if mask is None else mask.sum()) * self._applications
        return [batch for chunk in self.processes.share(chunks) for batch in chunks[chunk]]

    @torch.no_grad()
    def run(self, index: int, groups: list[Group], visit: Visit, advance: bool = False) -> None:
        """Run one block on every batch and show `visit` the real tokens' inputs [tokens, width] of the groups' consumers.

        `groups` stand in the order of the forward pass. The block is left as soon as the last has been seen, unless
        `advance` asks to go on to the next block in the same run. Inputs in half precision are shown in float32, and those
        of short batches together, about CHUNK tokens at a time: many rows cost hardly more than few. A block that runs more
        than once shows the tokens of all its runs, one run of a batch after the other.
        """
        self._stand_before(index)
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
        self._stand_before(index)
        for batch in range(len(self.masks)):
            self.hidden[batch] = self._forward(index, batch)

    def _stand_before(self, index: int) -> None:
        """At the first block of another stack, let the model go from what the last block of the one before has made to it."""
        position = len(self._finished) + 1
        if position < len(self._stacks) and index >= self._starts[position]:
            self._finished.append((self._returned or Returned(None), self.hidden))
            self._enter(position)

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
        for args, kwargs in self._calls[batch][index - self._starts[len(self._finished)]]:
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
            sums += torch.stack(
                [inverse if torch.isfinite(energy).all() else inverse * torch.nan, inverse.new_tensor(len(energy))]
            ).cpu()
        self.processes.add_up(sums)
        return float(sums[0] / sums[1])


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
        hidden, done = _hidden((args, kwargs)), sum(map(len, calls))
        if index != order[done] or (done and not _same(hidden, _hidden(calls[0][0]))):
            raise ValueError(f"Block {index} of {type(model).__name__} does not read what the block before it returns.")
        calls[index].append((args, kwargs))
        if returned is None:
            returned = Returned.of(forward(*args, **kwargs))
        if done + 1 == len(order):
            raise _Stop
        return returned.with_hidden(hidden)

    with torch.no_grad(), ExitStack() as stack:
        for before, output in zip(stacks, finished, strict=False):
            for block in before.blocks:
                stack.enter_context(replaced_forward(block, partial(_give, output)))
        for index, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block, partial(record, index, block.forward)))
        with suppress(_Stop):
            model(**inputs)
    assert returned is not None
    return calls, returned


def stack_tokens(model: nn.Module, inputs: dict[str, Tensor]) -> list[int]:
    """How many real tokens each stack has of this batch; where no input says which are real, all places count."""
    counts: list[int] = []
    for position, stack in enumerate(find_stacks(model)):
        mask = inputs.get(stack.mask)
        hidden = mask if mask is not None else _hidden(record_calls(model, inputs, position)[0][0][0])[..., 0]
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


def _hidden(call: Call) -> Tensor:
    args, kwargs = call
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _without_hidden(call: Call) -> Call:
    args, kwargs = call
    return args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}
