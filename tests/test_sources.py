"""Where a model comes from is found again: at its revision, from another folder, in a GGUF file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_checkpoint import tokenizer
from tiny import HEADS, HIDDEN, KEY_VALUE_HEADS, LAYERS, NEURONS, VOCAB, batches, tiny

from optimum_stat import STATConfig, STATPruner
from optimum_stat.commands import main
from optimum_stat.inspection import sizes
from optimum_stat.run_plan import plan_run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def gguf_file(path: Path) -> None:
    """Of a random Llama without a tokenizer."""
    gguf = pytest.importorskip("gguf")
    writer, model = gguf.GGUFWriter(str(path), "llama"), tiny("llama").state_dict()
    for write, value in (
        *((writer.add_block_count, LAYERS), (writer.add_context_length, 64), (writer.add_embedding_length, HIDDEN)),
        *((writer.add_feed_forward_length, NEURONS), (writer.add_head_count, HEADS), (writer.add_vocab_size, VOCAB)),
        *((writer.add_head_count_kv, KEY_VALUE_HEADS), (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_rope_freq_base, 1e4)),
    ):
        write(value)
    of_block = {"self_attn.": "attn_", "o_proj": "output", "mlp.": "ffn_", "input_layernorm": "attn_norm", "_proj": ""}
    names = {"model.layers": "blk", "post_attention_layernorm": "ffn_norm", **of_block}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in model.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gguf_file(tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    for name in ("model.gguf", "./model.gguf", str(tmp_path / "model.gguf")):
        pruner = STATPruner.from_pretrained(name, STATConfig(keep=0.6))
        assert pruner.source == str(tmp_path / "model.gguf")
    assert plan_run("model.gguf").model_type == "llama"
    with pytest.raises(ValueError, match=r"model\.gguf has no stat_pruning: it was not pruned by optimum-stat"):
        sizes("model.gguf")
    main(["inspect", "--dry-run", "model.gguf", "--quiet"])
    pruner.prune(batches())
    pruner.save_pretrained("small")
    assert json.loads(Path("small/stat_recipe.json").read_text())["base_model"] == str(tmp_path / "model.gguf")


def test_a_folder_is_found_again_from_elsewhere(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """Also where another model has its name, and where it is a folder in a folder."""
    data = tmp_path / "data.txt"
    data.write_text("w5 w6 w7 w8 w9\n" * 20)
    (tmp_path / "outer").mkdir()
    os.symlink(base, tmp_path / "outer" / "inner")
    tiny("llama", seed=7).save_pretrained(tmp_path / "elsewhere" / "base")
    asked = {"base": {}, "outer": {"subfolder": "inner"}}
    for name, options in asked.items():
        monkeypatch.chdir(tmp_path)
        pruner = STATPruner.from_pretrained(name, STATConfig(keep=0.6), **options)
        pruner.prune(batches())
        monkeypatch.chdir(tmp_path / "elsewhere")
        pruner.save_pretrained(tmp_path / f"{name} small")
        recipe = json.loads((tmp_path / f"{name} small" / "stat_recipe.json").read_text())
        assert (recipe["base_model"], recipe.get("base_subfolder")) == (str(tmp_path / name), options.get("subfolder"))
        assert f"`./{name}`, pruned" in (tmp_path / f"{name} small" / "README.md").read_text()
        main(["evaluate", str(tmp_path / f"{name} small"), "-d", str(data), "--quiet", "--json"])
        dense = json.loads(capsys.readouterr().out)["dense"]
        assert dense["name"] == str(tmp_path / name)
        assert dense["size_on_disk"] == (base / "model.safetensors").stat().st_size
    pushed = tmp_path / "base small" / "stat_recipe.json"
    pushed.write_text(pushed.read_text().replace(str(tmp_path / "base"), "./base"))
    main(["evaluate", str(tmp_path / "base small"), "-d", str(data), "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out[out.index("{") :])["dense"] is None
    assert "was made from ./base, which may lie anywhere, so it is not measured: name it with --dense." in err
    (base / "config.json").write_text("{}")  # transformers raises a ValueError
    main(["evaluate", str(tmp_path / "outer small"), "-d", str(data), "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out[out.index("{") :])["dense"] is None
    assert f"warning: the dense model {tmp_path}/outer cannot be loaded, so it is not measured: Unrecognized model" in err
