"""The state of one block as tensors and a few numbers: what a journal keeps of a block that is finished."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .families import groups_of_block
from .few_pairs import narrow_pairs
from .few_values import kept_values, narrow_values
from .head_dimensions import pairs_gone, queries_and_keys
from .slicing import keep_heads, kept_heads, slice_group

DIMENSIONS = ("pairs", "values")


def sizes(model: nn.Module, index: int, block: nn.Module) -> dict[str, Any]:
    """Group -> units; "kept_heads" where the block has to know which ones it keeps, "kept_values" and "gone_pairs"
    where some of a head's dimensions went. Plain JSON values."""
    found: dict[str, Any] = {}
    for group in groups_of_block(model, index, block):
        if group.structure in DIMENSIONS:
            continue  # of the dense model
        found[group.place] = group.units
        if group.biased is not None:
            found["kept_heads"] = kept_heads(group)
        if (values := kept_values(group.consumer)) is not None:
            found[f"kept_values {group.place}"] = values
        if group.structure == "heads" and (gone := pairs_gone(group)) is not None:
            found[f"gone_pairs {group.place}"] = gone
    return found


def restore(model: nn.Module, index: int, block: nn.Module, wanted: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Cut `block` to the sizes it had, and give it the weights it had, as far as there are any."""
    for group in groups_of_block(model, index, block):
        if group.structure not in DIMENSIONS:
            slice_group(group, torch.arange(wanted[group.place], device="cpu"))
    for group in groups_of_block(model, index, block):
        if group.biased is not None:
            keep_heads(group, wanted["kept_heads"])
        if (gone := wanted.get(f"gone_pairs {group.place}")) is not None:
            assert group.rotary is not None
            queries, keys = queries_and_keys(group)
            narrow_pairs(queries, keys, gone, group.rotary)
        if (values := wanted.get(f"kept_values {group.place}")) is not None:
            narrow_values(group.producers[-1].linear, group.consumer, values)
    for name, value in weights.items():
        owner, _, leaf = name.rpartition(".")
        module = block.get_submodule(owner)
        old = module._parameters[leaf]
        assert old is not None
        module._parameters[leaf] = nn.Parameter(value.to(old.device), bool(old.requires_grad))
