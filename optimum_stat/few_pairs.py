"""Attention whose queries and keys have lost rotary pairs of dimensions.

A rotary embedding turns dimensions of queries and keys two by two, each pair at its own pace, so a pair goes as a whole, and
those that stay must keep their places. The linears that make queries and keys write zeros where pairs are gone: attention, cache
and embedding are untouched, whatever computes them. Their weights are ordinary matrices, as small as what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .few_values import turn_into


class FewPairs(nn.Linear):
    """Makes queries, or keys, without the pairs `gone[g]` of each key/value head g, and zeros in their places.

    weight: [rows that are left, in_features], in their old order; `out_features` counts the zeros.
    """

    gone: tuple[tuple[int, ...], ...]
    made: tuple[int, ...]
    """Of every output its row of the weight; of those that are gone, the first behind the last."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., heads * head width]."""
        rows = F.pad(F.linear(input, self.weight, self.bias), (0, 1))
        return rows.index_select(-1, torch.tensor(self.made, device=rows.device))


def dimensions_of_pairs(width: int, rotated: int, interleaved: bool) -> Tensor:
    """The two dimensions of each pair: [width / 2, 2], of heads whose first `rotated` dimensions are turned.

    Halves stand side by side, or, `interleaved`, neighbours belong together; so do those that are not turned.
    """
    if interleaved:
        return torch.arange(width, device="cpu").view(-1, 2)
    turned = torch.arange(rotated, device="cpu").view(2, -1).T
    return torch.cat([turned, torch.arange(rotated, width, device="cpu").view(-1, 2)])


def narrow_pairs(queries: nn.Module, keys: nn.Module, gone: Sequence[Sequence[int]], pairs: Tensor) -> None:
    """Take the pairs `gone[g]` from each key/value head g and its query heads, in place; the modules become `FewPairs`.

    queries: weight [query heads * head width, in]; keys: [key/value heads * head width, in]; pairs: as `dimensions_of_pairs`.
    """
    for module in (queries, keys):
        if not isinstance(module, nn.Linear):
            raise TypeError(f"Fewer pairs asked of a {type(module).__name__}; it must be Linear.")
        heads = module.weight.shape[0] // pairs.numel() // len(gone)
        stays = torch.ones(len(gone), heads, pairs.numel(), dtype=torch.bool, device="cpu")
        for head, lost in enumerate(gone):
            stays[head, :, pairs[list(lost)].flatten()] = False
        flat = stays.flatten()
        rows = flat.nonzero().flatten()
        for name in ("weight", "bias"):
            old = getattr(module, name)
            if isinstance(old, Tensor):
                setattr(module, name, nn.Parameter(old.detach()[rows.to(old.device)], old.requires_grad))
        turn_into(module, FewPairs)
        module.made = tuple(torch.where(flat, flat.cumsum(0) - 1, len(rows)).tolist())  # type: ignore[assignment]
        module.gone = tuple(tuple(lost) for lost in gone)  # type: ignore[assignment]


def gone_pairs(keys: nn.Module) -> tuple[tuple[int, ...], ...] | None:
    """Which pairs of each key/value head are gone; None: none."""
    return keys.gone if isinstance(keys, FewPairs) else None
