"""Mask tuning: one factor for every head and neuron that stays, by least squares, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data import Batches
from ..families import Group, weight
from ..linalg import add_to_gram, damped, solve_psd, symmetrize
from ..probes import on_consumer_input
from ..slicing import Plan, consumer_columns, set_weight
from ..walk import BlockWalk

LIMIT = 10.0  # a factor beyond it is taken for a failure (the released code's guard)


class Tuning:
    """Two passes side by side: the student, with the plan's units, and the teacher, with a wider plan's.

    For every consumer `y = z W^T`, with units u that stay and the residual stream x that y is added to, the factors solve

        min_s || sum_u s_u z_u W_u^T - (y_teacher + x_teacher - x) ||^2 + ridge * sum_u N_uu (s_u - 1)^2

    where z and x are those of the student, all of whose earlier layers have been tuned. It needs only
    `N_uv = <G_uv, W_u^T W_v>` and `r_u = <z_u W_u^T, target>`, summed over tokens, with G the Gram matrix of z.

    Published: no ridge, but `s = 1 + (N^2 + I)^-1 N (r - N 1)`, to which the released code's LSMR(damp=1) on the normal
    matrix converges; heads of the first block are left at 1; the last MLP of a classifier sees its first token only; heads
    are fitted together with a constant, which is then dropped; the teacher's neurons of the layer at hand are not
    masked. In both, a factor beyond 10 ends the tuning: that layer and all later ones keep 1.
    Source: 2204.09656, section 4.4, and the released code.
    """

    def __init__(self, model: nn.Module, groups: list[Group], batches: Batches, ridge: float, *, published: bool):
        self.groups, self.ridge, self.published = groups, ridge, published
        self.student, self.teacher = BlockWalk(model, batches), BlockWalk(model, batches)

    @torch.no_grad()
    def run(self, plan: Plan, teacher: Plan) -> None:
        """Multiply the columns of every consumer's weight by the factors of its units; those that go are left to the slicer."""
        masks = {group.name: _mask(group, plan[group.name]) for group in self.groups}
        targets = {group.name: _mask(group, teacher[group.name]) for group in self.groups}
        for index in self.student.steps("Tuning"):
            own = [group for group in self.groups if group.block == index]
            with _gated(own, targets):
                wanted = self._targets(index, own)
            with _gated(own, masks):
                for group in own:
                    factors = self._factors(group, plan[group.name], wanted.pop(group.name))
                    if factors is None:
                        return self._fold(masks)
                    masks[group.name][consumer_columns(group, plan[group.name])] = factors.float().repeat_interleave(group.width)
                if index + 1 < len(self.student.blocks):
                    self.student.advance(index)
        return self._fold(masks)

    def _targets(self, index: int, own: list[Group]) -> dict[str, list[Tensor]]:
        """The teacher's residual stream behind each consumer, less biases: group -> parts [tokens, out], as `see` gets them."""
        wanted: dict[str, list[Tensor]] = {group.name: [] for group in own}

        def see(group: Group, rows: Tensor) -> None:
            if group.consumer is group.stream:
                wanted[group.name].append(rows)
            else:
                wanted[group.name][-1] = wanted[group.name][-1] + rows @ weight(group.consumer).T.to(rows)

        self.teacher.run(index, [each for group in own for each in (_stream(group), group)], see, advance=True)
        return wanted

    def _factors(self, group: Group, keep: Tensor, wanted: list[Tensor]) -> Tensor | None:
        """One factor for each unit that stays, float64: [kept]; None if that fails."""
        full = weight(group.consumer)
        columns = consumer_columns(group, keep).to(full.device)
        kept = full.index_select(1, columns).to(torch.promote_types(full.dtype, torch.float32))
        gram = torch.zeros(len(columns), len(columns), dtype=torch.float64, device=full.device)
        toward = torch.zeros(len(columns), dtype=torch.float64, device=full.device)
        stream: list[Tensor] = []

        def see(seen: Group, rows: Tensor) -> None:
            if seen.consumer is seen.stream:
                stream.append(rows)
                return
            z, missing = rows.index_select(1, columns), wanted.pop(0) - stream.pop()
            add_to_gram(gram, z)
            toward.add_((z * (missing @ kept)).double().sum(0))

        self.student.run(group.block, [_stream(group), group], see)
        kept = kept.double()
        blocks = (symmetrize(gram) * (kept.T @ kept)).view(len(keep), group.width, len(keep), group.width)
        normal = blocks.sum((1, 3))
        rest = toward.view(len(keep), group.width).sum(1) - normal.sum(1)
        factors = 1 + solve_psd(damped(normal, self.ridge), rest[:, None])[:, 0]
        return factors if bool((factors.abs() <= LIMIT).all()) else None

    def _fold(self, masks: dict[str, Tensor]) -> None:
        for group in self.groups:
            full = weight(group.consumer)
            set_weight(group.consumer, (full * masks[group.name]).to(full.dtype))


def _stream(group: Group) -> Group:
    """To be visited in the group's place: what reads the residual stream."""
    return replace(group, consumer=group.stream)


def _mask(group: Group, keep: Tensor) -> Tensor:
    mask = torch.zeros(group.units * group.width, device=weight(group.consumer).device)
    return mask.index_fill_(0, consumer_columns(group, keep).to(mask.device), 1.0)


@contextmanager
def _gated(groups: list[Group], masks: dict[str, Tensor]) -> Iterator[None]:
    with on_consumer_input(groups, lambda group, z: z * masks[group.name].to(z.dtype)):
        yield
