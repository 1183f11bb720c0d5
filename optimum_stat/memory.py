"""What a model takes in memory while it generates: its weights, and the keys and values of the tokens it has read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from .blocks import reads_tokens_alone, width_of_head
from .families import Group, find_groups, is_causal, weight
from .probes import caches_in, device_of


@dataclass(frozen=True)
class Memory:
    """Bytes of a model, where the budget was its memory."""

    batch_size: int
    seq_len: int
    """Tokens of each sequence in the cache."""
    dense: int
    asked: int
    weights: int
    """Of the pruned model."""
    cache: int

    @property
    def reached(self) -> int:
        """Weights and cache of the pruned model."""
        return self.weights + self.cache

    def __str__(self) -> str:
        dense, asked, reached, weights, cache = (
            f"{each / 2**20:,.1f}" for each in (self.dense, self.asked, self.reached, self.weights, self.cache)
        )
        return (
            f"MiB with {self.batch_size} x {self.seq_len} tokens in the cache: {dense} dense, {asked} asked, {reached} reached "
            f"({weights} of weights, {cache} of keys and values)"
        )


@dataclass(frozen=True)
class Residents:
    """What is counted: `batch_size` sequences of `seq_len` tokens in the cache, and the weights, in the model's dtype."""

    batch_size: int
    seq_len: int
    copies: int = 1
    """How often every key and value stands in the cache: some models repeat those that several query heads read."""
    dense: int = 0
    """Bytes of the dense model."""

    @classmethod
    def of(cls, model: Any, batch_size: int, seq_len: int) -> Residents:
        """Of a dense model. One token is run through it, to see what it keeps."""
        if not reads_tokens_alone(model):
            raise ValueError(
                f"budget='memory' asked of {type(model).__name__}, which reads more than token ids, or has several lists of "
                "blocks; what it keeps of its tokens is not known. Ask for params."
            )
        single = cls(1, 1).cache_bytes(model)
        copies = _cache_of_one_token(model) // single if single else 1
        own = cls(batch_size, seq_len, max(1, copies))
        return dataclasses.replace(own, dense=own.total(model))

    def unit_bytes(self, model: Any, group: Group, params: int) -> int:
        """What one unit of `group` takes, of `params` parameters: those, and its own key and value of every token."""
        size = weight(group.consumer).element_size()
        keys_and_values = 0 if group.shares_key_value else self._cached(model, group)
        return size * (params + keys_and_values)

    def cache_bytes(self, model: Any) -> int:
        """Keys and values of all tokens in all layers; none for models that do not generate.

        `2 * key/value heads * head width * min(seq_len, window - 1) * batch_size * copies` numbers a layer, the window that of a
        layer with sliding attention, whose cache keeps what the next token will see besides itself.
        """
        heads = [group for group in find_groups(model) if group.structure == "heads"]
        numbers = sum(group.key_value_heads * self._cached(model, group) for group in heads)
        return numbers * weight(heads[0].consumer).element_size()

    def total(self, model: Any) -> int:
        """Weights and cache of the model as it is now."""
        return weight_bytes(model) + self.cache_bytes(model)

    def compare(self, model: Any, keep: float) -> Memory:
        """What was asked beside what the model takes now."""
        sizes = weight_bytes(model), self.cache_bytes(model)
        return Memory(self.batch_size, self.seq_len, self.dense, int(keep * self.dense), *sizes)

    def _cached(self, model: Any, group: Group) -> int:
        """Numbers in the cache for one key/value head."""
        if group.structure != "heads" or not is_causal(model):
            return 0
        window = group.window
        tokens = self.seq_len if window is None else min(self.seq_len, window - 1)
        return 2 * width_of_head(model.config) * tokens * self.batch_size * self.copies


@torch.no_grad()
def _cache_of_one_token(model: Any) -> int:
    ids = torch.zeros(1, 1, dtype=torch.long, device=device_of(model))
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    layers = [layer for cache in caches_in(output).values() for layer in cache.layers]
    return sum(each.numel() * each.element_size() for layer in layers for each in (layer.keys, layer.values))


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters, each counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
