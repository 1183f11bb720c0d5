"""Whisper's word timestamps are read from the same heads as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import HEADS, LAYERS, data_of, tiny
from torch import Tensor

from optimum_stat import FisherConfig, FisherPruner, STATConfig, STATPruner

EVERY = [[layer, head] for layer in range(LAYERS) for head in range(HEADS)]


def whisper(heads: list[list[int]]) -> Any:
    model = tiny("whisper")
    vars(model.generation_config).update(alignment_heads=heads, no_timestamps_token_id=50, median_filter_width=3)
    return model


def keys(model: Any, layer: int) -> Tensor:
    """Of the heads that read the encoder; nothing corrects them."""
    return model.model.decoder.layers[layer].encoder_attn.k_proj.weight.detach().unflatten(0, (-1, 8))


def left(dense: Any, model: Any) -> list[list[int]]:
    """Which of the dense model's heads a pruned one has, in their order."""
    return [
        [layer, head] for layer, head in EVERY if any(torch.equal(keys(dense, layer)[head], own) for own in keys(model, layer))
    ]


@pytest.mark.parametrize(
    "make", [lambda m: STATPruner(m, STATConfig(keep=0.7)), lambda m: FisherPruner(m, FisherConfig(keep=0.7))]
)
def test_the_heads_have_their_new_numbers_also_after_pruning_twice(make: Any):
    dense = whisper(EVERY[1:])
    model = copy.deepcopy(dense)
    for _ in range(2):
        make(model).prune(data_of("whisper"))
    kept = left(dense, model)
    assert 0 < len(kept) < len(EVERY)
    found = [keys(model, layer)[head] for layer, head in model.generation_config.alignment_heads]
    wanted = [keys(dense, layer)[head] for layer, head in kept if [layer, head] != EVERY[0]]
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    features = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(0))
    model.generate(features, return_token_timestamps=True, max_new_tokens=4, return_dict_in_generate=True)


def test_without_any_of_them_transformers_says_that_there_are_no_timestamps():
    dense = tiny("whisper")
    pruned = STATPruner(copy.deepcopy(dense), STATConfig(keep=0.5)).prune(data_of("whisper"))
    model = whisper([each for each in EVERY if each not in left(dense, pruned)])
    STATPruner(model, STATConfig(keep=0.5)).prune(data_of("whisper"))
    with pytest.raises(ValueError, match="no `alignment_heads`"):
        model.generate(torch.randn(1, 8, 40), return_token_timestamps=True, max_new_tokens=4)


def test_an_error_takes_the_new_numbers_back():
    model = whisper(EVERY)
    pruner, before = STATPruner(model, STATConfig(keep=0.5)), model.generation_config

    def fail(*args: Any) -> None:
        assert model.generation_config.alignment_heads != EVERY
        raise KeyboardInterrupt

    pruner.finish = fail
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(data_of("whisper"))
    assert model.generation_config is before
    assert before.alignment_heads == EVERY
