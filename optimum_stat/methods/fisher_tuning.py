"""Mask tuning: one factor for every head and neuron that stays, by least squares, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..data import Batches
from ..families import Group, is_causal, task_of, weight
from ..journal import Journal
from ..linalg import add_to_gram, damped, held_out_ridge, solve_psd, symmetrize
from ..offload import brought_in
from ..probes import device_of, on_consumer_input
from ..processes import Processes
from ..slicing import Plan, consumer_columns, set_weight
from ..walk import BlockWalk

logger = logging.getLogger(__name__)
RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)
LIMIT = 10.0  # a factor beyond it is taken for a failure (the released code's guard)


class Tuning:
    """Two passes side by side: the student, with the plan's units, and the teacher, with a wider plan's.

    For every consumer `y = z W^T`, with units u that stay and the residual stream x that y is added to, the factors solve

        min_s || (sum_u s_u z_u W_u^T - (y_teacher + x_teacher - x)) F^(1/2) ||^2 + ridge sum_u N_uu (s_u - 1)^2

    where z and x are those of the student, all of whose earlier layers have been tuned, and F, diagonal, is the squared
    gradient of the loss at the output: factors cannot bring every channel close, so they are to bring those close that matter.
    It needs only `N_uv = <G_uv, W_u^T F W_v>` and `r_u = <z_u W_u^T F, target>`, summed over tokens, with G the Gram matrix
    of z. Each layer's ridge is the one of `RIDGES` whose factors from one half of the tokens fit the other half best: with
    few tokens, small units would take large factors for what earlier layers lost. A factor beyond 10 ends the tuning: that
    layer and all later ones keep 1.

    Published (no metric given): all channels count alike; no ridge, but `s = 1 + (N^2 + I)^-1 N (r - N 1)`, to which the
    released code's LSMR(damp=1) on the normal matrix converges; the heads of the first block keep 1; the last MLP of a
    classifier is fitted to the first token alone; heads are fitted together with a constant, which is then dropped; the
    teacher's neurons of the layer at hand are not masked.
    Source: 2204.09656 and the released code.
    """

    def __init__(
        self, model: nn.Module, groups: list[Group], batches: Batches, metric: Mapping[str, Tensor] | None, journal: Journal
    ):
        self.journal, self.device = journal, device_of(model)
        self.groups, self.metric, self.published = groups, metric, metric is None
        self.student, self.teacher = BlockWalk(model, batches, journal), BlockWalk(model, batches)
        classifier = task_of(model) == "text-classification" and not is_causal(model)
        last = [group.name for group in groups if group.structure == "neurons"][-1:]
        self.first_token_only = last[0] if last and self.published and classifier else None

    @torch.no_grad()
    def run(self, plan: Plan, teacher: Plan) -> None:
        """Multiply the columns of every consumer's weight by the factors of its units; those that go are left to the slicer."""
        masks = {group.name: _mask(group, plan[group.name], self.device) for group in self.groups}
        targets = {group.name: _mask(group, teacher[group.name], self.device) for group in self.groups}
        for index in range(len(self.student.blocks)):
            for name, mask in (self.journal.recall(f"factors {index}") or {}).items():
                masks[name].copy_(mask)
        for index in self.student.steps("Tuning", self.teacher):
            own = [group for group in self.groups if group.block == index]
            wanted = self._targets(index, own, targets)
            with _gated(own, masks):
                for group in own:
                    if self.published and index == 0 and group.structure == "heads":
                        continue
                    factors = self._factors(group, plan[group.name], wanted.pop(group.name))
                    if factors is None:
                        logger.warning("Tuning ends before %s, whose factors went beyond %g.", group.name, LIMIT)
                        return self._fold(masks)
                    columns = consumer_columns(group, plan[group.name])
                    masks[group.name][columns] = factors.float().repeat_interleave(group.width)
                if index + 1 < len(self.student.blocks):
                    self.student.advance(index)
            found = {group.name: masks[group.name] for group in own}
            self.journal.keep(f"factors {index}", found.items(), complete=False)
        return self._fold(masks)

    def _targets(self, index: int, own: list[Group], masks: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """The teacher's residual stream behind each consumer, less biases: group -> parts [tokens, out], as `see` gets them."""
        wanted: dict[str, list[Tensor]] = {group.name: [] for group in own}

        def see(group: Group, rows: Tensor) -> None:
            if group.consumer is group.stream:
                wanted[group.name].append(rows)
            else:
                wanted[group.name][-1] = wanted[group.name][-1] + rows @ weight(group.consumer).T.to(rows)

        gated = [group for group in own if group.structure == "heads" or not self.published]
        with _gated(gated, masks):
            pairs = [each for group in own for each in (_stream(group), group)]
            self.teacher.run(index, pairs, see, advance=not self.published)
        if self.published:
            with _gated(own, masks):
                self.teacher.advance(index)
        return wanted

    def _factors(self, group: Group, keep: Tensor, wanted: list[Tensor]) -> Tensor | None:
        """One factor for each unit that stays, float64: [kept]; None if that fails."""
        full = weight(group.consumer)
        columns = consumer_columns(group, keep).to(full.device)
        kept = full.index_select(1, columns).to(torch.promote_types(full.dtype, torch.float32))
        root = torch.ones_like(kept[:, 0]) if self.metric is None else self.metric[group.name].to(kept).sqrt()
        kept = kept * root[:, None]
        halves = [_Moments.empty(len(columns), full.device) for _ in range(1 if self.published else 2)]
        stream: list[Tensor] = []
        counts = self._tokens_that_count(group)

        def see(seen: Group, rows: Tensor) -> None:
            nonlocal counts
            if seen.consumer is seen.stream:
                stream.append(rows)
                return
            z, missing = rows.index_select(1, columns), (wanted.pop(0) - stream.pop()) * root
            if counts is not None:
                here, counts = counts[: len(z)], counts[len(z) :]
                z, missing = z[here], missing[here]
            parts = zip(z.tensor_split(len(halves)), missing.tensor_split(len(halves)), strict=True)
            for half, (some_z, some_missing) in zip(halves, parts, strict=True):
                half.add(some_z, some_missing, kept)

        self.student.run(group.block, [_stream(group), group], see)
        for half in halves:
            half.add_up(self.student.processes)
        constant = self.published and group.structure == "heads"
        systems = [half.of_units(kept.double(), len(keep), constant=constant) for half in halves]
        change = _published_change(*systems[0])[: len(keep)] if self.published else _change(systems)
        return 1 + change if bool(((1 + change).abs() <= LIMIT).all()) else None

    def _tokens_that_count(self, group: Group) -> Tensor | None:
        """Which of all real tokens are an example's first, where only these count; None: all count."""
        if group.name != self.first_token_only:
            return None
        firsts = [(mask.cumsum(1) == 1)[mask.bool()] for mask in self.student.masks if mask is not None]
        every = [first for first in firsts for _ in range(group.applications)]
        return torch.cat(every) if every else torch.empty(0, dtype=torch.bool)

    def _fold(self, masks: dict[str, Tensor]) -> None:
        for index, block in enumerate(self.student.blocks):
            with brought_in(block):
                for group in self.groups:
                    if group.block == index:
                        full = weight(group.consumer)
                        set_weight(group.consumer, (full * masks[group.name]).to(full.dtype))


@dataclass
class _Moments:
    """Sums over tokens, float64; z the columns that stay [tokens, width], missing what they are to add up to [tokens, out]."""

    gram: Tensor
    """z^T z."""
    toward: Tensor
    """Of each column: <z_c w_c^T, missing>."""
    column_sums: Tensor
    missing_sum: Tensor
    entries: int = 0

    @classmethod
    def empty(cls, width: int, device: torch.device) -> _Moments:
        like = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(gram=like.new_zeros(width, width), toward=like, column_sums=like.clone(), missing_sum=like.new_zeros(()))

    def add(self, z: Tensor, missing: Tensor, kept: Tensor) -> None:
        add_to_gram(self.gram, z)
        self.toward += (z * (missing @ kept)).double().sum(0)
        self.column_sums += z.double().sum(0)
        self.missing_sum += missing.double().sum()
        self.entries += missing.numel()

    def add_up(self, processes: Processes) -> None:
        entries = torch.tensor(self.entries, dtype=torch.float64, device=self.gram.device)
        processes.add_up(self.gram, self.toward, self.column_sums, self.missing_sum, entries)
        self.entries = int(entries)

    def of_units(self, kept: Tensor, units: int, *, constant: bool) -> tuple[Tensor, Tensor]:
        """Normal matrix, and right side less what factors of 1 give; for each unit, and one constant for all entries."""
        width = len(self.toward) // units
        normal = (symmetrize(self.gram) * (kept.T @ kept)).view(units, width, units, width).sum((1, 3))
        toward = self.toward.view(units, width).sum(1)
        if not constant:
            return normal, toward - normal.sum(1)
        beside = (self.column_sums * kept.sum(0)).view(units, width).sum(1)[:, None]
        corner = normal.new_full((1, 1), self.entries)
        normal = torch.cat([torch.cat([normal, beside], 1), torch.cat([beside.T, corner], 1)])
        return normal, torch.cat([toward, self.missing_sum[None]]) - normal.sum(1)


def _change(halves: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Factors less 1, from all tokens, with the ridge that does best from one half of the tokens to the other."""
    systems = [(normal, rest[:, None]) for normal, rest in halves]
    ridge = held_out_ridge([(systems[0], systems[1]), (systems[1], systems[0])], RIDGES)
    (first, first_rest), (second, second_rest) = halves
    return solve_psd(damped(first + second, ridge), (first_rest + second_rest)[:, None])[:, 0]


def _published_change(normal: Tensor, rest: Tensor) -> Tensor:
    """`(N^2 + I)^-1 N rest`."""
    values, vectors = torch.linalg.eigh(normal)
    return vectors @ (values / (values.square() + 1) * (vectors.T @ rest))


def _stream(group: Group) -> Group:
    """To be visited in the group's place: what reads the residual stream."""
    return replace(group, consumer=group.stream)


def _mask(group: Group, keep: Tensor, device: torch.device) -> Tensor:
    mask = torch.zeros(group.units * group.width, dtype=torch.float32, device=device)
    return mask.index_fill_(0, consumer_columns(group, keep).to(mask.device), 1.0)


@contextmanager
def _gated(groups: list[Group], masks: dict[str, Tensor]) -> Iterator[None]:
    with on_consumer_input(groups, lambda group, z: z * masks[group.name].to(z.dtype)):
        yield
