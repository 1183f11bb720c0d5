"""The gates of VTrans on what all blocks share: dimensions of the residual stream, and whole layers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Group, find_blocks, find_groups
from ..narrowing import multiply
from ..slicing import Plan
from ..stream import find_stream, is_norm
from ..training_sizes import Size, first, orders
from ..trunk import HIDDEN, LAYERS
from ..trunk_costs import TrunkCosts
from .vib_gates import START, divergence, log_noise


class TrunkGates(nn.Module):
    """One gate for each dimension, at every norm of the stream; and one for each layer, on what it adds to the stream.

    Dimensions and layers that do not fit into the size scheduled are out at once, in training too: norms see the others alone,
    as after slicing, and a layer hands on what it gets. Of the others a dimension is `mean + noise * deviation` times what the
    norm gives, fresh noise for each token and norm, and a layer `x + (1 + noise * deviation) (F(x) - x)`, fresh noise for each
    token. The first layer has no gate.
    """

    dimensions: Tensor
    """1 for those that are in: [width]."""
    blocks: Tensor
    """The same: [layers]."""

    def __init__(self, model: Any, structures: Sequence[str], costs: TrunkCosts, step: int, generator: torch.Generator):
        """step: the stream's width becomes a multiple of it."""
        nn.Module.__init__(self)
        self._step = min(step, costs.width)
        self._found, self._blocks, self.costs, self._structures = find_stream(model), list(find_blocks(model)), costs, structures
        self._readers = [producer.linear for group in find_groups(model) for producer in group.producers]
        self._norms = [norm for norm in dict.fromkeys(module for module, _, _ in self._found.axes) if is_norm(norm)]
        self._centred = {norm: _centres(norm) for norm in self._norms}
        drawn = 0.01 * torch.randn(2, costs.width, generator=generator)
        layers = 0.01 * torch.randn(len(self._blocks), generator=generator)
        if HIDDEN in structures:
            self.means, self.log_variances = nn.Parameter(1 + drawn[0]), nn.Parameter(START + drawn[1])
        if LAYERS in structures:
            self.log_noises = nn.Parameter(START + layers)
        self.register_buffer("dimensions", torch.ones(costs.width))
        self.register_buffer("blocks", torch.ones(len(self._blocks)))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """As hooks on norms, on what reads the stream, and on the blocks."""
        with ExitStack() as stack:
            if HIDDEN in self._structures:
                for norm in self._norms:
                    stack.callback(norm.register_forward_pre_hook(self._over_the_rest).remove)
                    stack.callback(norm.register_forward_hook(self._gated).remove)
                for linear in self._readers:
                    stack.callback(linear.register_forward_pre_hook(self._without).remove)
            if LAYERS in self._structures:
                for index, block in enumerate(self._blocks):
                    stack.callback(block.register_forward_hook(partial(self._layer, index), with_kwargs=True).remove)
            yield

    def _over_the_rest(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Have a norm over all dimensions compute that over those which are in: `(width / in)^(1/2)` times them, the rest 0."""
        x, own = args[0], self.dimensions.to(args[0].dtype)
        if self._centred[norm]:
            x = x - (x * own).sum(-1, keepdim=True) / own.sum()
        return (x * (own * (self.costs.width / own.sum()).sqrt()), *args[1:])

    def _gated(self, norm: nn.Module, args: Any, output: Tensor) -> Tensor:
        own, bias = self.dimensions.to(output.dtype), getattr(norm, "bias", None)
        shift = bias if isinstance(bias, Tensor) else torch.zeros((), dtype=output.dtype, device=output.device)
        plain = (output - shift) * (own.sum() / self.costs.width).sqrt() + shift
        factor: Tensor = self.means
        if self.training:
            factor = torch.addcmul(self.means, torch.randn_like(plain, dtype=self.means.dtype), (0.5 * self.log_variances).exp())
        return plain * (factor * self.dimensions).to(plain.dtype)

    def _without(self, linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * self.dimensions.to(args[0].dtype), *args[1:])

    def _layer(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x, y = args[0] if args else kwargs["hidden_states"], output if isinstance(output, Tensor) else output[0]
        if not self.blocks[index]:
            y = x
        elif self.training and index:
            noise = torch.randn_like(y[..., :1], dtype=self.log_noises.dtype) * (0.5 * self.log_noises[index]).exp()
            y = x + (1 + noise).to(y.dtype) * (y - x)
        return y if isinstance(output, Tensor) else (y, *output[1:])

    def divergences(self) -> dict[str, Tensor]:
        """Of each gate, by structure; the only layer there is has none."""
        found = {HIDDEN: divergence(self.means, self.log_variances)} if HIDDEN in self._structures else {}
        if LAYERS in self._structures and len(self._blocks) > 1:
            found[LAYERS] = divergence(torch.ones_like(self.log_noises), self.log_noises)[1:]
        return found

    def noises(self) -> dict[str, Tensor]:
        """`log(variance / mean^2)` of each gate; the first layer's is minus infinity."""
        found = {HIDDEN: log_noise(self.means, self.log_variances)} if HIDDEN in self._structures else {}
        if LAYERS in self._structures:
            found[LAYERS] = torch.cat([self.log_noises.new_full((1,), -torch.inf), self.log_noises[1:]])
        return found

    def expected_share(self, counts: Mapping[str, Tensor], steepness: float) -> Tensor:
        """Of the dense model's cost, with `counts` units of each group, and layers and dimensions counted in the same way."""
        soft = {name: torch.sigmoid(-steepness * noise) for name, noise in self.noises().items()}
        blocks = soft.get(LAYERS, self.blocks)
        width = soft[HIDDEN].sum() if HIDDEN in soft else self.costs.width
        share: Tensor = self.costs.spent(counts, blocks, width) / self.costs.total
        return share

    @torch.no_grad()
    def best(self, groups: Sequence[Group], scores: Mapping[str, Tensor], size: Size, share: float) -> Plan:
        """Everything of the highest scores, one threshold for all structures, that fits into `share`.

        The trunk at the threshold, a multiple of `step` wide; on it, heads and neurons as `Size.best` takes them. Of each group
        at least its smallest size stays, and one step of dimensions.
        """
        own = self.scores()
        every = torch.cat([*own.values(), *scores.values()]).sort().values
        low, high = 0, len(every) - 1
        while low < high:
            middle = (low + high) // 2
            fits = self._spent(groups, own, scores, size, float(every[middle])) <= share * self.costs.total
            low, high = (low, middle) if fits else (middle + 1, high)
        trunk = self._trunk(own, float(every[high]))
        blocks, width = trunk[LAYERS].tolist(), len(trunk[HIDDEN])
        inner = [group.name for group in groups if group.block in blocks]
        sizes = {name: size.sizes[name] for name in inner}
        unit = {name: sum(times * part for times, part in zip((1, width), self.costs.unit[name], strict=True)) for name in inner}
        rest = share * self.costs.total - self.costs.spent({}, self.blocks_of(blocks), width)
        costs = {name: [unit[name] * count for count in sizes[name]] for name in inner}
        plan = Size(share, costs, sizes, lambda _: rest).best({name: scores[name] for name in inner}, share)
        self.dimensions.zero_()[trunk[HIDDEN].to(self.dimensions.device)] = 1
        self.blocks.copy_(torch.tensor(self.blocks_of(blocks)))
        return {**plan, **{name: trunk[name] for name in self._structures}}

    def scores(self) -> dict[str, Tensor]:
        """1 for a gate without noise, as of heads and neurons: float64, on the CPU."""
        return {name: torch.sigmoid(-noise.detach().double().cpu()) for name, noise in self.noises().items()}

    def blocks_of(self, kept: Sequence[int]) -> list[float]:
        """1 for those that are kept, 0 for the others."""
        return [float(index in kept) for index in range(len(self._blocks))]

    def _trunk(self, scores: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
        layers = torch.arange(len(self._blocks))
        kept = {
            LAYERS: layers[scores[LAYERS] >= threshold] if LAYERS in scores else layers,
            HIDDEN: torch.arange(self.costs.width),
        }
        if HIDDEN in scores:
            count = max(1, int((scores[HIDDEN] >= threshold).sum()) // self._step) * self._step
            kept[HIDDEN] = first(orders(scores), {HIDDEN: min(count, self.costs.width)})[HIDDEN]
        return kept

    def _spent(
        self, groups: Sequence[Group], own: Mapping[str, Tensor], scores: Mapping[str, Tensor], size: Size, threshold: float
    ) -> float:
        """What stays at a threshold costs, every group rounded down to one of its sizes."""
        trunk = self._trunk(own, threshold)
        counts = {}
        for name, sizes in ((group.name, size.sizes[group.name]) for group in groups):
            counts[name] = sizes[max(0, bisect_right(sizes, int((scores[name] >= threshold).sum())) - 1)]
        return float(self.costs.spent(counts, self.blocks_of(trunk[LAYERS].tolist()), len(trunk[HIDDEN])))

    @torch.no_grad()
    def bake(self) -> None:
        """Write the means into the norms."""
        if HIDDEN in self._structures:
            for norm in self._norms:
                multiply(norm, self.means)


def _centres(norm: nn.Module) -> bool:
    """Whether it subtracts the mean: then nothing but a bias is left of what is the same everywhere."""
    like: Any = norm.weight
    bias = norm.bias if isinstance(getattr(norm, "bias", None), Tensor) else torch.zeros_like(like)
    return not (norm(torch.ones_like(like)) - bias).abs().gt(1e-3).any()
