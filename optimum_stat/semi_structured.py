"""2:4 weights in the form that a CUDA device's sparse kernels read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .families import find_blocks


@torch.no_grad()
def to_sparse_semi_structured(model: nn.Module) -> list[str]:
    """Turn every 2:4 weight of the blocks' linear layers into torch's semi-structured tensor, in place; returns their names.

    For inference only, after loading: such tensors cannot be trained or saved, the ordinary model with its zeros can.

    Raises:
        ValueError: no layer has two zeros in every four weights of a row, or one is not on a CUDA device in half precision.
    """
    inside = set(find_blocks(model).modules())
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if layer in inside and isinstance(layer, nn.Linear) and is_two_of_four(layer.weight)
    }
    if not layers:
        raise ValueError(
            f"No linear layer in the blocks of this {type(model).__name__} has two zeros in every four weights of a row. "
            "Prune it with SurgeonConfig(structure='2:4') first."
        )
    for name, layer in layers.items():
        if layer.weight.device.type != "cuda" or layer.weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is {layer.weight.dtype} on {layer.weight.device}; semi-structured kernels need float16 or bfloat16 on "
                "CUDA: model.to('cuda', torch.bfloat16)."
            )
    for layer in layers.values():
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
    return list(layers)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether every run of four weights in a row [out, in] holds at least two zeros."""
    return weight.shape[1] % 4 == 0 and bool((weight.reshape(len(weight), -1, 4) == 0).sum(-1).ge(2).all())
