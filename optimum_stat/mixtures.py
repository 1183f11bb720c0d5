"""What the model loses without a whole expert, when its router sends the expert's tokens to others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .budget import Ranking
from .data import Batches
from .experts import BIAS, linears_of_experts
from .families import Group, weight
from .gradients import output_worth
from .linalg import sums_of_what_goes
from .routers import Mixture, find_mixtures
from .walk import BlockWalk

EXPERTS = "experts"
TOKENS = 64  # whose outputs of all experts are held at a time


def refuse_without(model: Any) -> None:
    """Say no to a model that has no experts that could go."""
    if not find_mixtures(model):
        raise ValueError(
            f"'experts' asked of a {type(model).__name__}, which has none beside a router that is known: rows, and perhaps "
            "biases, of experts and nothing else. Leave 'experts' out."
        )


@torch.no_grad()
def rank_experts(model: Any, batches: Batches, seed: int, nats: float) -> Ranking:
    """Order and error of "experts", all experts of all blocks counted on from one block to the next.

    An expert's error is `sum over tokens of F (y' - y)^2`, y what all experts of its block give together and y' what they give
    once its row of the router is gone, so that its tokens go to the best of the others and shares are made anew; F is the
    diagonal of the Fisher information at y. Experts go one by one, and their errors add up. As many of each block as a token
    goes through never go: the best stand at infinity. One pass over the data, and one backward over `some_examples`. Ours.
    nats: what an error of 1 in the result stands for.
    """
    mixtures = find_mixtures(model)
    groups = [mixture.group for mixture in mixtures]
    worth = {name: 0.5 / nats * own for name, own in output_worth(model, groups, batches, seed).items()}
    lost = {group.name: torch.zeros(mixture.units, dtype=torch.float64) for mixture, group in zip(mixtures, groups, strict=True)}
    walk = BlockWalk(model, batches)
    for index in walk.steps("Measuring experts"):
        own = [mixture for mixture in mixtures if mixture.group.block == index]
        for mixture in own:
            name = mixture.group.name

            def add(_: Group, x: Tensor, mixture: Mixture = mixture, name: str = name) -> None:
                lost[name] += errors_without(mixture, x, worth[name])

            walk.run(index, [_reader(mixture)], add)
        walk.advance(index)
    batches.processes.add_up(*lost.values())
    for mixture in mixtures:
        errors = lost[mixture.group.name]
        errors[errors.topk(mixture.fewest).indices] = torch.inf
    every = torch.cat([lost[group.name] for group in groups])
    order = every.argsort(descending=True, stable=True)
    return Ranking({EXPERTS: order}, {EXPERTS: sums_of_what_goes(every[order])})


def errors_without(mixture: Mixture, x: Tensor, worth: Tensor) -> Tensor:
    """`sum over tokens of worth (y' - y)^2` for each expert. x: what the experts read, [tokens, width]; worth: [out]."""
    errors = torch.zeros(mixture.units, dtype=torch.float64)
    like = weight(mixture.group.consumer)
    scale = worth.to(like.device).sqrt()
    for rows in torch.split(x, TOKENS):
        each = _outputs(mixture, rows.to(like)).double() * scale  # [tokens, experts, out]
        shares = _shares(mixture, rows.to(like), None).double()
        for expert in range(mixture.units if mixture.units > mixture.fewest else 0):
            change = _shares(mixture, rows.to(like), expert).double() - shares  # of tokens that go elsewhere too, in some routers
            errors[expert] += torch.einsum("te,teo->to", change, each).square().sum().cpu()
    return errors


def _shares(mixture: Mixture, x: Tensor, without: int | None) -> Tensor:
    """What the router gives each expert of each token, [tokens, experts], with its rows or all but one."""
    keep = torch.tensor([i for i in range(mixture.units) if i != without], device=x.device)
    rows = {name: value[keep] for name, value in mixture.router.named_parameters()}
    _, shares, chosen = torch.func.functional_call(mixture.router, rows, (x,))
    return shares.new_zeros(len(x), mixture.units).scatter(1, keep[chosen], shares)


def _outputs(mixture: Mixture, x: Tensor) -> Tensor:
    """What each expert gives for each token: [tokens, experts, out]."""
    module: Any = mixture.group.experts
    up, down, count = linears_of_experts(module)
    made = up(x).unflatten(1, (count, -1))
    neurons = module._apply_gate(made) if module.has_gate else module.act_fn(made)
    columns = weight(down)
    given = torch.einsum("teu,oue->teo", neurons, columns.view(len(columns), -1, count))
    return given + getattr(module, BIAS) if BIAS in module._parameters else given


def _reader(mixture: Mixture) -> Group:
    """What the experts read, as a group whose units are its dimensions."""
    group, linear = mixture.group, mixture.group.producers[0].linear
    return Group(f"{group.name}.0", group.block, "hidden", (), linear, weight(linear).shape[1], group.stream, mask=group.mask)
