"""The wall time of models and of their blocks: what is run, and how it is timed."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache

from .blocks import reads_tokens_alone
from .calls import Call, record_calls, replaced_forward
from .families import Group, find_blocks, groups_of_block
from .probes import caches_in, device_of
from .slicing import slice_group

Run = Callable[[], Any]
Before = Callable[[Run], Any]  # done before a run, and not timed
CACHE_BYTES = 1 << 26  # that stand between two runs of a block, if the model has as many: more than a core finds in its cache
PAIRS = (8, 100)  # timings of one thing beside another: at least, at most
SECONDS = 0.3  # for one of them, if so many timings fit into it


@dataclass(frozen=True)
class Setting:
    """What a time depends on besides the model's shape."""

    device: str
    dtype: str
    attention: str
    """The attention's implementation: "eager", "sdpa", ..."""
    compiled: bool
    """Whether torch.compile has been at it."""
    phase: str
    """"prefill": a forward pass over [batch_size, seq_len] tokens; "decode": over one more token of each sequence, behind
    `seq_len` that are in the cache."""
    batch_size: int
    seq_len: int

    @classmethod
    def of(cls, model: Any, phase: str, batch_size: int, seq_len: int, compiled: bool = False) -> Setting:
        """Of a model as it is now."""
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        attention = str(getattr(model.config, "_attn_implementation", None) or "eager")
        return cls(describe_device(model), dtype, attention, compiled, phase, batch_size, seq_len)

    @property
    def where(self) -> str:
        """On what, and how."""
        return f"{self.device}, {self.dtype}, {self.attention}" + (", compiled" if self.compiled else "")

    def __str__(self) -> str:
        what = "one token each behind" if self.phase == "decode" else "a forward pass over"
        return f"{what} {self.batch_size} × {self.seq_len} tokens, {self.where}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def describe_device(model: nn.Module) -> str:
    """The device, and the number of threads on a CPU."""
    device = device_of(model)
    on_cpu = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{device.type} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else on_cpu})"


class Workload:
    """What is timed: the model's forward pass, and its blocks' as the model calls them.

    Make it inside `quiet(model)`; while decoding, the cache is filled once and put back after every run. example: inputs of one
    example, to run copies of instead of random token ids.
    """

    def __init__(self, model: Any, setting: Setting, example: Mapping[str, Any] | None = None):
        self.model, self.setting, self.device = model, setting, device_of(model)
        if example is None and not reads_tokens_alone(model):
            raise ValueError(
                f"Time asked of {type(model).__name__}, which reads more than token ids, or has several lists of blocks: no "
                "inputs to time it on are known. Ask for macs or params."
            )
        if example is not None and setting.phase != "prefill":
            raise ValueError(
                f"The time of decoding asked of {type(model).__name__}, which reads more than token ids, or has several lists of "
                "blocks: only its whole forward pass can be timed. Leave serve_phase (--serve-phase) at prefill."
            )
        self._example = example
        self.blocks, most = find_blocks(model), None if example is not None else longest(model, setting.phase)
        if most is not None and setting.seq_len > most:
            raise ValueError(
                f"The time of {setting} asked, but {type(model).__name__} has positions for {most} tokens"
                f"{' and the one that is decoded' if setting.phase == 'decode' else ''}: lower serve_seq_len (--serve-seq-len)."
            )
        self._inputs = self._make_inputs()
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.blocks.parameters())
        self._others = torch.ones(min(size, CACHE_BYTES) // 4, device=self.device)

    @torch.no_grad()
    def run_model(self) -> Run:
        """One forward pass of the model."""
        run, inputs = self._compiled(self.model), self._inputs
        return _restoring(_cache_in(inputs), lambda: run(**inputs))

    def calls(self) -> list[list[Call]]:
        """How the model calls each block."""
        with _restored(_cache_in(self._inputs)):
            return record_calls(self.model, self._inputs)[0]

    def run_block(self, index: int, call: Call, structure: str = "", size: int = 0) -> Run:
        """One run of a block, or of a copy with the first `size` units of its heads or neurons."""
        block, (args, kwargs) = self.blocks[index], call
        if structure:
            block = copy.deepcopy(block)
            own = next(each for each in groups_of_block(self.model, index, block) if each.structure == structure)
            args = tuple(_sliced(value, index, own, size) for value in args)
            kwargs = {name: _sliced(value, index, own, size) for name, value in kwargs.items()}
            slice_group(own, torch.arange(size))
        run = self._compiled(block)
        return _restoring(_cache_in(dict(enumerate(args)) | kwargs), lambda: run(*args, **kwargs))

    def forget(self, run: Run) -> None:
        """Read as much as a forward pass does between two runs of one block, so that this finds as little in the cache."""
        self._others.sum()

    def run_without_blocks(self, calls: list[list[Call]]) -> Run:
        """One forward pass of the model, each of whose blocks returns what it reads."""
        args, kwargs = calls[0][0]
        with torch.no_grad(), _restored(_cache_in(self._inputs)):
            returned = self.blocks[0](*args, **kwargs)
        count = len(returned) if isinstance(returned, tuple) else 0

        def stub(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states, *[None] * (count - 1)) if count else hidden_states

        def run() -> Any:
            with ExitStack() as stack, torch.no_grad(), _restored(_cache_in(self._inputs)):
                for block in self.blocks:
                    stack.enter_context(replaced_forward(block, stub))
                return self.model(**self._inputs)

        return run

    def start_over(self) -> None:
        """Forget what was compiled: of many sizes of one block, torch.compile would give up on the later ones."""
        if self.setting.compiled:
            torch.compiler.reset()

    def _compiled(self, module: nn.Module) -> Any:
        return torch.compile(module, dynamic=False) if self.setting.compiled else module

    def _make_inputs(self) -> dict[str, Any]:
        setting = self.setting
        if self._example is not None:
            return {name: value.to(self.device).repeat_interleave(setting.batch_size, 0) for name, value in self._example.items()}
        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (setting.batch_size, setting.seq_len), generator=generator).to(self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if setting.phase == "prefill":
            return inputs
        with torch.no_grad():
            caches = caches_in(self.model(**inputs, **self._cached()))
        if not caches:
            raise ValueError(f"Decoding asked of {type(self.model).__name__}, which keeps no keys and values.")
        mask = torch.ones(setting.batch_size, setting.seq_len + 1, dtype=torch.long, device=self.device)
        return {"input_ids": ids[:, :1], "attention_mask": mask, **caches, **self._cached()}

    def _cached(self) -> dict[str, bool]:
        return {"use_cache": True} if "use_cache" in inspect.signature(self.model.forward).parameters else {}


def longest(model: Any, phase: str) -> int | None:
    """How many tokens a pass can be timed on: as many as have learned positions; None, any number, where there are none."""
    learned = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name.rpartition(".")[2] or name.endswith("wpe"))
    ]
    if not learned:
        return None
    # where positions start behind the number that padding has, the config counts it too
    free = min(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1) for module in learned)
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None) or free
    return int(min(free, stated)) - (phase == "decode")


def _cache_in(values: Mapping[Any, Any]) -> Cache | None:
    return next(iter(caches_in(values).values()), None)


@contextmanager
def _restored(cache: Cache | None) -> Iterator[None]:
    """Take out of a cache what is put into it meanwhile. A growing cache makes new tensors and leaves the old as they are."""
    before = [dict(vars(layer)) for layer in cache.layers] if cache is not None else []
    try:
        yield
    finally:
        for layer, values in zip(cache.layers if cache is not None else (), before, strict=True):
            vars(layer).update(values)


def _restoring(cache: Cache | None, run: Run) -> Run:
    if cache is None:
        return run

    def restoring() -> None:
        with _restored(cache):
            run()

    return restoring


def _sliced(value: Any, index: int, group: Group, size: int) -> Any:
    """A cache for a block with fewer heads; anything else as it is."""
    if not isinstance(value, Cache):
        return value
    own = copy.copy(value)
    own.layers = [copy.copy(layer) for layer in value.layers]
    if group.structure == "heads" and not group.shares_key_value:
        layer: Any = own.layers[index]
        layer.keys, layer.values = layer.keys[:, :size].clone(), layer.values[:, :size].clone()
    return own


def warm(run: Run) -> None:
    """Run it once: a model that is asked again and again finds its own weights in the cache, not another's."""
    run()


def steady_time(run: Run, device: torch.device) -> int:
    """Lower quartile of the nanoseconds of a call: what else a machine does only ever adds to a time."""
    return round(statistics.quantiles([own for own, _ in pairs(run, run, device, before=lambda _: None)], n=4)[0])


def steady_ratio(run: Run, beside: Run, device: torch.device, seconds: float = SECONDS, before: Before = warm) -> float:
    """Ratio of the lower quartiles of their times, taken in turn: what else a machine does only ever adds to a time."""
    own, other = zip(*pairs(run, beside, device, seconds, before), strict=True)
    return statistics.quantiles(own, n=4)[0] / statistics.quantiles(other, n=4)[0]


@torch.no_grad()
def pairs(run: Run, beside: Run, device: torch.device, seconds: float = SECONDS, before: Before = warm) -> list[tuple[int, int]]:
    """Nanoseconds of both, taken in turn, after two of each that do not count; `before` each, something that does not either."""
    both = [beside, run]

    def once() -> tuple[int, int]:
        found = []
        for each in both:
            before(each)
            found.append(_timed(each, device))
        return found[0], found[1]

    start = time.perf_counter_ns()
    once()
    once()
    timed = [once() for _ in range(_repeats((time.perf_counter_ns() - start) // 2, seconds))]
    return [(own, other) for other, own in timed]


def _repeats(nanoseconds: int, seconds: float = SECONDS) -> int:
    fewest, most = PAIRS
    return max(fewest, min(most, int(seconds * 1e9 / max(1, nanoseconds))))


def _timed(run: Run, device: torch.device) -> int:
    start = time.perf_counter_ns()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns() - start


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
