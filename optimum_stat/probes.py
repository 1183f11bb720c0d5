"""Read or change the input of consumers, and read the gradient of their output, while a model runs.

Everything here is a context manager that leaves no hook, gradient or mode behind, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from .data import Batches
from .families import Group, task_of, weight
from .labels import loss_gradients

Visit = Callable[[Group, Tensor], Tensor | None]
FISHER_TOKENS = 2048  # a diagonal has one number a channel: it needs far fewer tokens than a Gram matrix


@contextmanager
def on_consumer_input(groups: Iterable[Group], visit: Visit) -> Iterator[None]:
    """Call `visit(group, z)` with the input z [..., units * width] of every consumer; a tensor returned replaces it."""

    def hook(group: Group, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        new = visit(group, args[0])
        return None if new is None else (new, *args[1:])

    with ExitStack() as stack:
        for group in groups:
            handle = group.consumer.register_forward_pre_hook(partial(hook, group))
            stack.callback(handle.remove)
        yield


@contextmanager
def on_output_gradient(groups: Iterable[Group], visit: Callable[[Group, Tensor], None]) -> Iterator[None]:
    """Call `visit(group, g)` with the gradient g [..., out] of every consumer's output during a backward pass."""

    def watch(group: Group, module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(partial(visit, group))  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        for group in groups:
            stack.callback(group.consumer.register_forward_hook(partial(watch, group)).remove)
        yield


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients, no cache, named outputs, full float32 products; all is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    # by name: the work inside may replace parameters, and the new ones are to be what the old ones were
    wanted = [(m, name, p.requires_grad) for m in model.modules() for name, p in m.named_parameters(recurse=False)]
    config: Any = getattr(model, "config", None)
    borrowed = {"use_cache": False, "return_dict": True}
    before = {name: getattr(config, name) for name in borrowed if getattr(config, name, None) is not None}
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")  # TF32 has too few digits for a Gram matrix
        model.eval()
        model.requires_grad_(False)
        for name in before:
            setattr(config, name, borrowed[name])
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for name, value in before.items():
            setattr(config, name, value)
        for module, mode in modes:
            module.training = mode
        for module, name, value in wanted:
            getattr(module, name).requires_grad_(value)


def output_fisher(model: nn.Module, groups: list[Group], batches: Batches, seed: int) -> dict[str, Tensor]:
    """Diagonal of the Fisher information with respect to each consumer's output, per token: [out], float64.

    `F_c = E[g_c^2]` with g the gradient of the model's own log-likelihood at a consumer's output. No labels: the
    gradient at the model's output is drawn as `sqrt(p) * e - p <sqrt(p), e>`, e standard normal, whose covariance is
    the softmax's Fisher `diag(p) - p p^T` exactly; outputs that are not logits count as means of unit-variance Gaussians.
    One forward and one backward pass over about 2,048 tokens, without gradients of weights. Call it inside `quiet(model)`.
    """
    generators = [torch.Generator().manual_seed(seed + output) for output in range(2)]  # start and end: two outputs
    totals = {group.name: torch.zeros(weight(group.consumer).shape[0], dtype=torch.float64) for group in groups}
    mask, num_tokens = torch.empty(0), 0

    def add(group: Group, gradient: Tensor) -> None:
        totals[group.name] += real_rows(gradient, mask).double().square().sum(0).cpu()

    with torch.enable_grad(), on_output_gradient(groups, add), _differentiable_embeddings(model):
        for inputs in tqdm(_some_examples(batches), desc="Gradients", unit="batch"):
            inputs = {name: value.to(device_of(model)) for name, value in inputs.items()}
            mask = inputs["attention_mask"]
            num_tokens += int(mask.sum())
            outputs, drawn = drawn_gradients(model(**inputs), mask, generators)
            torch.autograd.backward(outputs, drawn)
    return {name: total / num_tokens for name, total in totals.items()}


def _some_examples(batches: Batches) -> list[dict[str, Tensor]]:
    """About FISHER_TOKENS tokens, spread evenly over the data."""
    parts = [inputs for inputs, _ in small_parts(batches)]
    stride = max(1, batches.num_tokens // FISHER_TOKENS)
    return parts[min(stride, len(parts)) // 2 :: stride]


def small_parts(batches: Batches) -> list[tuple[dict[str, Tensor], dict[str, Tensor] | None]]:
    """Inputs and labels of all examples, in their order, about 512 tokens at a time: backward passes need memory."""
    parts = []
    for batch, labels in zip(batches, batches.labels or [None] * len(batches), strict=True):
        count, length = batch["input_ids"].shape
        for rows in torch.split(torch.arange(count), max(1, 512 // length)):
            own = None if labels is None else {name: value[rows] for name, value in labels.items()}
            parts.append(({name: value[rows] for name, value in batch.items()}, own))
    return parts


def has_loss(model: nn.Module, batches: Batches) -> bool:
    """Whether the data says what the model is to predict: its labels do, or, for causal language models, its next tokens."""
    return batches.labels is not None or task_of(model) == "text-generation"


def num_predictions(model: nn.Module, batches: Batches) -> int:
    """How many predictions the loss over all data is the sum of: one a token, or one an example."""
    tokenwise = task_of(model) in ("text-generation", "fill-mask", "token-classification", "feature-extraction")
    return batches.num_tokens if tokenwise else batches.num_examples


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
    summed over the example; or, not `from_labels`, of the model's own predictions: a gradient drawn as `output_fisher` draws
    it, whose covariance is the exact Fisher information of the output. No gradients of weights are made. Call it inside
    `quiet(model)`.
    Source: 2204.09656, where the factor multiplies a head's attention probabilities: the same derivative.
    """
    generators = [torch.Generator().manual_seed(seed + output) for output in range(2)]
    masks: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    output_sums = {group.name: torch.zeros(weight(group.consumer).shape[0], dtype=torch.float64) for group in groups}
    mask = torch.empty(0)

    def add(group: Group, z: Tensor, gradient: Tensor) -> None:
        units = (z * gradient).view(*mask.shape, group.units, group.width).double().sum((1, 3))
        masks[group.name][-1] = masks[group.name][-1] + units.cpu()  # a shared block runs more than once

    def add_output(group: Group, gradient: Tensor) -> None:
        output_sums[group.name] += real_rows(gradient, mask).double().square().sum(0).cpu()

    def watch(group: Group, z: Tensor) -> None:
        z.register_hook(partial(add, group, z.detach()))  # type: ignore[no-untyped-call]

    hooks = on_consumer_input(groups, watch), on_output_gradient(groups, add_output), _differentiable_embeddings(model)
    with torch.enable_grad(), hooks[0], hooks[1], hooks[2]:
        for inputs, labels in tqdm(small_parts(batches), desc="Gradients", unit="batch"):
            inputs = {name: value.to(device_of(model)) for name, value in inputs.items()}
            mask = inputs["attention_mask"]
            for group in groups:
                masks[group.name].append(torch.zeros(len(mask), group.units, dtype=torch.float64))
            output = model(**inputs)
            if from_labels:
                torch.autograd.backward(*loss_gradients(model, output, inputs, labels))
            else:
                torch.autograd.backward(*drawn_gradients(output, mask, generators))
    return {name: Sensitivity(torch.cat(parts), output_sums[name]) for name, parts in masks.items()}


@dataclass(frozen=True)
class Prediction:
    """One output of a model: the logits of distributions, or plain values, taken as means of unit-variance Gaussians."""

    value: Tensor
    """[examples, classes], [examples, tokens, classes], or, over tokens, [examples, tokens]."""
    mask: Tensor | None
    """Which tokens are real: [examples, tokens]; None where there is one prediction an example."""
    kind: str
    """"logits", "over tokens" (a softmax over the tokens of the sequence) or "values"."""

    def mean(self) -> Tensor:
        """What is predicted: probabilities, or the values; zero on padding. At least float32, without gradient."""
        value = self.value.detach().float()
        if self.kind == "over tokens":
            assert self.mask is not None
            return value.masked_fill(torch.eq(self.mask, 0), -torch.inf).softmax(-1)
        value = value.softmax(-1) if self.kind == "logits" else value
        return value if self.mask is None else value * self.mask[..., None]


def predictions(output: Any, mask: Tensor) -> list[Prediction]:
    """What the model predicts, in the order in which it does."""
    if "start_logits" in output:
        return [Prediction(output[name], mask, "over tokens") for name in ("start_logits", "end_logits")]
    value = output["logits"] if "logits" in output else output["last_hidden_state"]
    kind = "logits" if "logits" in output and value.shape[-1] > 1 else "values"
    return [Prediction(value, mask if value.dim() == 3 else None, kind)]


def drawn_gradients(output: Any, mask: Tensor, generators: list[torch.Generator]) -> tuple[list[Tensor], list[Tensor]]:
    """The model's predictions and a random gradient for each, drawn from their Fisher information."""
    found, drawn = predictions(output, mask), []
    for each, generator in zip(found, generators, strict=False):
        noise = _noise(each.value, each.mask, generator)
        if each.kind != "values":
            p = each.mean()
            noise.mul_(p.sqrt())
            noise.addcmul_(p, noise.sum(-1, keepdim=True), value=-1)
        drawn.append(noise.to(each.value.dtype))
    return [each.value for each in found], drawn


def _noise(value: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Standard normal, zero on padding; drawn example by example, so neither padding nor batch size changes the draw."""
    noise = torch.zeros(value.shape)
    for row, real in zip(noise, [slice(None)] * len(noise) if mask is None else mask.bool().cpu(), strict=True):
        row[real] = torch.randn(row[real].shape, generator=generator)
    return noise.to(value.device)


@contextmanager
def _differentiable_embeddings(model: nn.Module) -> Iterator[None]:
    """Let gradients flow back to the embeddings although no parameter wants one."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def real_rows(rows: Tensor, mask: Tensor) -> Tensor:
    """The rows of real tokens, [tokens, width]; `rows` is [batch, length, width] or already flattened (OPT's MLP)."""
    flat = rows.reshape(-1, rows.shape[-1])
    return flat if bool(mask.all()) else flat[mask.flatten().bool()]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: the device of its first real parameter."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
