"""Attention whose heads have fewer value dimensions than query and key dimensions.

transformers views queries, keys and values by one head width. So the linear that makes the values writes zeros where dimensions
are gone, and the one that reads the heads leaves these out: the attention between them is untouched, whatever computes it.
Their weights are ordinary matrices, as small as the dimensions that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FewValues(nn.Linear):
    """Makes the first `kept[g]` of the `head_width` values of each key/value head g, and zeros for the others.

    weight: [sum(kept), in_features]; `out_features` counts the zeros, as whatever is put around it has to.
    """

    kept: tuple[int, ...]
    head_width: int

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., key/value heads * head_width]."""
        parts = torch.split(F.linear(input, self.weight, self.bias), list(self.kept), dim=-1)
        return torch.cat([F.pad(part, (0, self.head_width - part.shape[-1])) for part in parts], dim=-1)


class OfFewValues(nn.Linear):
    """Reads the first `kept[g]` dimensions of each query head that belongs to key/value head g, and no others.

    weight: [out_features, query heads of one key/value head * sum(kept)]; `in_features` counts what is not read, too.
    """

    kept: tuple[int, ...]
    head_width: int

    def forward(self, input: Tensor) -> Tensor:
        """[..., query heads * head_width] -> [..., out_features]."""
        heads = torch.unflatten(input, -1, (len(self.kept), -1, self.head_width))
        read = [heads[..., group, :, :count].flatten(-2) for group, count in enumerate(self.kept)]
        return F.linear(torch.cat(read, dim=-1), self.weight, self.bias)


def narrow_values(values: nn.Module, out: nn.Module, kept: Sequence[int]) -> None:
    """Leave the first `kept[g]` value dimensions of each key/value head g, in place; the modules become those above.

    values: weight [key/value heads * head width, in]; out: weight [out, query heads * head width].
    """
    if not isinstance(values, nn.Linear) or not isinstance(out, nn.Linear):
        raise TypeError(f"Fewer values asked of a {type(values).__name__} and a {type(out).__name__}; both must be Linear.")
    width, each = values.weight.shape[0] // len(kept), out.weight.shape[1]
    queries = each // values.weight.shape[0]
    rows = torch.cat([group * width + torch.arange(count, device="cpu") for group, count in enumerate(kept)])
    columns = torch.arange(each, device="cpu").view(len(kept), queries, width)
    read = torch.cat([columns[group, :, :count].flatten() for group, count in enumerate(kept)])
    made = values.weight.detach()[rows.to(values.weight.device)]
    values.weight = nn.Parameter(made, values.weight.requires_grad)
    if isinstance(values.bias, Tensor):
        values.bias = nn.Parameter(values.bias.detach()[rows.to(values.bias.device)], values.bias.requires_grad)
    seen = out.weight.detach()[:, read.to(out.weight.device)].contiguous()
    out.weight = nn.Parameter(seen, out.weight.requires_grad)
    for module, kind in ((values, FewValues), (out, OfFewValues)):
        turn_into(module, kind)
        module.kept, module.head_width = tuple(kept), width  # type: ignore[assignment]


def turn_into(module: nn.Module, kind: type[nn.Module]) -> None:
    """Another class for a module, in place: hooks, and whoever holds the module, stay."""
    module.__class__ = kind
    if "_old_forward" in module.__dict__:  # accelerate's hooks keep the forward that they call
        module.__dict__["_old_forward"] = MethodType(kind.forward, module)


def kept_values(out: nn.Module) -> tuple[int, ...] | None:
    """How many value dimensions of each key/value head `out` reads; None: all."""
    return out.kept if isinstance(out, OfFewValues) else None
