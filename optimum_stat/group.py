"""What a group of units is: rows of what makes them, columns of what reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .anatomy import outer_shape, weight


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
    of_context: bool = False
    """Whether it reads what the encoder returns instead of the block's own tokens."""

    def rows(self, units: int) -> Tensor:
        """The output rows of each unit, run after run: [units, rows of one unit]."""
        share, start, runs = (weight(self.linear).shape[0] - self.fixed) // (units * sum(self.runs)), 0, []
        for run in self.runs:
            stop = start + units * run * share
            runs.append(torch.arange(start, stop, device="cpu").view(units, -1))
            start = stop
        return torch.cat(runs, dim=1)


@dataclass(frozen=True, eq=False)
class HandedOn:
    """A bias with a share for each head that the first attention makes and every other takes from the one before."""

    argument: str
    maker: str
    table: str
    flag: str
    attentions: tuple[nn.Module, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are kept or dropped together: rows of every producer, columns of the one consumer.

    For heads, a unit is one key/value head with all query heads that read it, or, where the dense model has one key/value
    head for all, one query head; for neurons, one hidden unit; for values, one dimension of what one key/value head hands to
    the query heads that read it, whose columns do not stand side by side; for pairs, two dimensions of the queries and keys of
    one key/value head that a rotary embedding turns together, which no column reads.
    """

    name: str  # "3.heads", "3.neurons", "3.pairs", "3.values", "3.cross" and "3.cross_values" for heads that read the encoder
    block: int
    """Its number, counted on from one stack to the next."""
    structure: str  # "heads" | "neurons" | "pairs" | "values"
    producers: tuple[Producer, ...]
    consumer: nn.Module
    units: int
    stream: nn.Module
    """What reads the residual stream to which the consumer's output is added."""
    counts: tuple[tuple[nn.Module, str, int], ...] = ()  # (module, integer attribute, what one unit adds to it)
    query_heads: int = 1  # query heads in one unit
    head_width: int = 0  # of values and pairs: how many of them one head has
    rotary: Tensor | None = None
    """The two dimensions of each pair of a head, where there are some that a rotary embedding turns: [pairs, 2]."""
    shares_key_value: bool = False  # one key/value head serves all units, and stays
    vectors: tuple[tuple[nn.Module, str], ...] = ()  # (module, name) of parameters with an equal share for each unit
    biased: tuple[nn.Module, tuple[str, ...]] | None = None
    """(module, its arguments with a share for each of the dense model's heads): it has to know which ones it keeps."""
    handed_on: HandedOn | None = None
    """Once one attention has fewer heads than another, each has to make its own bias."""
    applications: int = 1  # how often a forward pass runs the block
    stack: int = 0
    context: int | None = None
    """The stack whose output keys and values are made of, where it is another one."""
    mask: str = "attention_mask"
    """The model's input that says which of the consumer's tokens are real; "": all are."""
    experts: nn.Module | None = None
    """The stacked experts whose neurons these are, if they are some's."""
    active: tuple[int, int] = (1, 1)
    """So many of so many experts does a token go through."""
    causal: bool = False
    window: int | None = None
    """Which tokens a head sees: those before, and so many at most."""
    inexact: str = ""
    """Why dropping a unit changes others too; empty where it does not."""

    @property
    def place(self) -> str:
        """Its name within its block."""
        return self.name.partition(".")[2]

    @property
    def width(self) -> int:
        """Consumer columns per unit."""
        return outer_shape(self.consumer)[1] // self.units

    @property
    def key_value_heads(self) -> int:
        """Of a group of heads."""
        return 1 if self.shares_key_value else self.units
