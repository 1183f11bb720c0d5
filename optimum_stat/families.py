"""What can be pruned in a transformer: groups of heads and of neurons, found by the names and shapes of its modules.

The names stand in `family_table`, `anatomy` finds the modules.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Attention, Feed, at, attentions, feeds, first_of, inventory
from .anatomy import outer_shape as outer_shape
from .anatomy import weight as weight  # part of what this file offers
from .blocks import KEY, Stack, find_stacks, stack_is_causal, unknown, width_of_head
from .blocks import applications_of as applications_of
from .blocks import family_of as family_of
from .blocks import find_blocks as find_blocks
from .blocks import is_causal as is_causal
from .blocks import sliding_window as sliding_window
from .experts import is_stacked, linears_of_experts
from .family_table import (
    EXPERT_WIDTHS,
    EXPERTS,
    EXPERTS_OF_A_TOKEN,
    HEAD_COUNTS,
    HEAD_WIDTHS,
    HEADS_PER_KEY_VALUE,
    KEY_VALUE_COUNTS,
    NORM_BEFORE_NEURONS,
    NORMS_OVER_HEADS,
    OF_POSITIONS,
    PER_HEAD,
    Family,
)
from .family_table import FAMILIES as FAMILIES
from .family_table import TASK_OF_HEAD as TASK_OF_HEAD
from .group import Group as Group
from .group import HandedOn as HandedOn
from .group import Producer as Producer
from .head_dimensions import pairs_of as pairs_of
from .head_dimensions import rotary_of, why_no_pairs, why_no_values, with_dimensions
from .head_dimensions import values_of as values_of


def find_groups(model: Any, structures: Collection[str] = ("heads", "neurons")) -> list[Group]:
    """Everything of these `structures` in the blocks of `model`, in the order of the forward pass.

    "values" are dimensions that a key/value head hands to its query heads, "pairs" those that rotary embeddings turn.

    Raises:
        ValueError: the model is not built of parts with known names, or has no values or pairs that could go alone; says what was
            found and what was not.
    """
    found, first = list[Group](), 0
    for position, stack in enumerate(find_stacks(model)):
        for index, block in enumerate(stack.blocks):
            found += _groups(model, position, stack, index, block, first)
        first += len(stack.blocks)
    for asked, of_heads, why in (("values", values_of, why_no_values), ("pairs", pairs_of, why_no_pairs)):
        whole = [group for group in found if group.structure == "heads" and not of_heads(group, found)]
        if asked in structures and whole:
            raise ValueError(f"{asked!r} asked of {type(model).__name__}: {whole[0].name} {why(whole[0])}.")
    return [group for group in found if group.structure in structures]


def masks_of_linears(model: Any) -> dict[nn.Module, str]:
    """Of everything that makes or reads a group, the model's input that says which of its tokens are real."""
    stacks, found = find_stacks(model), dict[nn.Module, str]()
    for group in find_groups(model):
        found[group.consumer] = group.mask
        for producer in group.producers:
            context = group.context if producer.of_context else None
            found[producer.linear] = group.mask if context is None else stacks[context].mask
    return found


def groups_of_block(model: Any, index: int, block: nn.Module) -> list[Group]:
    """Everything that can be pruned in one block, which is block `index` of `model` or a copy of it."""
    first = 0
    for position, stack in enumerate(find_stacks(model)):
        if index < first + len(stack.blocks):
            return _groups(model, position, stack, index - first, block, first)
        first += len(stack.blocks)
    raise IndexError(f"block {index} asked of {first}")


def _groups(model: Any, position: int, stack: Stack, index: int, block: nn.Module, first: int) -> list[Group]:
    heads, neurons = list(attentions(block)), list(feeds(block))
    own = [each for each in heads if not each.cross]
    experts = [each for name, each in block.named_modules() if name.rpartition(".")[2] == EXPERTS]
    # while one is built for itself out of a pruned whole, a decoder's config says that there is no encoder
    cross = any(getattr(model.config, name, None) for name in ("is_encoder_decoder", KEY))
    makers = len(own) == 1 and len(heads) <= 1 + cross and len(neurons) <= 1 <= len(neurons) + len(experts)
    if not makers or not all(map(is_stacked, experts)):
        raise unknown(model, inventory(block))
    groups = [group for each in heads for group in with_dimensions(_heads(model, stack, each))]
    groups += [_neurons(family_of(model), stack, each, own[0].norm) for each in neurons]
    groups += [_in_experts(family_of(model), stack, block, each, own[0].norm) for each in experts]
    where: dict[str, Any] = {
        "block": first + index,
        "stack": position,
        "mask": stack.mask,
        "applications": applications_of(model),
    }
    sees: dict[str, Any] = {"causal": stack_is_causal(model, stack), "window": sliding_window(stack.config, index)}
    return [
        replace(group, name=f"{first + index}.{group.name}", **where, **(sees if group.name == "heads" else {}))
        for group in groups
    ]


def task_of(model: Any) -> str:
    """The Hub's name for what the model's head does; "feature-extraction" if it has none."""
    return task_of_class(type(model).__name__)


def task_of_class(name: str) -> str:
    """The same, from the name of the model's class."""
    return next((task for head, task in TASK_OF_HEAD.items() if head in name), "feature-extraction")


def _heads(model: Any, stack: Stack, found: Attention) -> Group:
    family, config, linears = family_of(model), stack.config, found.linears
    width, of_queries = found.head_width or width_of_head(config), outer_shape(found.out)[1]
    rows = (sum(outer_shape(each)[0] for each in linears) - of_queries) // 2  # of all keys, or all values
    one_for_all = rows == width and _one_key_value_head(config)
    units = of_queries // width if one_for_all else rows // width
    if units < 1 or rows % width or of_queries % (units * width):
        raise unknown(model, "its queries, keys and values are not made of heads of one width")
    queries = of_queries // width // units
    fixed = 2 * width if one_for_all else 0
    positions = [linear for name in OF_POSITIONS if (linear := at(found.module, name)) is not None]
    if len(linears) == 1:
        if not family.fused:
            raise unknown(model, "its query, key and value come from one linear, and no entry says how its rows are ordered")
        runs = (1,) if one_for_all or family.fused == "by head" else (queries, 1, 1)
        producers = [Producer(linears[0], runs, fixed)]
    else:
        shared = bool(getattr(found.module, "share_att_key", False))
        stays = [0, fixed // 2, fixed // 2]
        producers = [
            Producer(linear, (1,), rows, not shared or linear is linears[2], found.cross and linear is not linears[0])
            for linear, rows in zip(linears, stays, strict=True)
        ]
    vectors, over_heads = _vectors(found.module, width, one_for_all)
    return Group(
        name="cross" if found.cross else "heads",
        block=0,
        structure="heads",
        producers=(*(Producer(linear, tokens_only=False) for linear in positions), *producers),
        consumer=found.out,
        units=units,
        # of tokens alone, and of the block's own
        stream=found.norm if found.norm is not None and _norm_first(family, config) else linears[0 if found.cross else -1],
        counts=_counts(family, found, units, queries, width, one_for_all),
        query_heads=queries,
        shares_key_value=one_for_all,
        vectors=vectors,
        biased=_biased(family, config, found),
        handed_on=_handed_on(family, stack, found),
        context=0 if found.cross else None,
        inexact=over_heads,
        rotary=rotary_of(found.module, config, width, family.interleaved),
    )


def _neurons(family: Family, stack: Stack, found: Feed, norm: nn.Module | None) -> Group:
    units, stream = weight(found.down).shape[1], found.up[0]
    if norm is not None and _norm_first(family, stack.config):  # without one of its own, it reads what attention reads
        stream = first_of(found.around, NORM_BEFORE_NEURONS) or norm
    producers = tuple(Producer(linear, (1,) * (weight(linear).shape[0] // units)) for linear in found.up)
    return Group("neurons", 0, "neurons", producers, found.down, units, stream)


def _biased(family: Family, config: Any, found: Attention) -> tuple[nn.Module, tuple[str, ...]] | None:
    if family.bias_handed_on and not found.cross:
        return found.module, ()
    return (found.module, family.bias_by_head) if family.bias_by_head and getattr(config, "alibi", True) else None


def _handed_on(family: Family, stack: Stack, found: Attention) -> HandedOn | None:
    """By all attentions of the stack that stand at the same place in their blocks."""
    if family.bias_handed_on is None:
        return None
    alike = (other.module for block in stack.blocks for other in attentions(block) if other.cross == found.cross)
    return HandedOn(*family.bias_handed_on, tuple(alike))


def _in_experts(family: Family, stack: Stack, block: nn.Module, module: nn.Module, norm: nn.Module | None) -> Group:
    up, down, count = linears_of_experts(module)
    units, made = weight(down).shape[1] // count, weight(up).shape[0] // count
    together = getattr(module, "is_concatenated", True)  # else the two rows of a neuron stand side by side
    stream = first_of([block], NORM_BEFORE_NEURONS) or norm
    return Group(
        name="experts",
        block=0,
        structure="neurons",
        producers=(Producer(up, (1,) * (count * made // units if together else count)),),
        consumer=down,
        units=units,
        stream=stream if stream is not None and _norm_first(family, stack.config) else up,
        counts=tuple((module, name, 1) for name in EXPERT_WIDTHS if getattr(module, name, None) == units),
        experts=module,
        active=(min(count, int(getattr(stack.config, EXPERTS_OF_A_TOKEN, count))), count),
    )


def _counts(
    family: Family, found: Attention, units: int, queries: int, width: int, one_for_all: bool
) -> tuple[tuple[nn.Module, str, int], ...]:
    """The integers that say how many heads there are, wherever they stand, if they say it now."""
    wanted = [(name, queries * units, queries) for name in HEAD_COUNTS]
    wanted += [(name, width * queries * units, width * queries) for name in HEAD_WIDTHS]
    wanted += [(HEADS_PER_KEY_VALUE, units, 1)] if one_for_all else [(name, units, 1) for name in KEY_VALUE_COUNTS]
    counts = [
        (module, name, per_unit)
        for module in (*found.around, found.module)
        for name, now, per_unit in wanted
        if type(getattr(module, name, None)) is int and getattr(module, name) == now
    ]
    return (*counts, *((found.module, f"config.{name}", queries) for name in family.config_reads))


def _vectors(attention: nn.Module, width: int, one_for_all: bool) -> tuple[tuple[tuple[nn.Module, str], ...], str]:
    """(parameters with a share for each unit, why slicing them is not exact)."""
    found, inexact = list[tuple[nn.Module, str]](), ""
    for path in PER_HEAD[:1] + PER_HEAD[2:3] if one_for_all else PER_HEAD:
        module = at(attention, path.rpartition(".")[0])
        value = getattr(module, path.rpartition(".")[2], None)
        if module is not None and isinstance(value, Tensor) and _is_by_head(path, value, width):
            found.append((module, path.rpartition(".")[2]))
            if path in NORMS_OVER_HEADS and value.dim() == 1:
                inexact = "queries and keys are divided by the root mean square of all heads, which changes with each that goes"
    return tuple(found), inexact


def _is_by_head(path: str, value: Tensor, width: int) -> bool:
    """All heads share a norm that is as wide as one."""
    return value.dim() > 1 or path not in NORMS_OVER_HEADS or len(value) != width


def _one_key_value_head(config: Any) -> bool:
    if getattr(config, "multi_query", False):
        return not getattr(config, "new_decoder_architecture", False)
    return getattr(config, "num_key_value_heads", None) == 1 and config.num_attention_heads > 1


def _norm_first(family: Family, config: Any) -> bool:
    known = family.norm_first
    return known if isinstance(known, bool) else bool(getattr(config, known, True))


def check_finite(model: nn.Module) -> None:
    """Raise if a weight is NaN or infinite, naming it."""
    for name, parameter in model.named_parameters():
        held = parameter.numel() > 0 and parameter.device.type != "meta"
        if held and not torch.isfinite(torch.stack(parameter.aminmax())).all():  # a tenth of the time that all take
            raise ValueError(f"{name} holds NaN or infinite values; a model with broken weights cannot be pruned.")
