"""How much more the errors of an example's tokens matter together than each alone."""

from __future__ import annotations

import torch
from torch import Tensor


class Coherence:
    """`sum over examples and channels (sum_t e g)^2 / sum over examples, channels and tokens (e g)^2`, of a layer's output.

    g is the gradient of a prediction that reads all tokens of the example; e would be the error of the output, which nobody
    knows yet: the output itself stands for it, `centred` less its mean, where a bias takes over the mean of what goes. From sums
    over tokens, as the mean is known in the end. About 1 where the errors of the tokens have nothing to do with each other.
    """

    def __init__(self, centred: bool) -> None:
        self._centred = centred
        self.sums = torch.zeros(8, 1, dtype=torch.float64)
        """Tokens, y; over tokens y^2 g^2, y g^2, g^2; over examples p^2, p s, s^2, with their sums p of y g, s of g: [8, out]."""

    def add(self, y: Tensor, g: Tensor, num_tokens: int) -> None:
        """An output and its gradient, [examples, tokens, out], zero where there is no token."""
        y, g = y.double(), g.double()
        products, slopes = y * g, g.sum(1)
        joined, tokens = products.sum(1), y.new_full(y.shape[-1:], num_tokens)
        alone = [products.square().sum((0, 1)), (products * g).sum((0, 1)), g.square().sum((0, 1))]
        together = [joined.square().sum(0), (joined * slopes).sum(0), slopes.square().sum(0)]
        self.sums = self.sums + torch.stack([tokens, y.sum((0, 1)), *alone, *together]).cpu()

    def value(self) -> float:
        """The ratio; 1 if nothing matters."""
        tokens, total, *products = self.sums
        mean = total / tokens if self._centred else torch.zeros_like(total)
        alone, together = (
            float((squares - 2 * mean * crossed + mean.square() * of_gradients).sum())
            for squares, crossed, of_gradients in (products[:3], products[3:])
        )
        return together / alone if alone > 0 else 1.0
