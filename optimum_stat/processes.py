"""Several processes that share the calibration data: everybody reads its own part, and the sums are added up.

Started by `torchrun` or `accelerate launch`; every process holds the whole model. Decisions are made by all of them, from the
same sums, so nothing but sums has to travel.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor

T = TypeVar("T")
OF_MAIN = "The main process failed: "
PATIENCE = timedelta(days=1)  # with what one process does alone, in place of the minutes of a sum; one that dies is noticed


@dataclass(frozen=True)
class Processes:
    """Which of how many this one is. By default it is alone, and all sums are complete."""

    index: int = 0
    count: int = 1

    @classmethod
    def launched(cls, *, cpu: bool = False) -> Processes:
        """Those that a launcher started, connected to each other; without a launcher, this one alone.

        cpu: connect over the network (gloo), although there are GPUs.
        """
        if torch.distributed.is_initialized():  # accelerate's state forgets it where TrainingArguments are made on a CPU
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        state = PartialState(cpu=cpu or not torch.accelerator.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and talks to people."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> range:
        """Which of `items` are this process's: consecutive ones, everybody's number differs by one at most."""
        start, stop = (len(items) * each // self.count for each in (self.index, self.index + 1))
        return range(start, stop)

    def add_up(self, *sums: Tensor) -> None:
        """Replace every tensor by its sum over all processes, in place; several small ones travel as one.

        Raises:
            ConnectionError: another process is gone.
        """
        if self.count == 1 or not sums:
            return
        on = PartialState().device if torch.distributed.get_backend() != "gloo" else torch.device("cpu")
        flat = sums[0] if len(sums) == 1 else torch.cat([each.flatten().to(on) for each in sums])
        total = flat.to(on).contiguous()
        try:
            torch.distributed.all_reduce(total)
        except RuntimeError as error:
            raise self._lost(error) from error
        if len(sums) == 1:
            if total is not flat:
                sums[0].copy_(total)
            return
        for each, part in zip(sums, torch.split(total, [each.numel() for each in sums]), strict=True):
            each.copy_(part.view(each.shape))

    def tell(self, value: T, group: Any = None) -> T:
        """What the main process has for `value`; plain values only. group: through which it is told."""
        if self.count == 1:
            return value
        box: list[Any] = [value]
        try:
            torch.distributed.broadcast_object_list(box, src=0, group=group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return box[0]

    def as_main(self, work: Callable[[], T]) -> T:
        """What `work`, which the main process alone does, gives; plain values only. If it fails there, it fails in all."""
        value: Any = None
        failed: Exception | None = None
        patient = self._patient()
        if self.is_main:
            try:
                value = work()
            except Exception as error:
                failed = error
        kind = next((each.__name__ for each in type(failed).__mro__ if _takes_a_message(each)), "")
        try:
            value, kind, message = self.tell((value, "" if failed is None else kind, str(failed)), patient)
        finally:
            if patient is not None:
                torch.distributed.destroy_process_group(patient)
        if failed is not None:
            raise failed
        if kind:
            raise getattr(builtins, kind)(f"{OF_MAIN}{message}")
        return value

    def _patient(self) -> Any:
        """A group of all processes in which they wait for each other as long as it takes."""
        if self.count == 1:
            return None
        self.wait()  # or who is gone is waited for, too
        return torch.distributed.new_group(timeout=PATIENCE, backend="gloo")

    def everybodys(self, value: int) -> list[int]:
        """What each process has for `value`."""
        every = torch.zeros(self.count, dtype=torch.int64)
        every[self.index] = value
        self.add_up(every)
        return every.tolist()

    def wait(self) -> None:
        """Until all have come so far."""
        self.tell(None)
        self.add_up(torch.zeros(1))

    def _lost(self, error: RuntimeError) -> ConnectionError:
        why = str(error).strip().splitlines()
        return ConnectionError(
            f"Process {self.index} of {self.count} has lost another one and ends too; no model was written. If the other one "
            f"ended by itself, its own message says why. ({why[0] if why else type(error).__name__})"
        )


def _takes_a_message(kind: type) -> bool:
    """Whether it is an exception of Python that can be made of a message alone."""
    return kind.__module__ == "builtins" and kind.__base__ is not UnicodeError


ALONE = Processes()


def is_main() -> bool:
    """Whether this process is the main one of those that are connected, or alone."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
