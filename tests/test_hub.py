"""Pushing: what is refused before any work, what is replaced, what does not leave this machine, what a failure leaves."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Commit, HubServer, Repo
from test_checkpoint import client, run_client, tokenizer
from tiny import tiny

from optimum_stat import MovementConfig, MovementPruner
from optimum_stat.hub import _reason

START = """
import torch
from test_checkpoint import pruner_of
torch.set_num_threads(1)
pruner, found = pruner_of("llama"), {}

def attempt(name, **options):
    try:
        found[name] = pruner.push_to_hub("user/" + name, **options)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"

"""
REFUSED = """
attempt("typo", privat=True)
attempt("token", token=" hf_of_the_test_user\\n")
attempt("split", token="hf_SECRET hf_SECRET")
attempt("foreign", token="hf_SECRETé")
attempt("empty", token=" ")
attempt("nobody", token=False)
attempt("no name")
attempt("é")
attempt("public", private=True)
try:
    pruner.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="user/saved")
except Exception as error:
    found["saved"] = f"{type(error).__name__}: {error}"
import resource
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
attempt("full")
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


def test_what_is_refused_makes_no_repo(server: HubServer, tmp_path: Path):
    server.repos["user/public"] = Repo("user/public", False, [Commit("seed", {})])
    found = client(server, START + REFUSED, tmp_path / "home", tmp_path / "saved")
    assert "/commit/" in found["token"]  # with blanks around it
    assert not [said for said in found.values() if "SECRET" in said]
    says = {
        "typo": "TypeError: push_to_hub has no option privat; it has private, token, commit_message, ",
        "split": "ValueError: Pushing to user/split needs a token, and what was given has characters in it that none has.",
        "foreign": "ValueError: Pushing to user/foreign needs a token, and what was given has characters in it that none has.",
        "empty": "ValueError: Pushing to user/empty needs a token: ",
        "nobody": "ValueError: Pushing to user/nobody needs a token: ",
        "no name": "HFValidationError: Repo id must ",
        "é": "HFValidationError: Repo id must ",
        "public": "ValueError: user/public exists and is public; private=True asked, so nothing was pushed to it.",
        "saved": "ValueError: save_pretrained(push_to_hub=True) asked; push with push_to_hub(repo_id).",
        "full": "OSError: [Errno 27] Nothing was pushed to user/full, and the model in memory is unharmed: ",
    }
    assert {name: found[name][: len(begin)] for name, begin in says.items()} == says
    assert not (tmp_path / "saved").exists()
    assert not {"user/typo", "user/full", "user/saved"} & server.repos.keys()
    assert server.commits("user/public") == ["seed"]


def test_a_token_that_can_only_read_is_told_before_the_work(tmp_path: Path):
    with HubServer(role="read") as hub:
        found = client(hub, START + 'attempt("read")\nprint(json.dumps(found))', tmp_path)
        assert found["read"] == "ValueError: Pushing to user/read needs a token that can write, and this one can only read."
        assert not hub.repos


OF_TOKENIZERS = ["chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "processor_config.json"]
STALE = [
    *("model.bf16.safetensors", "model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.fp16.json"),
    *OF_TOKENIZERS,
]
MINE = [
    *("onnx/model.safetensors", "model.onnx/a.safetensors", "my_model.safetensors", "model.safetensors.md", "old/vocab.txt"),
    *("vocab.txt.gz", "tokenizer_notes.json"),
]


def test_an_adapter_goes_with_the_other_weights_and_a_new_branch_is_made(server: HubServer, tmp_path: Path):
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"", "notes.txt": b"mine"}
    for name in ("adapter", "branch", "bare"):
        server.repos[f"user/{name}"] = Repo(
            f"user/{name}", False, [Commit("seed", {**adapter, **dict.fromkeys([*STALE, *MINE], b"")})]
        )
    code = 'attempt("adapter")\nattempt("branch", revision="small")\nattempt("branch", revision="small", variant="fp16")\n'
    code += 'pruner.tokenizer = None\nattempt("bare")\n'
    found = client(server, START + code + "print(json.dumps(found))", tmp_path)
    assert "/commit/" in found["adapter"]
    assert "/commit/" in found["branch"]
    branch = server.repos["user/branch"]
    assert server.commits("user/branch") == ["seed"]
    assert len(branch.branches["small"]) == 3
    assert "model.fp16.safetensors" in branch.at("small").files
    for files in (server.files("user/adapter"), branch.at("small").files):
        assert "stat_recipe.json" in files
        assert [name for name in files if name in adapter] == ["notes.txt"]
        assert [name for name in [*STALE, *MINE] if name in files] == MINE
    left = [name for name in [*STALE, *MINE] if name in server.files("user/bare")]
    assert left == [*OF_TOKENIZERS, *MINE]  # no others came in their place


def test_a_commit_that_arrived_without_an_answer_is_told(server: HubServer, tmp_path: Path):
    server.commit_answers = {"user/lost": b"", "user/odd": b"{}", "user/page": b"<html>"}
    found = client(server, START + 'for each in ("lost", "odd", "page"):\n    attempt(each)\nprint(json.dumps(found))', tmp_path)
    for name, why in (("lost", ""), ("odd", "KeyError: 'commitUrl'"), ("page", "JSONDecodeError")):
        said = found[name]
        assert said.startswith(f"ConnectionError: Pushing to user/{name} at {server.endpoint} failed: {why}")
        assert f"But the repo has a new commit, {server.repos[f'user/{name}'].at().sha}: " in said
        assert "as it was before" not in said


SILENT = """
from optimum_stat import STATPruner, hub
from optimum_stat.inspection import config_of
hub.SILENCE = 0.5
attempt("late")
attempt("mute")
found["config"] = config_of("user/mute", None).model_type
found["model"] = type(STATPruner.from_pretrained("user/mute", tokenizer=pruner.tokenizer).model).__name__
print(json.dumps(found))
"""


def test_a_hub_that_says_nothing_is_not_waited_for_for_ever(server: HubServer, tmp_path: Path):
    tiny("llama").save_pretrained(tmp_path / "mute")
    files = {path.name: path.read_bytes() for path in (tmp_path / "mute").iterdir()}
    server.repos["user/mute"] = Repo("user/mute", False, [Commit("seed", files)])
    server.silent_at = ("user/late/commit", "/api/models/user/mute")
    try:
        found = client(server, START + SILENT, tmp_path / "home")
    finally:
        server.silent_at = ()
    for name in ("late", "mute"):
        assert found[name].startswith(
            f"ConnectionError: Pushing to user/{name} at {server.endpoint} failed: timed out. The repo is as"
        )
    assert (found["config"], found["model"]) == ("llama", "LlamaForCausalLM")
    assert server.commits("user/late") == ["initial commit"]


def test_why_a_large_file_could_not_be_stored_is_told_without_the_signature_of_its_address():
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = OSError("Client error '403 Forbidden' for url 'https://store/a?X-Signature=SECRET'\nmore")
    wanted = "RuntimeError: Error while uploading 'model.safetensors' to the Hub: Client error '403 Forbidden' for url 'https://store/a'"
    assert _reason(error) == f"{wanted}\nmore"
    again = OSError("no room")
    again.__cause__ = OSError("no room")
    assert _reason(again) == "no room"


RECIPES = """
from huggingface_hub import constants
from optimum_stat.comparison import base_model
found = [base_model("user/" + name, None) for name in ("damaged-recipe", "no-recipe", "no-repo")]
constants.HF_HUB_OFFLINE = True
print(json.dumps([*found, base_model("user/no-recipe", None)]))
"""


def test_a_recipe_that_cannot_be_read_is_told(server: HubServer, tmp_path: Path):
    server.repos["user/damaged-recipe"] = Repo("user/damaged-recipe", False, [Commit("seed", {"stat_recipe.json": b"<html>"})])
    server.repos["user/no-recipe"] = Repo("user/no-recipe", False, [Commit("seed", {})])
    done = run_client(server, RECIPES, tmp_path)
    assert json.loads(done.stdout) == [None] * 4
    told = [line.split()[2] for line in done.stderr.splitlines() if line.startswith("stat_recipe.json of ")]
    assert told == ["user/damaged-recipe", "user/no-recipe"]  # there may be one, which offline nobody can tell


def test_where_models_lie_on_this_machine_is_not_published(server: HubServer, tmp_path: Path):
    """The card of a saved folder does not tell either; its recipe has the base model's folder, which `evaluate` reads."""
    home = tmp_path / "SECRET" / "dense"
    tiny("bert", "SequenceClassification").save_pretrained(home)
    tokenizer().save_pretrained(home)
    code = """
from test_checkpoint import tokenizer
from test_hub import trained
pruner = trained(sys.argv[1])
pruner.save_pretrained(sys.argv[2])
print(json.dumps(pruner.push_to_hub("user/trained")))
"""
    client(server, code, tmp_path / "home", home, tmp_path / "saved")
    files = server.files("user/trained")
    assert [name for name, content in files.items() if b"SECRET" in content] == []
    recipe = json.loads(files["stat_recipe.json"])
    assert (recipe["base_model"], recipe["report"]["training"]["teacher"]) == ("./dense", "./dense")
    assert b"`./dense`, pruned" in files["README.md"]
    assert b"- Teacher: ./dense" in files["README.md"]
    kept = {path.name: path.read_text("utf-8", "replace") for path in (tmp_path / "saved").iterdir() if path.is_file()}
    assert [name for name, content in kept.items() if "SECRET" in content] == ["stat_recipe.json"]
    assert json.loads(kept["stat_recipe.json"])["base_model"] == str(home)
    assert kept["stat_recipe.json"].count("SECRET") == 1


def test_the_licence_of_a_base_model_on_the_hub(server: HubServer, tmp_path: Path):
    """At the commit that the model is of; a licence that is a file of the repo is linked there. What cannot be read is told."""
    said = {"license": "other", "license_name": "ours", "license_link": "./LICENSE", "language": ["en", "de"]}
    cards = [f"---\n{json.dumps(each)}\n---\n".encode() for each in ({"license": "mit", "datasets": ["imdb"]}, said)]
    repo = Repo("user/licensed", False, [Commit(str(at), {"README.md": card}) for at, card in enumerate(cards)])
    odd = {"norsk": b"language: no", "both": b"language:\n- no\n- en", "damaged": b"license: ["}
    server.repos |= {"user/licensed": repo, "user/nothing": Repo("user/nothing", False, [Commit("seed", {})])}
    for name, text in odd.items():
        server.repos[f"user/{name}"] = Repo(f"user/{name}", True, [Commit("seed", {"README.md": b"---\n" + text + b"\n---\n"})])
    code = """
import os
from optimum_stat.base_card import inherited
from optimum_stat.sources import Source
names = ("licensed", "licensed/m.gguf", "nothing", "missing", "norsk", "both", "damaged")
found = [inherited(Source("user/" + name)) for name in names]
found += [inherited(Source("user/licensed", sys.argv[1]))]
access = {"token": os.environ.pop("HF_TOKEN"), "cache_dir": sys.argv[2]}
found += [inherited(Source("user/norsk", access=each)) for each in (access, {"cache_dir": sys.argv[3]})]
print(json.dumps(found))
"""
    done = run_client(server, code, tmp_path, repo.history[0].sha, tmp_path / "cache", tmp_path / "other")
    now = said | {"license_link": f"{server.endpoint}/user/licensed/blob/main/LICENSE"}
    norsk = {"language": "no"}
    assert json.loads(done.stdout) == [now, now, {}, {}, norsk, {"language": ["no", "en"]}, {}, {"license": "mit"}, norsk, {}]
    assert (tmp_path / "cache" / "models--user--norsk").exists()
    told = [line.split()[3] for line in done.stderr.splitlines() if "cannot be read, so its licence and languages" in line]
    assert told == ["user/missing", "user/damaged", "user/norsk"]


BASE = """
import os
from test_checkpoint import batches
from optimum_stat import STATConfig, STATPruner, plots
from optimum_stat.commands import main
plots.available = lambda: False
private = {"token": os.environ.pop("HF_TOKEN"), "cache_dir": sys.argv[2]}
asked = {"tag": ("user/base", {"revision": "v1"}), "sub": ("user/sub", {"subfolder": "inner"})}
asked["closed"] = ("user/closed", private)
for name, (model, options) in asked.items():
    pruner = STATPruner.from_pretrained(model, STATConfig(keep=0.6), **options)
    pruner.prune(batches())
    pruner.save_pretrained(sys.argv[1] + name)
how = ["-d", sys.argv[3], "--json"]
for name in ("tag", "sub", "closed"):
    main(["evaluate", sys.argv[1] + name, *how, "--quiet"])
main(["evaluate", sys.argv[4], *how, "--quiet"])
"""


def test_a_base_model_is_measured_at_the_revision_and_in_the_folder_it_was_read_from(server: HubServer, tmp_path: Path):
    for seed, name in enumerate(("main", "v1")):
        tiny("llama", seed=seed).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "data.txt").write_text("w5 w6 w7 w8 w9\n" * 20)
    files = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("main", "v1")}
    card = {"README.md": b"---\nlicense: mit\n---\n"}
    inner = {f"inner/{name}": content for name, content in files["v1"].items()}
    tagged = {"v1": [Commit("seed", files["v1"])]}
    server.repos |= {
        "user/base": Repo("user/base", False, [Commit("seed", files["main"])], tagged),
        "user/sub": Repo("user/sub", False, [Commit("seed", inner)]),
        "user/closed": Repo("user/closed", True, [Commit("seed", files["v1"] | card)]),
    }
    arguments = (f"{tmp_path}/", tmp_path / "cache", tmp_path / "data.txt", tmp_path / "v1")
    done = run_client(server, BASE, tmp_path / "home", *arguments)
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := done.stdout.find("{", at)) >= 0:
        value, at = decoder.raw_decode(done.stdout, at)
        found.append(value)
    assert len(found) == 4, done.stderr
    wanted = found[3]["pruned"]
    for each in found[:2]:
        assert (each["metrics"][0]["dense"], each["dense"]["parameters"]) == (
            found[3]["metrics"][0]["value"],
            wanted["parameters"],
        )
        assert each["dense"]["size_on_disk"] == wanted["size_on_disk"]
    assert found[2]["dense"] is None  # closed to those without the token
    recipes = {name: json.loads((tmp_path / name / "stat_recipe.json").read_text()) for name in ("tag", "sub", "closed")}
    at = {name: server.repos[f"user/{name}"].at().sha for name in ("sub", "closed")} | {"tag": tagged["v1"][0].sha}
    assert {name: recipe["base_revision"] for name, recipe in recipes.items()} == at
    assert recipes["sub"]["base_subfolder"] == "inner"
    assert recipes["closed"]["base_card"] == {"license": "mit"}
    assert not [name for name in recipes if server.token in (tmp_path / name / "stat_recipe.json").read_text()]
    assert f"--model user/base --revision {tagged['v1'][0].sha} --dataset" in (tmp_path / "tag" / "README.md").read_text()
    assert f"--model user/sub --revision {at['sub']} --subfolder inner --dataset" in (tmp_path / "sub" / "README.md").read_text()


def trained(folder: str) -> Any:
    rows = [{"text": f"w{i % 9 + 2} w{i % 5 + 2} w{i % 7 + 2}", "label": i % 2} for i in range(24)]
    pruner = MovementPruner.from_pretrained(folder, MovementConfig(keep=0.6))
    pruner.prune(rows, training_args={"max_steps": 2}, teacher=folder)
    return pruner


COMMANDS = """
import os
from huggingface_hub import constants
from optimum_stat.commands import main

def run(*argv):
    try:
        main(["prune", *argv, "-m", sys.argv[1], "--keep", "0.6", "--quiet"])
    except SystemExit as end:
        return end.code

os.chdir(sys.argv[2])
codes = [run("my model", "--push-to-hub"), run("out", "--push-to-hub", "a/b/c")]
codes.append(run("out", "--push-to-hub", "public", "--private"))
constants.HF_HUB_OFFLINE = True
codes.append(run("out", "--push-to-hub"))
constants.HF_HUB_OFFLINE = False
os.environ["HF_TOKEN"] = "hf_wrong"
codes.append(run("out", "--push-to-hub"))
print(json.dumps([codes, os.listdir()]))
"""


def test_the_command_asks_the_hub_before_the_work(server: HubServer, tmp_path: Path):
    server.repos["user/public"] = Repo("user/public", False, [Commit("seed", {})])
    (tmp_path / "at").mkdir()
    done = run_client(server, COMMANDS, tmp_path / "home", "user/nothing", tmp_path / "at")
    assert json.loads(done.stdout.splitlines()[-1]) == [[1] * 5, []]
    says = (
        "'my model' is OUTPUT's name; --push-to-hub takes another. Nothing was done.",
        "Repo id must be in the form 'repo_name' or 'namespace/repo_name': 'a/b/c'",
        "user/public exists and is public; private=True asked, so nothing was pushed to it. Nothing was done.",
        "offline mode is enabled",
        "Invalid user token.",
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [part in line for part, line in zip(says, lines, strict=True)] == [True] * 5, lines


@pytest.mark.parametrize("method", ["stat", "movement"])
def test_a_push_that_fails_after_the_work_says_how_to_push_what_is_saved(server: HubServer, tmp_path: Path, method: str):
    home, out, name = tmp_path / "SECRET" / "dense", tmp_path / "out", f"user/{method}"
    tiny("bert", "SequenceClassification").save_pretrained(home)
    tokenizer().save_pretrained(home)
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"w{i % 9 + 2} w{i % 5 + 2} w3,{i % 2}\n" for i in range(24)))
    training = ["--training-args", "max_steps=2"] if method == "movement" else []
    asked = ["-m", str(home), "-d", str(tmp_path / "data.csv"), "--keep", "0.6", "--method", method, *training]
    argv = ["prune", str(out), "--push-to-hub", name, "--private", *asked]
    code = "from optimum_stat.commands import main\nmain(sys.argv[1:])"
    server.fail_commits = True
    try:
        done = run_client(server, code, tmp_path / "home", *argv)
    finally:
        server.fail_commits = False
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert f"Pushing to {name} at {server.endpoint} failed: " in line
    assert "save_pretrained" not in line
    command = shlex.split(line.partition("The model is saved: `")[2].partition("` pushes it")[0])
    assert command == ["optimum-cli", "stat", "push", str(out), name, "--private"]
    cli = Path(sys.executable).parent / command[0]
    subprocess.run([cli, *command[1:]], env=server.client_env(tmp_path / "home"), check=True, capture_output=True)
    files = server.files(name)
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert [each for each, content in files.items() if b"SECRET" in content] == []
    assert server.is_private(name)
    if method == "stat":  # it wrote down what it had finished, so the same command can go on, too
        del server.repos[name]
        again = run_client(server, code, tmp_path / "home", *argv, "--resume")
        assert f"pushed: {server.endpoint}/{name}/commit/" in again.stdout, again.stderr
        assert server.files(name) == files
