"""One block in memory at a time: what `device_map` left on the disk or the CPU is brought in, worked on, put away.

accelerate keeps the weights of an offloaded module in a map and gives the module's forward a hook that fetches them for
every call. Here a block is fetched once, for all batches, and what has changed of it is written anew.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors.torch import save_file
from torch import Tensor, nn

from . import experts

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
LARGE = 1 << 17  # bytes
KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16"


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are not there between two forward passes."""
    return any(_hook(module) is not None for module in model.modules())


def free_at_once() -> None:
    """Have the C library give back what a large tensor took as soon as it is freed (glibc), and few kernels be kept.

    By itself glibc learns to keep pieces of up to 32 MB in its heap, where small tensors that stay settle in the holes; and
    oneDNN, which multiplies in half precision on CPUs, keeps a compiled kernel of some 0.3 MB for each of the last 1,024 shapes,
    and pruned blocks have other shapes than all before them. Both would grow from block to block. Until the process ends; kernels
    only if the process has not used any yet.
    """
    os.environ.setdefault(*KERNELS)
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(MMAP_THRESHOLD, LARGE)


def execution_device(model: nn.Module) -> torch.device | None:
    """Where the first offloaded module runs; None if none is."""
    return next((torch.device(hook.execution_device) for hook in map(_hook, model.modules()) if hook is not None), None)


@contextmanager
def brought_in(block: nn.Module) -> Iterator[None]:
    """The weights of `block` in memory; those that were replaced meanwhile are stored where the old ones were: disk or CPU.

    Does nothing to a block that is not offloaded, or is in already.
    """
    away = {name: hook for name, module in block.named_modules() if (hook := _hook(module)) is not None}
    opened = [block.get_submodule(name) for name in away if experts.is_open(block.get_submodule(name))]
    for module in opened:
        experts.stack(module)
    fetched = {name: _fetch(block.get_submodule(name), hook) for name, hook in away.items()}
    for module in opened:
        experts.fill(module)
    try:
        yield
    finally:
        for module in opened:
            experts.stack(module)
        if any(_differs(block.get_submodule(name), own) for name, own in fetched.items()):
            _store(block, away)
        for name, hook in away.items():
            _leave(block.get_submodule(name))
            hook.offload = True
        for module in opened:
            experts.fill(module)  # with nothing but shapes


@contextmanager
def reading_copies(model: nn.Module) -> Iterator[None]:
    """While offloaded weights are read one after the other and kept, as for a shard of a file: do not keep their files mapped."""
    before = [(hook, hook.weights_map) for hook in map(_hook, model.modules()) if hook is not None]
    try:
        for hook, weights in before:
            hook.weights_map = _Copies(weights)
        yield
    finally:
        for hook, weights in before:
            hook.weights_map = weights


def _hook(module: nn.Module) -> Any:
    """The hook that fetches this module's weights, if it has one that is at work."""
    outer = module.__dict__.get("_hf_hook")
    hooks = getattr(outer, "hooks", (outer,))
    return next((hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload), None)


def _fetch(module: nn.Module, hook: Any) -> dict[str, nn.Parameter]:
    """As the hook does it, but until `_leave`."""
    hook.offload = False
    found: dict[str, nn.Parameter] = {}
    for name, old in module._parameters.items():
        if old is not None and old.device.type == "meta":
            value = _copied(hook.weights_map[name]).to(hook.execution_device)
            module._parameters[name] = found[name] = nn.Parameter(value, bool(old.requires_grad))
    return found


def _copied(value: Tensor) -> Tensor:
    """So that the file is not mapped any longer: maps of whole files count where memory is limited.

    It begins as far from a multiple of 64 bytes as the original does: kernels round otherwise where memory is aligned otherwise,
    and a model that was loaded whole reads its weights from where they stand in the file.
    """
    if value.device.type != "cpu" or not value.is_contiguous():
        return value.clone()
    width = value.element_size()
    raw = torch.empty(value.numel() + 128 // width, dtype=value.dtype)
    start = (value.data_ptr() - raw.data_ptr()) % 64 // width
    return raw[start : start + value.numel()].view(value.shape).copy_(value)


def _differs(module: nn.Module, fetched: Mapping[str, nn.Parameter]) -> bool:
    return any(module._parameters[name] is not value for name, value in fetched.items())


def _leave(module: nn.Module) -> None:
    for name, value in module._parameters.items():
        if value is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(value, device="meta"), bool(value.requires_grad))


def _store(block: nn.Module, hooks: Mapping[str, Any]) -> None:
    """The weights that modules have now, for their hooks to fetch."""
    on_disk: dict[str, dict[str, Tensor]] = {}
    for name, hook in hooks.items():
        own = {key: value.detach() for key, value in block.get_submodule(name)._parameters.items() if value is not None}
        home = getattr(hook.weights_map, "dataset", hook.weights_map)
        in_memory = getattr(home, "state_dict", home)
        if any(f"{getattr(hook.weights_map, 'prefix', '')}{key}" in in_memory for key in own):
            hook.weights_map = {key: value.to("cpu") for key, value in own.items()}
        else:
            on_disk[name] = own
    if on_disk:
        folder = getattr(getattr(hooks[next(iter(on_disk))].weights_map, "dataset", None), "save_folder", None)
        loader = _Written(folder, {f"{name}.{key}": value for name, own in on_disk.items() for key, value in own.items()})
        for name in on_disk:
            hooks[name].weights_map = PrefixedDataset(loader, f"{name}.")


class _Copies(dict[str, Tensor]):
    """What a map of weights holds, read when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        self._weights = weights

    def __getitem__(self, key: str) -> Tensor:
        return _copied(self._weights[key])


class _Written(OffloadedWeightsLoader):
    """Weights in a file of their own, which goes when nobody reads it any more. What is read is a copy."""

    def __init__(self, folder: str | Path | None, weights: Mapping[str, Tensor]):
        own = tempfile.mkdtemp(prefix="pruned-", dir=folder)
        weakref.finalize(self, shutil.rmtree, own, ignore_errors=True)
        path = str(Path(own, "block.safetensors"))
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
        super().__init__(save_folder=folder, index={name: {"safetensors_file": path} for name in weights})

    def __getitem__(self, key: str) -> Tensor:
        return _copied(super().__getitem__(key))
