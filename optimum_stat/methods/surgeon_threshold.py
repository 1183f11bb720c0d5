"""One threshold over all layers, or one per layer: what lies below goes. Layers are seen twice; only counts are kept in between.

Source: The LLM Surgeon (2312.17244) and its authors' `threshold.py`. Difference: exactly as many weights go as were
asked, ties or not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = 11  # of a float32 cost that do not count for its bin: bins differ by one part in 4,096


class ElementThreshold:
    """For costs of single weights [out, in], all at least 0; `of_four`: of the two cheapest of each four, which go together.

    `per_layer`: the same share of every layer, instead of what costs least over all layers.
    """

    def __init__(self, of_four: bool = False, per_layer: bool = False):
        self.of_four, self.per_layer, self._share = of_four, per_layer, 0.0
        self._counts = torch.zeros(1 << (31 - BITS), dtype=torch.int64)
        self._bin = self._left = 0

    def see(self, costs: Tensor) -> None:
        """Count a layer's costs."""
        self._counts += torch.bincount(_bins(self._grouped(costs)).flatten(), minlength=len(self._counts)).cpu()

    def settle(self, num_gone: int) -> None:
        """Find the level at which at least `num_gone` weights go, and no more than one pair further."""
        wanted = -(-num_gone // 2) if self.of_four else num_gone
        self._share = wanted / max(1, int(self._counts.sum()))
        self._find(wanted)

    def _find(self, wanted: int) -> None:
        below = self._counts.cumsum(0)
        self._bin = int(torch.searchsorted(below, wanted))  # the first bin with which enough has gone
        self._left = wanted - (int(below[self._bin - 1]) if self._bin else 0)

    def mask(self, costs: Tensor) -> Tensor:
        """What goes of a layer, [out, in]; show the layers in one order, each once, with the costs that were seen."""
        grouped = self._grouped(costs)
        bins = _bins(grouped)
        if self.per_layer:
            self._counts = torch.bincount(bins.flatten(), minlength=len(self._counts)).cpu()
            self._find(math.ceil(self._share * bins.numel() - 1e-6))
        chosen = bins < self._bin
        on_edge = (bins == self._bin).flatten().nonzero().flatten()[: self._left]
        self._left -= len(on_edge)
        chosen.view(-1)[on_edge] = True
        if not self.of_four:
            return chosen
        pairs = costs.view(len(costs), -1, 4).topk(2, dim=-1, largest=False).indices
        every = torch.zeros(*grouped.shape, 4, dtype=torch.bool, device=costs.device).scatter_(-1, pairs, True)
        return (every & chosen[..., None]).view_as(costs)

    def _grouped(self, costs: Tensor) -> Tensor:
        if not self.of_four:
            return costs.float().contiguous()
        return costs.view(len(costs), -1, 4).topk(2, dim=-1, largest=False).values.sum(-1).float()


class LineThreshold:
    """For the costs of rows [out] and columns [in], which overlap: r rows and c columns hold `r in + c out - r c` weights."""

    def __init__(self) -> None:
        self._costs: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._level = float("-inf")

    def see(self, rows: Tensor, columns: Tensor) -> None:
        """Note what each line of a layer costs, and how many weights it adds to those that cheaper lines hold."""
        out, width = len(rows), len(columns)
        costs, order = torch.cat([rows, columns]).double().cpu().sort(stable=True)
        is_row = order < out
        r, c = is_row.long().cumsum(0), (~is_row).long().cumsum(0)
        held = r * width + c * out - r * c
        self._costs.append(costs)
        self._sizes.append(held.diff(prepend=held.new_zeros(1)))

    def settle(self, num_gone: int) -> None:
        """Find the cheapest level at which at least `num_gone` weights go."""
        costs, order = torch.cat(self._costs).sort(stable=True)
        held = torch.cat(self._sizes)[order].cumsum(0)
        if num_gone > 0:
            self._level = float(costs[int(torch.searchsorted(held, num_gone))])
        self._costs.clear()
        self._sizes.clear()

    def mask(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows and which columns of a layer go: bool [out], bool [in]."""
        return rows.double() <= self._level, columns.double() <= self._level


def _bins(costs: Tensor) -> Tensor:
    """Numbers of at least 0 are in the order of their bits."""
    return costs.clamp_min(0).view(torch.int32) >> BITS
