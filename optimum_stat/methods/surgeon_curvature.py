"""The Kronecker factors of linear layers' curvature, measured a few blocks at a time.

For a linear layer `y = W a + b` the Fisher information of `[W, b]` is taken as `G (x) A`, with `A = E[a a^T]` over real tokens, a
ending with the constant 1, and `G = E[g g^T]`, g the gradient of the loss at y. Source: K-FAC (1503.05671) as The LLM Surgeon
(2312.17244) uses it; the authors' code can also fit the nearest product, or a sum of two, but none of its scripts does. A
factor's scale means nothing: one loss is behind all of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..activations import free_bytes
from ..data import Batches
from ..families import applications_of, masks_of_linears, weight
from ..gradients import Loss, Passes
from ..linalg import add_to_gram, symmetrize
from ..probes import OVERFLOW, device_of, has_loss, small_parts
from ..processes import Processes

LABELS = ("data", "model")


@dataclass(frozen=True)
class Factors:
    """Of one linear layer; both are means over real tokens, float64."""

    inputs: Tensor
    """A [in + 1, in + 1], the constant 1 last. Layers that read the same tensor share it."""
    gradients: Tensor
    """G [out, out]."""


def factors_by_block(
    model: nn.Module, linears: Mapping[int, Sequence[nn.Module]], batches: Batches, labels: str, seed: int
) -> Iterator[tuple[int, dict[nn.Module, Factors]]]:
    """(block, the factors of its `linears`) block by block, as many in one pass over the data as fit into memory at a time.

    Call it inside `probes.quiet(model)`, and leave the weights alone until it is exhausted.
    """
    waiting = sorted(linears)
    room = _blocks_at_once(model, linears)
    while waiting:
        now, waiting = waiting[:room], waiting[room:]
        found = measure_factors(model, now[0], [linear for block in now for linear in linears[block]], batches, labels, seed)
        for block in now:
            yield block, {linear: found.pop(linear) for linear in linears[block]}


@contextmanager
def kept_factors(
    model: nn.Module, linears: Mapping[int, Sequence[nn.Module]], batches: Batches, labels: str, seed: int
) -> Iterator[Callable[[int], dict[nn.Module, Factors]]]:
    """A function that gives a block's factors as often as wanted, measured once: from memory if all fit, else from a folder."""
    found = factors_by_block(model, linears, batches, labels, seed)
    if len(linears) <= _blocks_at_once(model, linears):
        yield dict(found).__getitem__
        return
    with tempfile.TemporaryDirectory() as folder:
        for block, factors in found:
            _write(Path(folder, str(block)), linears[block], factors)
        yield lambda block: _read(Path(folder, str(block)), linears[block])


def _write(path: Path, linears: Sequence[nn.Module], factors: Mapping[nn.Module, Factors]) -> None:
    """Tensors by the layer's place in its block; a shared one is written once, under its first reader's."""
    first = [[factors[one].inputs is factors[two].inputs for two in linears].index(True) for one in linears]
    inputs = {f"inputs.{i}": factors[linears[i]].inputs.cpu() for i in set(first)}
    gradients = {f"gradients.{i}": factors[linear].gradients.cpu() for i, linear in enumerate(linears)}
    save_file(inputs | gradients, path, {"shared": " ".join(map(str, first))})


def _read(path: Path, linears: Sequence[nn.Module]) -> dict[nn.Module, Factors]:
    with safe_open(path, "pt", device=str(weight(linears[0]).device)) as stored:
        first = stored.metadata()["shared"].split()
        inputs = {i: stored.get_tensor(f"inputs.{i}") for i in set(first)}
        return {linear: Factors(inputs[first[i]], stored.get_tensor(f"gradients.{i}")) for i, linear in enumerate(linears)}


def measure_factors(
    model: nn.Module, first: int, linears: Sequence[nn.Module], batches: Batches, labels: str, seed: int
) -> dict[nn.Module, Factors]:
    """The factors of `linears`, none of which stands before block `first`: one forward pass and one backward to that block.

    labels: "data", the labels of the data, or for causal language models its next tokens, gives the empirical Fisher of the
    paper; "model", and wherever the data has no labels, a gradient drawn from the model's own predictions.
    """
    parts = small_parts(batches)
    loss = Loss(model, parts, seed, from_labels=labels == "data" and has_loss(model, batches))
    passes = Passes(model, parts, loss, batches.processes, "Curvature", first_block=first)
    sums = _Sums.of(linears, passes, masks_of_linears(model))
    passes.run(lambda: _watched(linears, sums))
    return sums.finish(model, batches.processes)


@dataclass
class _Sums:
    """Accumulates both factors of every layer over a pass."""

    inputs: dict[nn.Module, Tensor]
    gradients: dict[nn.Module, Tensor]
    shared: dict[nn.Module, nn.Module]
    """Layer -> the one whose input it reads too."""
    passes: Passes
    masks: Mapping[nn.Module, str]
    """Which of the model's inputs says what tokens that a layer reads are real."""
    num_tokens: dict[nn.Module, Tensor]
    seen: list[tuple[Tensor, nn.Module]]
    """What was read in the part at hand, and who was the first to do so."""
    part: int = -1

    @classmethod
    def of(cls, linears: Iterable[nn.Module], passes: Passes, masks: Mapping[nn.Module, str]) -> _Sums:
        return cls({}, {}, {}, passes, masks, {linear: torch.zeros(1, dtype=torch.float64) for linear in linears}, [])

    def add_input(self, linear: nn.Module, a: Tensor) -> None:
        if self.part != self.passes.part:
            self.part, self.seen = self.passes.part, []
        for tensor, other in self.seen:
            if tensor is a:
                self.shared[linear] = other
                return
        self.seen.append((a, linear))
        rows = _single(self.passes.real_rows(a.detach(), self.masks[linear]))
        if linear not in self.inputs:
            self.inputs[linear] = _square(rows.shape[1] + 1, linear)
        add_to_gram(self.inputs[linear], torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1))

    def add_gradient(self, linear: nn.Module, gradient: Tensor) -> None:
        rows = _single(self.passes.real_rows(gradient, self.masks[linear]))
        if linear not in self.gradients:
            self.gradients[linear] = _square(rows.shape[1], linear)
        add_to_gram(self.gradients[linear], rows)
        self.num_tokens[linear] += len(rows)

    def finish(self, model: nn.Module, processes: Processes) -> dict[nn.Module, Factors]:
        """The means over all processes; what is not finite is named."""
        names, applications = {module: name for name, module in model.named_modules()}, applications_of(model)
        processes.add_up(*self.num_tokens.values())
        for what, sums in (("activations that enter", self.inputs), ("gradients at the output of", self.gradients)):
            for linear, total in sums.items():
                processes.add_up(total)
                symmetrize(total).div_(float(self.num_tokens[linear]) / applications)
                if not torch.isfinite(total).all():
                    raise ValueError(f"The {what} {names[linear]} are NaN or infinite; there is no curvature. {OVERFLOW}")
        return {
            linear: Factors(self.inputs[self.shared.get(linear, linear)], gradient) for linear, gradient in self.gradients.items()
        }


@contextmanager
def _watched(linears: Iterable[nn.Module], sums: _Sums) -> Iterator[None]:
    """Show `sums` the inputs and the outputs' gradients of `linears`."""

    def before(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums.add_input(linear, args[0])

    def after(linear: nn.Module, args: Any, output: Tensor) -> None:
        visit: Callable[[Tensor], None] = partial(sums.add_gradient, linear)
        output.register_hook(visit)  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        for linear in linears:
            stack.callback(linear.register_forward_pre_hook(before).remove)
            stack.callback(linear.register_forward_hook(after).remove)
        yield


def _blocks_at_once(model: nn.Module, linears: Mapping[int, Sequence[nn.Module]]) -> int:
    """How many blocks' factors may exist together: they take at most half of the free memory.

    Raises:
        ValueError: not even one block's factors fit.
    """
    free = free_bytes(device_of(model))
    if free is None:
        return 1
    needs = {block: sum(_bytes(linear) for linear in own) for block, own in linears.items()}
    block, most = max(needs.items(), key=lambda item: item[1])
    if most > free:
        widest = max(max(weight(linear).shape) for linear in linears[block])
        fits = int((free / most) ** 0.5 * widest)
        raise ValueError(
            f"The curvature of block {block} alone takes {most / 2**30:.1f} GiB (its widest layer has {widest:,} channels) and "
            f"{free / 2**30:.1f} GiB are free; about {fits:,} channels would fit. Use a machine or a device with more memory."
        )
    return max(1, int(free / 2 / most))


def _bytes(linear: nn.Module) -> int:
    return sum(8 * width**2 for width in weight(linear).shape)


def _single(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _square(width: int, linear: nn.Module) -> Tensor:
    return torch.zeros(width, width, dtype=torch.float64, device=weight(linear).device)
