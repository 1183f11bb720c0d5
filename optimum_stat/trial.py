"""Whether a model of a family that nobody listed computes what it should once it is smaller."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .budget import OF_EXPERTS
from .data import Batches
from .experts import opened
from .families import Group, find_blocks, find_groups
from .family_table import FAMILIES
from .linalg import unit_columns
from .offload import is_offloaded
from .probes import device_of, on_consumer_input, quiet
from .slicing import restored_on_error, slice_model

logger = logging.getLogger(__name__)
FAR = 0.2  # of what the dropped units make: half precision makes a few hundredths of that, a mistake at least a half


class _Over(Exception):
    """The end of the trial, at which the model is put back."""


def refuse_unlike(model: Any, structures: Collection[str], batches: Batches) -> None:
    """Drop half of everything in the first block, for one example: that has to be what zeros in its place are.

    Names and shapes tell where heads and neurons are, but not what else a forward pass knows of them: a bias with a share for
    each head, a width from the config. The model is as before. Listed families are not tried; of what does not fit, a warning
    says that it is not.

    Raises:
        ValueError: the model does not run with fewer units, or computes something else; or `structures` ask for pairs.
    """
    if model.config.model_type in FAMILIES:
        return
    if "pairs" in structures:
        raise _refused(model, "and which two dimensions of its heads turn together is not known: leave 'pairs' out")
    if is_offloaded(model):
        logger.warning(
            "model_type=%r is none of the families that optimum-stat knows, and while weights are offloaded it is not tried "
            "whether the model runs with fewer heads and neurons: prune a small one of its kind first, in memory.",
            model.config.model_type,
        )
        return
    example = {name: value[:1].to(device_of(model)) for name, value in batches.items[0].items()}
    with quiet(model), opened(model), torch.no_grad():
        kept, modules = _halves(find_groups(model)), [*model.modules()]

        def without(group: Group, z: Tensor) -> Tensor:
            return z.index_fill(-1, unit_columns(torch.arange(kept[group], group.units, device=z.device), group.width), 0)

        try:
            dense = _first_block(model, example)
            with on_consumer_input(kept, without):
                wanted = _first_block(model, example)
        except Exception as error:  # whatever the code of a model that nobody knows raises
            raise _refused(model, f"and does not run on the data, as it is read and as experts are opened: {error}") from error
        if modules != [*model.modules()]:
            raise _refused(model, "and replaces its parts while it runs, by some that know nothing of what is gone")
        try:
            found = _sliced(model, kept, example)
        except Exception as error:
            raise _refused(model, f"and does not run with fewer heads and neurons: {error}") from error
    if found.shape != wanted.shape or float((found - wanted).norm()) > FAR * float((dense - wanted).norm()):
        raise _refused(model, "and with fewer heads and neurons it computes something else than without what they hand on")


def _halves(groups: list[Group]) -> dict[Group, int]:
    """How many units stay, of those in the first block that can be dropped without a change to others."""
    steps = {group: 1 if group.experts is None else OF_EXPERTS for group in groups if group.block == 0 and not group.inexact}
    kept = {group: max(step, group.units // 2 // step * step) for group, step in steps.items()}
    return {group: count for group, count in kept.items() if count < group.units}


def _sliced(model: Any, kept: dict[Group, int], example: dict[str, Tensor]) -> Tensor:
    found: list[Tensor] = []
    with suppress(_Over), restored_on_error(model):
        slice_model(model, {group.name: torch.arange(count) for group, count in kept.items()})
        found.append(_first_block(model, example))
        raise _Over
    return found[0]


def _first_block(model: Any, example: dict[str, Tensor]) -> Tensor:
    """What it returns while the whole model runs, in float32: further on, rounding grows."""
    seen: list[Tensor] = []
    block = find_blocks(model)[0]
    with block.register_forward_hook(
        lambda own, args, output: seen.append((output if isinstance(output, Tensor) else output[0]).float())
    ):
        model(**example)
    return seen[-1]


def _refused(model: Any, why: str) -> ValueError:
    kind, name = model.config.model_type, type(model).__name__
    return ValueError(f"model_type={kind!r} of this {name} is none of the families that optimum-stat knows, {why}.")
