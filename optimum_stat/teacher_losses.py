"""What a teacher says of a student: of what it predicts, and of what stands in the residual stream after every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss

TEMPERATURE = 2.0
"""Of the predictions (Block Pruning's and VTrans's)."""
_SPANS = ("start_logits", "end_logits")


def of_outputs(model: nn.Module, outputs: Any, wanted: Any, mask: Tensor) -> Tensor:
    """`T^2 KL(teacher || student)` of the predicted distributions, mean over examples, or over real tokens where each has one.

    For answers in a text the mean of start and end; for regression and independent labels the mean squared difference of the
    outputs; without a head that of the last hidden states. T = 2. Source: Block Pruning's code (SQuAD and GLUE), VTrans's alike.
    """
    if "start_logits" in wanted:
        hidden = mask == 0
        pairs = [(outputs[name].masked_fill(hidden, -1e9), wanted[name].masked_fill(hidden, -1e9)) for name in _SPANS]
        return torch.stack([_divergence(*pair) for pair in pairs]).mean()
    name = "logits" if "logits" in wanted else "last_hidden_state"
    own, other = outputs[name].float(), wanted[name].float()
    if own.shape[:2] == mask.shape and own.dim() == 3:
        real = mask.bool()
        own, other = own[real], other[real]
    independent = getattr(model.config, "problem_type", None) == "multi_label_classification"
    if name != "logits" or own.shape[-1] == 1 or independent:
        return mse_loss(own, other)
    return _divergence(own, other)


def _divergence(own: Tensor, other: Tensor) -> Tensor:
    student, teacher = ((value.float() / TEMPERATURE).log_softmax(-1) for value in (own, other))
    return TEMPERATURE**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)


def of_layers(outputs: Any, wanted: Any, mask: Tensor) -> Tensor:
    """`mean over layers and real tokens of |h - h_teacher|^2 / |h_teacher|^2`; 0 where the teacher has other layers.

    Both with `output_hidden_states`. Relative for every token, as a few have activations that would hide all others.
    Source: VTrans's code takes the squared distance of chosen layers, after a learned map; here the teacher is, by default, the
    same network, and layer stands against layer.
    """
    own, other = outputs["hidden_states"][1:], wanted["hidden_states"][1:]
    if len(own) != len(other) or own[0].shape != other[0].shape:
        return mask.new_zeros((), dtype=torch.float32)
    real, distances = mask.bool(), []
    for here, there in zip(own, other, strict=True):
        target = there[real].float()
        distance = (here[real].float() - target).square().sum(-1)
        distances.append((distance / target.square().sum(-1).clamp(min=1e-12)).mean())
    return torch.stack(distances).mean()
