"""`push`: a saved model reaches the Hub as a push of the model in memory would, and nothing else of its folder does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Commit, HubServer, Repo
from test_checkpoint import run_client
from test_commands import fails

RUN = """
from pathlib import Path
from optimum_stat.commands import main
from test_checkpoint import pruner_of

folder = Path(sys.argv[1])
pruner_of("llama").save_pretrained(folder, max_shard_size="20KB")
recipe = json.loads((folder / "stat_recipe.json").read_text())
(folder / "stat_recipe.json").write_text(json.dumps(recipe | {"base_model": "/SECRET/dense", "base_subfolder": "SECRET"}))
(folder / ".hidden").mkdir()
(folder / ".hidden" / "token").write_text("SECRET")
(folder / "onnx").mkdir()
(folder / "onnx" / "model.onnx").write_text("mine")
from optimum_stat.recipe_update import enter
enter(folder)
main(["push", str(folder), "--private", "--json"])
main(["push", str(folder), "user/other"])
(folder / "README.md").write_text((folder / "README.md").read_text() + "My own words.")
main(["push", str(folder), "user/edited", "--revision", "v2", "--commit-message", "mine"])

import os
import shutil
enter(folder)  # as it is written
os.symlink(folder, folder.with_name("link"))
main(["push", str(folder.with_name("link"))])
moved = shutil.copytree(folder, folder.with_name("moved"))
os.chdir(moved / "onnx")
main(["push", ".."])
"""


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


def test_a_saved_model_is_pushed_whole(server: HubServer, tmp_path: Path) -> None:
    dense = {"pytorch_model.bin": b"", "model.fp16.safetensors": b"", "notes.md": b"mine"}
    server.repos["user/other"] = Repo("user/other", False, [Commit("seed", dense)])
    folder = tmp_path / "small-one"
    done = run_client(server, RUN, tmp_path / "home", folder)
    assert done.returncode == 0, done.stderr
    url = json.loads(done.stdout.partition("}")[0] + "}")["url"]
    assert url.startswith(f"{server.endpoint}/user/small-one/commit/")
    own, other, edited = (server.files(f"user/{name}") for name in ("small-one", "other", "edited"))
    assert server.is_private("user/small-one")
    assert not server.is_private("user/other")
    for name in ("link", "moved"):  # whatever the folder is called
        files = server.files(f"user/{name}")
        assert f'from_pretrained("user/{name}")' in files["README.md"].decode()
        assert f"# {name}\n" in files["README.md"].decode()
    here = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed = {"README.md", "stat_recipe.json"}
    assert {name: content for name, content in own.items() if name not in {*changed, ".gitattributes"}} == {
        name: content for name, content in here.items() if name not in {*changed, ".hidden/token"}
    }
    assert len([name for name in own if name.endswith(".safetensors")]) > 1
    assert set(other) == (set(own) - {".gitattributes"}) | {"notes.md"}
    for files in (own, other):
        assert not [name for name, content in files.items() if b"SECRET" in content]
    recipe = json.loads(other["stat_recipe.json"])
    assert recipe == {name: value for name, value in json.loads(here["stat_recipe.json"]).items() if name != "base_subfolder"} | {
        "base_model": "./dense"
    }
    assert 'from_pretrained("user/small-one")' in own["README.md"].decode()
    assert 'from_pretrained("user/other")' in other["README.md"].decode()
    assert "# other\n" in other["README.md"].decode()
    branch = server.repos["user/edited"].branches["v2"]
    assert branch[-1].message == "mine"
    assert done.stderr.count("README.md is no longer as it was written") == 1
    assert branch[-1].files["README.md"] == here["README.md"] + b"My own words."
    assert set(edited) == {".gitattributes"}


def test_what_is_not_whole_is_not_pushed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    assert f"{folder} has no stat_recipe.json" in fails(capsys, 1, "push", str(folder), "me/it")
    for name in ("stat_recipe.json", "config.json"):
        (folder / name).write_text("{}")
    assert "lacks weights, without which" in fails(capsys, 1, "push", str(folder), "me/it")
    (folder / "model-00001-of-00002.safetensors").touch()
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    (folder / "config.json").unlink()
    said = fails(capsys, 1, "push", str(folder), "me/it")
    assert "lacks config.json, model-00002-of-00002.safetensors, without which" in said
    index.unlink()
    assert "lacks config.json, the index of its weights, without which" in fails(capsys, 1, "push", str(folder), "me/it")
    for damaged in ("{", "{}", "[]"):
        index.write_text(damaged)
        assert f"{index} is damaged: " in fails(capsys, 1, "push", str(folder), "me/it")
    index.unlink()
    for name in ("model.safetensors", "config.json"):
        (folder / name).touch()
    assert "stat_recipe.json is damaged: it has no method, base_model" in fails(capsys, 1, "push", str(folder), "me/it")


def test_a_folder_whose_name_no_repo_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).touch()
    names = ("method", "base_model", "architecture", "config", "record", "report")
    (folder / "stat_recipe.json").write_text(json.dumps(dict.fromkeys(names)))
    said = fails(capsys, 1, "push", str(folder))
    assert said.endswith("'my model' is FOLDER's name; REPO_ID takes another. Nothing was pushed.")
