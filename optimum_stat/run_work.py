"""The multiply-adds of a run of STAT: what the data, the decompositions and the corrections take, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .budget import unit_cost
from .device_speed import Speeds
from .families import Group, weight
from .halted import room_for
from .probes import gradient_stride


@dataclass(frozen=True)
class Stage:
    """One part of the work, for all blocks together."""

    name: str
    macs: float
    """Multiply-adds, of whatever kind."""
    forwards: float
    """In forward passes of the dense model over the calibration data, if all multiply-adds took the same time."""
    seconds: float
    """On this device, from speeds that were measured now."""


def matrices(group: Group) -> tuple[int, int]:
    """How many Gram matrices a group has, one or one for every expert, and how wide they are."""
    return (group.width, group.units) if group.experts is not None else (1, group.units * group.width)


@dataclass(frozen=True)
class Work:
    """Multiply-adds of everything that a run does."""

    model: nn.Module
    groups: Sequence[Group]
    kept: Mapping[str, int]
    num_tokens: int
    seq_len: int

    @property
    def head(self) -> float:
        """What stands on top of the blocks, over all data."""
        on_top = self.model.get_output_embeddings()  # type: ignore[operator]
        return 0.0 if on_top is None else float(weight(on_top).numel()) * self.num_tokens

    @property
    def forward(self) -> float:
        """One forward pass of the dense model over all data."""
        return self.head + sum(self._run(group, group.units) / self._opened(group) for group in self.groups)

    def pace(self, speeds: Speeds) -> float:
        """Multiply-adds of a forward pass in a second, with what stands between its linear layers.

        Of a token: its columns once, four times the stream (norms, sums), and in attention three times the columns (rotations)
        and every score.
        """
        elements = 0.0
        for group in self.groups:
            out, columns = weight(group.consumer).shape
            scores = group.units * group.query_heads * self.seq_len
            elements += 4 * out + columns / self._opened(group) + (0 if group.structure == "neurons" else 3 * columns + scores)
        return self.forward / (self.forward / speeds.forward + self.num_tokens * elements / speeds.element)

    def stages(self, speeds: Speeds, metric: str) -> list[Stage]:
        """Everything that a run does, in its order, at these speeds."""
        blocks, found = sum(self._run(group, group.units) for group in self.groups), []
        # six panels of the triangle; experts have one each, of the tokens that go through them
        grams = sum(self.num_tokens * group.active[0] * matrices(group)[1] ** 2 * 0.58 for group in self.groups)
        if metric == "fisher":
            once = (blocks + self.head) / gradient_stride(self.num_tokens)
            found.append(self._stage("gradients", 2 * once, once, speeds))
        found.append(self._stage("forward pass", 0, blocks, speeds))
        found.append(self._stage("Gram matrices", grams, 0, speeds, speeds.gram))
        eliminated = sum(self._elimination(group) for group in self.groups)
        units = sum(group.units * (group.width if group.experts is not None else 1) for group in self.groups)
        seconds = eliminated / speeds.elimination + units * speeds.unit
        found.append(Stage("choosing", eliminated, eliminated / self.forward, seconds))
        again, moments, solves = map(sum, zip(*(self._correction(group) for group in self.groups), strict=True))
        found.append(self._stage("forward passes of the corrections", 0, again, speeds))
        found.append(self._stage("moments of the corrections", moments, 0, speeds, speeds.gram))
        return [*found, self._stage("solving", solves, 0, speeds, speeds.factor)]

    def _stage(self, name: str, other: float, forward: float, speeds: Speeds, speed: float | None = None) -> Stage:
        pace = self.pace(speeds)
        seconds = forward / pace + other / (speed or pace)
        return Stage(name, other + forward, (other + forward) / self.forward, seconds)

    def _run(self, group: Group, units: int) -> float:
        """As a walk does it: every token goes through all experts."""
        once = unit_cost(group, "macs", self.seq_len) * units * self.num_tokens / self.seq_len
        return once * self._opened(group)

    @staticmethod
    def _opened(group: Group) -> float:
        """How many experts a token goes through while they are open, beside those that its router chooses."""
        return group.active[1] / group.active[0]

    @staticmethod
    def _elimination(group: Group) -> float:
        """The inverse (`w^3`), and 32 units at a time what each removal changes in it and in the rows."""
        (count, wide), out = matrices(group), int(weight(group.consumer).shape[0])
        return count * (wide**3 * 1.6 + 0.6 * wide**2 * out)

    def _correction(self, group: Group) -> tuple[float, float, float]:
        """(what of a forward pass this group's correction takes; moments; solving).

        That of the group alone, where the block waits; or a run up to its consumer and, behind the last, to the next block.
        """
        out, (count, wide) = int(weight(group.consumer).shape[0]), matrices(group)
        left = self.kept[group.name] * wide // group.units
        own = [each for each in self.groups if each.block == group.block]
        again = self._run(group, group.units) - self.num_tokens * count * wide * out
        if all(each.experts is None and room_for(self.model, each, self.num_tokens, self.seq_len) for each in own):
            again += self.num_tokens * left * out
        else:
            as_cut = [self._run(each, self.kept[each.name]) for each in own]
            again += sum(as_cut[: own.index(group)]) + (sum(as_cut) if group is own[-1] else 0)
        moments = self.num_tokens * group.active[0] * (0.58 * left**2 + (wide - left) * out + left * out)
        return again, moments, count * (left**3 / 3 + left**2 * out)
