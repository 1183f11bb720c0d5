"""Make a model small: keep the planned units of every group, drop the rest, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .families import Group, Producer, find_blocks, find_groups, weight

Plan = Mapping[str, Tensor]
"""Group name -> the units to keep, in the order in which they shall stand afterwards."""


@torch.no_grad()
def slice_model(model: nn.Module, plan: Plan) -> None:
    """Keep only the planned units of every group named in `plan`; groups that lose nothing are not touched."""
    for group in find_groups(model):
        if group.name in plan:
            slice_group(group, plan[group.name])


@torch.no_grad()
def slice_group(group: Group, keep: Tensor) -> None:
    """Keep only the units `keep` of one group. Afterwards `group` is stale: find the groups anew.

    Raises:
        ValueError: nothing would be left, or a unit does not exist.
    """
    if len(keep) == group.units:
        return
    if len(keep) == 0 or int(keep.max()) >= group.units:
        raise ValueError(f"{group.name} has units 0 to {group.units - 1}; the plan keeps {keep.tolist()}.")
    for producer in group.producers:
        _keep_outputs(producer.linear, producer_rows(group, producer, keep))
    _keep_inputs(group.consumer, consumer_columns(group, keep))
    for module, name, per_unit in group.counts:
        setattr(module, name, per_unit * len(keep))


def producer_rows(group: Group, producer: Producer, keep: Tensor) -> Tensor:
    """The output rows of `producer` that belong to the units `keep`."""
    rows = torch.arange(weight(producer.linear).shape[0], device=keep.device)
    return rows.view(producer.parts, group.units, -1)[:, keep].flatten()


def consumer_columns(group: Group, keep: Tensor) -> Tensor:
    """The input columns of the consumer that belong to the units `keep`: [len(keep) * width]."""
    columns = torch.arange(group.units * group.width, device=keep.device)
    return columns.view(group.units, group.width)[keep].flatten()


def _keep_outputs(linear: nn.Module, rows: Tensor) -> None:
    at = rows.to(weight(linear).device)
    set_weight(linear, weight(linear)[at])
    bias = linear.bias
    if isinstance(bias, Tensor):
        linear.bias = nn.Parameter(bias[at].clone(), bias.requires_grad)


def _keep_inputs(linear: nn.Module, columns: Tensor) -> None:
    set_weight(linear, weight(linear)[:, columns.to(weight(linear).device)])


def set_weight(linear: nn.Module, value: Tensor) -> None:
    """Give `linear` the weight `value` [out, in], and bring its size attributes along."""
    wanted = bool(linear.weight.requires_grad)
    if isinstance(linear, nn.Linear):
        linear.weight = nn.Parameter(value.clone(memory_format=torch.contiguous_format), wanted)
        linear.out_features, linear.in_features = value.shape
    else:
        linear.weight = nn.Parameter(value.T.clone(memory_format=torch.contiguous_format), wanted)
        linear.nx, linear.nf = value.T.shape  # type: ignore[assignment]


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put the parameters and sizes of all blocks back if the enclosed work fails or is interrupted.

    Keeps the old weights alive until the end, so the peak holds the dense model beside the pruned one; what must not be
    changed in place is every parameter: replace it, as `set_weight` does.
    """
    before = [(module, dict(module.__dict__), dict(module._parameters)) for module in find_blocks(model).modules()]
    try:
        yield
    except BaseException:
        for module, attributes, parameters in before:
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
        raise
