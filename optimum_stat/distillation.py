"""Train what is left, for a few passes over the calibration data, to predict what the dense model predicts. No labels."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from .blocks import mask_of_output
from .data import Batches
from .families import find_blocks, task_of
from .probes import Prediction, device_of, predictions, quiet, small_parts

RATE = 0.001
"""Largest step of a weight, as a share of the root mean square of its tensor."""
NEAR = 0.0005
"""The same as a share of the square root of the divergence that a step sees, in nats, all its predictions together: where little
is wrong, or few predictions say so (a classifier has ten in a step), longer steps lead away from the teacher."""
STEP = 128
"""Tokens of a step. SmolLM2 at 0.75, 8,192 tokens, one pass: perplexity 27.35; in steps of 256 28.05, of 512 28.23."""
WARM_UP = 0.1  # of all steps


def teacher_of(model: nn.Module) -> nn.Module:
    """A model of its own with the same parameters, which are shared: pruning replaces parameters, it never changes them."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def distill(model: nn.Module, teacher: nn.Module, batches: Batches, epochs: int, seed: int) -> None:
    """Train all parameters of the blocks, for `epochs` passes over the data, about 128 tokens at a step.

    The loss is the mean over predictions of the Kullback-Leibler divergence from the teacher's distribution, or half of the
    squared difference where the output is no logits. Adam, whose steps are a share of each tensor's size, so that one rate
    serves all models: `min(RATE, NEAR sqrt(D))`, D the divergence of all predictions of a step, mean of the steps so far; it
    rises over the first tenth of the steps and falls to zero. Weights that are zero stay zero. The blocks get new parameters,
    the old ones stay as they are. Call it inside `quiet(model)`, which takes the gradients away again.
    Source: Hinton et al. 1503.02531 (temperature 1); steps relative to the parameter from Adafactor (1804.04235).
    """
    weights = _renewed(model)
    masters = [weight.detach().float().clone().requires_grad_() for weight in weights]  # small steps vanish in half precision
    empty = [nothing if (nothing := master == 0).any() else None for master in masters]
    sizes = [float(master.detach().square().mean().sqrt()) for master in masters]
    # fused: on CPU a quarter of the time, which is otherwise half of a step's
    groups = [{"params": [master]} for master in masters]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    parts, generator = _lessons(model, batches), torch.Generator().manual_seed(seed)
    order = [int(at) for _ in range(epochs) for at in torch.randperm(len(parts), generator=generator)]
    lost = 0.0
    with quiet(teacher), torch.enable_grad():
        shown = {"desc": "Distilling", "unit": "batch", "disable": None if batches.processes.is_main else True}
        for step, at in enumerate(tqdm(order, **shown)):
            lost += _backward(model, teacher, {name: value.to(device_of(model)) for name, value in parts[at].items()})
            rate = min(RATE, NEAR * math.sqrt(max(0.0, lost) / (step + 1)))
            share = min((step + 1) / (WARM_UP * len(order)), 1 - step / len(order))
            for group, size, master, weight in zip(optimizer.param_groups, sizes, masters, weights, strict=True):
                group["lr"] = rate * share * size
                master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
            optimizer.step()
            with torch.no_grad():
                for weight, master, zeros in zip(weights, masters, empty, strict=True):
                    weight.copy_(master if zeros is None else master.masked_fill_(zeros, 0))


def _lessons(model: Any, batches: Batches) -> list[dict[str, Tensor]]:
    """Inputs of each step: whole examples, or, of causal language models, to which it is a text as well, a piece of one."""
    whole = [inputs for inputs, _ in small_parts(batches, STEP)]
    if task_of(model) != "text-generation":
        return whole
    pieces = [
        {name: value[:, start : start + STEP] for name, value in inputs.items()}
        for inputs in whole
        for start in range(0, inputs["input_ids"].shape[1], STEP)
    ]
    real = [piece["attention_mask"].any(1) for piece in pieces]
    return [{k: v[rows] for k, v in piece.items()} for piece, rows in zip(pieces, real, strict=True) if rows.any()]


def _renewed(model: nn.Module) -> list[nn.Parameter]:
    """New parameters, equal to the old ones, in all blocks; each once, also if blocks share it."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in find_blocks(model).modules():
        for name, old in module.named_parameters(recurse=False):
            if old not in new:
                new[old] = nn.Parameter(old.detach().clone())
            setattr(module, name, new[old])
    return list(new.values())


def _backward(model: Any, teacher: Any, inputs: dict[str, Tensor]) -> float:
    """Gradients of the loss of one batch; the divergence summed over its predictions."""
    with torch.no_grad():
        wanted = [each.mean() for each in predictions(teacher(**inputs), inputs.get(mask_of_output(model)))]
    found = predictions(model(**inputs), inputs.get(mask_of_output(model)))
    means, scale = [each.mean() for each in found], 1 / max(1, *map(_count, found))
    gradients = [(scale * (own - target)).to(each.value.dtype) for each, own, target in zip(found, means, wanted, strict=True)]
    torch.autograd.backward([each.value for each in found], gradients)
    return sum(_lost(each.kind, own, target) for each, own, target in zip(found, means, wanted, strict=True))


def _lost(kind: str, own: Tensor, target: Tensor) -> float:
    """The divergence of distributions from their targets, summed; of values half the squared difference."""
    if kind == "values":
        return float((own - target).square().sum()) / 2
    least = torch.finfo(own.dtype).tiny  # padding has no probabilities, and counts nothing
    return float((target * (target.clamp_min(least) / own.clamp_min(least)).log()).sum())


def _count(prediction: Prediction) -> int:
    """How many distributions, or values, it holds."""
    if prediction.kind == "over tokens" or prediction.mask is None:
        return len(prediction.value) if prediction.value.dim() == 2 else prediction.value.shape[:2].numel()
    return int(prediction.mask.sum())
