"""The Hub of the tests, against the real clients.

`HF_ENDPOINT` is read at import, so every client is a process: it runs one function `client_...` and prints its JSON.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from hub_server import Commit, HubServer, Repo

CARD = "---\nlibrary_name: transformers\ntags:\n- pruned\n---\n# A card\n"


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as hub:
        seed(hub, "user/open")
        seed(hub, "user/closed", private=True)
        yield hub


def seed(server: HubServer, repo_id: str, private: bool = False, content: bytes = b"content") -> None:
    server.repos[repo_id] = Repo(repo_id, private, [Commit("seed", {"data.bin": content})])


def run_client(client: Callable[..., Any], env: dict[str, str], *arguments: object) -> Any:
    command = [sys.executable, __file__, client.__name__, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def raised_by(call: Callable[..., object], *arguments: Any, **options: Any) -> list[str]:
    """The type of the exception, its bases, and those of its cause, by name; none where nothing was raised."""
    try:
        call(*arguments, **options)
    except Exception as error:
        return [kind.__name__ for each in (error, error.__cause__) for kind in type(each).__mro__]
    return []


def contents(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def pushed(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a client with transformers saw; nearly all of this file's time is its imports, so there is one only."""
    home = tmp_path_factory.mktemp("transformers")
    return {"home": home, **run_client(client_with_transformers, server.client_env(home / "cache"), home)}


def client_with_transformers(home: str) -> dict[str, Any]:
    import torch
    from huggingface_hub import ModelCard
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model, tokenizer = BertModel(BertConfig(vocab_size=40, **sizes)).eval(), make_tokenizer()
    model.save_pretrained(f"{home}/saved")
    model.push_to_hub("user/bert", commit_message="weights")
    tokenizer.push_to_hub("user/bert", commit_message="tokenizer")
    model.push_to_hub("user/shards", max_shard_size="8KB", private=True)
    loaded, loaded_tokenizer = AutoModel.from_pretrained("user/bert"), AutoTokenizer.from_pretrained("user/bert")
    return {
        "weights_equal": same_weights(model, loaded),
        "shards_equal": same_weights(model, AutoModel.from_pretrained("user/shards")),
        "ids": [one(["the red fox"])["input_ids"] for one in (tokenizer, loaded_tokenizer)],
        "card_library": ModelCard.load("user/bert").data.library_name,
        "missing_repo": raised_by(AutoModel.from_pretrained, "user/nothing"),
    }


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "the": 2, "red": 3, "fox": 4}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def same_weights(one: Any, other: Any) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_a_pushed_model_comes_back_bit_for_bit(pushed: dict[str, Any], server: HubServer) -> None:
    assert pushed["weights_equal"]
    stored = server.files("user/bert")
    assert stored["model.safetensors"] == (pushed["home"] / "saved" / "model.safetensors").read_bytes()
    assert server.commits("user/bert") == ["initial commit", "weights", "tokenizer"]
    assert not server.is_private("user/bert")


def test_a_private_model_in_shards_comes_back_bit_for_bit(pushed: dict[str, Any], server: HubServer) -> None:
    assert pushed["shards_equal"]
    assert sum(path.endswith(".safetensors") for path in server.files("user/shards")) > 1
    assert server.is_private("user/shards")


def test_a_pushed_tokenizer_and_card_come_back(pushed: dict[str, Any]) -> None:
    assert pushed["ids"] == [[[2, 3, 4]], [[2, 3, 4]]]
    assert pushed["card_library"] == "transformers"


def test_transformers_says_that_a_repo_is_missing(pushed: dict[str, Any]) -> None:
    assert pushed["missing_repo"][0] == "OSError"
    assert "RepositoryNotFoundError" in pushed["missing_repo"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "README.md").write_text(CARD)
    (tmp_path / "folder" / "inner" / "values.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "folder" / "empty.txt").write_bytes(b"")
    return tmp_path / "folder"


def test_an_uploaded_folder_can_be_listed_and_changed(server: HubServer, tmp_path: Path, folder: Path) -> None:
    seen = run_client(client_with_a_folder, server.client_env(tmp_path), folder, tmp_path / "snapshot")
    assert contents(tmp_path / "snapshot") == {".gitattributes": b"", **contents(folder)}
    assert seen["user"] == "user"
    assert seen["files"] == [".gitattributes", "README.md", "empty.txt", "inner/values.bin"]
    assert seen["top"] == [".gitattributes", "README.md", "empty.txt", "inner"]
    assert seen["card_tags"] == ["pruned"]
    assert seen["exists"] == [True, False]
    assert seen["first_commit"] == [".gitattributes"]
    assert server.commits("user/folder") == ["initial commit", "add", "remove", "remove inner"]
    assert server.files("user/folder").keys() == {".gitattributes", "README.md"}


def client_with_a_folder(folder: str, snapshot: str) -> dict[str, Any]:
    from huggingface_hub import HfApi, ModelCard, snapshot_download

    api, repo = HfApi(), "user/folder"
    first = api.model_info(api.create_repo("folder").repo_id).sha
    for _ in range(2):  # the second finds nothing to do
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="add")
    seen = {
        "user": api.whoami()["name"],
        "files": api.list_repo_files(repo),
        "top": [entry.path for entry in api.list_repo_tree(repo)],
        "card_tags": ModelCard.load(repo).data.tags,
        "exists": [api.file_exists(repo, path) for path in ("inner/values.bin", "inner/none.bin")],
        "first_commit": api.list_repo_files(repo, revision=first),
    }
    snapshot_download(repo, revision=api.list_repo_refs(repo).branches[0].target_commit, local_dir=snapshot)
    api.delete_files(repo, ["*.txt"], commit_message="remove")
    api.delete_folder("inner", repo, commit_message="remove inner")
    return seen


def test_missing_things_and_bad_requests_raise_the_client_s_own_errors(server: HubServer, tmp_path: Path) -> None:
    errors = run_client(client_with_mistakes, server.client_env(tmp_path))
    assert "RepositoryNotFoundError" in errors["repo"]
    assert "RepositoryNotFoundError" in errors["upload"]
    assert "EntryNotFoundError" in errors["file"]
    assert "EntryNotFoundError" in errors["folder"]
    assert "RevisionNotFoundError" in errors["revision"]
    assert "HfHubHTTPError" in errors["taken"]
    assert "BadRequestError" in errors["pull_request"]
    assert "ValueError" in errors["card"]
    assert server.commits("user/mistakes") == ["initial commit"]


def client_with_mistakes() -> dict[str, list[str]]:
    from huggingface_hub import HfApi

    api, repo = HfApi(), "user/mistakes"
    api.create_repo(repo)
    file = {"path_or_fileobj": b"x", "path_in_repo": "x.txt"}
    card = {"path_or_fileobj": b"---\ntags: [pruned\n---\n", "path_in_repo": "README.md"}
    return {
        "repo": raised_by(api.hf_hub_download, "user/nothing", "config.json"),
        "upload": raised_by(api.upload_file, repo_id="user/nothing", **file),
        "file": raised_by(api.hf_hub_download, repo, "config.json"),
        "folder": raised_by(lambda: list(api.list_repo_tree(repo, "nowhere"))),
        "revision": raised_by(api.model_info, repo, revision="v2"),
        "taken": raised_by(api.create_repo, repo),
        "pull_request": raised_by(api.upload_file, repo_id=repo, create_pr=True, **file),
        "card": raised_by(api.upload_file, repo_id=repo, **card),
    }


def test_without_a_token_only_public_repos_can_be_read(server: HubServer, tmp_path: Path) -> None:
    env = server.client_env(tmp_path)
    del env["HF_TOKEN"]
    errors = run_client(client_who_is_a_stranger, env)
    assert errors["read_open"] == []
    assert "RepositoryNotFoundError" in errors["read_closed"]
    assert "RepositoryNotFoundError" in errors["write"]
    assert errors["create"][0] == "HfHubHTTPError"
    assert server.commits("user/open") == ["seed"]
    assert "user/stranger" not in server.repos


def test_a_wrong_token_is_refused_everywhere(server: HubServer, tmp_path: Path) -> None:
    errors = run_client(client_who_is_a_stranger, server.client_env(tmp_path) | {"HF_TOKEN": "hf_wrong"})
    assert [kinds[0] for kinds in errors.values()] == ["HfHubHTTPError"] * 4
    assert server.commits("user/open") == ["seed"]
    assert "user/stranger" not in server.repos


def client_who_is_a_stranger() -> dict[str, list[str]]:
    from huggingface_hub import HfApi

    api = HfApi()
    return {
        "read_open": raised_by(api.model_info, "user/open"),
        "read_closed": raised_by(api.model_info, "user/closed"),
        "write": raised_by(api.upload_file, repo_id="user/open", path_or_fileobj=b"x", path_in_repo="x.txt"),
        "create": raised_by(api.create_repo, "user/stranger", exist_ok=True),
    }


def test_a_commit_cut_short_leaves_the_repo_as_it_was(server: HubServer, tmp_path: Path, folder: Path) -> None:
    seed(server, "user/lossy")
    (folder / "large.bin").write_bytes(bytes(3_000_000))
    env = server.client_env(tmp_path)
    server.fail_commits = True
    try:
        lost = run_client(client_with_an_upload, env, "user/lossy", folder)
    finally:
        server.fail_commits = False
    assert "TransportError" in lost
    assert server.commits("user/lossy") == ["seed"]
    assert server.files("user/lossy") == {"data.bin": b"content"}
    assert run_client(client_with_an_upload, env, "user/lossy", folder) == []
    assert server.files("user/lossy") == {"data.bin": b"content", **contents(folder)}


def client_with_an_upload(repo_id: str, folder: str) -> list[str]:
    from huggingface_hub import HfApi

    return raised_by(HfApi().upload_folder, repo_id=repo_id, folder_path=folder)


def test_a_broken_download_goes_on_where_it_stopped(server: HubServer, tmp_path: Path) -> None:
    content = random.Random(0).randbytes(14_000_000)
    seed(server, "user/large", content=content)
    server.cut_next_download_at = 13_000_000
    path = run_client(client_with_a_download, server.client_env(tmp_path), "user/large")
    assert Path(path).read_bytes() == content
    # 10 MiB is the client's chunk: of what had come, it keeps whole ones.
    ranges = [line.split()[2:] for line in server.requests if line.startswith("GET /user/large/resolve")]
    assert ranges == [[], ["bytes=10485760-"]]


def client_with_a_download(repo_id: str) -> Any:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repo_id, "data.bin")


def test_ranges_are_answered_as_http_says(server: HubServer) -> None:
    seed(server, "user/ranges", content=b"0123456789")
    assert get_range(server, "bytes=2-4") == (206, b"234", "bytes 2-4/10")
    assert get_range(server, "bytes=8-99") == (206, b"89", "bytes 8-9/10")
    assert get_range(server, "bytes=10-")[::2] == (416, "bytes */10")


def get_range(server: HubServer, asked: str) -> tuple[int, bytes, str | None]:
    connection = HTTPConnection(server.endpoint.removeprefix("http://"))
    connection.request("GET", "/user/ranges/resolve/main/data.bin", headers={"Range": asked})
    response = connection.getresponse()
    answer = response.status, response.read(), response.headers["Content-Range"]
    connection.close()
    return answer


def test_after_the_with_block_nothing_answers_any_more() -> None:
    with HubServer() as hub:
        open_before = HTTPConnection(hub.endpoint.removeprefix("http://"))
        open_before.request("GET", "/api/models/user/nothing")
        assert open_before.getresponse().read() == b'{"error": "Invalid username or password."}'
    open_before.request("GET", "/api/models/user/nothing")
    with pytest.raises(ConnectionError):
        open_before.getresponse()
    open_before.close()
    with pytest.raises(ConnectionRefusedError):
        HTTPConnection(hub.endpoint.removeprefix("http://")).connect()


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
