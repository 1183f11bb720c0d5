"""What can be pruned in a transformer: groups of heads and of neurons, found by the names and shapes of its modules.

The names stand in `family_table`, `anatomy` finds the modules.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Attention, Feed, at, attentions, feeds, inventory, inventory_of_model
from .anatomy import weight as weight  # part of what this file offers
from .family_table import (
    EXPERTS,
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


@dataclass(frozen=True, eq=False)
class Producer:
    """A linear whose output rows are stacked runs, each ordered by unit, with an equal share for each unit."""

    linear: nn.Module
    runs: tuple[int, ...] = (1,)
    """Relative sizes of the runs: (2, 1, 1) for a fused query, key, value with two query heads to a key/value head."""
    fixed: int = 0
    """So many last rows belong to no unit and stay."""
    tokens_only: bool = True
    """Whether all it ever reads is tokens; not, if it reads relative positions too."""

    def rows(self, units: int) -> Tensor:
        """The output rows of each unit, run after run: [units, rows of one unit]."""
        share, start, runs = (weight(self.linear).shape[0] - self.fixed) // (units * sum(self.runs)), 0, []
        for run in self.runs:
            stop = start + units * run * share
            runs.append(torch.arange(start, stop, device="cpu").view(units, -1))
            start = stop
        return torch.cat(runs, dim=1)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are kept or dropped together: rows of every producer, columns of the one consumer.

    For heads, a unit is one key/value head with all query heads that read it, or, where the dense model has one key/value
    head for all, one query head; for neurons, one hidden unit.
    """

    name: str  # "3.heads", "3.neurons"
    block: int
    structure: str  # "heads" | "neurons"
    producers: tuple[Producer, ...]
    consumer: nn.Module
    units: int
    stream: nn.Module
    """What reads the residual stream to which the consumer's output is added."""
    counts: tuple[tuple[nn.Module, str, int], ...] = ()  # (module, integer attribute, what one unit adds to it)
    query_heads: int = 1  # query heads in one unit
    shares_key_value: bool = False  # one key/value head serves all units, and stays
    vectors: tuple[tuple[nn.Module, str], ...] = ()  # (module, name) of parameters with an equal share for each unit
    biased: tuple[nn.Module, tuple[str, ...]] | None = None
    """(module, its arguments with a share for each of the dense model's heads): it has to know which ones it keeps."""
    applications: int = 1  # how often a forward pass runs the block
    inexact: str = ""
    """Why dropping a unit changes others too; empty where it does not."""

    @property
    def width(self) -> int:
        """Consumer columns per unit."""
        return int(weight(self.consumer).shape[1]) // self.units

    @property
    def key_value_heads(self) -> int:
        """Of a group of heads."""
        return 1 if self.shares_key_value else self.units


def find_groups(model: Any, structures: Collection[str] = ("heads", "neurons")) -> list[Group]:
    """Everything of these `structures` in the blocks of `model`, in the order of the forward pass.

    Raises:
        ValueError: the model is not built of parts with known names; says what was found and what was not.
    """
    found = (group for index, block in enumerate(find_blocks(model)) for group in groups_of_block(model, index, block))
    return [group for group in found if group.structure in structures]


def groups_of_block(model: Any, index: int, block: nn.Module) -> list[Group]:
    """Heads and neurons of one block, which is block `index` of `model` or a copy of it."""
    heads, neurons = list(attentions(block)), list(feeds(block))
    if len(heads) != 1 or len(neurons) != 1 or any(name.endswith(EXPERTS) for name, _ in block.named_modules()):
        raise _unknown(model, inventory(block))
    return [_heads(model, index, heads[0]), _neurons(model, index, block, neurons[0], heads[0].norm)]


def find_blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks of `model`, whatever head sits on top. One that runs several times stands here once."""
    refused = family_of(model).refused
    if refused and getattr(model.config, refused[0], None):
        raise _unknown(model, f"config.{refused[0]} is set, and {refused[1]}")
    found: dict[str, nn.ModuleList] = {}
    for name, module in getattr(model, "base_model", model).named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if not inner and isinstance(module, nn.ModuleList) and len(module) and any(attentions(module[0])):
            found[name] = module
    if len(found) != 1:
        names = ", ".join(f"{name!r}" for name in found)
        what = f"blocks with attention stand at {names}, and only models with one list of them are supported"
        raise _unknown(model, what if found else inventory_of_model(getattr(model, "base_model", model)))
    return next(iter(found.values()))


def family_of(model: Any) -> Family:
    """What is known about the model's family beyond names and shapes: nothing, for one that nobody listed."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(kind, str):
        raise ValueError(
            f"optimum-stat cannot prune {kind!r} models ({type(model).__name__}): it has no config with a model_type."
        )
    return FAMILIES.get(kind, Family())


def applications_of(model: Any) -> int:
    """How often a forward pass runs each block, one application after the other: more than once where layers share one."""
    blocks = getattr(model.config, "num_hidden_groups", None)
    if blocks is None:
        return 1
    layers = model.config.num_hidden_layers
    if getattr(model.config, "inner_group_num", 1) != 1 or layers % blocks:
        raise _unknown(
            model, "its layers share several blocks in turn, and only blocks that run one after the other are supported"
        )
    return int(layers // blocks)


def task_of(model: Any) -> str:
    """The Hub's name for what the model's head does; "feature-extraction" if it has none."""
    return task_of_class(type(model).__name__)


def task_of_class(name: str) -> str:
    """The same, from the name of the model's class."""
    return next((task for head, task in TASK_OF_HEAD.items() if head in name), "feature-extraction")


def is_causal(model: Any) -> bool:
    """Whether tokens see only what stands before them."""
    known = family_of(model).causal
    if known is None:
        known = bool(getattr(next(attentions(find_blocks(model)[0])).module, "is_causal", False))
    return known or bool(getattr(model.config, "is_decoder", False))


def sliding_window(config: Any, block: int) -> int | None:
    """How many tokens the attention of one block sees at most, back from each with itself; None if there is no limit."""
    types = getattr(config, "layer_types", None)
    local = types[block] == "sliding_attention" if types else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if local else None


def head_dim(config: Any) -> int:
    """The width of one head. Pruning never changes it, so the dense model's config tells it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _heads(model: Any, index: int, found: Attention) -> Group:
    family, config, linears = family_of(model), model.config, found.linears
    width, of_queries = head_dim(config), weight(found.out).shape[1]
    rows = (sum(weight(each).shape[0] for each in linears) - of_queries) // 2  # of all keys, or all values
    one_for_all = rows == width and _one_key_value_head(config)
    units = of_queries // width if one_for_all else rows // width
    queries = of_queries // width // units
    fixed = 2 * width if one_for_all else 0
    positions = [linear for name in OF_POSITIONS if (linear := at(found.module, name)) is not None]
    if len(linears) == 1:
        if not family.fused:
            raise _unknown(model, "its query, key and value come from one linear, and no entry says how its rows are ordered")
        runs = (1,) if one_for_all or family.fused == "by head" else (queries, 1, 1)
        producers = [Producer(linears[0], runs, fixed)]
    else:
        shared = bool(getattr(found.module, "share_att_key", False))
        stays = [0, fixed // 2, fixed // 2]
        producers = [
            Producer(linear, fixed=rows, tokens_only=not shared or linear is linears[2])
            for linear, rows in zip(linears, stays, strict=True)
        ]
    vectors, over_heads = _vectors(found.module, width, one_for_all)
    return Group(
        name=f"{index}.heads",
        block=index,
        structure="heads",
        producers=(*(Producer(linear, tokens_only=False) for linear in positions), *producers),
        consumer=found.out,
        units=units,
        stream=found.norm if found.norm is not None and _norm_first(config) else linears[-1],  # of tokens alone
        counts=_counts(family, found, units, queries, width, one_for_all),
        query_heads=queries,
        shares_key_value=one_for_all,
        vectors=vectors,
        biased=(found.module, family.bias_by_head) if family.bias_by_head and getattr(config, "alibi", True) else None,
        applications=applications_of(model),
        inexact=over_heads,
    )


def _neurons(model: Any, index: int, block: nn.Module, found: Feed, norm: nn.Module | None) -> Group:
    units, stream = weight(found.down).shape[1], found.up[0]
    if norm is not None and _norm_first(model.config):  # without one of its own, it reads what attention reads
        stream = next((own for name in NORM_BEFORE_NEURONS if (own := at(block, name)) is not None), norm)
    producers = tuple(Producer(linear, (1,) * (weight(linear).shape[0] // units)) for linear in found.up)
    return Group(f"{index}.neurons", index, "neurons", producers, found.down, units, stream, applications=applications_of(model))


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
        if module is not None and isinstance(value, Tensor) and (value.dim() > 1 or len(value) != width):
            found.append((module, path.rpartition(".")[2]))
            if path in NORMS_OVER_HEADS and value.dim() == 1:
                inexact = "queries and keys are divided by the root mean square of all heads, which changes with each that goes"
    return tuple(found), inexact


def _one_key_value_head(config: Any) -> bool:
    if getattr(config, "multi_query", False):
        return not getattr(config, "new_decoder_architecture", False)
    return getattr(config, "num_key_value_heads", None) == 1 and config.num_attention_heads > 1


def _norm_first(config: Any) -> bool:
    return bool(getattr(config, "do_layer_norm_before", True))


def check_finite(model: nn.Module) -> None:
    """Raise if a weight is NaN or infinite, naming it."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or infinite values; a model with broken weights cannot be pruned.")


def _unknown(model: Any, why: str) -> ValueError:
    kind = model.config.model_type
    return ValueError(
        f"optimum-stat cannot prune {kind!r} models ({type(model).__name__}): {why}. It knows {', '.join(FAMILIES)}, and models "
        f"whose parts have the same names; how to add others stands in {Family.__module__}."
    )
