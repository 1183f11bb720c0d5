"""Each family's entry, against what transformers builds and computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import DECODERS, HEADS, KEY_VALUE_HEADS, LAYERS, LLAMAS, NEURONS, batches, outputs, tiny
from torch import nn
from transformers import AutoModel, BertConfig, BertLMHeadModel, T5Config, T5Model

from optimum_stat.families import (
    FAMILIES,
    Group,
    Producer,
    check_finite,
    find_blocks,
    find_groups,
    is_causal,
    sliding_window,
    weight,
)
from optimum_stat.probes import on_consumer_input
from optimum_stat.slicing import consumer_columns, producer_rows

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@EACH_FAMILY
@pytest.mark.parametrize("head", ["", None])
def test_groups_hold_the_config_s_sizes_in_the_order_of_the_forward_pass(family: str, head: str | None):
    model = tiny(family, head)
    groups = find_groups(model)
    assert [group.name for group in groups] == [f"{i}.{kind}" for i in range(LAYERS) for kind in ("heads", "neurons")]
    grouped = family in LLAMAS
    for group in groups:
        if group.structure == "heads":
            assert (group.units, group.query_heads) == ((KEY_VALUE_HEADS, HEADS // KEY_VALUE_HEADS) if grouped else (HEADS, 1))
            assert group.width == group.query_heads * (12 if family == "qwen3" else 8)
        else:
            assert (group.units, group.width, group.query_heads) == (NEURONS, 1, 1)
    seen = []
    with on_consumer_input(groups, lambda group, z: seen.append(group.name)), torch.no_grad():
        outputs(model, batches()[0])
    assert seen == [group.name for group in groups]


@EACH_FAMILY
@pytest.mark.parametrize("name", ["0.heads", "1.neurons"])
def test_units_are_what_the_consumer_reads(family: str, name: str):
    """Without its producers' rows a unit is silent, and nothing else in the consumer's input changes."""
    for unit in (0, 1):
        seen = []
        for silenced in (False, True):
            model = tiny(family)
            group = next(group for group in find_groups(model) if group.name == name)
            if silenced:
                _silence(group, group.producers[-1], torch.tensor([unit]))  # the value, or the last of (gate, up)
            with on_consumer_input([group], lambda group, z, seen=seen: seen.append(z.reshape(-1, z.shape[-1]))):
                outputs(model, batches()[0])
        columns = consumer_columns(group, torch.tensor([unit]))
        assert (seen[-1][:, columns] == 0).all()
        changed = (seen[-1] != seen[-2]).any(0).nonzero().flatten()
        assert set(changed.tolist()) <= set(columns.tolist())
        assert len(changed) == len(columns) or name == "1.neurons"  # some neurons are silent in any case (ReLU)


@torch.no_grad()
def _silence(group: Group, producer: Producer, unit: torch.Tensor) -> None:
    rows = producer_rows(group, producer, unit)
    weight(producer.linear)[rows] = 0
    if isinstance(producer.linear.bias, torch.Tensor):
        producer.linear.bias[rows] = -1e9 if group.structure == "neurons" else 0  # GELU(-1e9) is 0


@EACH_FAMILY
def test_causal_means_that_the_future_does_not_matter(family: str):
    model, one, other = tiny(family, ""), batches((10,))[0], batches((10,))[0]
    other["input_ids"][0, -1] = 3 + (other["input_ids"][0, -1] - 2) % 60
    first, second = (outputs(model, batch).view(10, -1) for batch in (one, other))
    assert torch.equal(first[:-1], second[:-1]) is is_causal(model) is (family in DECODERS)


def test_a_decoder_made_of_an_encoder_is_causal():
    config = BertConfig(is_decoder=True, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    assert is_causal(BertLMHeadModel(config))


@pytest.mark.parametrize(
    ("family", "windows"), [("mistral", [6, 6]), ("qwen2", [None, 6]), ("llama", [None] * 2), ("bert", [None] * 2)]
)
def test_sliding_windows_are_those_of_the_attention(family: str, windows: list[int | None]):
    """Twenty tokens: with a window of 6 the last token's attention output ignores the first token's value."""
    model = tiny(family, "")
    assert [sliding_window(model.config, block) for block in range(LAYERS)] == windows
    if family == "bert":
        return
    ids = batches((20,))[0]
    for block, window in enumerate(windows):
        outs = []
        for scale in (1.0, 2.0):
            value = find_groups(model)[2 * block].producers[-1].linear

            def change(module: nn.Module, args: object, output: torch.Tensor, scale: float = scale) -> torch.Tensor:
                output = output.clone()
                output[:, 0] *= scale
                return output

            handle, group = value.register_forward_hook(change), find_groups(model)[2 * block]
            with on_consumer_input([group], lambda group, z, outs=outs: outs.append(z[0, -1].clone())):
                outputs(model, ids)
            handle.remove()
        assert torch.equal(outs[0], outs[1]) is (window is not None)


def test_an_unknown_family_is_refused_and_the_known_ones_are_named():
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    with pytest.raises(ValueError, match="cannot prune 't5' models") as caught:
        find_groups(T5Model(config))
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize("config", [None, SimpleNamespace(), SimpleNamespace(model_type=None)])
def test_what_is_no_transformer_is_refused(config: object):
    model = nn.Linear(2, 2)
    if config is not None:
        model.config = config
    with pytest.raises(ValueError, match=r"cannot prune None models \(Linear\)"):
        find_groups(model)


def test_a_model_that_is_built_otherwise_than_its_family_is_refused():
    model = tiny("bert")
    model.config.model_type = "llama"
    with pytest.raises(
        ValueError, match=r"BertForMaskedLM has no blocks at 'layers', where 'llama' models keep them; it has embed"
    ):
        find_blocks(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_weights_are_named(value: float):
    model = tiny("gpt2")
    check_finite(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight holds NaN or infinite"):
        check_finite(model)


def test_weights_that_are_not_there_yet_are_not_called_broken():
    with torch.device("meta"):
        check_finite(AutoModel.from_config(tiny("bert").config))
