"""Experts whose weights are stacked in one parameter: opened, they are two linears like those of any other layer.

A unit is one neuron of every expert, the same or one of each expert's own: all experts of a layer stay equally wide, as one
parameter holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .family_table import EXPERTS, EXPERTS_DOWN, EXPERTS_UP

UP, DOWN, BIAS, CLOSED, FORWARD = "opened_up", "opened_down", "opened_bias", "_closed", "_closed_forward"


def is_stacked(module: nn.Module) -> bool:
    """Whether `module` holds experts in the one form that is known: up and down, [experts, ...], open or not."""
    own = module._parameters
    stacked = any(_is_stack(own.get(name)) for name in EXPERTS_UP) and _is_stack(own.get(EXPERTS_DOWN))
    return (stacked or is_open(module)) and not getattr(module, "has_post_expert_norm", False)


def is_open(module: nn.Module) -> bool:
    """Whether the experts are two linears just now."""
    return UP in module._modules


def linears_of_experts(module: Any) -> tuple[nn.Module, nn.Module, int]:
    """(what makes the neurons of all experts, what reads them, number of experts); without weights, if it is not open.

    Rows: expert after expert. Columns: neuron after neuron, of each neuron those of all experts.
    """
    if is_open(module):
        return getattr(module, UP), getattr(module, DOWN), int(module.num_experts)
    up, down = _up(module), getattr(module, EXPERTS_DOWN)
    count, rows, read = _rows_first(module, up).shape
    columns = _rows_first(module, down).shape[2]
    bias = getattr(module, f"{_up_name(module)}_bias", None) is not None
    made = nn.Linear(read, count * rows, bias=bias, device="meta", dtype=up.dtype)
    return made, nn.Linear(columns * count, read, bias=False, device="meta", dtype=up.dtype), count


def opened_in(model: nn.Module) -> list[nn.Module]:
    """All experts of `model` that can be opened, in their order."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] == EXPERTS and is_stacked(module)]


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Every token goes through the linears of all experts; what its router did not choose for it counts zero times."""
    for module in opened_in(model):
        _open(module)
    try:
        yield
    finally:
        close(model)


def close(model: nn.Module) -> None:
    """Stack the experts' weights again, as they are now; those that nobody has changed are the very parameters of before."""
    for module in opened_in(model):
        if is_open(module):
            _close(module)


@torch.no_grad()
def slice_stacked(module: Any, rows: Tensor, keep: Tensor) -> None:
    """Keep, in each expert, the rows `rows` [experts, rows] of what makes its neurons, and its neurons `keep` [experts, kept]."""
    name, down = _up_name(module), getattr(module, EXPERTS_DOWN)
    rows, keep = rows.to(down.device), keep.to(down.device)
    own = torch.arange(len(rows), device=down.device)[:, None]
    _set(module, name, _rows_first(module, _rows_first(module, _up(module))[own, rows]))
    if getattr(module, f"{name}_bias", None) is not None:
        _set(module, f"{name}_bias", getattr(module, f"{name}_bias")[own, rows])
    columns_first = _rows_first(module, down).transpose(1, 2)
    _set(module, EXPERTS_DOWN, _rows_first(module, columns_first[own, keep].transpose(1, 2)))


@torch.no_grad()
def keep_stacked(module: Any, keep: Tensor) -> None:
    """Keep the experts `keep`, open or stacked."""
    if not is_open(module):
        for name in (_up_name(module), EXPERTS_DOWN):
            for own in (name, f"{name}_bias"):
                if module._parameters.get(own) is not None:
                    _set(module, own, getattr(module, own)[keep.to(getattr(module, own).device)])
        return
    made: Any = getattr(module, UP)
    reads: Any = getattr(module, DOWN)
    count, at = int(module.num_experts), keep.to(made.weight.device)
    for name, value in list(made.named_parameters()):
        setattr(made, name, nn.Parameter(value.unflatten(0, (count, -1))[at].flatten(0, 1).clone(), value.requires_grad))
    columns = reads.weight.unflatten(1, (-1, count))[..., at].flatten(1)
    reads.weight = nn.Parameter(columns.clone(), reads.weight.requires_grad)
    made.out_features, reads.in_features = len(made.weight), reads.weight.shape[1]
    if BIAS in module._parameters:
        _set(module, BIAS, getattr(module, BIAS)[at])


def set_aside(model: nn.Module) -> list[Tensor]:
    """The parameters that the experts of `model` have while they are stacked, of those that are open."""
    return [value for module in opened_in(model) if is_open(module) for value in module.__dict__[CLOSED][0].values()]


@torch.no_grad()
def fill(module: Any) -> None:
    """Give the linears of experts that are open the weights that stand in the stacked parameters, and put these aside."""
    made, reads = getattr(module, UP), getattr(module, DOWN)
    up, down, name = _rows_first(module, _up(module)), _rows_first(module, getattr(module, EXPERTS_DOWN)), _up_name(module)
    made.weight = nn.Parameter(up.flatten(0, 1).clone(), _up(module).requires_grad)
    reads.weight = nn.Parameter(down.permute(1, 2, 0).flatten(1).clone(), down.requires_grad)
    names = [name, EXPERTS_DOWN, *(each for each in (f"{name}_bias", f"{EXPERTS_DOWN}_bias") if each in module._parameters)]
    parameters = {each: module._parameters.pop(each) for each in names}
    if f"{name}_bias" in parameters:
        made.bias = nn.Parameter(parameters[f"{name}_bias"].flatten().clone(), made.weight.requires_grad)
    if f"{EXPERTS_DOWN}_bias" in parameters:
        module.register_parameter(BIAS, parameters[f"{EXPERTS_DOWN}_bias"])
    made.out_features, reads.in_features = len(made.weight), reads.weight.shape[1]
    module.__dict__[CLOSED] = parameters, _state(made, reads)


@torch.no_grad()
def stack(module: Any) -> None:
    """Put the stacked parameters back, made anew if the linears' have changed; until `fill`, the linears are of no use."""
    made, reads = getattr(module, UP), getattr(module, DOWN)
    parameters, before = module.__dict__.pop(CLOSED)
    bias = module._parameters.pop(BIAS, None)
    if bias is not None:
        parameters = {**parameters, f"{EXPERTS_DOWN}_bias": bias}
    for name, value in parameters.items():
        module.register_parameter(name, value)
    if before == _state(made, reads):
        return
    count, name = int(module.num_experts), _up_name(module)
    _set(module, name, _rows_first(module, made.weight.unflatten(0, (count, -1))))
    if made.bias is not None:
        _set(module, f"{name}_bias", made.bias.view(count, -1))
    _set(module, EXPERTS_DOWN, _rows_first(module, reads.weight.unflatten(1, (-1, count)).permute(2, 0, 1)))


def _open(module: Any) -> None:
    made, reads, _ = linears_of_experts(module)
    module.add_module(UP, made)
    module.add_module(DOWN, reads)
    module.__dict__[FORWARD] = module.__dict__.get("forward")  # accelerate's, where weights are fetched for every call
    fill(module)
    module.forward = MethodType(_forward, module)


def _close(module: Any) -> None:
    stack(module)
    del module._modules[UP], module._modules[DOWN], module.forward
    if (before := module.__dict__.pop(FORWARD)) is not None:
        module.forward = before


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts' own forward returns."""
    made = getattr(self, UP)(hidden_states).unflatten(1, (self.num_experts, -1))
    neurons = self._apply_gate(made) if self.has_gate else self.act_fn(made)
    shares = top_k_weights.new_zeros(len(hidden_states), self.num_experts).scatter_add(1, top_k_index, top_k_weights)
    shares = shares.to(hidden_states.dtype)
    output: Tensor = getattr(self, DOWN)((neurons * shares[..., None]).transpose(1, 2).flatten(1))
    return output + shares @ getattr(self, BIAS) if BIAS in self._parameters else output


def _state(made: nn.Module, reads: nn.Module) -> list[tuple[int, int]]:
    """Which parameters there are, and how often each was changed in place."""
    return [(id(each), each._version) for linear in (made, reads) for each in linear.parameters()]


def _up_name(module: nn.Module) -> str:
    known = {**module._parameters, **(module.__dict__[CLOSED][0] if CLOSED in module.__dict__ else {})}
    return next(name for name in EXPERTS_UP if name in known)


def _up(module: Any) -> Tensor:
    value: Tensor = getattr(module, _up_name(module))
    return value


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", False))


def _rows_first(module: nn.Module, value: Tensor) -> Tensor:
    """[experts, out, in] of what stands in the module, and back."""
    return value.transpose(1, 2) if _is_transposed(module) else value


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old = module._parameters[name]
    assert old is not None
    setattr(module, name, nn.Parameter(value.clone(memory_format=torch.contiguous_format), old.requires_grad))


def _is_stack(value: Tensor | None) -> bool:
    return value is not None and value.dim() == 3
