"""Whether a model of a family that nobody listed computes what it should once it is smaller."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .budget import OF_EXPERTS
from .data import Batches
from .experts import opened
from .families import Group, find_groups
from .family_table import FAMILIES
from .linalg import unit_columns
from .offload import is_offloaded
from .probes import device_of, on_consumer_input, quiet
from .slicing import restored_on_error, slice_model

FAR = 0.05  # of what the dropped units make: of that much, rounding makes nothing


class _Over(Exception):
    """The end of the trial, at which the model is put back."""


def refuse_unlike(model: Any, batches: Batches) -> None:
    """Drop a unit of everything in the first block, for one example: that has to be what zeros in its place are.

    Names and shapes tell where heads and neurons are, but not what else a forward pass knows of them: a bias with a share for
    each head, a width from the config. The model is as before. Listed families are not tried, nor is what does not fit.

    Raises:
        ValueError: the model does not run with a unit less, or computes something else.
    """
    if model.config.model_type in FAMILIES or is_offloaded(model):
        return
    example = {name: value[:1].to(device_of(model)) for name, value in batches.items[0].items()}
    with quiet(model), opened(model), torch.no_grad():
        try:
            dense, wanted, found = _tried(model, example)
        except Exception as error:  # whatever the code of a model that nobody knows raises
            raise _refused(model, f"and does not run with fewer heads and neurons: {error}") from error
    if found.shape != wanted.shape or float((found - wanted).abs().max()) > FAR * float((dense - wanted).abs().max()):
        raise _refused(model, "and with fewer heads and neurons it computes something else than without what they hand on")


def _tried(model: Any, example: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What the model makes of an example: as it is, with zeros in place of some units, and without these units."""
    steps = [(group, 1 if group.experts is None else OF_EXPERTS) for group in find_groups(model) if group.block == 0]
    kept = {group: group.units - step for group, step in steps if group.units > step and not group.inexact}

    def without(group: Group, z: Tensor) -> Tensor:
        gone = unit_columns(torch.arange(kept[group], group.units, device=z.device), group.width)
        return z.index_fill(-1, gone, 0)

    dense = _output(model, example)
    with on_consumer_input(kept, without):
        wanted = _output(model, example)
    found = wanted
    with suppress(_Over), restored_on_error(model):
        slice_model(model, {group.name: torch.arange(count) for group, count in kept.items()})
        found = _output(model, example)
        raise _Over
    return dense, wanted, found


def _output(model: Any, example: dict[str, Tensor]) -> Tensor:
    """The first tensor of numbers that the model returns, in float32."""
    output = model(**example)
    return next(value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point()).float()


def _refused(model: Any, why: str) -> ValueError:
    kind, name = model.config.model_type, type(model).__name__
    return ValueError(f"model_type={kind!r} of this {name} is none of the families that optimum-stat knows, {why}.")
