"""The record of a pruned model's sizes in config.json, and the hook that builds the model small from it.

The loader is the slicer itself: while a model is built (on the meta device, in `from_pretrained`), its blocks are cut to
the recorded sizes before any weight is read. So every way to make a model works: Auto classes, constructors,
`from_config`, PEFT, quantizers, Trainer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .blocks import KEY as KEY
from .blocks import find_stacks, width_of_head
from .families import Group, family_of, find_groups, weight
from .few_pairs import narrow_pairs
from .few_values import kept_values, narrow_values
from .head_dimensions import pairs_gone, queries_and_keys
from .parts import HIDDEN as HIDDEN
from .parts import own_part, recorded_groups, refuse_narrow_parts, refuse_paged_cache
from .routers import counts, find_mixtures, keep_experts
from .slicing import keep_heads, kept_heads, set_count, slice_group
from .stream import narrow

FORMAT = 1
SIZES = ("heads", "key_value_heads", "neurons")
EXPERTS_LEFT = "experts"  # block by block, where there are some
INEXACT = "inexact"  # groups whose units change with each of them that goes; for the reader
VALUES = "values"  # dimensions of each key/value head's values, attention by attention (null: all): only where some went
PAIRS = "gone_pairs"  # which pairs of each key/value head's queries and keys, attention by attention (null: none)
HEADS = "kept_heads"  # which ones, block by block: only where a bias that is made for all blocks has a share for each


def describe(model: Any) -> dict[str, Any]:
    """The record: a format number and, block by block, query heads, key/value heads and neurons; and, of each key/value head, the
    number of its value dimensions and the pairs of its queries and keys that are gone, if not every head is whole.

    With the width of the residual stream, if it is not `config.hidden_size`. Dropped blocks need no record: the config has
    as many layers as are left.
    """
    return _describe(find_groups(model), find_stacks(model)[0].config, counts(model))


def _describe(groups: list[Group], config: Any, experts: list[int]) -> dict[str, Any]:
    sizes: dict[str, list[int]] = {name: [] for name in SIZES}
    for group in groups:
        if group.structure == "heads":
            sizes["heads"].append(group.units * group.query_heads)
            sizes["key_value_heads"].append(group.key_value_heads)
        else:
            sizes["neurons"].append(group.units)
    biased = [kept_heads(group) for group in groups if group.biased is not None]
    width = weight(groups[0].consumer).shape[0]
    narrowed = {} if groups[0].stack != groups[-1].stack or width == config.hidden_size else {HIDDEN: width}
    inexact = [group.name for group in groups if group.inexact]
    values = [kept_values(group.consumer) for group in groups if group.structure == "heads"]
    values_of_heads = [None if own is None else list(own) for own in values] if any(values) else []
    pairs = [pairs_gone(group) for group in groups if group.structure == "heads"]
    pairs_of_heads = [None if own is None else [list(gone) for gone in own] for own in pairs] if any(pairs) else []
    others = {VALUES: values_of_heads, PAIRS: pairs_of_heads, HEADS: biased, EXPERTS_LEFT: experts, INEXACT: inexact}
    return {"format": FORMAT, **sizes, **narrowed, **{name: value for name, value in others.items() if value}}


def write_record(model: nn.Module) -> None:
    """Write the model's sizes into `model.config`, in our form and, where transformers has one, in its own."""
    config: Any = model.config
    record = describe(model)
    setattr(config, KEY, record)
    _write_parts(model)
    names = family_of(model).per_layer_config
    if names:
        # transformers plans static caches from this; without the flag it refuses to read the dense sizes at all
        config.allow_global_per_layer_attribute_access = True
        if names[0] == "num_attention_heads":
            config.head_dim = width_of_head(config)  # else it would divide the hidden size by each layer's number of heads
        own = [(theirs, record[name]) for theirs, name in zip(names, SIZES, strict=True) if theirs]
        config.per_layer_config = {i: {name: sizes[i] for name, sizes in own} for i in range(config.num_hidden_layers)}
        _give_own_configs(find_groups(model))
    refuse_paged_cache(model)


def _write_parts(model: Any) -> None:
    """Into the config of each tower its part of the record, so that its own class loads it alone out of the whole."""
    stacks, groups = find_stacks(model), find_groups(model)
    for position, stack in enumerate(stacks):
        shared = sum(other.config is stack.config for other in stacks) > 1
        if stack.config is not model.config and not shared and not counts(model):
            own = [group for group in groups if group.stack == position]
            setattr(stack.config, KEY, _describe(own, stack.config, []))


def replay(model: nn.Module) -> None:
    """Cut a freshly built model to the sizes its config records. Does nothing to a group that has its size already.

    Raises:
        ValueError: the record has another format, does not fit the model, or was edited into something impossible.
    """
    record = getattr(model.config, KEY, None)
    if record is None:
        return
    _check_form(record)
    if HIDDEN in record:
        _narrow(model, record[HIDDEN])
    if EXPERTS_LEFT in record:
        _keep_experts(model, record[EXPERTS_LEFT])
    groups = recorded_groups(model, record)
    record = own_part(record, groups)
    by_structure = {structure: [group for group in groups if group.structure == structure] for structure in ("heads", "neurons")}
    for name in SIZES:
        own = by_structure["neurons" if name == "neurons" else "heads"]
        if len(own) != len(record[name]):
            raise ValueError(
                f"{KEY} in config.json records {name} for {len(record[name])} blocks, but the model has {len(own)}. "
                "Was num_hidden_layers or the record edited?"
            )
    _check_kept_heads(model, by_structure["heads"], record)
    own_heads = iter(record.get(HEADS, ()))
    for index, group in enumerate(by_structure["heads"]):
        _cut(group, record["heads" if group.shares_key_value else "key_value_heads"][index])
        if group.biased is not None:
            keep_heads(group, next(own_heads))
    for group, size in zip(by_structure["neurons"], record["neurons"], strict=True):
        _cut(group, size)
    _check_heads(recorded_groups(model, record), record)
    _divide_heads([group for group in recorded_groups(model, record) if group.structure == "heads"], record)
    _give_own_configs(recorded_groups(model, record))
    refuse_paged_cache(model)


def install() -> None:
    """Make every transformers model replay its record when it is built. Safe to call more than once."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.post_init
    if getattr(original, "_optimum_stat", False):
        return

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        if getattr(self.config, KEY, None) is not None:
            replay(self)
            if type(self).__module__.startswith("transformers.models."):
                # a re-save from the local class would name a remote-code file that it does not write
                self.config.__dict__.pop("auto_map", None)
        else:
            refuse_narrow_parts(self)
        original(self)

    post_init._optimum_stat = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init


def _check_form(record: Any) -> None:
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else record
        raise ValueError(
            f"{KEY} in config.json has format {found!r}; this optimum-stat reads format {FORMAT}. "
            "A newer optimum-stat may know it: pip install -U optimum-stat."
        )
    unknown = sorted(record.keys() - {"format", *SIZES, VALUES, PAIRS, HIDDEN, HEADS, EXPERTS_LEFT, INEXACT})
    if unknown:
        raise ValueError(f"{KEY} in config.json holds {', '.join(unknown)}, which format {FORMAT} does not have.")
    for name in SIZES:
        sizes = record.get(name)
        if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
            raise ValueError(f"{KEY} in config.json must hold a list of whole numbers for {name!r}; it holds {sizes!r}.")


def _narrow(model: Any, width: Any) -> None:
    groups = find_groups(model)
    now = weight(groups[0].consumer).shape[0]
    if type(width) is not int or not 1 <= width <= now:
        raise ValueError(
            f"{KEY} in config.json records a residual stream of {width!r} dimensions; the dense model has {now}, so it must be a "
            f"whole number between 1 and {now}. Was config.json edited, or is it another model's?"
        )
    try:
        if any(group.context is not None for group in groups):
            raise ValueError("It has attention that reads an encoder, which the pruned model had not.")
        narrow(model, torch.arange(width, device="cpu"))
    except ValueError as error:
        raise ValueError(
            f"A {type(model).__name__} cannot be loaded from this model, whose residual stream has {width} of its "
            f"{model.config.hidden_size} dimensions: {error} Load the class that it was pruned as, or prune without 'hidden'."
        ) from error


def _keep_experts(model: Any, sizes: Any) -> None:
    mixtures = find_mixtures(model)
    whole = isinstance(sizes, list) and len(sizes) == len(mixtures) and all(type(size) is int for size in sizes)
    if not whole or not all(each.fewest <= size <= each.units for each, size in zip(mixtures, sizes, strict=True)):
        room = ", ".join(f"{each.fewest} to {each.units}" for each in mixtures) or "no experts"
        raise ValueError(f"{KEY} in config.json records {sizes!r} experts; block by block, the dense model has room for {room}.")
    parts, first = [], 0
    for mixture, size in zip(mixtures, sizes, strict=True):
        parts.append(torch.arange(first, first + size, device="cpu"))
        first += mixture.units
    keep_experts(model, torch.cat(parts))


def _cut(group: Group, size: int) -> None:
    if not 1 <= size <= group.units:
        raise ValueError(
            f"{KEY} in config.json records {size} units for {group.name}; the dense model has {group.units}, so it must "
            f"lie between 1 and {group.units}. Was config.json edited, or is it another model's?"
        )
    slice_group(group, torch.arange(size, device="cpu"))


def _divide_heads(groups: list[Group], record: dict[str, Any]) -> None:
    for name, narrow_one in ((PAIRS, _narrow_pairs), (VALUES, _narrow_values)):
        for group, own in zip(groups, _of_attentions(name, record, groups), strict=True):
            narrow_one(group, own)


def _of_attentions(name: str, record: dict[str, Any], groups: list[Group]) -> list[Any]:
    """What the record says of each attention."""
    every = record.get(name, [None] * len(groups))
    if not isinstance(every, list) or len(every) != len(groups):
        raise ValueError(
            f"{KEY} in config.json records {name} as {every!r}; it must be a list, one entry for each of the {len(groups)} "
            "blocks' attentions. Was config.json edited, or is it another model's?"
        )
    return every


def _narrow_values(group: Group, kept: Any) -> None:
    if kept is None or kept == list(kept_values(group.consumer) or ()):
        return
    width, heads = group.width // group.query_heads, group.key_value_heads
    listed = isinstance(kept, list) and len(kept) == heads and all(type(each) is int for each in kept)
    if not listed or not all(0 <= each <= width for each in kept) or not any(kept):
        raise ValueError(
            f"{KEY} in config.json records {kept!r} values for {group.name}; it must be a list of {heads} whole numbers "
            f"from 0 to {width}. Was config.json edited, or is it another model's?"
        )
    narrow_values(group.producers[-1].linear, group.consumer, kept)


def _narrow_pairs(group: Group, gone: Any) -> None:
    if gone is None or gone == [list(each) for each in pairs_gone(group) or ()]:
        return
    pairs, heads = range(0 if group.rotary is None else len(group.rotary)), group.key_value_heads
    if not isinstance(gone, list) or len(gone) != heads or not all(_names(pairs, each, None) for each in gone):
        raise ValueError(
            f"{KEY} in config.json records {gone!r} as the pairs that {group.name} has lost; it must be a list of {heads} lists, "
            f"each of different numbers below {len(pairs)}. Was config.json edited, or is it another model's?"
        )
    if group.rotary is not None:
        queries, keys = queries_and_keys(group)
        narrow_pairs(queries, keys, gone, group.rotary)


def _give_own_configs(groups: list[Group]) -> None:
    """To modules that read theirs at run time, also where nothing went: with sizes layer by layer a read of it is a warning."""
    for group in groups:
        for module, name, per_unit in group.counts:
            if "." in name:
                set_count(module, name, per_unit * group.units)


def _check_kept_heads(model: nn.Module, groups: list[Group], record: dict[str, Any]) -> None:
    """Numbers of heads, where the model has to know which ones it keeps."""
    wanted, lists = [group.biased is not None for group in groups], record.get(HEADS)
    if not any(wanted) and lists is None:
        return
    dense = range(int(getattr(model.config, "num_attention_heads", 0)))
    counts = [count for count, one in zip(record["heads"], wanted, strict=True) if one]
    listed = isinstance(lists, list) and len(lists) == len(counts)
    if not any(wanted) or not listed or not all(map(functools.partial(_names, dense), lists or (), counts)):
        need = f"must list which of the heads 0 to {len(dense) - 1} each block keeps" if any(wanted) else "must not be there"
        raise ValueError(f"{KEY} in config.json records {HEADS} as {lists!r}; for this model it {need}.")


def _names(dense: range, own: Any, count: int | None) -> bool:
    """Whether it lists `count` different ones of them."""
    listed = isinstance(own, list) and all(type(each) is int and each in dense for each in own)
    return listed and len(set(own)) == len(own) and count in (None, len(own))


def _check_heads(groups: list[Group], record: dict[str, Any]) -> None:
    own = [group for group in groups if group.structure == "heads"]
    expected = [group.units * group.query_heads for group in own]
    if expected != record["heads"]:
        raise ValueError(
            f"{KEY} in config.json records {record['heads']} query heads; its key/value heads and the model make {expected}."
        )
    shared = [group.key_value_heads for group in own]
    if shared != record["key_value_heads"]:
        raise ValueError(f"{KEY} in config.json records {record['key_value_heads']} key/value heads; the model has {shared}.")
