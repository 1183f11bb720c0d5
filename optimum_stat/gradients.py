"""Backward passes over the calibration data, for what gradients say at heads, neurons and outputs. No gradients of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from .block_passes import passes_by_block
from .blocks import find_stacks, mask_of_output
from .coherence import Coherence
from .data import Batches
from .families import Group, find_blocks, masks_of_linears, weight
from .labels import loss_gradients
from .offload import is_offloaded
from .probes import (
    Part,
    Prediction,
    device_of,
    on_consumer_input,
    on_output_gradient,
    predictions,
    predicts_once,
    real_rows,
    small_parts,
    some_examples,
)
from .processes import Processes


@dataclass(frozen=True)
class Output:
    """Of a module's output, means over tokens; float64, on the CPU."""

    fisher: Tensor
    """Diagonal of the Fisher information with respect to it: [out]."""
    energy: Tensor
    """Its square: [out]."""
    coherence: float = 1.0
    """How much more an example's errors would matter together than each alone, were they as alike as the outputs."""

    @property
    def worth(self) -> Tensor:
        """What a squared error of one in each channel, at one token, is worth; what corrections leave is less alike: the root."""
        return self.fisher * self.coherence**0.5


def output_worth(model: nn.Module, groups: list[Group], batches: Batches, seed: int) -> dict[str, Tensor]:
    """What a squared error of one in each channel of each consumer's output is worth at one token (`outputs_of`): [out]."""
    found = outputs_of(model, {group.name: group.consumer for group in groups}, batches, seed)
    return {name: output.worth for name, output in found.items()}


def outputs_of(model: nn.Module, modules: Mapping[str, nn.Module], batches: Batches, seed: int) -> dict[str, Output]:
    """What the model's predictions say of each module's output (the first, of several).

    `F_c = E[g_c^2]` with g the gradient of the model's own log-likelihood at the output. No labels: the
    gradient at the model's output is drawn as `sqrt(p) * e - p <sqrt(p), e>`, e standard normal, whose covariance is
    the softmax's Fisher `diag(p) - p p^T` exactly; outputs that are not logits count as means of unit-variance Gaussians.

    Where one prediction reads all tokens of an example, their errors e add up before they are squared, and heads, say, err
    in the same direction at all of them: see `Coherence`. (No better for predictions at every token.)

    One forward and one backward pass over `some_examples`. Call it inside `quiet(model)`.
    """
    totals: dict[str, Tensor] = {}
    parts = some_examples(batches)
    passes = Passes(model, parts, Loss(model, parts, seed, from_labels=False), batches.processes, "Gradients")
    masks, predicts = masks_of_linears(model), mask_of_output(model)
    num_tokens = {name: torch.zeros(1, dtype=torch.float64) for name in modules}
    counted: dict[str, int] = {}  # name -> the last part whose tokens have been counted
    together = {
        name: Coherence(isinstance(getattr(module, "bias", None), Tensor))
        for name, module in modules.items()
        if predicts_once(model)
    }

    def add(name: str, output: Tensor, gradient: Tensor) -> None:
        mask = masks.get(modules[name], predicts)
        rows = [passes.real_rows(each, mask) for each in (gradient, output)]
        totals[name] = totals.get(name, 0) + torch.stack([each.double().square().sum(0) for each in rows]).cpu()
        if together:
            together[name].add(passes.by_example(output, mask), passes.by_example(gradient, mask), len(rows[0]))
        if counted.get(name) != passes.part:  # a shared block runs more than once
            counted[name] = passes.part
            num_tokens[name] += len(rows[0])

    passes.run(lambda: on_output_gradient(modules, add))
    found = [totals[name] for name in modules]
    batches.processes.add_up(*found, *(each.sums for each in together.values()), *num_tokens.values())
    means = {name: total / num_tokens[name] for name, total in zip(modules, found, strict=True)}
    return {name: Output(mean[0], mean[1], together[name].value() if together else 1.0) for name, mean in means.items()}


@dataclass(frozen=True)
class Sensitivity:
    """Of the loss, at one group; float64, on the CPU."""

    masks: Tensor
    """Gradient of each example's loss with respect to a factor on each unit, at 1: [examples, units]."""
    output: Tensor
    """Sum over tokens of the squared gradient at the consumer's output: [out]."""


def sensitivities(
    model: nn.Module, groups: list[Group], batches: Batches, seed: int, *, from_labels: bool
) -> dict[str, Sensitivity]:
    """What the loss says of every unit and of every consumer's output, from one forward and one backward pass over all data.

    The gradient of a factor on a unit is, with z what the consumer reads, `sum z * dL/dz` over the example's tokens and the
    unit's columns. The loss is the negative log-likelihood of the labels (of the next tokens, for causal language models),
    summed over the example; or, not `from_labels`, of the model's own predictions: a gradient drawn as `outputs_of` draws
    it, whose covariance is the exact Fisher information of the output. Call it inside `quiet(model)`.
    Source: 2204.09656, where the factor multiplies a head's attention probabilities: the same derivative.
    """
    parts = small_parts(batches)
    passes = Passes(model, parts, Loss(model, parts, seed, from_labels=from_labels), batches.processes, "Gradients")
    counts = [_examples(inputs) for inputs, _ in parts]
    masks = {group.name: torch.zeros(sum(counts), group.units, dtype=torch.float64) for group in groups}
    rows = {name: torch.split(own, counts) for name, own in masks.items()}
    by_name = {group.name: group for group in groups}
    output_sums = {group.name: torch.zeros(weight(group.consumer).shape[0], dtype=torch.float64) for group in groups}

    def add(group: Group, z: Tensor, gradient: Tensor) -> None:
        units = (z * gradient).view(counts[passes.part], -1, group.units, group.width).double().sum((1, 3))
        if passes.counts:
            rows[group.name][passes.part].add_(units.cpu())  # a shared block runs more than once

    def add_output(name: str, output: Tensor, gradient: Tensor) -> None:
        output_sums[name] += passes.real_rows(gradient, by_name[name].mask).double().square().sum(0).cpu()

    def watch(group: Group, z: Tensor) -> None:
        z.register_hook(partial(add, group, z.detach()))  # type: ignore[no-untyped-call]

    consumers = {group.name: group.consumer for group in groups}

    @contextmanager
    def hooks() -> Iterator[None]:
        with on_consumer_input(groups, watch), on_output_gradient(consumers, add_output):
            yield

    passes.run(hooks)
    for group in groups:
        batches.processes.add_up(masks[group.name], output_sums[group.name])
    return {name: Sensitivity(own, output_sums[name]) for name, own in masks.items()}


class Loss:
    """What is differentiated: the loss of the labels, or that of labels drawn from the model's own predictions."""

    def __init__(self, model: nn.Module, parts: Sequence[Part], seed: int, *, from_labels: bool):
        self._model, self._from_labels, self._seed, self._drawn = model, from_labels, seed, 0
        self._predicts = mask_of_output(model)
        self._masks = [inputs.get(self._predicts) for inputs, _ in parts]
        self._generators = [torch.Generator().manual_seed(seed + output) for output in range(2)]  # start and end: two outputs

    def gradients(
        self, part: int, output: Any, inputs: dict[str, Tensor], labels: dict[str, Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The model's predictions, and the gradient at each, for part number `part`; parts come in their order.

        What other processes draw for their parts is drawn here too, and forgotten: the draw does not depend on who makes it.
        """
        if self._from_labels:
            return loss_gradients(self._model, output, inputs, labels)
        found = predictions(output, inputs.get(self._predicts))
        if inputs.get(self._predicts) is None:  # what others predict may have another length: each part has a draw of its own
            self._generators = [torch.Generator().manual_seed(self._seed + 2 * part + output) for output in range(2)]
        for mask in (mask for mask in self._masks[self._drawn : part] if mask is not None):
            for each, generator in zip(found, self._generators, strict=False):
                _noise(_shape(each, mask), None if each.mask is None else mask, generator)
        self._drawn = part + 1
        return drawn_gradients(found, self._generators)


class Passes:
    """A forward and a backward pass for each of this process's parts. Hooks look up here what they see just now."""

    def __init__(
        self, model: nn.Module, parts: Sequence[Part], loss: Loss, processes: Processes, what: str, first_block: int | None = None
    ):
        """first_block: where the backward pass may end; None: at the first. Later stacks have an end of their own."""
        self._model, self._parts, self._loss = model, parts, loss
        self._first = first_block
        self._own = processes.share(parts)
        self.part = 0
        """The number of the part at hand."""
        self.inputs: dict[str, Tensor] = {}
        """Its inputs."""
        self._bar: dict[str, Any] = {"desc": what, "unit": "batch", "disable": None if processes.is_main else True}

    @property
    def counts(self) -> bool:
        """Whether what is seen belongs to this process."""
        return bool(self._own)

    def real_rows(self, rows: Tensor, mask: str) -> Tensor:
        """The rows of the real tokens of the part at hand, which its input `mask` names; none if the part does not count."""
        return real_rows(rows, self.inputs.get(mask)) if self._own else rows.reshape(-1, rows.shape[-1])[:0]

    def by_example(self, rows: Tensor, mask: str) -> Tensor:
        """The same rows as [examples, tokens, width], zero where there is no token."""
        whole, real = rows.reshape(_examples(self.inputs), -1, rows.shape[-1]), self.inputs.get(mask)
        whole = whole if self._own else whole[:0]
        return whole if real is None or not self._own else whole * real.to(whole.device).reshape(*whole.shape[:2], 1).bool()

    def run(self, hooks: Callable[[], AbstractContextManager[Any]]) -> None:
        """All parts, one after the other, with `hooks` in place; of an offloaded model with one block at a time in memory."""
        # one without a part of its own looks at the first, to know what there is to sum, and counts nothing
        own = list(self._own or range(1))
        if is_offloaded(self._model) and len(find_stacks(self._model)) == 1:
            with torch.enable_grad():
                inputs = [self._at(part) for part in own]
                start, at = (lambda i, output: self._start(own[i], output)), (lambda i: self._at(own[i]))
                passes_by_block(self._model, inputs, start, at, hooks, self._first or 0)
            return
        starts = first_blocks(self._model)
        if self._first is not None:
            starts = [find_blocks(self._model)[self._first], *starts[1:]]
        with torch.enable_grad(), differentiable_from(starts), hooks():
            for part in tqdm(own, **self._bar):
                torch.autograd.backward(*self._start(part, self._model(**self._at(part))))

    def _at(self, part: int) -> dict[str, Tensor]:
        """Go to this part; its inputs."""
        device = device_of(self._model)
        self.part, self.inputs = part, {name: value.to(device) for name, value in self._parts[part][0].items()}
        return self.inputs

    def _start(self, part: int, output: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The predictions for this part, and the gradient at each."""
        inputs, labels = self._at(part), self._parts[part][1]
        outputs, given = self._loss.gradients(part, output, inputs, labels)
        return outputs, given if self._own else [torch.zeros_like(each) for each in given]


def first_blocks(model: nn.Module) -> list[nn.Module]:
    """Of every stack."""
    return [stack.blocks[0] for stack in find_stacks(model)]


def _examples(inputs: dict[str, Tensor]) -> int:
    return len(next(iter(inputs.values())))


@contextmanager
def differentiable_from(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let gradients flow back to the inputs of `blocks` and no further, although no parameter wants one."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden.requires_grad_()

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


def drawn_gradients(found: list[Prediction], generators: list[torch.Generator]) -> tuple[list[Tensor], list[Tensor]]:
    """The model's predictions and a random gradient for each, drawn from their Fisher information."""
    drawn = []
    for each, generator in zip(found, generators, strict=False):
        noise = _noise(each.value.shape, each.mask, generator).to(each.value.device)
        if each.kind != "values":
            p = each.mean()
            noise.mul_(p.sqrt())
            noise.addcmul_(p, noise.sum(-1, keepdim=True), value=-1)
        drawn.append(noise.to(each.value.dtype))
    return [each.value for each in found], drawn


def _noise(shape: Sequence[int], mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Standard normal, zero on padding; drawn example by example, so neither padding nor batch size changes the draw."""
    noise = torch.zeros(*shape)
    for row, real in zip(noise, [slice(None)] * len(noise) if mask is None else mask.bool().cpu(), strict=True):
        row[real] = torch.randn(row[real].shape, generator=generator)
    return noise


def _shape(like: Prediction, mask: Tensor) -> tuple[int, ...]:
    """That of the same prediction for the examples of `mask`."""
    return (*mask.shape, *like.value.shape[2:]) if like.mask is not None else (len(mask), *like.value.shape[1:])
