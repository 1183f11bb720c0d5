"""Loading: what is loaded is what was asked for, as a whole, or an error says in clear words why not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_checkpoint import TOKENIZER, equal, tokenizer
from tiny import batches, tiny
from transformers import AutoModelForCausalLM

from optimum_stat import STATConfig, STATPruner
from optimum_stat.commands import main

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM as Llama
class MineConfig(LlamaConfig):
    model_type = "mine"
class LlamaForCausalLM(Llama):
    config_class = LlamaConfig
class MineForCausalLM(Llama):
    config_class = MineConfig
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.fixture
def code(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model with Python code of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (base / "mine.py").write_text(CODE)
    return base


def test_code_that_bears_the_name_of_a_stock_class_is_used_where_it_may_run(code: Path):
    auto_map = {"AutoModel": "mine.MineForCausalLM", "AutoModelForCausalLM": "mine.LlamaForCausalLM"}
    for own in (auto_map, {name: f"somebody/mine--{entry}" for name, entry in auto_map.items()}):
        change(code, auto_map=own)
        assert type(STATPruner.from_pretrained(code).model).__module__ == "transformers.models.llama.modeling_llama"
        if own is auto_map:  # nobody is asked for the other
            model = STATPruner.from_pretrained(code, trust_remote_code=True).model
            assert (type(model).__module__.split(".")[0], type(model).__name__) == ("transformers_modules", "LlamaForCausalLM")
    change(code, auto_map={"AutoModelForCausalLM": "mine.MineForCausalLM"})
    assert type(STATPruner.from_pretrained(code, trust_remote_code=True).model).__name__ == "MineForCausalLM"
    change(code, auto_map={"AutoModelForCausalLM": "modeling_stat.LlamaForCausalLM"})
    model = STATPruner.from_pretrained(code, trust_remote_code=True).model
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"


def test_a_class_of_its_own_comes_along_and_the_card_says_how_to_load_it(
    code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    change(code, model_type="mine", architectures=["MineForCausalLM"], auto_map=auto_map)
    pruner = STATPruner.from_pretrained(code, STATConfig(keep=0.6), trust_remote_code=True)
    pruner.prune(batches())
    for name in ("small", "again"):  # saving does not change the model
        pruner.save_pretrained(tmp_path / name)
    card = (tmp_path / "again" / "README.md").read_text()
    assert 'model = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)\n' in card
    assert "Its class, MineForCausalLM, is Python code in this repo. Without the package it does not load:" in card
    assert "Without the package: `" not in card
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == auto_map
    assert (tmp_path / "again" / "mine.py").exists()
    assert not (tmp_path / "again" / "modeling_stat.py").exists()
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True), pruner.model)
    data = tmp_path / "data.txt"
    data.write_text("w5 w6 w7 w8 w9\n" * 20)
    main(["evaluate", str(tmp_path / "again"), "-d", str(data), "--trust-remote-code", "--quiet", "--json"])
    assert json.loads(capsys.readouterr().out)["dense"]["name"] == str(code)
    main(["inspect", str(tmp_path / "again"), "--trust-remote-code", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["pruned"], found["dense"]["neurons"]) == (pruner.model.config.stat_pruning, [44, 44])
    main(["inspect", "--dry-run", str(code), "--trust-remote-code", "--json"])
    assert json.loads(capsys.readouterr().out)["model_type"] == "mine"


def without(folder: Path, *names: str) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(names)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_weights_of_blocks_that_are_missing_are_not_made_at_random(base: Path, tmp_path: Path):
    without(base, "model.layers.1.mlp")
    says = r"base lacks 3 weights of the blocks of a LlamaForCausalLM, .* model\.layers\.1\.mlp\.down_proj\.weight first"
    for options in ({}, {"output_loading_info": True}, {"device_map": "auto"}, {"task": "text-classification"}):
        with pytest.raises(
            ValueError, match=says.replace("CausalLM", "SequenceClassification" if "task" in options else "CausalLM")
        ):
            STATPruner.from_pretrained(base, **options)
    tiny("llama").save_pretrained(base)
    with pytest.raises(ValueError, match=r"lacks 6 weights of the blocks .* or has them in other sizes"):
        STATPruner.from_pretrained(base, intermediate_size=40, ignore_mismatched_sizes=True)
    assert STATPruner.from_pretrained(base, output_loading_info=True).tokenizer is not None


def test_a_new_head_is_told(base: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "optimum_stat"):
        for task in (None, "text-classification"):
            STATPruner.from_pretrained(base, task=task)
    assert [record.getMessage() for record in caplog.records if record.name == "optimum_stat.loaded"] == [
        f"{base} lacks score.weight: made at random, and what is computed with them means nothing."
    ]


def test_a_tokenizer_that_cannot_be_read_is_told_and_one_that_is_not_there_is_not(base: Path, caplog: pytest.LogCaptureFixture):
    for broken in ("{ broken", '{"model": {"type": "None"}}', None):
        caplog.clear()
        if broken is None:
            for name in TOKENIZER:
                (base / name).unlink()
        else:
            (base / "tokenizer.json").write_text(broken)
        assert STATPruner.from_pretrained(base).tokenizer is None
        told = [record.getMessage() for record in caplog.records if record.name == "optimum_stat.loaded"]
        assert len(told) == (broken is not None)
        assert all(f"the tokenizer or processor of {base} cannot be read, so there is none: " in each for each in told)


def test_what_is_no_model_is_named(base: Path, tmp_path: Path):
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(OSError, match=f"The weights of {base} cannot be read: .* Their file is damaged, or not all of it"):
        STATPruner.from_pretrained(base)
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=f"The weights of {base} were not loaded: device_map='meta' leaves them out"):
        STATPruner.from_pretrained(base, device_map="meta")
    with pytest.raises(ValueError, match=f"model {base}/config.json asked, which is a file: name the folder"):
        STATPruner.from_pretrained(base / "config.json")
    with pytest.raises(FileNotFoundError, match=f"model {base}/no.gguf asked, but there is no such file"):
        STATPruner.from_pretrained(base / "no.gguf")


@pytest.mark.parametrize("damage", ["", "{}", "[]", "\xff", '{"metadata": {}, "weight_map": {}}'])
def test_an_index_of_shards_that_is_none_is_named(damage: str, base: Path):
    model = tiny("llama")
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="8KB")
    assert STATPruner.from_pretrained(base).model.num_parameters() == model.num_parameters()
    (base / "model.safetensors.index.json").write_text(damage, "latin-1")
    with pytest.raises(
        OSError, match=rf"The weights of {base} cannot be read: model\.safetensors\.index\.json is damaged, or not"
    ):
        STATPruner.from_pretrained(base)


def test_a_folder_of_adapters(base: Path):
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/base", "peft_type": "LORA"}))
    (base / "model.safetensors").unlink()
    for _ in range(2):  # with the base model's config.json, and without
        with pytest.raises(
            ValueError, match=f"{base} has adapters for another model, and no weights of its own: merge them first"
        ):
            STATPruner.from_pretrained(base)
        (base / "config.json").unlink(missing_ok=True)
