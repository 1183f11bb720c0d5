"""Make a model small: keep the planned units of every group, drop the rest, in place."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .experts import is_open, slice_stacked
from .families import Group, HandedOn, Producer, find_blocks, find_groups, weight
from .few_pairs import gone_pairs
from .few_values import kept_values
from .offload import brought_in

Plan = Mapping[str, Tensor]
"""Group name -> the units to keep, in the order in which they shall stand afterwards: [kept], or, where every expert keeps
neurons of its own, [kept, experts]."""


@torch.no_grad()
def slice_model(model: nn.Module, plan: Plan) -> None:
    """Keep only the planned units of every group named in `plan`; groups that lose nothing are not touched."""
    blocks = find_blocks(model)
    for group in find_groups(model):
        if group.name in plan and len(plan[group.name]) != group.units:
            with brought_in(blocks[group.block]):
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
    if kept_values(group.consumer) is not None or any(gone_pairs(producer.linear) for producer in group.producers):
        raise ValueError(f"{group.name} has fewer dimensions in some heads than in others, and cannot be cut any more.")
    if group.handed_on is not None:
        own_biases(group.handed_on)
    if group.experts is not None and not is_open(group.experts):
        rows, own = weight(group.producers[0].linear).shape[0] // group.width, torch.arange(group.width, device=keep.device)
        rows_of_each = producer_rows(group, group.producers[0], keep).view(group.width, -1) - rows * own[:, None]
        slice_stacked(group.experts, rows_of_each, keep.T if keep.dim() == 2 else keep.expand(group.width, -1))
    else:
        _keep_rows_and_columns(group, keep)
    for module, name in group.vectors:
        _keep_shares(module, name, group.units, keep)
    for module, name, per_unit in group.counts:
        set_count(module, name, per_unit * len(keep))
    if group.biased is not None:
        before = kept_heads(group)
        heads = keep.cpu()[:, None] * group.query_heads + torch.arange(group.query_heads, device="cpu")
        keep_heads(group, [before[head] for head in heads.flatten().tolist()])


def _keep_rows_and_columns(group: Group, keep: Tensor) -> None:
    for producer in group.producers:
        rows, out = producer_rows(group, producer, keep).cpu(), weight(producer.linear).shape[0]
        if producer.fixed == out:
            continue
        _keep_outputs(producer.linear, torch.cat([rows, torch.arange(out - producer.fixed, out, device="cpu")]))
    _keep_inputs(group.consumer, consumer_columns(group, keep))


def producer_rows(group: Group, producer: Producer, keep: Tensor) -> Tensor:
    """The output rows of `producer` that belong to the units `keep`, in the producer's order: run after run."""
    own, start, parts = producer.rows(group.units).to(keep.device), 0, []
    for number, run in enumerate(producer.runs):
        width = own.shape[1] * run // sum(producer.runs)
        units = keep if keep.dim() == 1 else keep[:, number * group.width // len(producer.runs)]  # the expert's, whose run it is
        parts.append(own[units, start : start + width].flatten())
        start += width
    return torch.cat(parts)


def consumer_columns(group: Group, keep: Tensor) -> Tensor:
    """The input columns of the consumer that belong to the units `keep`: [len(keep) * width]."""
    columns = torch.arange(group.units * group.width, device=keep.device).view(group.units, group.width)
    return (columns[keep] if keep.dim() == 1 else columns.gather(0, keep)).flatten()


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


def _keep_shares(module: nn.Module, name: str, units: int, keep: Tensor) -> None:
    value: nn.Parameter = getattr(module, name)
    shares = value.view(units, -1, *value.shape[1:])[keep.to(value.device)]
    setattr(module, name, nn.Parameter(shares.flatten(0, 1).clone(), value.requires_grad))


class ConfigView:
    """A model's config as one of its modules sees it: the same, but for a few values. It follows later changes of the config."""

    def __init__(self, config: Any, values: Mapping[str, int]):
        self.__dict__.update(_config=config, **values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # while it is copied or read back
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)


def set_count(module: nn.Module, name: str, value: int) -> None:
    """Set an integer attribute of `module`; "config.x" gives it a view of its config with another x, for itself alone."""
    owner, _, inner = name.rpartition(".")
    if not owner:
        setattr(module, name, value)
        return
    config = getattr(module, owner)
    beneath = config.__dict__["_config"] if isinstance(config, ConfigView) else config
    setattr(module, owner, ConfigView(beneath, {inner: value}))


def kept_heads(group: Group) -> list[int]:
    """Which of the dense model's query heads a group with a bias by head has."""
    assert group.biased is not None
    return list(getattr(group.biased[0], "kept_heads", range(group.units * group.query_heads)))


def keep_heads(group: Group, heads: Sequence[int]) -> None:
    """Have the attention read only the shares of `heads`, numbered as in the dense model, in what is made for all of them."""
    assert group.biased is not None
    module, names = group.biased
    module.kept_heads = tuple(heads)  # type: ignore[assignment]
    if group.handed_on is not None:
        own_biases(group.handed_on)
    elif not any(isinstance(hook, OwnHeads) for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(OwnHeads(module, names), with_kwargs=True)


def own_biases(handed_on: HandedOn) -> None:
    """Have every attention make its own bias by head instead of taking that of the one before.

    The table stays whole, and a part of the first attention alone: the others know it, and take the biases of their own heads.
    """
    first = handed_on.attentions[0]
    for module in handed_on.attentions:
        if handed_on.maker in module.__dict__ or any(isinstance(h, NoBias) for h in module._forward_pre_hooks.values()):
            continue
        module.register_forward_pre_hook(NoBias(handed_on.argument), with_kwargs=True)
        if getattr(first, handed_on.flag):
            setattr(module, handed_on.flag, True)
            module.__dict__[handed_on.table] = getattr(first, handed_on.table)
            setattr(module, handed_on.maker, OwnBias(module, handed_on.maker))


class NoBias:
    """Forward pre-hook of an attention: nothing is taken from the one before."""

    def __init__(self, argument: str):
        self.argument = argument

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Without the argument, the attention makes its own."""
        return args, {**kwargs, self.argument: None}


class OwnBias:
    """What makes an attention's bias: of that for all heads the share of those that it has."""

    def __init__(self, attention: nn.Module, maker: str):
        self.attention, self.maker = attention, maker

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """[1, heads, queries, keys]."""
        bias: Tensor = getattr(type(self.attention), self.maker)(self.attention, *args, **kwargs)
        heads = getattr(self.attention, "kept_heads", None)
        return bias if heads is None else bias[:, list(heads)]


class OwnHeads:
    """Forward pre-hook of an attention: takes its own heads' share of arguments made for all heads of the dense model."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]):
        self.names = names
        self.parameters = tuple(inspect.signature(type(module).forward).parameters)[1:]

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Select in those of [batch, heads, ...], or [batch * heads, 1, length]; one of [batch, 1, ...] is for all heads."""
        batch = args[0].shape[0]
        kwargs = {**dict(zip(self.parameters[1:], args[1:], strict=False)), **kwargs}
        for name in self.names:
            value = kwargs.get(name)
            if value is not None and value.dim() == 3:
                kwargs[name] = value.unflatten(0, (batch, -1))[:, list(module.kept_heads)].flatten(0, 1)
            elif value is not None and value.shape[1] > 1:
                kwargs[name] = value[:, list(module.kept_heads)]
        return args[:1], kwargs


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put all parameters, sizes, blocks and the config back if the enclosed work fails or is interrupted.

    Keeps the old weights alive until the end, so the peak holds the dense model beside the pruned one; what must not be
    changed in place is every parameter: replace it, as `set_weight` does.
    """
    before = [
        (module, type(module), dict(module.__dict__), [dict(module.__dict__[name]) for name in _CHANGED])
        for module in model.modules()
    ]
    own: Any = model.config
    configs = [own, *(inner for name in own.sub_configs if (inner := getattr(own, name)) is not None)]
    values = [dict(vars(config)) for config in configs]
    try:
        yield
    except BaseException:
        for module, kind, attributes, contents in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in zip(_CHANGED, contents, strict=True):
                attributes[name].clear()
                attributes[name].update(content)
        for config, value in zip(configs, values, strict=True):
            vars(config).clear()
            vars(config).update(value)
        raise


_CHANGED = ("_parameters", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
