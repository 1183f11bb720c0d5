"""Find a block's attention and its neurons by the names and shapes of their linears."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .experts import is_stacked
from .family_table import (
    ATTENTION_OUT,
    ATTENTION_OUT_BESIDE,
    CROSS_ATTENTION,
    EXPERTS,
    FUSED,
    HEAD_WIDTH,
    NEURONS,
    NORM_BEFORE_ATTENTION,
    NORM_BEFORE_CROSS,
    QUERY_KEY_VALUE,
)
from .few_pairs import FewPairs
from .few_values import FewValues, OfFewValues

INPUTS = (*QUERY_KEY_VALUE, *((name,) for name in FUSED))


@dataclass(frozen=True)
class Attention:
    """Where a block keeps its heads."""

    path: str
    module: nn.Module
    linears: list[nn.Module]
    """Query, key and value, or one that makes all three."""
    out: nn.Module
    around: list[nn.Module]
    """The modules around it, the block the first."""
    norm: nn.Module | None
    """What reads the residual stream before it; None: its linears do."""
    cross: bool
    """Whether its keys and values are made of what the encoder returns."""

    @property
    def head_width(self) -> int | None:
        """How wide one head is, if the module says so."""
        found = (getattr(self.module, name, None) for name in HEAD_WIDTH)
        return next((width for width in found if type(width) is int), None)


@dataclass(frozen=True)
class Feed:
    """Where a block keeps its neurons."""

    path: str
    up: list[nn.Module]
    down: nn.Module
    around: list[nn.Module]
    """The modules around them, the block the first."""


def attentions(block: nn.Module) -> Iterator[Attention]:
    """Every attention in a block."""
    for path, module in _parents(block):
        linears = next((own for names in INPUTS if (own := _all(module, names))), None)
        if linears is None:
            continue
        out = _first(module, ATTENTION_OUT)
        if out is None and path:
            out = at(block.get_submodule(path.rpartition(".")[0]), ATTENTION_OUT_BESIDE)
        if out is not None:
            around, cross = _enclosing(block, path), not set(CROSS_ATTENTION).isdisjoint(path.split("."))
            norm = first_of(around, NORM_BEFORE_CROSS if cross else NORM_BEFORE_ATTENTION)
            yield Attention(path, module, linears, out, around, norm, cross)


def feeds(block: nn.Module) -> Iterator[Feed]:
    """Every pair of linears in a block between which neurons stand, one of them perhaps with a gate."""
    for path, module in _parents(block):
        for names, name in NEURONS:
            down = at(module, name)
            up = [] if down is None else _all(module, names)
            if up and down is not None:
                made, read = sum(weight(each).shape[0] for each in up), weight(down).shape[1]
                if weight(down).shape[0] == weight(up[0]).shape[1] and made in (read, 2 * read):
                    yield Feed(path, up, down, [*_enclosing(block, path), module])
                    break


def inventory(block: nn.Module) -> str:
    """What a block has of known parts, and what not, in words."""
    neurons = [each.path for each in feeds(block)]
    heads = [each.path + (" (perhaps, in one linear)" if len(each.linears) == 1 else "") for each in attentions(block)]
    experts = [name for name, each in block.named_modules() if name.rpartition(".")[2] == EXPERTS and not is_stacked(each)]
    linears = [name for name, module in block.named_modules() if isinstance(getattr(module, "weight", None), Tensor)]
    wanted = " or ".join("/".join(names) for names in (*QUERY_KEY_VALUE, FUSED))
    asked = [
        ("attention", heads, f"{wanted}, with one of {', '.join(ATTENTION_OUT)}, {ATTENTION_OUT_BESIDE}"),
        ("neurons", neurons, ", ".join(f"{'/'.join(up)} with {down}" for up, down in NEURONS)),
    ]
    lines = [f"experts at {', '.join(experts)} in a form that is not known"] if experts else []
    for what, paths, names in asked:
        found = f"{what} at {' and '.join(paths)}" if paths else f"no {what} ({names})"
        lines.append(f"{found}, of which there must be one" if len(paths) > 1 else found)
    return f"a {type(block).__name__} has {'; '.join(lines)}; its modules with weights are {', '.join(linears)}"


def inventory_of_model(base: nn.Module) -> str:
    """Why no list of blocks was found, in words."""
    lists = {name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    if not lists:
        return f"it has no list of blocks, but {', '.join(name for name, _ in base.named_children()) or 'nothing inside'}"
    name, longest = max(lists.items(), key=lambda item: len(item[1]))
    return f"no list of blocks with attention was found; at {name!r}, {inventory(longest[0])}"


def weight(linear: nn.Module) -> Tensor:
    """[out, in] view of a linear's weight; GPT-2's Conv1D stores it transposed."""
    value = linear.weight
    assert isinstance(value, Tensor)
    return value if isinstance(linear, nn.Linear) else value.T


def outer_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) as seen from around a linear: with the dimensions of heads that are gone."""
    if isinstance(linear, (FewPairs, FewValues, OfFewValues)):
        return linear.out_features, linear.in_features
    out, read = weight(linear).shape
    return out, read


def at(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, or None."""
    if path and "." not in path:
        return module._modules.get(path)
    for name in path.split("."):
        child = module._modules.get(name) if name else None
        if child is None:
            return None if name else module
        module = child
    return module


def first_of(modules: list[nn.Module], names: tuple[str, ...]) -> nn.Module | None:
    """What one of the names means, in the first of the modules that has one."""
    return next((found for module in modules if (found := _first(module, names)) is not None), None)


def _parents(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What has modules inside, which most have not, with the path to it."""
    return ((path, module) for path, module in block.named_modules() if module._modules)


def _enclosing(block: nn.Module, path: str) -> list[nn.Module]:
    parts = path.split(".")
    return [block.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((each for name in names if (each := at(module, name)) is not None), None)


def _all(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """All of them, or none; linears only."""
    found = list[nn.Module]()
    for name in names:
        each = at(module, name)
        if each is None or not is_linear(each):
            return []
        found.append(each)
    return found


def is_linear(module: Any) -> bool:
    """Whether it multiplies by a matrix: a Linear, or GPT-2's Conv1D."""
    value = getattr(module, "weight", None)
    return isinstance(value, Tensor) and value.dim() == 2 and not isinstance(module, nn.Embedding)
