"""Families that nobody listed: what a forward pass knows of heads and neurons besides names and shapes is found out by trying."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import data_of, outputs, tiny
from transformers import AutoModelForCausalLM

from optimum_stat import FisherConfig, FisherPruner, STATConfig, STATPruner
from optimum_stat.family_table import FAMILIES

CONFIG = STATConfig(keep=0.6, round_to=1)


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose family is not listed, until the test is over."""

    def make(family: str) -> Any:
        model = tiny(family)
        monkeypatch.delitem(FAMILIES, model.config.model_type)
        return model

    return make


@pytest.mark.parametrize("family", ["bert", "llama", "mixtral", "vit"])
def test_one_that_is_built_of_common_parts_is_pruned_as_if_it_were_listed(unlisted: Any, family: str) -> None:
    alone = FisherPruner(tiny(family), FisherConfig(keep=0.6)).prune(data_of(family))
    found = FisherPruner(unlisted(family), FisherConfig(keep=0.6)).prune(data_of(family))
    assert torch.equal(outputs(found, data_of(family)[0]), outputs(alone, data_of(family)[0]))


def test_rounding_is_no_mistake(unlisted: Any) -> None:
    model = unlisted("llama").to(torch.bfloat16)
    assert STATPruner(model, CONFIG).prune(data_of("llama")) is model


@pytest.mark.parametrize("family", ["mpnet", "t5"])
def test_a_bias_with_a_share_for_each_head_is_noticed_before_any_work(unlisted: Any, family: str) -> None:
    model = unlisted(family)
    before, wanted = copy.deepcopy(model.state_dict()), outputs(model, data_of(family)[0])
    with pytest.raises(ValueError, match=f"model_type='{family}' .* none of the families .* does not run with fewer heads"):
        STATPruner(model, CONFIG).prune(data_of(family))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(outputs(model, data_of(family)[0]), wanted)


def test_parts_that_are_replaced_while_the_model_runs_are_noticed(unlisted: Any) -> None:
    model = unlisted("bert")
    model.register_forward_pre_hook(
        lambda own, args: setattr(own.bert.encoder.layer[0].attention, "dropout", torch.nn.Dropout(0))
    )
    with pytest.raises(ValueError, match="replaces its parts while it runs"):
        STATPruner(model, CONFIG).prune(data_of("bert"))


def test_which_dimensions_turn_together_is_known_of_listed_families_alone(unlisted: Any) -> None:
    with pytest.raises(ValueError, match="which two dimensions of its heads turn together is not known: leave 'pairs' out"):
        STATPruner(unlisted("llama"), STATConfig(keep=0.9, structures=("neurons", "pairs"))).prune(data_of("llama"))


def test_offloaded_models_are_not_tried_which_is_told(unlisted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unlisted("llama").save_pretrained(tmp_path / "dense")
    there = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "weights")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **there)
    STATPruner(model, CONFIG).prune(data_of("llama"))
    assert "while weights are offloaded it is not tried whether the model runs" in caplog.text


def test_a_width_that_the_forward_pass_reads_is_noticed(unlisted: Any) -> None:
    model = unlisted("llama")
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda own, _, out: (out[0] * own.o_proj.in_features / 32, *out[1:]))
    with pytest.raises(ValueError, match=r"model_type='llama' .* it computes something else"):
        STATPruner(model, CONFIG).prune(data_of("llama"))
