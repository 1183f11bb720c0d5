"""Parts of a pruned model alone, wholes around one, and what transformers cannot do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from made import pruned
from tiny import HIDDEN, batches, data_of, outputs, tiny
from transformers import AutoConfig, EncoderDecoderModel

from optimum_stat import STATConfig, STATPruner
from optimum_stat.slicing import slice_model
from optimum_stat.stream import narrow
from optimum_stat.structure import write_record

PARTS = [
    ("t5", "T5EncoderModel", "encoder"),
    ("t5", "AutoModelForTextEncoding", "encoder"),
    ("t5", "AutoModelForTokenClassification", "transformer.encoder"),
    ("bart", "AutoModelForCausalLM", "model.decoder"),
    ("whisper", "AutoModelForCausalLM", "model.decoder"),
]


@pytest.mark.parametrize(("family", "kind", "path"), PARTS)
def test_an_encoder_or_a_decoder_loads_alone_out_of_a_pruned_whole(family: str, kind: str, path: str, tmp_path: Path):
    whole = pruned(family)
    whole.save_pretrained(tmp_path / "whole")
    part = getattr(transformers, kind).from_pretrained(tmp_path / "whole")
    part.save_pretrained(tmp_path / "part")
    stack = whole.base_model.get_submodule(path.rpartition(".")[2])
    wanted = {name: value for name, value in stack.state_dict().items() if not name.startswith("embed_tokens")}
    for found in (part, type(part).from_pretrained(tmp_path / "part")):
        own = found.get_submodule(path).state_dict()
        assert all(torch.equal(own[name], value) for name, value in wanted.items())


@torch.no_grad()
def test_a_decoder_alone_predicts_what_it_does_in_the_whole(tmp_path: Path):
    whole, batch = pruned("whisper"), data_of("whisper")[0]
    whole.save_pretrained(tmp_path)
    alone = transformers.WhisperForCausalLM.from_pretrained(tmp_path)
    heard = whole.get_encoder()(batch["input_features"]).last_hidden_state
    ids = batch["decoder_input_ids"]
    wanted = whole(input_features=batch["input_features"], decoder_input_ids=ids).logits
    assert torch.allclose(alone(input_ids=ids, encoder_outputs=(heard,)).logits, wanted, atol=1e-5)


def test_a_part_with_fewer_blocks_than_recorded_is_refused(tmp_path: Path):
    pruned("t5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="records heads for 2 blocks, but the model has 1"):
        transformers.T5EncoderModel.from_pretrained(tmp_path, num_layers=1)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_as_the_decoder_of_another_encoder_its_new_heads_are_dense(family: str, tmp_path: Path):
    model = pruned(family, seed=1)
    model.save_pretrained(tmp_path / "decoder")
    tiny("bert").save_pretrained(tmp_path / "encoder")
    both = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder")
    own = both.decoder.base_model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in model.base_model.state_dict().items() if name in own)
    crossing = [value for name, value in own.items() if "crossattention" in name and name.endswith("c_proj.weight")]
    crossing += [value for name, value in own.items() if "crossattention" in name and name.endswith("self.query.weight")]
    assert [value.shape for value in crossing] == [(HIDDEN, HIDDEN)] * 2
    both.save_pretrained(tmp_path / "both")
    again, batch = EncoderDecoderModel.from_pretrained(tmp_path / "both"), batches()[0]
    batch = {"input_ids": batch["input_ids"], "decoder_input_ids": batch["input_ids"]}
    assert torch.equal(outputs(again, batch), outputs(both, batch))


def narrowed(family: str, folder: Path) -> Path:
    model = tiny(family)
    narrow(model, torch.arange(24))
    write_record(model)
    model.save_pretrained(folder)
    return folder


def test_a_narrower_stream_does_not_load_where_something_else_reads_it(tmp_path: Path):
    bert, llama = narrowed("bert", tmp_path / "bert"), narrowed("llama", tmp_path / "llama")
    start = "cannot be loaded from this model, whose residual stream has 24 of its 32 dimensions: "
    with pytest.raises(ValueError, match=f"A BertForPreTraining {start}BertForPreTraining has several heads, .* was pruned as"):
        transformers.AutoModelForPreTraining.from_pretrained(bert)
    with pytest.raises(ValueError, match=f"A BertModel {start}It has attention that reads an encoder"):
        EncoderDecoderModel.from_encoder_decoder_pretrained(bert, bert)
    vision = transformers.CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    both = transformers.LlavaConfig(text_config=AutoConfig.from_pretrained(llama), vision_config=vision)
    with pytest.raises(ValueError, match="LlavaModel cannot be built around this 'llama', whose residual stream has 24 of 32"):
        transformers.LlavaForConditionalGeneration(both)


def test_a_decoder_without_its_encoder_is_not_pruned(tmp_path: Path):
    pruned("whisper", whole=True).save_pretrained(tmp_path)
    for model in (tiny("bart", "CausalLM"), transformers.WhisperForCausalLM.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="has attention that reads an encoder, but no encoder: prune the whole"):
            STATPruner(model, STATConfig())


def continuously(model: Any) -> list[int]:
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=1)
    (found,) = model.generate_batch(inputs=[[5, 6, 7]], generation_config=config).values()
    return found.generated_tokens


def test_continuous_batching_is_refused_where_its_cache_would_not_fit(tmp_path: Path):
    model = tiny("llama")
    slice_model(model, {"0.neurons": torch.arange(16)})
    write_record(model)
    wanted = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert continuously(model) == wanted[0, 3:].tolist()
    slice_model(model, {"1.heads": torch.arange(1)})
    write_record(model)
    model.save_pretrained(tmp_path)
    for each in (model, type(model).from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"Continuous batching .* has lost some"):
            continuously(each)
