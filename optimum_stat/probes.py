"""Read or change the input of consumers, and read the gradient of their output, while a model runs.

Everything here is a context manager that leaves no hook, gradient or mode behind, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .budget import largest
from .data import Batches
from .families import Group, task_of
from .labels import predicts_next
from .offload import execution_device

OVERFLOW = "Does the model overflow in its dtype? Try dtype=torch.float32 or torch.bfloat16."
FISHER_TOKENS = 2048  # a diagonal has one number a channel: it needs far fewer tokens than a Gram matrix
Visit = Callable[[Group, Tensor], Tensor | None]
Part = tuple[dict[str, Tensor], dict[str, Tensor] | None]
"""Inputs and labels of some examples."""


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
def on_output_gradient(modules: Mapping[str, nn.Module], visit: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `visit(name, y, g)` with every module's output y [..., out], or the first of several, and its gradient g.

    During a backward pass, in the order in which gradients come.
    """

    def watch(name: str, module: nn.Module, args: Any, output: Any) -> None:
        y = output if isinstance(output, Tensor) else output[0]
        y.register_hook(partial(visit, name, y.detach()))

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(watch, name)).remove)
        yield


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients, no cache, named outputs, full float32 products; all is put back afterwards.

    So is the state of torch's random numbers: some models draw which layers to skip also when they skip none.
    """
    modes = [(module, module.training) for module in model.modules()]
    # by name: the work inside may replace parameters, and the new ones are to be what the old ones were
    wanted = [(m, name, p.requires_grad) for m in model.modules() for name, p in m.named_parameters(recurse=False)]
    parts = [module for module in model.modules() if module is model or isinstance(module, PreTrainedModel)]
    configs = {id(config): config for part in parts if (config := getattr(part, "config", None)) is not None}
    borrowed = {"use_cache": False, "return_dict": True}
    before = [(c, n, getattr(c, n)) for c in configs.values() for n in borrowed if getattr(c, n, None) is not None]
    precision, random = torch.get_float32_matmul_precision(), torch.random.get_rng_state()
    try:
        torch.set_float32_matmul_precision("highest")  # TF32 has too few digits for a Gram matrix
        model.eval()
        model.requires_grad_(False)
        for config, name, _ in before:
            setattr(config, name, borrowed[name])
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.random.set_rng_state(random)
        for config, name, value in before:
            setattr(config, name, value)
        for module, mode in modes:
            module.training = mode
        for module, name, value in wanted:
            getattr(module, name).requires_grad_(value)


def small_parts(batches: Batches, tokens: int = 512) -> list[Part]:
    """Inputs and labels of all examples, in their order, about so many tokens at a time: backward passes need memory."""
    parts, least = [], 1 if isinstance(batches.seq_len, int) and "input_ids" in batches.items[0] else largest(batches.seq_len)
    for batch, labels in zip(batches, batches.labels or [None] * len(batches), strict=True):
        count, length = len(next(iter(batch.values()))), max(batch["input_ids"].shape[1] if "input_ids" in batch else 1, least)
        for rows in torch.split(torch.arange(count), max(1, tokens // length)):
            own = None if labels is None else {name: value[rows] for name, value in labels.items()}
            parts.append(({name: value[rows] for name, value in batch.items()}, own))
    return parts


def some_examples(batches: Batches) -> list[Part]:
    """One part in `gradient_stride`, spread evenly over the data: about FISHER_TOKENS tokens where there are many."""
    parts, stride = small_parts(batches), gradient_stride(batches.num_tokens)
    return parts[min(stride, len(parts)) // 2 :: stride]


def gradient_stride(num_tokens: int) -> int:
    """Of so many tokens, gradients are taken at one in how many: of 1,024 or more, half say it as well as all."""
    return max(1, num_tokens // FISHER_TOKENS, min(2, num_tokens // 512))


def has_loss(model: nn.Module, batches: Batches) -> bool:
    """Whether the data says what the model is to predict: its labels do, or, for causal language models, its next tokens."""
    return batches.labels is not None or predicts_next(model)


def predicts_once(model: nn.Module) -> bool:
    """Whether all tokens of an example serve one prediction."""
    task = task_of(model)
    return task == "question-answering" or "classification" in task.replace("token-classification", "")


def num_predictions(model: nn.Module, batches: Batches) -> int:
    """How many predictions the loss over all data is the sum of: one a token, or one an example."""
    if predicts_once(model):
        return batches.num_examples
    return batches.num_tokens if isinstance(batches.seq_len, int) else batches.seq_len[-1] * batches.num_examples


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
            return (value if self.mask is None else value.masked_fill(torch.eq(self.mask, 0), -torch.inf)).softmax(-1)
        value = value.softmax(-1) if self.kind == "logits" else value
        return value if self.mask is None else value * self.mask[..., None]


def predictions(output: Any, mask: Tensor | None) -> list[Prediction]:
    """What the model predicts, in the order in which it does; two towers predict where both inputs lie in one space."""
    if "start_logits" in output:
        return [Prediction(output[name], mask, "over tokens") for name in ("start_logits", "end_logits")]
    if "image_embeds" in output and "text_embeds" in output:
        return [Prediction(output[name], None, "values") for name in ("image_embeds", "text_embeds")]
    name = next((name for name in ("logits", "last_hidden_state") if name in output), None)
    if name is None:
        raise ValueError(
            f"The model returns {', '.join(output)}; what it predicts is sought in logits or last_hidden_state. Prune the model "
            "without this head, or with another."
        )
    value = output[name]
    kind = "logits" if "logits" in output and value.shape[-1] > 1 else "values"
    return [Prediction(value, mask if value.dim() == 3 else None, kind)]


def caches_in(values: Mapping[Any, Any]) -> dict[Any, Cache]:
    """The caches in a model's output or inputs, which have one name there: `past_key_values`, since transformers 5.24 `cache`."""
    return {name: value for name, value in values.items() if isinstance(value, Cache)}


def real_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of real tokens, [tokens, width]; `rows` is [batch, length, width] or already flattened (OPT's MLP)."""
    flat = rows.reshape(-1, rows.shape[-1])
    if mask is None or bool(mask.all()):
        return flat
    real = mask.flatten().nonzero().flatten().to(flat.device)
    return flat.index_select(0, real)  # a third of the time that flat[mask] takes


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: the device of its first real parameter; of one that is offloaded whole, where it runs."""
    real = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    return real or execution_device(model) or torch.device("cpu")
