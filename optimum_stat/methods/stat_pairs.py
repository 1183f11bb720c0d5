"""STAT on rotary pairs: which of their dimensions queries and keys lose, by what that would do to the model's predictions.

Attention is not linear in queries and keys, so no least-squares problem says what a pair is worth. The gradient does: the
derivative by a factor on pair p of one token's queries is `x_p = sum of q * dL/dq` over both dimensions and the query heads of a
key/value head, the same before the embedding has turned the pair as behind it. The Fisher information of these factors prices any
set of pairs, in the unit in which `gradients.output_worth` prices errors of outputs, and with the root of the same ratio where
one prediction reads all tokens of an example (`coherence.Coherence`). Ours; STAT has heads and neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import Batches
from ..families import Group
from ..few_pairs import narrow_pairs
from ..gradients import Loss, Passes
from ..probes import on_output_gradient, predicts_once, some_examples


def worth_of_pairs(model: nn.Module, groups: list[Group], batches: Batches, seed: int) -> dict[str, Tensor]:
    """`sum over tokens of E[x^T x]`, x [pairs of all key/value heads] as above: [pairs, pairs] a group; float64, on the CPU.

    Times the root of `sum over examples of |sum_t x|^2 / sum over tokens of |x|^2` where a prediction reads the whole example.

    From one forward and one backward pass over `some_examples`; no labels. Call it inside `quiet(model)`.
    """
    parts, by_name = some_examples(batches), {group.name: group for group in groups}
    passes = Passes(model, parts, Loss(model, parts, seed, from_labels=False), batches.processes, "Gradients of pairs")
    sums = {group.name: torch.zeros(group.units, group.units, dtype=torch.float64) for group in groups}
    counts = {group.name: torch.zeros(1, dtype=torch.float64) for group in groups}
    together = {group.name: torch.zeros(1, dtype=torch.float64) for group in groups}

    def add(name: str, output: Tensor, gradient: Tensor) -> None:
        group = by_name[name]
        products = output.double() * gradient.double()
        rows = by_pair(group, passes.real_rows(products, group.mask)).cpu()
        sums[name] += rows.T @ rows
        counts[name] += len(rows)
        together[name] += by_pair(group, passes.by_example(products, group.mask).sum(1)).square().sum().cpu()

    passes.run(lambda: on_output_gradient({group.name: group.producers[0].linear for group in groups}, add))
    batches.processes.add_up(*sums.values(), *counts.values(), *together.values())
    once = predicts_once(model)
    return {
        name: total
        * (batches.num_tokens / counts[name])
        * ((together[name] / total.trace()).sqrt() if once and total.any() else 1)
        for name, total in sums.items()
    }


def by_pair(group: Group, products: Tensor) -> Tensor:
    """[tokens, query heads * width], summed over what belongs to one pair of one key/value head: [tokens, pairs]."""
    assert group.rotary is not None
    parts = products.view(len(products), group.units // group.head_width, group.query_heads, -1)
    return parts[..., group.rotary.to(parts.device)].sum((2, 4)).flatten(1)


def rank_pairs(worth: Tensor) -> tuple[Tensor, Tensor]:
    """(order, best first; error of the first k) with `1_S^T worth 1_S` the error of losing the pairs S: one after the other goes,
    each time the one that adds least."""
    matrix = worth.numpy()
    price, removed, error = matrix.diagonal().copy(), list[int](), [0.0]
    for _ in range(len(matrix)):
        pair = int(price.argmin())
        error.append(error[-1] + max(0.0, float(price[pair])))  # errors may cancel; what is lost does not come back
        removed.append(pair)
        price += 2 * matrix[pair]
        price[removed] = float("inf")
    return torch.tensor(removed).flip(0), torch.tensor(error, dtype=torch.float64).flip(0)


def lose_pairs(group: Group, keep: Tensor) -> None:
    """Keep the pairs `keep` alone, in place."""
    assert group.rotary is not None
    stays = torch.zeros(group.units, dtype=torch.bool).index_fill_(0, keep.cpu(), True).view(-1, group.head_width)
    gone = [(~own).nonzero().flatten().tolist() for own in stays]
    narrow_pairs(group.producers[0].linear, group.producers[1].linear, gone, group.rotary)
