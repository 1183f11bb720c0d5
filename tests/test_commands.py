"""The commands, as a user calls them: mostly in this process, a few as the installed scripts."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, NamedSplit
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetLMHeadModel,
)

from optimum_stat import STATConfig, command_options
from optimum_stat.commands import main
from optimum_stat.config import PruningConfig
from optimum_stat.methods import METHODS
from optimum_stat.slicing import slice_model

pytestmark = pytest.mark.pictures

BIN = Path(sys.executable).parent
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = ["First", "Citizen", "All", "Speak", "we", "are", "to", "die", "rather", "than", "you", "know", "the", "people", "him"]


def save(model: Any, folder: Path) -> str:
    for parameter in model.parameters():  # far enough from zero for pruning to change something
        parameter.data += 0.2 * torch.randn_like(parameter)
    own = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *WORDS])}, unk_token="[UNK]")
    )
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny dense models: a BERT classifier, a bare BERT, a Llama, and a family that is not known."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("dense")
    config = BertConfig(vocab_size=30, max_position_embeddings=64, **SIZES)
    llama = LlamaConfig(vocab_size=30, num_key_value_heads=2, max_position_embeddings=64, **SIZES)
    xlnet = XLNetConfig(vocab_size=30, d_model=16, d_inner=16, n_layer=1, n_head=2)
    return {
        "classifier": save(BertForSequenceClassification(config), home / "classifier"),
        "encoder": save(BertModel(config), home / "encoder"),
        "llama": save(LlamaForCausalLM(llama), home / "llama"),
        "xlnet": save(XLNetLMHeadModel(xlnet), home / "xlnet"),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same labelled sentences in every kind of file."""
    home = tmp_path_factory.mktemp("data")
    rows = {"sentence": [" ".join(WORDS[i % 7 : 9 + i % 11]) for i in range(40)], "label": [i % 2 for i in range(40)]}
    dataset = Dataset.from_dict(rows)
    dataset.to_json(home / "data.jsonl")
    dataset.to_json(home / "array.json", lines=False)
    dataset.to_csv(home / "data.csv")
    dataset.to_parquet(home / "data.parquet")
    dataset.save_to_disk(home / "folder")
    (home / "data.txt").write_text("\n".join(rows["sentence"]) + "\n")
    return {path.name: str(path) for path in home.iterdir()}


@pytest.fixture(scope="module")
def pruned(folders: dict[str, str], data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pruned models, each from its command."""
    home, found = tmp_path_factory.mktemp("pruned"), {}
    for name in ("classifier", "encoder", "llama"):
        found[name] = str(home / name)
        main(["prune", found[name], "-m", folders[name], "-d", data["data.jsonl"], "--keep", "0.6", "--quiet"])
    return found


def fails(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    """The last line on standard error of a command that ends with `code` and prints no result."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.rstrip().rpartition("\n")[2]


def shell(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_options_are_those_of_the_configurations() -> None:
    for method in METHODS:
        fields = {field.name: field for field in (*command_options.shared_fields(), *command_options.methods()[method.method])}
        wanted = {field.name: str(field.default) for field in dataclasses.fields(method.config_class)}
        assert {name: field.default.replace("_", "") for name, field in fields.items()} == wanted
        assert all(field.doc.endswith((".", ")")) or field.doc for field in fields.values())
    assert list(command_options.methods()) == sorted(method.method for method in METHODS)


def test_both_scripts_show_every_option_without_importing_torch() -> None:
    shown = [shell(BIN / "optimum-cli", "stat", "prune", "-h"), shell(BIN / "optimum-stat", "prune", "-h")]
    for done in shown:
        assert done.returncode == 0, done.stderr
        assert all(field.name.replace("_", "-") in done.stdout for field in dataclasses.fields(PruningConfig))
        assert "Share of the blocks' cost that stays" in done.stdout
    code = "import sys, optimum_stat.commands as c; c.main(['--help'])"
    done = shell(sys.executable, "-X", "importtime", "-c", code)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "optimum_stat.commands" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "numpy"}


def test_prune_through_optimum_cli(folders: dict[str, str], data: dict[str, str], tmp_path: Path) -> None:
    command = ("stat", "prune", "-m", folders["llama"], "-d", data["data.txt"], "--keep", "0.5", "--json", str(tmp_path / "out"))
    done = shell(BIN / "optimum-cli", *command)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert 0.3 < values["report"]["reached"] <= 0.5
    assert values["report"]["data"] == "data.txt, split train, columns text"
    load = shell(sys.executable, "-c", values["load"] + "; print(model.config.stat_pruning['format'])")
    assert load.stdout == "1\n", load.stderr
    full = shell(BIN / "optimum-cli", *command)
    assert full.returncode == 1
    assert full.stderr.startswith("error: ")
    assert full.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl", "array.json", "data.csv", "data.parquet", "folder"])
def test_every_kind_of_file_is_the_same_data(
    name: str, folders: dict[str, str], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--keep", "0.7", "--json", "--quiet", "--max-examples", "20", "--metric", "stream"]
    main(["prune", str(tmp_path / "out"), "-m", folders["encoder"], "-d", data[name], *arguments])
    out, err = capsys.readouterr()
    report = json.loads(out)["report"]
    assert err == ""
    assert report["num_examples"] == 20
    assert report["data"].startswith(f"{name}, split train" if name != "folder" else name)
    tokens = sum(2 + len(" ".join(WORDS[i % 7 : 9 + i % 11]).split()) for i in range(20))
    assert report["num_tokens"] == tokens


def test_a_saved_dataset_has_one_split(data: dict[str, str], tmp_path: Path) -> None:
    from optimum_stat import command_data

    def load(split: str | None, config: str | None = None, streaming: bool = False) -> Any:
        return command_data.load(data["folder"], config, split, streaming=streaming, for_evaluation=True)

    whole = load(None)["sentence"]
    assert [list(load(split)["sentence"]) for split in ("train", "train[:10]", "train[50%:]")] == [
        list(whole),
        list(whole[:10]),
        list(whole[20:]),
    ]
    assert [row["sentence"] for row in load("train[3:5]", streaming=True)] == whole[3:5]
    for split in ("validation", "train+train", "train[a"):
        with pytest.raises(ValueError, match=re.escape(f"--split {split} asked, but {data['folder']} holds train alone")):
            load(split)
    Dataset.from_dict({"text": ["a", "b", "c"]}, split=NamedSplit("train[:3]")).save_to_disk(tmp_path / "slice")
    found = command_data.load(str(tmp_path / "slice"), None, "train[1:]", streaming=False, for_evaluation=False)
    assert list(found["text"]) == ["b", "c"]
    with pytest.raises(ValueError, match="--dataset-config german asked"):
        load(None, "german")
    with pytest.raises(ValueError, match="--dataset-config german asked"):
        command_data.load(data["data.csv"], "german", None, streaming=False, for_evaluation=False)


def test_options_reach_the_configuration(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--paper", "--keep", "0.75", "--budget", "params", "--num-tokens", "700", "--seq-len", "32", "--batch-size", "3"]
    main(["prune", str(tmp_path / "out"), "-m", folders["encoder"], "--dtype", "float64", *options])
    out, err = capsys.readouterr()
    recipe = json.loads((tmp_path / "out" / "stat_recipe.json").read_text())
    paper = STATConfig.paper().to_dict()
    changed = {"keep": 0.75, "budget": "params", "num_tokens": 700, "seq_len": 32, "batch_size": 3}
    assert recipe["config"] == {**paper, **changed}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float64"
    assert "note: no --dataset" in err
    assert "from transformers import BertModel" in out
    assert "1.neurons" in out
    assert recipe["base_model"] == folders["encoder"]


def test_the_bundled_text_is_split_between_pruning_and_evaluation() -> None:
    from optimum_stat import command_data

    calibration, held_out = (
        command_data.load(None, None, None, streaming=False, for_evaluation=flag)["text"] for flag in (False, True)
    )
    whole = (Path(command_data.__file__).parent / "shakespeare.txt").read_text()
    assert "\n".join([*calibration, *held_out]).strip() == whole.strip()
    assert 0.05 < len(held_out) / len(calibration) < 0.2


def test_evaluate_puts_the_dense_model_beside_and_saves(
    folders: dict[str, str], data: dict[str, str], pruned: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", pruned["classifier"], "-d", data["data.csv"], "--json", "--quiet", "--save"]
    for _ in range(2):  # the second time replaces the first
        main(command)
    capsys.readouterr()
    main(command)
    found = json.loads(capsys.readouterr().out)
    main(["evaluate", folders["classifier"], "-d", data["data.csv"], "--json", "--quiet"])
    alone = json.loads(capsys.readouterr().out)
    assert alone["dense"] is None
    assert found["dense"]["name"] == folders["classifier"]
    assert [m["dense"] for m in found["metrics"]] == [m["value"] for m in alone["metrics"]]
    assert [m["name"] for m in found["metrics"]] == ["accuracy", "f1"]
    assert found["dense"]["parameters"] == alone["pruned"]["parameters"] > found["pruned"]["parameters"]
    weights = Path(pruned["classifier"]) / "model.safetensors"
    assert found["pruned"]["size_on_disk"] == weights.stat().st_size < found["dense"]["size_on_disk"]
    recipe = json.loads((Path(pruned["classifier"]) / "stat_recipe.json").read_text())
    assert recipe["metrics"] == found["metrics"]
    accuracy = found["metrics"][0]
    row = f"| accuracy | data.csv, split train | {accuracy['dense']} | {accuracy['value']} |"
    assert row in (Path(pruned["classifier"]) / "README.md").read_text()


def test_evaluate_times_both_models_and_writes_it_into_the_card(
    data: dict[str, str],
    pruned: dict[str, str],
    folders: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("optimum_stat.speed.SECONDS", 0.1)
    main(["evaluate", pruned["classifier"], "-d", data["data.csv"], "--json", "--quiet", "--save", "--speed", "1,3"])
    found = json.loads(capsys.readouterr().out)["speed"]
    assert [(row["phase"], row["batch_size"]) for row in found] == [("prefill", 1), ("prefill", 3)]
    recipe = json.loads((Path(pruned["classifier"]) / "stat_recipe.json").read_text())
    assert recipe["speed"] == found
    assert found[0]["seq_len"] == recipe["report"]["seq_len"]
    card = (Path(pruned["classifier"]) / "README.md").read_text()
    assert "## Speed" in card
    assert "](pictures/speed.png)" in card
    assert (Path(pruned["classifier"]) / "pictures" / "speed.png").exists()
    with pytest.raises(SystemExit):
        main(["evaluate", folders["classifier"], "-d", data["data.csv"], "--speed", "1"])
    assert "beside its dense model asked, and there is none. Name it with --dense" in capsys.readouterr().err


def test_evaluate_prints_a_table(
    data: dict[str, str], pruned: dict[str, str], folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "evaluate",
            pruned["llama"],
            "-d",
            data["data.txt"],
            "--dense",
            folders["llama"],
            "--seq-len",
            "16",
            "--max-examples",
            "4",
        ]
    )
    rows = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")}
    assert len(rows["perplexity"]) == 3
    assert float(rows["parameters"][2]) < 1
    assert "ms for 16 tokens" in rows


def test_an_encoder_is_compared_with_its_dense_model(
    data: dict[str, str], pruned: dict[str, str], folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["evaluate", pruned["encoder"], "-d", data["data.txt"], "--json", "--quiet"])
    (metric,) = json.loads(capsys.readouterr().out)["metrics"]
    assert metric["name"] == "cosine_with_dense"
    assert 0 < metric["value"] < 1
    main(["evaluate", folders["encoder"], "-d", data["data.txt"], "--dense", folders["encoder"], "--json", "--quiet"])
    assert json.loads(capsys.readouterr().out)["metrics"][0]["value"] == pytest.approx(1, abs=1e-6)
    line = fails(capsys, 1, "evaluate", pruned["encoder"], "-d", data["data.txt"], "--no-dense", "--quiet")
    assert "Name it with --dense" in line


def test_a_dense_model_that_is_gone_is_left_out_with_a_warning(
    folders: dict[str, str], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    os.symlink(folders["llama"], moved)
    main(["prune", str(tmp_path / "out"), "-m", str(moved), "-d", data["data.txt"], "--quiet", "--metric", "stream"])
    moved.unlink()
    main(["evaluate", str(tmp_path / "out"), "-d", data["data.txt"], "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out[out.index("{") :])["dense"] is None
    assert f"warning: the dense model {moved} cannot be loaded" in err
    assert str(moved) in fails(capsys, 1, "evaluate", folders["llama"], "-d", data["data.txt"], "--dense", str(moved))


def test_inspect(pruned: dict[str, str], folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (Path(pruned["llama"]) / "model.safetensors").rename(Path(pruned["llama"]) / "away")  # weights are not read
    try:
        main(["inspect", pruned["llama"], "--json"])
        found = json.loads(capsys.readouterr().out)
        main(["inspect", pruned["llama"]])
        table = capsys.readouterr().out.splitlines()
    finally:
        (Path(pruned["llama"]) / "away").rename(Path(pruned["llama"]) / "model.safetensors")
    record = json.loads((Path(pruned["llama"]) / "config.json").read_text())["stat_pruning"]
    assert found["pruned"] == record
    assert found["dense"] == {"format": 1, "heads": [4, 4], "key_value_heads": [2, 2], "neurons": [48, 48]}
    dense = LlamaForCausalLM.from_pretrained(folders["llama"])
    assert found["block_params"]["dense"] == sum(p.numel() for p in dense.model.layers.parameters())
    small = LlamaForCausalLM.from_pretrained(pruned["llama"])
    assert found["block_params"]["pruned"] == sum(p.numel() for p in small.model.layers.parameters())
    assert (
        table[2].split()
        == f"1 {record['heads'][1]} of 4 {record['key_value_heads'][1]} of 2 {record['neurons'][1]} of 48".split()
    )


def test_a_dry_run_shows_what_could_be_pruned_from_the_config_alone(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((Path(folders["llama"]) / "config.json").read_text())  # no weights at all
    main(["inspect", str(tmp_path), "--dry-run", "--json"])
    found = json.loads(capsys.readouterr().out)
    main(["inspect", str(tmp_path), "--dry-run"])
    table = capsys.readouterr().out.splitlines()
    model = LlamaForCausalLM.from_pretrained(folders["llama"])
    everything = sum(p.numel() for p in model.model.layers.parameters())
    assert (found["model_type"], found["params"]) == ("llama", everything)
    assert [(group["name"], group["units"], group["fewest"]) for group in found["groups"]] == [
        ("0.heads", 2, 1),
        ("0.neurons", 48, 8),
        ("0.pairs", 8, 4),
        ("0.values", 16, 8),
        ("1.heads", 2, 1),
        ("1.neurons", 48, 8),
        ("1.pairs", 8, 4),
        ("1.values", 16, 8),
    ]
    usual = [group for group in found["groups"] if group["structure"] in ("heads", "neurons")]
    for group in usual:
        smaller = LlamaForCausalLM.from_pretrained(folders["llama"])
        slice_model(smaller, {group["name"]: torch.arange(1, group["units"])})
        assert group["params"] == everything - sum(p.numel() for p in smaller.model.layers.parameters())
    slice_model(model, {group["name"]: torch.arange(group["fewest"]) for group in usual})
    left = sum(p.numel() for p in model.model.layers.parameters())
    assert found["smallest"]["params"] == pytest.approx(left / everything, abs=1e-12)
    assert table[2].split()[:4] == ["0-1", "heads", "2", "1"]
    assert table[3].split()[:4] == ["0-1", "neurons", "48", "8"]
    assert table[-2].startswith(f"smallest: {left / everything:.2%} of the params, ")
    assert table[-1].startswith("with values too: ")


def test_a_dry_run_of_what_is_not_known_says_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    XLNetConfig(vocab_size=9, d_model=8, d_inner=8, n_layer=1, n_head=2).save_pretrained(tmp_path)
    assert "no list of blocks with attention was found" in fails(capsys, 1, "inspect", str(tmp_path), "--dry-run")


def test_inspect_refuses_a_dense_model(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "no stat_pruning" in fails(capsys, 1, "inspect", folders["llama"])


def test_autoload_status(capsys: pytest.CaptureFixture[str]) -> None:
    main(["autoload", "status"])
    assert capsys.readouterr().out.startswith(("on", "off"))
    assert "invalid choice: 'maybe'" in fails(capsys, 2, "autoload", "maybe")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--keep", "0"], 2, "error: keep=0.0 asked"),
        (["--keep", "half"], 2, "argument --keep: invalid float value: 'half'"),
        (["--metric", "magic"], 2, "error: metric='magic' asked"),
        (["--num-tokens", "1e5"], 2, "argument --num-tokens: '1e5' asked; it must be a whole number, or none."),
        (["--ridge", "small"], 2, "argument --ridge: 'small' asked; it must be a number, or none."),
        (["--structure", "2:4"], 2, "error: --structure is no option of method stat, but of surgeon."),
        (["--method", "magic"], 2, "argument --method: invalid choice: 'magic'"),
        (["--private"], 2, "error: --private asked without --push-to-hub."),
        (["-d", "nothing.jsonl"], 1, "error: --dataset nothing.jsonl asked, but there is no such file"),
        (["-d", "./nothing"], 1, "error: --dataset ./nothing asked, but there is no such file"),
        (["-d", __file__], 1, "of unknown kind '.py'; known are .txt, .jsonl"),
        (
            ["-d", "data.csv", "--text-columns", "words"],
            1,
            "there is no column 'words'. Columns: sentence (large_string), label (int64).",
        ),
        (["-d", "data.csv", "--split", "test"], 1, "test"),
        (["-m", "./no/such/model"], 1, "error: model ./no/such/model asked, but there is no such folder."),
        (["--device", "abacus"], 1, "error: --device abacus asked"),
        (["--task", "magic"], 1, "error: task='magic' asked"),
        (["--keep", "0.001"], 1, "error: keep=0.001"),
        (["--teacher", "them"], 2, "error: --teacher is no option of method stat, which does not train."),
        (["--method", "movement", "--resume"], 2, "--resume asked, but there is nowhere to resume from: --training-args"),
        (["--method", "movement", "--training-args", "speed=9"], 2, "transformers.TrainingArguments has no speed."),
        (["--method", "movement", "--training-args", "help=1"], 2, "transformers.TrainingArguments has no help."),
        (["--method", "movement", "--training-args", "max_steps"], 2, "--training-args max_steps asked; it takes NAME=VALUE"),
        (["--method", "movement", "--training-args", "max_steps=few"], 2, "--training-args: argument --max_steps"),
        (["--method", "movement", "--eval-split", "test"], 2, "--eval-split asked without --dataset"),
        (["--method", "movement", "-d", "data.csv"], 1, "error: Labels are needed: BertModel has no head"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str],
    code: int,
    says: str,
    folders: dict[str, str],
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [data.get(argument, argument) for argument in arguments]
    line = fails(capsys, code, "prune", str(tmp_path / "out"), "-m", folders["encoder"], "--max-examples", "9", *given)
    assert says in line
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_trains(
    folders: dict[str, str], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With Trainer's arguments, a teacher, an evaluation, and again from its last checkpoint: the same model."""
    checkpoints, found = tmp_path / "checkpoints", []
    for resume in ([], ["--resume"]):
        asked = ["--method", "movement", "--keep", "0.6", "--batch-size", "8", "--teacher", folders["classifier"]]
        training = ["--training-args", "max_steps=9", "save_steps=4", "learning_rate=1e-3", f"output_dir={checkpoints}", *resume]
        data_options = ["-d", data["data.csv"], "--eval-split", "train"]
        out = tmp_path / f"out{len(found)}"
        main(["prune", str(out), "-m", folders["classifier"], *asked, *data_options, *training, "--quiet", "--json"])
        report = json.loads(capsys.readouterr().out)["report"]
        assert report["method"] == "movement"
        assert 0.4 < report["reached"] <= 0.6
        assert "accuracy" in (out / "README.md").read_text()
        found.append((out / "model.safetensors").read_bytes())
        assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-4", "checkpoint-8", "checkpoint-9", "stat_run.json"}
        shutil.rmtree(checkpoints / "checkpoint-9")
    assert found[0] == found[1]


def test_what_is_no_progress_of_a_run_is_left_alone(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.resume").mkdir()
    (tmp_path / "out.resume" / "mine").touch()
    for resume in ([], ["--resume"]):
        line = fails(capsys, 1, "prune", str(tmp_path / "out"), "-m", folders["llama"], *resume)
        assert "out.resume is in the way" in line
    assert (tmp_path / "out.resume" / "mine").exists()


def test_only_what_was_left_half_written_is_deleted(folders: dict[str, str], tmp_path: Path) -> None:
    """Beside the folder, and in it; whose name is no pattern."""
    own = [".m[1]-12345678.half-written", "m[1]/.m[1]-90abcdef.half-written"]
    others = [".m[1]-original", ".m[1]-backup01", ".m1-12345678.half-written"]
    for name in (*own, *others):
        (tmp_path / name / "deep").mkdir(parents=True)
    main(["prune", str(tmp_path / "m[1]"), "-m", folders["encoder"], "--quiet", "--resume"])
    assert {path.name for path in tmp_path.iterdir()} == {"m[1]", *others}
    assert all((tmp_path / name / "deep").is_dir() for name in others)
    assert not list((tmp_path / "m[1]").glob(".*"))


def test_progress_behind_a_link_goes_and_the_user_s_folder_stays(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "out.resume").symlink_to("big disk")
    main(["prune", str(tmp_path / "out"), "-m", folders["encoder"], "--quiet", "--resume"])
    assert {path.name for path in tmp_path.iterdir()} == {"out", "big disk"}
    assert not list((tmp_path / "big disk").iterdir())


def test_a_folder_in_a_place_of_others(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It can be filled, and beside it nothing can be written down."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, *_: Path(path) != tmp_path)
    main(["prune", str(tmp_path / "out"), "-m", folders["encoder"]])
    assert f"{tmp_path / 'out.resume'} cannot be made, so this run cannot be resumed" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be made" in fails(capsys, 1, "prune", str(tmp_path / "new"), "-m", folders["encoder"])


def test_a_method_that_trains_into_the_folder_at_hand(
    folders: dict[str, str],
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["-d", data["data.csv"], "--method", "movement", "--keep", "0.6", "--training-args", "max_steps=2"]
    main(["prune", ".", "-m", folders["classifier"], *asked, "--quiet", "--json"])
    assert json.loads(capsys.readouterr().out)["report"]["method"] == "movement"
    assert (tmp_path / "model.safetensors").is_file()


def test_checkpoints_do_not_go_where_the_model_will_stand(
    folders: dict[str, str], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for where in ("out", "out/checkpoints"):
        asked = ["-d", data["data.csv"], "--training-args", f"output_dir={tmp_path / where}"]
        line = fails(capsys, 2, "prune", str(tmp_path / "out"), "-m", folders["classifier"], "--method", "movement", *asked)
        assert "name another for checkpoints" in line
    assert list(tmp_path.iterdir()) == []


def test_unknown_families_are_refused(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, 1, "prune", str(tmp_path / "out"), "-m", folders["xlnet"])
    assert "error: optimum-stat cannot prune 'xlnet' models" in line


def test_a_full_folder_is_refused_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    line = fails(capsys, 1, "prune", str(tmp_path / "out"), "-m", "./there/is/no/model")
    assert f"{tmp_path / 'out'} exists and is not an empty folder" in line
    assert "cannot be made" in fails(capsys, 1, "prune", str(tmp_path / "out" / "mine" / "deep"), "-m", "./no/model")
    (tmp_path / "loop").symlink_to("loop")
    assert "is not an empty folder" in fails(capsys, 1, "prune", str(tmp_path / "loop"), "-m", "./no/model")
    assert "cannot be made" in fails(capsys, 1, "prune", str(tmp_path / "loop" / "deep"), "-m", "./no/model")


def test_files_that_cannot_be_written_are_refused_before_the_work(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for where in (tmp_path, tmp_path / "no" / "file"):
        assert "no file can be written there" in fails(capsys, 2, "profile", folders["encoder"], "-o", str(where))
        assert "no file can be written there" in fails(capsys, 2, "report", str(tmp_path), "--html", str(where))


def test_a_place_that_leads_up_again(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["prune", str(tmp_path / "not" / "there" / ".." / ".." / "out"), "-m", folders["encoder"], "--quiet"])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert f"saved in {(tmp_path / 'out').resolve()}" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_mistake(pruned: dict[str, str]) -> None:
    command = f"{shlex.quote(str(BIN))}/optimum-stat inspect {shlex.quote(pruned['llama'])} | true"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert "BrokenPipe" not in found.stderr


def test_a_result_that_cannot_be_printed_is_told(pruned: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(
            [BIN / "optimum-stat", "inspect", pruned["llama"], "--quiet"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert found.returncode == 1
    assert found.stderr == "error: All is done, but the result cannot be printed: [Errno 28] No space left on device\n"


def test_what_a_terminal_cannot_show_is_escaped(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "größe").symlink_to(folders["llama"])
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    main(["inspect", "--dry-run", str(tmp_path / "größe")])
    assert b"gr\\xf6\\xdfe (llama): blocks of" in shown.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "why"), [("a" * 231, "a name can have 230 bytes"), ("gr\udcf6sse", "no name in UTF-8")])
def test_names_that_cannot_be_written_are_refused(
    name: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["prune", str(tmp_path / name), "-m", "none"])
    assert caught.value.code == 2
    assert why in capsys.readouterr().err


def test_the_longest_name(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ("a" * 230)).mkdir()
    for name in ("a" * 230, "b" * 230):
        main(["prune", str(tmp_path / name), "-m", folders["encoder"], "--quiet", "--max-examples", "20"])
        assert (tmp_path / name / "model.safetensors").exists()


def test_a_place_where_datasets_cannot_write_is_named(
    folders: dict[str, str],
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    line = fails(capsys, 1, "prune", str(tmp_path / "out"), "-m", folders["llama"], "-d", data["data.txt"])
    assert f"`datasets` keeps a copy in {tmp_path / 'file' / 'cache'}, and cannot write there" in line


def test_without_a_head_and_a_dense_model_nothing_is_measured(
    folders: dict[str, str],
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where a dense model is named and gone; and speed beside one that is gone."""
    base, out = shutil.copytree(folders["encoder"], tmp_path / "base"), str(tmp_path / "out")
    main(["prune", out, "-m", str(base), "--quiet", "--max-examples", "20"])
    shutil.rmtree(base)
    capsys.readouterr()
    monkeypatch.setattr("optimum_stat.comparison.measure", lambda *_: pytest.fail("it was measured"))
    for more in (["--no-dense"], []):
        line = fails(capsys, 1, "evaluate", out, "-d", data["data.txt"], *more)
        assert "has no head: what is measured is how close its embeddings are" in line
    assert "there is none. Name it with --dense" in fails(capsys, 1, "evaluate", out, "-d", data["data.txt"], "--speed", "1")


def test_a_model_in_a_subfolder(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was pruned from one is measured beside it; the card names neither the folder nor what is in it."""
    (tmp_path / "outer").mkdir()
    shutil.copytree(folders["llama"], tmp_path / "outer" / "inner")
    few = ["--quiet", "--max-examples", "20"]
    main(["prune", str(tmp_path / "small" / "own"), "-m", str(tmp_path / "outer"), "--subfolder", "inner", *few])
    assert "--model MODEL --dataset" in (tmp_path / "small" / "own" / "README.md").read_text()
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "small"), "--subfolder", "own", "--save", "--json", *few])
    assert json.loads(capsys.readouterr().out)["dense"]["name"] == str(tmp_path / "outer")
    assert json.loads((tmp_path / "small" / "own" / "stat_recipe.json").read_text())["metrics"]


def test_a_family_without_a_head_is_measured_by_its_embeddings(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--quiet", "--json", "--max-examples", "20"]
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join([" ".join(WORDS)] * 30))
    main(
        [
            "sweep",
            str(tmp_path / "out"),
            "-m",
            folders["encoder"],
            "-d",
            str(rows),
            "--keep",
            "0.9,0.5",
            "--eval-dataset",
            str(rows),
            *few,
        ]
    )
    found = json.loads(capsys.readouterr().out)
    assert found["metric"] == "cosine_with_dense"
    assert found["dense_metrics"] == {"cosine_with_dense": 1.0}
    assert [0.5 < size["metrics"]["cosine_with_dense"] <= 1 for size in found["sizes"]] == [True, True]
    assert "cosine_with_dense" in (tmp_path / "out" / "0.5" / "README.md").read_text()


def test_one_of_several_processes_measures(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a sweep the others cut; of other commands they do nothing at all, and the main one waits for nobody."""
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join([" ".join(WORDS)] * 30))
    few, evaluate = ["--quiet", "--max-examples", "20"], ["evaluate", folders["llama"], "-d", str(rows), "--no-dense", "--quiet"]
    with monkeypatch.context() as patch:
        waits = SimpleNamespace(as_main=lambda work: None)
        patch.setattr("optimum_stat.family.Processes", SimpleNamespace(launched=lambda: waits))
        patch.setattr("optimum_stat.family.measure", lambda *_: pytest.fail("it was measured"))
        main(
            [
                "sweep",
                str(tmp_path / "out"),
                "-m",
                folders["llama"],
                "-d",
                str(rows),
                "--keep",
                "0.9",
                "--eval-dataset",
                str(rows),
                *few,
            ]
        )
        assert not json.loads((tmp_path / "out" / "0.9" / "stat_recipe.json").read_text())["metrics"]
    for name, value in (
        ("WORLD_SIZE", "2"),
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "9"),
    ):
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    main(evaluate)
    assert "perplexity" in capsys.readouterr().out
    assert os.environ["WORLD_SIZE"] == "2"
    monkeypatch.setattr("optimum_stat.command_base.MAIN", False)
    main(evaluate)
    assert capsys.readouterr() == ("", "")


def test_files_without_sense_are_refused(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("empty.txt", ""), ("blank.txt", "\n\n"), ("broken.json", '{"text": "a'), ("empty.jsonl", "")):
        (tmp_path / name).write_text(text)
        line = fails(capsys, 1, "prune", str(tmp_path / "out"), "-m", folders["encoder"], "-d", str(tmp_path / name))
        assert line.startswith("error: "), name
        assert name in line or "dataset" in line.lower(), line


def test_pushing_without_a_token_fails_before_the_work(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    line = fails(capsys, 1, "prune", str(tmp_path / "out"), "-m", folders["encoder"], "--push-to-hub", "me/it")
    assert "needs a token" in line
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_what_it_cannot_do(
    folders: dict[str, str], data: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("evaluate", folders["classifier"])
    assert "No label column" in fails(capsys, 1, *command, "-d", data["data.txt"])
    assert "No label column" in fails(capsys, 1, *command)
    assert "mood" in fails(capsys, 1, *command, "-d", data["data.csv"], "--label-column", "mood")
    assert "stat_recipe.json" in fails(capsys, 2, *command, "-d", data["data.csv"], "--save")
    assert "batch_size=0" in fails(capsys, 2, *command, "-d", data["data.csv"], "--batch-size", "0")


def test_debug_shows_the_traceback(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot prune 'xlnet'"):
        main(["prune", str(tmp_path / "out"), "-m", folders["xlnet"], "--debug"])


@pytest.mark.timeout(90)
def test_ctrl_c_leaves_what_is_finished(data: dict[str, str], tmp_path: Path) -> None:
    slow = GPT2Config(vocab_size=30, n_embd=128, n_layer=16, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=3)
    model = save(GPT2LMHeadModel(slow), tmp_path / "model")
    home = tmp_path / "home"
    home.mkdir()
    command = [BIN / "optimum-stat", "prune", str(home / "out"), "-m", model, "--metric", "stream", "--num-tokens", "30000"]
    environ = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts behind an `&` ignores it
    )
    try:
        assert process.stderr is not None
        seen = b""
        while b"Measuring" not in seen:
            piece = os.read(process.stderr.fileno(), 4096)
            assert piece, seen.decode()
            seen += piece
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err.decode()
    assert out == b""
    assert err.decode().endswith("interrupted\n")
    assert [path.name for path in home.iterdir()] == ["out.resume"], "what is finished, for --resume"


def test_sweep_writes_every_size_and_a_table(folders: dict[str, str], data: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "family"
    main(
        [
            "sweep",
            "-m",
            folders["llama"],
            "-d",
            data["data.jsonl"],
            "--keep",
            "0.9,0.6",
            "--round-to",
            "1",
            "--quiet",
            "--json",
            str(out),
        ]
    )
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "sweep.json").read_text())
    assert [size["keep"] for size in found["sizes"]] == [0.9, 0.6]
    for size in found["sizes"]:
        folder = out / str(size["keep"])
        assert LlamaForCausalLM.from_pretrained(folder).num_parameters() == size["cost"]["params"]
        assert (folder / "model.safetensors").stat().st_size == size["weight_bytes"] < found["dense_bytes"]
        assert "## Family" not in (folder / "README.md").read_text()
    assert found["sizes"][0]["error"] < found["sizes"][1]["error"]


def test_sweep_measures_every_size_beside_the_dense_model(
    folders: dict[str, str], data: dict[str, str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimum_stat.speed.SECONDS", 0.1)
    out, start = tmp_path / "family", ["sweep", "-m", folders["classifier"], "-d", data["data.csv"], "--round-to", "1", "--quiet"]
    main([*start, "--keep", "0.9,0.6", "--eval-dataset", data["data.csv"], str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-6:] == ["accuracy", "f1", "ms", "of", "dense", "front"]
    assert [line.split()[0] for line in lines[1:4]] == ["dense", "0.9", "0.6"]
    found = json.loads((out / "sweep.json").read_text())
    main(["evaluate", folders["classifier"], "-d", data["data.csv"], "--json", "--quiet"])
    alone = json.loads(capsys.readouterr().out)["metrics"]
    assert found["dense_metrics"] == {metric["name"]: metric["value"] for metric in alone}
    for size in found["sizes"]:
        recipe = json.loads((out / str(size["keep"]) / "stat_recipe.json").read_text())
        assert recipe["family"] == found
        assert {metric["name"]: metric["value"] for metric in recipe["metrics"]} == size["metrics"]
        assert recipe["speed"] == [size["speed"]]
        card = (out / str(size["keep"]) / "README.md").read_text()
        assert f"| **{size['keep']}** | {size['cost']['params']:,} |" in card
        assert "](pictures/pareto.png)" in card
    for wrong, said in (
        (["--eval-split", "test"], "evaluation asked without OUTPUT"),
        (["--keep", "0.9", "--eval-dataset", "none.csv", str(tmp_path / "new")], "none.csv"),
    ):
        with pytest.raises(SystemExit):
            main([*start, *wrong])
        assert said in capsys.readouterr().err


def test_sweep_without_output_cuts_nothing(folders: dict[str, str], data: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    main(["sweep", "-m", folders["llama"], "-d", data["data.jsonl"], "--round-to", "1", "--quiet"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "keep"
    assert len(lines) > 5
    assert not list(tmp_path.iterdir())


def test_sweep_refuses_what_it_cannot_do(folders: dict[str, str], data: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    start = ["sweep", "-d", data["data.jsonl"], "-m", folders["llama"]]
    measured = ["-m", folders["classifier"], "--eval-dataset", data["data.jsonl"], "--keep", "0.8,0.6", str(tmp_path / "out")]
    for wrong, code, says in (
        ([*measured, "--serve-phase", "decode", "--budget", "macs"], 1, "BertForSequenceClassification, which keeps no keys"),
        ([str(tmp_path / "out")], 2, "OUTPUT asked without --keep"),
        (["--keep", "half"], 2, "shares with commas"),
        (["--keep", "0.5,2"], 1, "must be a list of shares in (0, 1], not 2.0"),
        (["--method", "vib"], 2, "--method vib asked, which trains towards one size"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*start, *wrong])
        assert stopped.value.code == code
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
