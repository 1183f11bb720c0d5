"""Run a model one block at a time over the calibration data.

The inputs of the current block are kept for all batches, so a block can be run, changed and run again without the rest
of the model, and no more than one block's statistics need to exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from . import block_state
from .activations import Activations
from .blocks import TOKENS, find_stacks
from .budget import largest
from .calls import Call, Returned, Stop, hidden_of, record_calls, without_hidden
from .data import Batches
from .families import Group, applications_of, find_blocks
from .halted import HaltedPasses, room_for
from .journal import Journal
from .offload import brought_in
from .probes import Visit, device_of, on_consumer_input, real_rows
from .progress import each_block

CHUNK = 2048


class BlockWalk:
    """The state of one pass: `hidden[b]` is what the next block will read from this process's batch b.

    Call `run` as often as wanted on block 0, then `advance(0)`, then go on with block 1, and so on, from one stack to the
    next: what the encoder returns is what its blocks have become by then. Call it inside `probes.quiet(model)`.
    """

    def __init__(self, model: nn.Module, batches: Batches, journal: Journal | None = None):
        self._journal = journal or Journal()
        self.blocks, self.processes = find_blocks(model), batches.processes
        self.masks: list[Tensor | None] = []
        """Of the stack at hand, which tokens of each batch are real; None: all are."""
        self.hidden = Activations([])
        self._model, self._stacks = model, find_stacks(model)
        self._starts = [sum(len(stack.blocks) for stack in self._stacks[:i]) for i in range(len(self._stacks))]
        self._applications = applications_of(model)
        self._calls: list[list[list[Call]]] = []
        self._finished: list[tuple[Returned, Activations]] = []  # stack after stack, what its last block returned
        self._returned: Returned | None = None
        self._num_tokens = batches.num_tokens
        self._mean_len = largest(batches.seq_len)
        self._longest = max(
            [largest(batches.seq_len), *(batch["input_ids"].shape[1] for batch in batches if "input_ids" in batch)]
        )
        self._batches = self._own(batches)
        self._halted: HaltedPasses | None = None
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
            hidden.append(hidden_of(calls[0][0]))
            self._calls.append([[without_hidden(call) for call in own] for own in calls])
        self.hidden = Activations(hidden)

    def _own(self, batches: Batches) -> list[dict[str, Tensor]]:
        """This process's share, in whole chunks: what is summed in single precision is then the same for any number of them."""
        chunks: list[list[dict[str, Tensor]]] = []
        rows = CHUNK
        for batch in batches:
            if rows >= CHUNK:
                chunks.append([])
                rows = 0
            chunks[-1].append(batch)
            mask = batch.get(TOKENS)
            rows += int(len(next(iter(batch.values()))) * self._mean_len if mask is None else mask.sum()) * self._applications
        return [batch for chunk in self.processes.share(chunks) for batch in chunks[chunk]]

    @torch.no_grad()
    def run(self, index: int, groups: list[Group], visit: Visit, advance: bool = False) -> None:
        """Run one block on every batch and show `visit` the real tokens' inputs [tokens, width] of the groups' consumers.

        `groups` stand in the order of the forward pass. The block is left as soon as the last has been seen, unless
        `advance` asks to go on to the next block in the same run. Inputs in half precision are shown in float32, and those
        of short batches together, about CHUNK tokens at a time: many rows cost hardly more than few. A block that runs more
        than once shows the tokens of all its runs, one run of a batch after the other.
        """
        if not groups:
            return self.advance(index) if advance else None
        self._halted = None
        self._stand_before(index)
        self._show(groups, (self._consumer_inputs(index, groups, batch, advance) for batch in range(len(self.masks))), visit)
        return None

    @torch.no_grad()
    def halt(self, group: Group, visit: Visit, columns: Tensor) -> None:
        """`run` for one group that may be cut to `columns` afterwards: the block waits there, and `halt` and `advance` go on.

        Groups in the order of the forward pass. Their blocks then run once, where `run` does again for each; if they would hold
        too much meanwhile, or run more than once, this is `run`, which always begins anew, with what has changed.
        """
        if self._applications > 1 or not room_for(self._model, group, self._num_tokens, self._longest):
            return self.run(group.block, [group], visit)
        halted, self._halted = self._halted, None  # nothing waits after an error
        if halted is None:
            self._stand_before(group.block)
            halted = HaltedPasses(partial(self._forward, group.block, batch) for batch in range(len(self.masks)))
        with halted.at(group, columns) as inputs:
            self._show([group], ([self._rows_of(z, batch)] for batch, z in enumerate(inputs)), visit)
        self._halted = halted
        return None

    def _show(self, groups: list[Group], inputs: Iterable[list[Tensor]], visit: Visit) -> None:
        """What the groups' consumers read in one batch after the other, of short ones together."""
        waiting: list[list[Tensor]] = []
        for batch, read in enumerate(inputs):
            waiting.append(read)
            if sum(len(rows[0]) for rows in waiting) >= CHUNK or batch == len(self.masks) - 1:
                by_group = [list(parts) for parts in zip(*waiting, strict=True)]
                waiting.clear()
                for group, parts in zip(groups, by_group, strict=True):
                    rows = torch.cat(parts)
                    parts.clear()  # what is shown is large enough once
                    visit(group, rows)
                    del rows

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace every batch's hidden states by what block `index` makes of them."""
        self._stand_before(index)
        halted, self._halted = self._halted, None
        for batch, hidden in enumerate(halted.finish() if halted else self._passes(index)):
            self.hidden[batch] = hidden

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
            seen[group].append(self._rows_of(z, batch))
            missing -= 1
            if not advance and not missing:
                raise Stop

        with on_consumer_input(groups, see), suppress(Stop):
            output = self._forward(index, batch)
            if advance:
                self.hidden[batch] = output
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in seen.values()]

    def _rows_of(self, z: Tensor, batch: int) -> Tensor:
        rows = real_rows(z, self.masks[batch])
        return rows if rows.dtype == torch.float64 else rows.float()

    def _passes(self, index: int) -> Iterator[Tensor]:
        return (self._forward(index, batch) for batch in range(len(self.masks)))

    def _forward(self, index: int, batch: int) -> Tensor:
        hidden = self.hidden[batch]
        for args, kwargs in self._calls[batch][index - self._starts[len(self._finished)]]:
            output = self.blocks[index](hidden, *args, **kwargs)
            hidden = output if isinstance(output, Tensor) else output[0]
        return hidden

    def steps(self, what: str, *beside: BlockWalk) -> Iterator[int]:
        """The blocks that are still to do, under a progress bar; each is in memory while it is its turn.

        A journal gets what has become of a block when the next one is asked for, and the walk goes on behind the last that it
        has. `beside`: other walks over the same blocks, which keep pace.
        """
        first = self._resumed(what, (self, *beside))
        device, shown = device_of(self._model), self.processes.is_main
        tokens = self._num_tokens // self.processes.count
        for index in each_block(what, first, len(self.blocks), tokens, device, shown=shown):
            block = self.blocks[index]
            with brought_in(block):
                before = dict(block.named_parameters())
                yield index
                self._halted = None  # of the last block, behind which nothing has asked for the rest
                now = dict(block.named_parameters())
                if any(now[name] is not value for name, value in before.items()):
                    note, replaced = block_state.sizes(self._model, index, block), self._journal.last(f" weights {index}")
                    self._journal.keep(f"{what} weights {index}", now.items(), note=note, replaces=replaced, complete=False)
            is_last = index + 1 == len(self.blocks)
            every = ((f"{i} {j}", each) for i, walk in enumerate((self, *beside)) for j, each in enumerate(walk.hidden))
            earlier = self._journal.full(f"{what} behind {index - 1}") if index else None
            self._journal.keep(f"{what} behind {index}", () if is_last else every, replaces=earlier)

    def _resumed(self, what: str, walks: Sequence[BlockWalk]) -> int:
        """Put everything into the state behind the last block that is done; returns the next one."""
        count = next((i for i in range(len(self.blocks)) if f"{what} behind {i}" not in self._journal), len(self.blocks))
        for index in range(count):
            weights = self._journal.recall(f"{what} weights {index}")
            if weights is not None:
                with brought_in(self.blocks[index]):
                    sizes = self._journal.note(f"{what} weights {index}")
                    block_state.restore(self._model, index, self.blocks[index], sizes, weights)
        if 0 < count < len(self.blocks):
            for key, value in self._journal.read(f"{what} behind {count - 1}"):
                walk, batch = map(int, key.split())
                walks[walk].hidden[batch] = value.to(device_of(self._model))
        return count

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
