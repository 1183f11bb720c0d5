"""Each family's entry, against what transformers builds and computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import DECODERS, HEADS, HIDDEN, KEY_VALUE_HEADS, LAYERS, LLAMAS, NEURONS, SIZES, batches, outputs, roughen, tiny
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertLMHeadModel

from optimum_stat.families import (
    FAMILIES,
    Group,
    Producer,
    check_finite,
    find_groups,
    is_causal,
    sliding_window,
    weight,
)
from optimum_stat.probes import on_consumer_input
from optimum_stat.slicing import consumer_columns, producer_rows, slice_model
from optimum_stat.structure import write_record

EACH_FAMILY = pytest.mark.parametrize("family", SIZES)


@EACH_FAMILY
@pytest.mark.parametrize("head", ["", None])
def test_groups_hold_the_config_s_sizes_in_the_order_of_the_forward_pass(family: str, head: str | None):
    model = tiny(family, head)
    groups = find_groups(model)
    blocks, runs = (1, LAYERS) if family == "albert" else (LAYERS, 2 if "albert" in family else 1)
    assert [group.name for group in groups] == [f"{i}.{kind}" for i in range(blocks) for kind in ("heads", "neurons")]
    assert {group.applications for group in groups} == {runs}
    grouped = family in (*LLAMAS, "falcon") and "one" not in family
    for group in groups:
        if group.structure == "heads":
            assert (group.units, group.query_heads) == ((KEY_VALUE_HEADS, HEADS // KEY_VALUE_HEADS) if grouped else (HEADS, 1))
            assert group.width == group.query_heads * (12 if family in ("qwen3", "gemma") else 8)
            assert group.shares_key_value is ("one key head" in family)
        else:
            assert (group.units, group.width, group.query_heads) == (128 if family == "bloom" else NEURONS, 1, 1)
    seen = []
    with on_consumer_input(groups, lambda group, z: seen.append(group.name)), torch.no_grad():
        outputs(model, batches()[0])
    assert seen == [group.name for i in range(blocks) for _ in range(runs) for group in groups[2 * i : 2 * i + 2]]


ONE_LAYER_EACH = {"albert": {"num_hidden_layers": 1}, "albert, two blocks": {"num_hidden_layers": 2}}
"""Else a later application of the same block reads what an earlier one changed."""


@EACH_FAMILY
@pytest.mark.parametrize("name", ["heads", "neurons"])
def test_units_are_what_the_consumer_reads(family: str, name: str):
    """Without its producers' rows a unit is silent, and nothing else in the consumer's input changes."""
    if name == "heads" and "one key head" in family:
        return  # there is no value of its own: that sliced equals masked says the same
    for unit in (0, 1):
        seen = []
        for silenced in (False, True):
            model = tiny(family, **ONE_LAYER_EACH.get(family, {}))
            group = [group for group in find_groups(model) if group.structure == name][-1]
            if silenced:
                _silence(group, group.producers[-1], torch.tensor([unit]))  # the value, or the last of (gate, up)
            with on_consumer_input([group], lambda group, z, seen=seen: seen.append(z.reshape(-1, z.shape[-1]))):
                outputs(model, batches()[0])
        columns = consumer_columns(group, torch.tensor([unit]))
        assert (seen[-1][:, columns].abs() < 1e-5).all()  # one activation function has a little left at zero
        changed = (seen[-1] != seen[-2]).any(0).nonzero().flatten()
        assert set(changed.tolist()) <= set(columns.tolist())
        assert len(changed) == len(columns) or name == "neurons"  # some neurons are silent in any case (ReLU)


@torch.no_grad()
def _silence(group: Group, producer: Producer, unit: torch.Tensor) -> None:
    rows = producer_rows(group, producer, unit)
    weight(producer.linear)[rows] = 0
    if isinstance(producer.linear.bias, torch.Tensor):
        gated = len(group.producers) > 1 or len(producer.runs) > 1
        producer.linear.bias[rows] = -1e9 if group.structure == "neurons" and not gated else 0  # GELU(-1e9) is 0
    for module, vector in group.vectors:
        if "bias" in vector:
            getattr(module, vector).view(group.units, -1)[unit] = 0


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


_COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 64,
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "other names": (
        "xlnet",
        {"d_model": 8, "d_inner": 8, "n_layer": 1, "n_head": 2},
        r"no list of blocks with attention was found; at '[a-z.0-9]*', a .* has no attention \(q_proj/k_proj/v_proj or .*; no ",
    ),
    "no attention": (
        "mamba",
        {"hidden_size": 8, "num_hidden_layers": 2},
        r"a MambaBlock has attention at mixer \(perhaps, in one linear\); no neurons .*; its modules with weights are .*in_proj",
    ),
    "a fused projection in a family that nobody listed": (
        "gpt_neox_japanese",
        {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_multiple_size": 2},
        "its query, key and value come from one linear, and no entry says how its rows are ordered",
    ),
    "talking heads": (
        "deberta",
        {**SIZES["deberta"], "talking_head": True},
        "config.talking_head is set, and its attention mixes the heads",
    ),
    "layers in turn": (
        "albert",
        {**SIZES["albert"], "inner_group_num": 2},
        "has attention at .* and .*, of which there must be one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_with_what_was_found_and_what_not(case: str):
    family, sizes, message = REFUSED[case]
    model = AutoModel.from_config(AutoConfig.for_model(family, vocab_size=9, **sizes))
    with pytest.raises(ValueError, match=f"cannot prune '{family}' models.*{message}") as caught:
        find_groups(model)
    assert all(known in str(caught.value) for known in FAMILIES)


UNLISTED = {
    "olmo": {**_COMMON, "num_key_value_heads": 2},
    "seed_oss": {**_COMMON, "num_key_value_heads": 2, "head_dim": 8},
    "stablelm": {**_COMMON, "num_key_value_heads": 2},
    "xlm-roberta": _COMMON,
    "camembert": _COMMON,
    "ernie": _COMMON,
}


@pytest.mark.parametrize("family", UNLISTED)
def test_a_family_that_nobody_listed_works_if_it_has_the_common_names(family: str, tmp_path):
    assert family not in FAMILIES
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=67, pad_token_id=1, **UNLISTED[family])
        models.append(AutoModel.from_config(config).eval())
        roughen(models[-1])
    dense, small = models
    plan = {"0.heads": torch.tensor([1]), "1.neurons": torch.tensor([3, 9, 30])}
    gated = [group for group in find_groups(dense) if group.name in plan]
    with on_consumer_input(gated, lambda group, z: z * _mask(group, plan[group.name])):
        wanted = outputs(dense, batches()[0])
    slice_model(small, plan)
    torch.testing.assert_close(outputs(small, batches()[0]), wanted, atol=2e-4, rtol=1e-4)
    assert is_causal(small) is ("rob" not in family and family not in ("camembert", "ernie"))
    write_record(small)
    small.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path), batches()[0]), outputs(small, batches()[0]))


def _mask(group: Group, keep: torch.Tensor) -> torch.Tensor:
    return torch.zeros(group.units * group.width).index_fill_(0, consumer_columns(group, keep), 1)


@pytest.mark.parametrize("config", [None, SimpleNamespace(), SimpleNamespace(model_type=None)])
def test_what_is_no_transformer_is_refused(config: object):
    model = nn.Linear(2, 2)
    if config is not None:
        model.config = config
    with pytest.raises(ValueError, match=r"cannot prune None models \(Linear\)"):
        find_groups(model)


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
