"""Of heads that can be divided, what can go one by one: pairs of query and key dimensions, and dimensions of values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .anatomy import outer_shape
from .few_pairs import dimensions_of_pairs, gone_pairs
from .few_values import FewValues
from .group import Group


def with_dimensions(heads: Group) -> Iterator[Group]:
    """The heads, and, where there are some that can go one by one, their pairs and their values."""
    yield heads
    plain: dict[str, Any] = {"counts": (), "vectors": (), "biased": None, "handed_on": None, "inexact": ""}
    width, cross = heads.width // heads.query_heads, "cross_" if heads.name == "cross" else ""
    if not why_no_pairs(heads):
        units, makers = heads.units * width // 2, heads.producers[-3:-1]
        yield replace(
            heads, name=f"{cross}pairs", structure="pairs", producers=makers, units=units, head_width=width // 2, **plain
        )
    if not why_no_values(heads):
        units, makers = heads.units * width, heads.producers[-1:]
        yield replace(heads, name=f"{cross}values", structure="values", producers=makers, units=units, head_width=width, **plain)


def values_of(heads: Group, groups: Iterable[Group]) -> Group | None:
    """Of `groups`, that of the value dimensions of `heads`."""
    return next((each for each in groups if each.structure == "values" and each.consumer is heads.consumer), None)


def pairs_of(heads: Group, groups: Iterable[Group]) -> Group | None:
    """Of `groups`, that of the pairs of `heads`."""
    return next((each for each in groups if each.structure == "pairs" and each.consumer is heads.consumer), None)


def queries_and_keys(heads: Group) -> tuple[nn.Module, ...]:
    """The linears that make them; none, where one makes values too."""
    return tuple(producer.linear for producer in heads.producers[-3:-1])


def pairs_gone(heads: Group) -> tuple[tuple[int, ...], ...] | None:
    """Which pairs of each key/value head are gone; None: none."""
    return next(map(gone_pairs, queries_and_keys(heads)), None)


def why_no_values(heads: Group) -> str:
    """Why value dimensions of these heads cannot go one by one; empty if they can."""
    made = heads.producers[-1].linear
    if isinstance(made, FewValues):
        return "has lost some already, and what is left of a head cannot be cut again"
    if heads.shares_key_value:
        return "has one key/value head for all query heads, of which each has its own share of the output"
    return _why_together(heads) or _why_not_linear(made, heads.consumer)


def why_no_pairs(heads: Group) -> str:
    """The same of pairs of query and key dimensions."""
    makers = queries_and_keys(heads)
    if pairs_gone(heads) is not None:
        return "has lost some already, and what is left of a head cannot be cut again"
    if heads.shares_key_value:
        return "has one key/value head for all query heads"
    if heads.rotary is None:
        return "has no rotary embeddings, or divides queries and keys by a norm of their own"
    return _why_together(heads) or _why_not_linear(*makers, heads.consumer)


def _why_together(heads: Group) -> str:
    made = heads.producers[-1].linear
    alone = outer_shape(made) == (heads.units * heads.width // heads.query_heads, outer_shape(made)[1])
    return "" if alone else f"makes queries, keys and values in one {type(made).__name__}"


def _why_not_linear(*modules: nn.Module) -> str:
    kinds = [type(each) for each in modules]
    together = " and ".join(kind.__name__ for kind in kinds)
    return "" if set(kinds) == {nn.Linear} else f"is made of {together}, not of {len(kinds)} Linear"


def rotary_of(attention: nn.Module, config: Any, width: int, interleaved: bool) -> Tensor | None:
    """The two dimensions of each pair of a head, [width / 2, 2]; None where none are turned, or what is turned is normalised."""
    settings = getattr(config, "rope_parameters", None)
    normed = any(name.startswith(("q_", "k_")) and "norm" in name for name, _ in attention.named_children())
    rotated = int(width * float((settings or {}).get("partial_rotary_factor") or 1))
    if not settings or normed or width % 2 or rotated % 2:
        return None
    return dimensions_of_pairs(width, rotated, interleaved)
