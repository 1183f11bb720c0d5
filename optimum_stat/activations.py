"""What blocks read, for all batches: in memory, or, where that would take much of it, in a file.

A plain file, not a memory map. What was read of a map counts as resident until the system wants it back: of 64 batches of 42 MB
2.5 GiB, where the file took 0.07. Reading one takes 40 ms more than from memory, while a block computes on it for seconds.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor

SHARE = 0.25  # of the free memory; more goes to the disk


class Activations:
    """A list of tensors that keep their shapes while their values change. Reading one from the disk gives a copy."""

    def __init__(self, tensors: list[Tensor], *, on_disk: bool | None = None):
        """on_disk: None decides by the free memory of the tensors' device."""
        self._sizes = [each.numel() * each.element_size() for each in tensors]
        free = free_bytes(tensors[0].device) if tensors else None
        if on_disk is None:
            on_disk = free is not None and sum(self._sizes) > SHARE * free
        self._like = [torch.empty_like(each, device="meta") for each in tensors]
        self._devices = [each.device for each in tensors]
        self._kept: list[Tensor] | None = None if on_disk else tensors
        self._file: Any = None
        if on_disk:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            for index, each in enumerate(tensors):
                self[index] = each

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        if self._kept is not None:
            return self._kept[index]
        index %= len(self)
        self._file.seek(sum(self._sizes[:index]))
        found = torch.empty_like(self._like[index], device="cpu")  # aligned, as what was never in a file is
        self._file.readinto(_bytes(found))
        return found.to(self._devices[index])

    def __setitem__(self, index: int, value: Tensor) -> None:
        if self._kept is not None:
            self._kept[index] = value
            return
        self._file.seek(sum(self._sizes[:index]))
        self._file.write(_bytes(value.detach().cpu().contiguous()))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)
