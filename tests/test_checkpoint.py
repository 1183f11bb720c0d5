"""Saving, loading and pushing: what is written loads again, in any form that transformers offers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Commit, HubServer, Repo
from tiny import batches, data_of, outputs, tiny
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from optimum_stat import STATConfig, STATPruner
from optimum_stat.families import find_groups
from optimum_stat.folders import RECIPE, written_as_a_whole

pytestmark = pytest.mark.pictures

FILES = ["README.md", "config.json", "model.safetensors", "modeling_stat.py", "stat_recipe.json"]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i for i in range(2, 60)}}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def pruner_of(family: str, **config: Any) -> STATPruner:
    pruner = STATPruner.from_pretrained(tiny(family), STATConfig(keep=0.6, **config), tokenizer=tokenizer())
    pruner.prune(batches())
    return pruner


@pytest.fixture(scope="module")
def pruner() -> STATPruner:
    return pruner_of("llama")


@pytest.fixture
def folder(pruner: STATPruner, tmp_path: Path) -> Path:
    pruner.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def equal(model: Any, other: Any) -> bool:
    return all(torch.equal(outputs(model, batch), outputs(other, batch)) for batch in batches())


def test_what_is_written(folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, *TOKENIZER, "generation_config.json", "pictures"])
    assert [path.name for path in folder.parent.iterdir()] == ["pruned"]
    assert "# pruned\n" in (folder / "README.md").read_text()
    assert b"pickle" not in b"".join(path.read_bytes() for path in folder.iterdir() if path.suffix == ".py")


def test_the_recipe_holds_the_whole_run(pruner: STATPruner, folder: Path):
    recipe = json.loads((folder / "stat_recipe.json").read_text())
    assert STATConfig.from_dict(recipe["config"]) == pruner.config
    assert recipe["record"] == json.loads((folder / "config.json").read_text())["stat_pruning"]
    assert recipe["report"]["fingerprint"] == pruner.report.fingerprint
    assert set(recipe["versions"]) == {"optimum-stat", "torch", "transformers"}
    assert recipe["architecture"] == "LlamaForCausalLM"


def test_saving_does_not_change_the_model(pruner: STATPruner, folder: Path):
    assert "auto_map" not in pruner.model.config.to_dict()
    assert pruner.model.config.stat_pruning == json.loads((folder / "config.json").read_text())["stat_pruning"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one file", {}),
        ("shards", {"max_shard_size": "8KB"}),
    ],
)
def test_every_form_loads_bit_for_bit(name: str, options: dict[str, Any], pruner: STATPruner, tmp_path: Path):
    pruner.save_pretrained(tmp_path / "pruned", **options)
    assert (len(list((tmp_path / "pruned").glob("*.safetensors"))) > 1) is (name == "shards")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(report.values())
    assert equal(loaded, pruner.model)
    loaded.save_pretrained(tmp_path / "again", **options)
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), pruner.model)


# transformers warns whoever saves a model that is partly on disk; that is what is tested
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_placed_by_accelerate_and_partly_on_disk(pruner: STATPruner, folder: Path, tmp_path: Path):
    placed = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert equal(placed, pruner.model)
    places = {
        "model.layers.1": "disk",
        "model.layers.0": "cpu",
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    places["model.rotary_emb"] = "cpu"
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert offloaded.model.layers[1].mlp.down_proj.weight.is_meta
    assert equal(offloaded, pruner.model)
    offloaded.save_pretrained(tmp_path / "again")
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), pruner.model)


def test_half_precision_on_load(pruner: STATPruner, folder: Path):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert equal(loaded, AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16"))
    assert (outputs(loaded, batches()[0]) - outputs(pruner.model, batches()[0])).abs().max() < 0.5


def test_a_folder_is_pruned_with_its_own_tokenizer_and_class(folder: Path, tmp_path: Path):
    again = STATPruner.from_pretrained(folder, STATConfig(keep=0.9))
    assert type(again.model).__name__ == "LlamaForCausalLM"
    assert again.tokenizer.get_vocab() == tokenizer().get_vocab()
    assert again.source == str(folder)
    again.prune(["w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 " * 20])
    again.save_pretrained(tmp_path / "again")
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), again.model)


def test_a_model_loaded_by_remote_code_is_pruned_and_saved_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(remote).__module__.startswith("transformers_modules")
    again = STATPruner.from_pretrained(remote, STATConfig(keep=0.9))
    again.prune(batches())
    again.save_pretrained(tmp_path / "again")
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), again.model)
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True), again.model)


def test_a_head_checkpoint_with_another_head_and_task(folder: Path):
    assert type(STATPruner.from_pretrained(folder, task="feature-extraction").model).__name__ == "LlamaModel"
    with pytest.raises(ValueError, match=r"task='chess' asked; known are audio-classification, .*, token-classification"):
        STATPruner.from_pretrained(folder, task="chess")


def test_speech_is_recognised_by_two_kinds_of_heads(tmp_path: Path):
    for family in ("wav2vec2", "whisper"):
        tiny(family).save_pretrained(tmp_path / family)
        pruner = STATPruner.from_pretrained(tmp_path / family, task="automatic-speech-recognition")
        assert type(pruner.model) is type(tiny(family))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_one_tower_with_a_head(family: str, tmp_path: Path):
    """Its config has both, and no width of its own."""
    model = tiny(family, "ImageClassification")
    data = [{"pixel_values": batch["pixel_values"]} for batch in data_of(family, 8, 2)]
    pruner = STATPruner.from_pretrained(model, STATConfig(keep=0.6))
    pruner.prune(data)
    pruner.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(again, data[0]), outputs(model, data[0]))


def test_an_architecture_that_transformers_does_not_have(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(
        ValueError, match=r"names NoSuchModel, which transformers [\d.]+ does not have; say what to load with task="
    ):
        STATPruner.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))
    with pytest.raises(ValueError, match="names no architecture; say what it is with task="):
        STATPruner.from_pretrained(folder)


def test_options_of_loading_make_no_sense_for_a_loaded_model():
    with pytest.raises(TypeError, match="dtype, task asked for a model that is loaded already"):
        STATPruner.from_pretrained(tiny("bert"), dtype="auto", task="fill-mask")


def test_only_a_pruned_and_unchanged_model_is_saved(tmp_path: Path):
    dense = STATPruner.from_pretrained(tiny("bert"))
    with pytest.raises(ValueError, match=r"has not been pruned: call prune\(dataset\) first"):
        dense.save_pretrained(tmp_path / "dense")
    changed = pruner_of("bert")
    consumer = find_groups(changed.model)[1].consumer
    consumer.weight = torch.nn.Parameter(consumer.weight[:, 1:])
    with pytest.raises(ValueError, match="was changed after pruning: its sizes are not those of its record"):
        changed.save_pretrained(tmp_path / "changed")
    changed = pruner_of("bert")
    changed.model.bert.embeddings.word_embeddings.weight = torch.nn.Parameter(torch.zeros(5, 32))
    with pytest.raises(
        ValueError, match=r"weights would not load again, .*word_embeddings.weight first: \(5, 32\) in the model, \(67, 32\)"
    ):
        changed.save_pretrained(tmp_path / "changed")
    assert list(tmp_path.iterdir()) == []


def test_an_added_vocabulary_is_no_reason_not_to_save(tmp_path: Path):
    pruner = pruner_of("bert")
    pruner.model.resize_token_embeddings(80, mean_resizing=False)
    pruner.save_pretrained(tmp_path / "larger")
    assert equal(AutoModelForMaskedLM.from_pretrained(tmp_path / "larger"), pruner.model)


def test_an_empty_folder_and_a_link_to_one_are_filled(pruner: STATPruner, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("empty", "link", "deep/er/still"):
        pruner.save_pretrained(tmp_path / name)
        assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / name), pruner.model)
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "link", "target"]


@pytest.mark.parametrize("name", ["new", "there"])
@pytest.mark.parametrize("mask", [0o027, 0o002])
def test_who_may_read_it_is_for_the_user_to_say(mask: int, name: str, pruner: STATPruner, tmp_path: Path):
    """By the umask, or the mode of the folder that is there."""
    (tmp_path / "there").mkdir(mode=0o711)
    before = os.umask(mask)
    try:
        pruner.save_pretrained(tmp_path / name)
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == (0o711 if name == "there" else 0o777 & ~mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / name).iterdir() if path.is_file()} == {0o666 & ~mask}


def test_a_folder_that_cannot_be_replaced_is_filled(pruner: STATPruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a mounted one, or one in a folder of others, cannot be."""
    (tmp_path / "mount").mkdir()
    before = (tmp_path / "mount").stat()

    def busy(self: Path, *_: Any) -> None:
        assert tmp_path not in (self.parent, self), f"{self} is not ours to change"

    with monkeypatch.context() as patch:
        for name in ("rmdir", "mkdir", "rename"):
            plain = getattr(Path, name)
            patch.setattr(Path, name, lambda self, *args, _plain=plain, **kwargs: busy(self) or _plain(self, *args, **kwargs))
        pruner.save_pretrained(tmp_path / "mount")
    assert (tmp_path / "mount").stat().st_ino == before.st_ino
    assert not list((tmp_path / "mount").glob(".*"))
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "mount"), pruner.model)


def test_the_recipe_comes_last_into_a_folder_that_is_there(pruner: STATPruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With it, a run that was killed counts as written."""
    moved, plain = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: moved.append(Path(to).name) or plain(self, to))
    pruner.save_pretrained(tmp_path)
    assert moved.pop(0).endswith(".whole"), "what is to be moved is complete"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(moved)
    assert moved[-1] == "stat_recipe.json"


def test_what_was_moved_already_goes_again_if_the_rest_cannot(tmp_path: Path):
    with pytest.raises(OSError, match="Nothing was written"), written_as_a_whole(tmp_path) as half:  # noqa: PT012
        (half / "config.json").touch()
        (half / RECIPE).touch()
        (tmp_path / RECIPE / "somebody's").mkdir(parents=True)
    assert [path.name for path in tmp_path.iterdir()] == [RECIPE]


def test_the_folder_at_hand_is_filled_and_stays(pruner: STATPruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    pruner.save_pretrained(".")
    assert Path.cwd() == tmp_path
    assert equal(AutoModelForCausalLM.from_pretrained("."), pruner.model)
    assert not [path for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}-")]


# ---- the Hub


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


def run_client(server: HubServer, code: str, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, because `HF_ENDPOINT` is read at import."""
    start = f"import json, sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    return subprocess.run(command, env=server.client_env(home), capture_output=True, text=True, check=False)


def client(server: HubServer, code: str, home: Path, *arguments: object) -> Any:
    """What a process that runs `code` prints last, as JSON."""
    done = run_client(server, code, home, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PUSH = """
import os
import torch
from safetensors.torch import save_file
from test_checkpoint import batches, outputs, pruner_of
torch.set_num_threads(1)
pruner = pruner_of("llama")
save_file({"outputs": outputs(pruner.model, batches()[0])}, sys.argv[1])

def attempt(**options):
    try:
        return pruner.push_to_hub(**options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found = {
    "open": attempt(repo_id="user/open", commit_message="half of it"),
    "short name": attempt(repo_id="short", private=True),
    "over a dense one": attempt(repo_id="user/dense", max_shard_size="8KB"),
    "wrong token": attempt(repo_id="user/open", token="hf_wrong"),
}
os.environ.pop("HF_TOKEN")
found["no token"] = attempt(repo_id="user/open")
found["usable"] = torch.equal(outputs(pruner.model, batches()[0]), outputs(pruner.model, batches()[0]))
found["auto_map"] = "auto_map" in pruner.model.config.to_dict()
print(json.dumps(found))
"""
FAIL = """
from test_checkpoint import batches, outputs, pruner_of
import torch
torch.set_num_threads(1)
pruner = pruner_of("llama")
before = outputs(pruner.model, batches()[0])
try:
    pruner.push_to_hub("user/open")
except Exception as error:
    found = {"type": type(error).__name__, "text": str(error)}
pruner.save_pretrained(sys.argv[1])
found["same"] = torch.equal(outputs(pruner.model, batches()[0]), before)
print(json.dumps(found))
"""
LOAD = """
import torch
if sys.argv[2] == "package":
    import optimum_stat
else:
    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "optimum_stat":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, NotInstalled())
from safetensors.torch import load_file
from tiny import batches, outputs
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
wanted, found = load_file(sys.argv[1])["outputs"], {}
options = {} if sys.argv[2] == "package" else {"trust_remote_code": True}
for repo in ("user/open", "user/short", "user/dense"):
    model = AutoModelForCausalLM.from_pretrained(repo, **options)
    found[repo] = [torch.equal(outputs(model, batches()[0]), wanted), type(model).__module__.split(".")[0]]
found["vocabulary"] = len(AutoTokenizer.from_pretrained("user/open").get_vocab())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def pushed(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process saw that pushed one pruned model to several places."""
    home = tmp_path_factory.mktemp("hub")
    stale = {"model.safetensors": b"dense", "notes.txt": b"mine", "onnx/model.safetensors": b"other"}
    server.repos["user/dense"] = Repo("user/dense", False, [Commit("dense", stale)])
    return {"home": home, **client(server, PUSH, home, home / "wanted.safetensors")}


def test_a_pushed_repo_is_whole(pushed: dict[str, Any], server: HubServer):
    assert pushed["open"].startswith(f"{server.endpoint}/user/open/commit/")
    files = server.files("user/open")
    pictures = ["pictures/errors.png", "pictures/kept.png"]
    assert sorted(files) == sorted([".gitattributes", *FILES, *TOKENIZER, "generation_config.json", *pictures])
    assert server.commits("user/open") == ["initial commit", "half of it"]
    assert b'from_pretrained("user/open")' in files["README.md"]
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"] == "modeling_stat.LlamaForCausalLM"


def test_private_means_private_and_a_short_name_is_the_user_s(pushed: dict[str, Any], server: HubServer):
    assert pushed["short name"].startswith(f"{server.endpoint}/user/short/commit/")
    assert server.is_private("user/short")
    assert not server.is_private("user/open")
    assert server.commits("user/short")[-1] == "Pruned with optimum-stat (stat)"
    assert b'from_pretrained("user/short")' in server.files("user/short")["README.md"]


def test_stale_weights_are_removed_and_nothing_else(pushed: dict[str, Any], server: HubServer):
    assert "/commit/" in pushed["over a dense one"]
    files = server.files("user/dense")
    assert "model.safetensors" not in files
    assert (files["notes.txt"], files["onnx/model.safetensors"]) == (b"mine", b"other")
    assert "model.safetensors.index.json" in files


@pytest.mark.parametrize("how", ["package", "remote code"])
def test_pushed_models_load_from_the_hub(how: str, pushed: dict[str, Any], server: HubServer, tmp_path: Path):
    found = client(server, LOAD, tmp_path, pushed["home"] / "wanted.safetensors", how)
    module = "transformers" if how == "package" else "transformers_modules"
    assert found == {**{f"user/{name}": [True, module] for name in ("open", "short", "dense")}, "vocabulary": 60}


def test_tokens_that_are_missing_or_wrong_are_named(pushed: dict[str, Any], server: HubServer):
    assert pushed["no token"].startswith("ValueError: Pushing to user/open needs a token: run `hf auth login`")
    assert pushed["wrong token"].startswith(f"ConnectionError: Pushing to user/open at {server.endpoint} failed: ")
    assert "Invalid user token" in pushed["wrong token"]
    assert "The repo is as it was before" in pushed["wrong token"]
    assert server.commits("user/open") == ["initial commit", "half of it"]
    assert pushed["usable"]
    assert not pushed["auto_map"]


def test_a_lost_connection_leaves_the_repo_and_the_model_as_they_were(pushed: dict[str, Any], server: HubServer, tmp_path: Path):
    before = server.files("user/open")
    server.fail_commits = True
    try:
        found = client(server, FAIL, tmp_path / "home", tmp_path / "kept")
    finally:
        server.fail_commits = False
    assert found["type"] == "ConnectionError"
    assert f"Pushing to user/open at {server.endpoint} failed: " in found["text"]
    assert "keep it with save_pretrained(folder)" in found["text"]
    assert found["same"]
    assert server.files("user/open") == before
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "kept"), AutoModelForCausalLM.from_pretrained(tmp_path / "kept"))
