"""What is built with a pruned model's record besides the model itself, and what of transformers cannot work with it.

A part of the model alone, a whole around it; a cache that is made for one number of heads.
"""

from __future__ import annotations

from typing import Any

from .blocks import KEY, find_stacks
from .families import Group, find_groups

HIDDEN = "hidden"  # dimensions of the residual stream: in the record only where some went


def recorded_groups(model: Any, record: dict[str, Any]) -> list[Group]:
    """The groups that the record speaks of: not heads that read an encoder, if there was none when the model was pruned."""
    groups = find_groups(model)
    added = len(record["heads"]) == len(record["neurons"]) and not groups[-1].stack
    return [group for group in groups if group.context is None] if added else groups


def own_part(record: dict[str, Any], groups: list[Group]) -> dict[str, Any]:
    """What the record says of an encoder or a decoder that is built for itself: its first entries, or its last."""
    decoding = len(record["heads"]) - len(record["neurons"])  # blocks that read an encoder have heads twice
    first, reads = len(record["neurons"]) - decoding, any(group.context is not None for group in groups)
    if decoding <= 0 or groups[-1].stack or not (reads or first > 0):
        return record
    own = slice(first, None) if reads else slice(first)
    return {name: value[own] if isinstance(value, list) else value for name, value in record.items()}


def refuse_narrow_parts(model: Any) -> None:
    """Raise if a part of the model has a narrower residual stream than its config's `hidden_size`, which its neighbours read."""
    for name in model.config.sub_configs:
        part: Any = getattr(model.config, name, None)
        width = (getattr(part, KEY, None) or {}).get(HIDDEN)
        if width is not None:
            raise ValueError(
                f"A {type(model).__name__} cannot be built around this {part.model_type!r}, whose residual stream has {width} "
                f"of {part.hidden_size} dimensions, and the parts beside it would read or write all. Prune without 'hidden'."
            )


def refuse_paged_cache(model: Any) -> None:
    """Have `generate_batch` say what is wrong where blocks have other numbers of key/value heads than the config, its cache's.

    Else every request would fail in a thread, and its answer be empty.
    """
    config = find_stacks(model)[0].config
    dense = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = [group for group in find_groups(model) if group.structure == "heads" and not group.shares_key_value]
    if any(group.key_value_heads != dense for group in heads):
        model.init_continuous_batching = no_continuous_batching


def no_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    """In place of the method that begins it."""
    raise ValueError(
        "Continuous batching (generate_batch) has a cache for equally many key/value heads in all blocks, as many as the dense "
        "model's; this model has lost some. Call generate, or prune with structures=('neurons',)."
    )
