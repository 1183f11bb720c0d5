"""The heads from which Whisper reads when a word was said: its generation config lists them."""

from __future__ import annotations

import copy
from typing import Any

from .families import Group
from .slicing import Plan

HEADS = "alignment_heads"
"""[layer of the decoder, head of it that reads the encoder], in a generation config."""


def renumber(model: Any, groups: list[Group], plan: Plan) -> None:
    """Give these heads the numbers that they have after `plan`. groups: as they were before.

    Those that are gone are left out. Without any the list goes too, and transformers says that there are no timestamps.
    """
    listed = getattr(getattr(model, "generation_config", None), HEADS, None)
    cross = [group for group in groups if group.place == "cross"]
    if not listed or not cross:
        return
    kept = [plan[group.name].tolist() if group.name in plan else list(range(group.units)) for group in cross]
    own = copy.deepcopy(model.generation_config)  # another one: the old may be put back
    left = [[layer, kept[layer].index(head)] for layer, head in listed if head in kept[layer]]
    if left:
        setattr(own, HEADS, left)
    else:
        delattr(own, HEADS)
    model.generation_config = own
