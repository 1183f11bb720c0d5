"""The model card: everything a reader needs, rendered from the recipe and nothing else."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from tiny import ROWS, batches, tiny

from optimum_stat import (
    FisherConfig,
    MovementConfig,
    STATConfig,
    STATPruner,
    SurgeonConfig,
    VIBConfig,
    command_options,
    plots,
)
from optimum_stat.card import Paper, render, write
from optimum_stat.commands import PruneCommand
from optimum_stat.methods import METHODS

pytestmark = pytest.mark.pictures

CARDS = Path(__file__).parent.parent / "model_cards"
PAPERS = {pruner.method: pruner.paper for pruner in METHODS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that claims to come from the Hub and was measured twice."""
    root = tmp_path_factory.mktemp("card")
    pruner = STATPruner.from_pretrained(tiny("llama", "SequenceClassification"), STATConfig(keep=0.6, budget="macs"))
    pruner.source = "user/dense-llama"
    pruner.prune(batches())
    pruner.metrics = [
        {"name": "accuracy", "dataset": "SST-2 validation", "value": 0.9125, "dense": 0.9243},
        {"name": "f1", "dataset": "MRPC", "value": 0.875, "dense": None},
    ]
    pruner.save_pretrained(root / "llama-small")
    return root / "llama-small"


def recipe_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stat_recipe.json").read_text())


def test_the_metadata_is_what_the_hub_reads(folder: Path):
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "user/dense-llama"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-classification"
    assert {"optimum", "optimum-stat", "pruned", "structured-pruning", "stat"} == set(data["tags"])
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results == {("SST-2 validation", "accuracy"): 0.9125, ("MRPC", "f1"): 0.875}
    assert data["model-index"][0]["name"] == "llama-small"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("license: apache-2.0\nlanguage: en\ntags: [mine]", {"license": "apache-2.0", "language": "en"}),
        ("license: other\nlicense_name: ours\nlicense_link: LICENSE", {"license": "other", "license_name": "ours"}),
        ("license: [", {}),
    ],
)
def test_licence_and_languages_are_those_of_the_base_model(tmp_path: Path, said: str, kept: dict[str, str]):
    tiny("bert", "SequenceClassification").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(f"---\n{said}\n---\n# Dense\n")
    pruner = STATPruner.from_pretrained(tmp_path / "dense", STATConfig(keep=0.6))
    pruner.prune(batches())
    pruner.save_pretrained(tmp_path / "once")
    again = STATPruner.from_pretrained(tmp_path / "once", STATConfig(keep=0.9))
    again.prune(batches())
    again.save_pretrained(tmp_path / "twice")
    for folder in ("once", "twice"):
        data = ModelCard.load(tmp_path / folder / "README.md").data.to_dict()
        assert {name: data[name] for name in ("license", "license_name", "license_link", "language") if name in data} == kept
        assert "mine" not in data["tags"]


def test_the_text_says_what_was_asked_and_reached_and_how(folder: Path):
    recipe = recipe_of(folder)
    report, card = recipe["report"], (folder / "README.md").read_text()
    for part in (
        "# llama-small\n",
        "[user/dense-llama](https://huggingface.co/user/dense-llama), pruned",
        f"Asked: 60.0% of the blocks' macs. Reached: {report['reached']:.2%}.",
        f"| parameters | {report['dense']['params']:,} | {report['pruned']['params']:,} |",
        "| accuracy | SST-2 validation | 0.9243 | 0.9125 |",
        "| f1 | MRPC |  | 0.875 |",
        'AutoModelForSequenceClassification.from_pretrained("llama-small")',
        'AutoModelForSequenceClassification.from_pretrained("llama-small", trust_remote_code=True)',
        "[STAT: Shrinking Transformers After Training](https://arxiv.org/abs/2406.00061)",
        f"{report['data']}; 6 examples, 48 tokens, SHA-256 of the tokens `{report['fingerprint'][:16]}`",
        "optimum-cli stat prune --method stat --model user/dense-llama --dataset DATASET --keep 0.6 --budget macs",
        "eprint = {2406.00061}",
        "![The share of its heads and neurons that each block keeps](pictures/kept.png)",
        "](pictures/errors.png)",
        f"on {recipe['environment']['device']}",
        "Energy was not measured.",
        f"Python {recipe['environment']['python']}",
        f"transformers {recipe['versions']['transformers']}",
    ):
        assert part in card, part
    assert "{{" not in card
    assert "None" not in card


def test_the_sizes_are_those_of_the_record(folder: Path):
    record = recipe_of(folder)["record"]
    card = (folder / "README.md").read_text()
    assert "| block | key/value heads kept | neurons kept |" in card
    for block, (heads, neurons) in enumerate(zip(record["key_value_heads"], record["neurons"], strict=True)):
        assert f"| {block} | {heads} of 2 | {neurons} of 44 |\n" in card


def test_the_commands_in_the_card_are_the_commands_that_there_are(folder: Path):
    """Every option in the line that reproduces the run is one that the command knows."""
    parser = argparse.ArgumentParser()
    PruneCommand.parse_args(parser)
    line = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("optimum-cli stat prune "))
    asked = parser.parse_args(line.split()[3:])
    assert (asked.keep, asked.budget, str(asked.output)) == (0.6, "macs", "OUTPUT")


@pytest.mark.parametrize(
    "config",
    [
        STATConfig(keep=0.6, ridge=0.1, structures=("heads", "neurons", "values")),
        STATConfig.paper(),
        FisherConfig(keep=0.7, budget="latency", serve_compiled=True, tune=False),
        FisherConfig.paper(),
        SurgeonConfig.paper(structure="2:4"),
        MovementConfig(variant="hybrid", regularization=3.0),
        MovementConfig.paper(),
        VIBConfig.faster(keep=0.4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_command_in_the_card_asks_for_the_same_configuration(folder: Path, config: Any):
    """Also where a switch is off that is on by default."""
    (method,) = (pruner for pruner in METHODS if pruner.config_class is type(config))
    recipe = recipe_of(folder) | {"method": method.method, "config": config.to_dict()}
    recipe["report"]["training"] = {"teacher": "user/large", "arguments": {"max_steps": 9}}
    (line,) = re.findall(r"^optimum-cli stat prune (.*)$", render(recipe, "me/small", method.paper), flags=re.M)
    parser = argparse.ArgumentParser()
    PruneCommand.parse_args(parser)
    asked = parser.parse_args(line.split())
    assert dataclasses.replace(type(config)(), **command_options.given_config(asked)) == config
    assert (asked.method, asked.teacher, asked.training_args) == (method.method, "user/large", ["max_steps=9"])


@pytest.mark.parametrize(
    ("family", "head", "auto", "task"),
    [
        ("bert", "", "AutoModel", "feature-extraction"),
        ("bert", "MaskedLM", "AutoModelForMaskedLM", "fill-mask"),
        ("roberta", "QuestionAnswering", "AutoModelForQuestionAnswering", "question-answering"),
        ("electra", "TokenClassification", "AutoModelForTokenClassification", "token-classification"),
        ("gpt2", "CausalLM", "AutoModelForCausalLM", "text-generation"),
        ("bart", "Seq2SeqLM", "AutoModelForSeq2SeqLM", "text2text-generation"),
        ("whisper", "SpeechSeq2Seq", "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
        ("wav2vec2", "CTC", "AutoModelForCTC", "automatic-speech-recognition"),
        ("clip", "", "AutoModelForZeroShotImageClassification", "zero-shot-image-classification"),
        ("clip_text_model", "", "AutoModel", "feature-extraction"),
    ],
)
def test_every_head_is_loaded_by_its_own_class(folder: Path, family: str, head: str, auto: str, task: str):
    recipe = recipe_of(folder) | {"architecture": type(tiny(family, head)).__name__, "base_model": None, "metrics": []}
    card = render(recipe, "me/small", PAPERS["stat"])
    assert f'\nmodel = {auto}.from_pretrained("me/small")\n' in card
    assert f"A {recipe['architecture']}, pruned" in card
    assert ModelCard(card).data.pipeline_tag == task
    assert "## Measured" not in card
    assert "base_model" not in ModelCard(card).data.to_dict()


@pytest.mark.parametrize("family", ROWS)
def test_what_a_card_loads_with_makes_the_model(folder: Path, family: str):
    model = tiny(family)
    recipe = recipe_of(folder) | {"architecture": type(model).__name__}
    (auto,) = re.findall(r"\nmodel = (\w+)\.from_pretrained", render(recipe, "me/small", PAPERS["stat"]))
    with torch.device("meta"):
        assert type(getattr(transformers, auto).from_config(model.config)) is type(model)


@pytest.mark.parametrize(
    ("name", "loaded_by"),
    [
        ("T5EncoderModel", "AutoModelForTextEncoding"),
        ("Wav2Vec2ForAudioFrameClassification", "AutoModelForAudioFrameClassification"),
        ("T5ForTokenClassification", "AutoModelForTokenClassification"),
        ("WhisperForCausalLM", "AutoModelForCausalLM"),
        ("Dinov2Backbone", "Dinov2Backbone"),
        ("ModelOfTheirOwn", "AutoModel"),
    ],
)
def test_rare_heads_are_loaded_by_what_there_is(folder: Path, name: str, loaded_by: str):
    card = render(recipe_of(folder) | {"architecture": name}, "me/small", PAPERS["stat"])
    assert f"\nmodel = {loaded_by}.from_pretrained(" in card


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/me/models/bert", "./bert"),
        ("./bert", "./bert"),
        ("../models/bert", "./bert"),
        ("~/models/my bert", "./my bert"),
        ("my bert", "./my bert"),
        (r"C:\Users\me\bert", "./bert"),
        ("/home/me/model.gguf", "./model.gguf"),
        ("a/b/model.gguf", "a/b/model.gguf"),
    ],
)
def test_a_folder_is_no_base_model_and_no_link_and_only_its_name_is_shown(folder: Path, source: str, shown: str):
    card = render(recipe_of(folder) | {"base_model": source}, "small", PAPERS["stat"])
    assert f"`{shown}`, pruned" in card
    assert "huggingface.co" not in card
    assert "base_model" not in ModelCard(card).data.to_dict()


def test_a_folder_named_like_a_hub_id_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny("bert").save_pretrained(tmp_path / "models" / "bert")
    monkeypatch.chdir(tmp_path)
    assert STATPruner.from_pretrained("models/bert").source == str(tmp_path / "models" / "bert")


def test_text_from_outside_is_not_run_as_a_template(folder: Path):
    recipe = recipe_of(folder)
    recipe["report"]["data"] = "{{ 7 * 6 }} {% raw %}"
    card = render(recipe, "small", PAPERS["stat"])
    assert "{{ 7 * 6 }} {% raw %}; 6 examples" in card


def test_what_is_not_exact_is_said(tmp_path: Path):
    pruner = STATPruner.from_pretrained(tiny("olmo2"), STATConfig(keep=0.6, metric="stream"))
    pruner.prune(batches())
    assert {group.name for group in pruner.report.groups if group.note} == {"0.heads", "1.heads"}
    said = "not exact for heads: queries and keys are divided by the root mean square of all heads"
    pruner.save_pretrained(tmp_path / "pruned")
    fewer_heads = any(group.note and group.kept < group.units for group in pruner.report.groups)
    assert fewer_heads
    assert str(pruner.report).count(said) == 1
    assert (tmp_path / "pruned" / "README.md").read_text().count(said.capitalize()[:9] + said[9:]) == 1


def test_the_citation_is_complete():
    paper = Paper("ABC: A Method", "Jane Doe, John Roe", 2031, "3101.00001")
    assert paper.url == "https://arxiv.org/abs/3101.00001"
    for part in ("@misc{abc2031,", "author = {Jane Doe and John Roe}", "title = {ABC: A Method}", "year = {2031}"):
        assert part in paper.bibtex


def edited_cards(cards: Path) -> Iterator[str]:
    """Folders whose README.md is not what their recipe.json renders to."""
    for folder in sorted(path for path in cards.iterdir() if path.is_dir()):
        recipe = json.loads((folder / "recipe.json").read_text())
        card = (folder / "README.md").read_text()
        name = (
            ModelCard(card).data.to_dict().get("model-index", [{}])[0].get("name") or card.partition("\n# ")[2].partition("\n")[0]
        )
        names = [name] + [line.split('"')[1] for line in card.splitlines() if line.startswith("model = ")]
        lying = [name for name in plots.drawings(recipe) if (folder / "pictures" / f"{name}.png").exists()]
        if all(render(copy.deepcopy(recipe), each, PAPERS[recipe["method"]], lying) != card for each in names):
            yield folder.name


def test_the_cards_in_the_repository_are_rendered_not_written():
    assert list(edited_cards(CARDS)) == []


def test_every_method_has_cards_of_both_models():
    names = {folder.name for folder in CARDS.iterdir() if folder.is_dir()}
    assert names == {f"{model}-{method}" for model in ("minilm-sst2", "smollm2-135m") for method in PAPERS}
    for folder in sorted(CARDS / name for name in names):
        recipe = json.loads((folder / "recipe.json").read_text())
        assert folder.name.endswith(recipe["method"])
        assert recipe["metrics"]
        assert len(recipe["speed"]) >= 2


@pytest.mark.parametrize("folder", sorted(path for path in CARDS.iterdir() if path.is_dir()), ids=lambda path: path.name)
def test_the_pictures_in_the_repository_are_drawn_from_their_recipes(folder: Path):
    from PIL import Image

    pytest.importorskip("matplotlib")
    drawn = plots.pictures(json.loads((folder / "recipe.json").read_text()))
    assert set(drawn) == {path.name for path in (folder / "pictures").iterdir()}
    for name, content in drawn.items():
        found, wanted = (
            np.asarray(Image.open(each).convert("RGBA"), float) for each in (folder / "pictures" / name, io.BytesIO(content))
        )
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).mean() < 2, name  # another matplotlib sets text a little otherwise


def test_an_edited_card_is_noticed(folder: Path, tmp_path: Path):
    (tmp_path / "one").mkdir()
    shutil.copy(folder / "stat_recipe.json", tmp_path / "one" / "recipe.json")
    shutil.copy(folder / "README.md", tmp_path / "one")
    shutil.copytree(folder / "pictures", tmp_path / "one" / "pictures")
    assert list(edited_cards(tmp_path)) == []
    card = (tmp_path / "one" / "README.md").read_text()
    for old, new in (("0.9125", "0.9925"), ("22 of 44", "21 of 44"), ("## Limits", "## No limits"), ("60.0%", "50.0%")):
        if old in card:
            (tmp_path / "one" / "README.md").write_text(card.replace(old, new))
            assert list(edited_cards(tmp_path)) == ["one"]
    recipe = recipe_of(folder)
    recipe["report"]["pruned"]["params"] -= 1
    (tmp_path / "one" / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "one" / "README.md").write_text(card)
    assert list(edited_cards(tmp_path)) == ["one"]


def test_the_card_says_whether_weights_were_trained():
    recipe = json.loads((CARDS / "smollm2-135m-stat" / "recipe.json").read_text())
    text = render(recipe, "me/small", PAPERS["stat"])
    assert "corrected, without retraining." in text
    recipe["config"]["distill_epochs"] = 1
    assert "corrected, and trained for 1 pass over the calibration data." in render(recipe, "me/small", PAPERS["stat"])
    recipe["config"]["distill_epochs"] = 3
    text = render(recipe, "me/small", PAPERS["stat"])
    assert "corrected, and trained for 3 passes over the calibration data." in text
    assert "without retraining" not in text


def test_without_matplotlib_the_card_has_no_pictures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    write(tmp_path, recipe_of(folder), "llama-small", PAPERS["stat"])
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    card = (tmp_path / "README.md").read_text()
    assert "pictures" not in card
    assert "![" not in card
    assert "## Sizes" in card


def test_every_picture_of_a_card_lies_beside_it(folder: Path):
    card = (folder / "README.md").read_text()
    named = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card)
    assert sorted(named) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert len(named) == 2


def test_speed_is_shown_with_its_spread(folder: Path):
    recipe = recipe_of(folder)
    row = {"phase": "decode", "batch_size": 32, "seq_len": 128, "device": "cpu (an abacus, 1 threads), float32, sdpa"}
    spreads = {
        "dense": {"low": 9.0, "median": 10.0, "high": 11.0},
        "pruned": {"low": 4.5, "median": 5.0, "high": 6.0},
        "ratio": {"low": 0.4, "median": 0.5, "high": 0.8},
    }
    recipe["speed"] = [{**row, **spreads, "dense_tokens_per_second": 3200.0, "pruned_tokens_per_second": 6400.0}]
    card = render(recipe, "me/small", PAPERS["stat"], ["speed"])
    assert (
        "| one token each, behind 32 × 128 tokens | 10.00 (9.00 to 11.00) | 5.00 (4.50 to 6.00) | 2.00 (1.25 to 2.50) |" in card
    )
    assert "(1.25 to 2.50) | 3,200 | 6,400 |" in card
    assert "in turn, on cpu (an abacus, 1 threads), float32, sdpa. By its multiply-adds" in card
    assert "](pictures/speed.png)" in card
