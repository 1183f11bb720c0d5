"""The Hub: what is its name for a model, what is checked before a push, and what a failed one leaves."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # HTTPError is that of its HTTP library, whichever it is
from huggingface_hub.utils import get_session, validate_repo_id

WEIGHTS = re.compile(  # of any variant, such as model.fp16-00001-of-00002.safetensors and model.safetensors.index.fp16.json
    r"(model|pytorch_model)(\.[^./]+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)"
    r"|(model\.safetensors|pytorch_model\.bin)\.index(\.[^./]+)?\.json|adapter_config\.json|adapter_model\.(safetensors|bin)"
)
"""Of what the repo held before, these would be loaded instead of or beside the new weights."""
READERS = re.compile(
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|tokenizer\.model"
    r"|additional_chat_templates/[^/]+\.jinja|vocab\.(txt|json|bpe)|merges\.txt|spiece\.model|sentencepiece\.bpe\.model"
    r"|((video_)?preprocessor|processor|audio_tokenizer)_config\.json"
)
"""These would be loaded beside the new tokenizer or processor, if there is one."""

AS_BEFORE = "The repo is as it was before, at most newly made."
SILENCE = 120.0
"""Seconds for which a Hub that has been asked something may say nothing."""


def is_hub_id(source: str | None) -> bool:
    """Whether a source can be a name on the Hub, and is not a folder."""
    return source is not None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source, re.ASCII) is not None


def shown(source: str | None) -> str | None:
    """A model's source as anybody may see it: of a folder on this machine only what it is called."""
    repo = "/".join(source.split("/")[:2]) if source is not None and source.endswith(".gguf") else source
    if source is None or is_hub_id(repo):
        return source
    return f"./{PureWindowsPath(os.path.abspath(source)).name}"  # knows both kinds of slashes


@dataclass(frozen=True)
class Destination:
    """A repo that can be pushed to."""

    api: HfApi
    repo_id: str
    """With the user's name."""
    private: bool | None

    @classmethod
    def checked(cls, repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> Destination:
        """Ask the Hub, before any work; nothing is made.

        Raises:
            ValueError: no repo can have this name, there is no token that can write, or the repo should be private and is public.
            ConnectionError: the Hub does not answer, or does not know the token.
        """
        validate_repo_id(repo_id)
        api = HfApi(token=_token(repo_id, token))
        public = False
        with _explained(repo_id, api, lambda: "The repo is as it was before."):
            user = api.whoami()
            full = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
            role = user.get("auth", {}).get("accessToken", {}).get("role")
            if private:
                with suppress(RepositoryNotFoundError):
                    public = not api.model_info(full).private
        if role == "read":
            raise ValueError(f"Pushing to {full} needs a token that can write, and this one can only read.")
        _refuse_public(full, public)
        return cls(api, full, private)

    def upload(self, files: Mapping[str, Path | bytes], message: str, revision: str | None, create_pr: bool) -> str:
        """Files or contents, by name, in one commit, in place of other weights; returns its address. A missing branch is made."""
        api, name = self.api, self.repo_id
        with _explained(name, api, lambda: AS_BEFORE):
            api.create_repo(name, private=self.private, exist_ok=True)
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(name, branch=revision, exist_ok=True)
            found = api.model_info(name, revision=revision)
            stale = stale_files([each.rfilename for each in found.siblings or ()], files)
        _refuse_public(name, bool(self.private) and not found.private)
        with _explained(name, api, lambda: self._fate(revision, found.sha, create_pr)):
            new = [CommitOperationAdd(each, content) for each, content in files.items()]
            old = [CommitOperationDelete(each, is_folder=False) for each in stale]
            commit = api.create_commit(name, [*new, *old], commit_message=message, revision=revision, create_pr=create_pr)
            return str(commit.commit_url)

    def _fate(self, revision: str | None, before: str | None, create_pr: bool) -> str:
        """What a commit has done that ended in an error: it may have arrived, and only the answer to it been lost."""
        if create_pr:
            return "A pull request may have been opened; else the repo is as it was before."
        try:
            now = self.api.model_info(self.repo_id, revision=revision).sha
        except Exception:  # odd answers make the client raise anything
            return "Whether all of it arrived cannot be told, as the Hub does not answer: look at the repo."
        if now == before:
            return AS_BEFORE
        return f"But the repo has a new commit, {now}: it is this one if nobody else pushed, and only the answer was lost."


def stale_files(there: Iterable[str], new: Collection[str]) -> list[str]:
    """What of a repo's files transformers would take for part of the model that comes instead; `new`: what will be there."""
    kinds = (WEIGHTS, READERS) if any(READERS.fullmatch(each) for each in new) else (WEIGHTS,)
    return [each for each in there if each not in new and any(kind.fullmatch(each) for kind in kinds)]


def _token(repo_id: str, given: str | bool | None) -> str:
    """The one to use, which no message may show."""
    token: Any = get_token() if given is None or given is True else given
    if not isinstance(token, str) or not token.strip():
        raise ValueError(f"Pushing to {repo_id} needs a token: run `hf auth login`, set HF_TOKEN, or pass token=.")
    token = token.strip()
    if re.fullmatch("[!-~]+", token) is None:
        raise ValueError(
            f"Pushing to {repo_id} needs a token, and what was given has characters in it that none has. Copy it anew."
        )
    return token


def _refuse_public(repo_id: str, public: bool) -> None:
    if public:
        raise ValueError(f"{repo_id} exists and is public; private=True asked, so nothing was pushed to it.")


@contextmanager
def _explained(repo_id: str, api: HfApi, fate: Callable[[], str]) -> Iterator[None]:
    """Say what a failed request means for the repo and the model."""
    with impatient():
        try:
            yield
        except Exception as error:  # odd answers make the client raise anything
            raise ConnectionError(
                f"Pushing to {repo_id} at {api.endpoint} failed: {_reason(error)}. {fate()} The model is unharmed."
            ) from error


def _reason(error: Exception) -> str:
    """Of an upload to the store of large files, the client's error has why it failed as its cause alone; addresses are signed."""
    what = str(error) if isinstance(error, (OSError, HTTPError)) else f"{type(error).__name__}: {error}"
    why = str(error.__cause__) if isinstance(error.__cause__, (OSError, HTTPError)) else ""
    said = [what] if why in what else [what, why]
    return ": ".join(re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", each).strip().rstrip(".") for each in said)


@contextmanager
def impatient(place: str = "") -> Iterator[None]:
    """Let no request wait longer than `SILENCE`: for most, the client has no limit. Of a folder nobody is asked."""
    if place and Path(place).exists():
        yield
        return
    hooks = get_session().event_hooks["request"]
    hooks.append(_limit)
    try:
        yield
    finally:
        hooks.remove(_limit)


def _limit(request: Any) -> None:
    """Its own limits hold, where it has some."""
    limits = request.extensions.get("timeout") or {}
    own = {kind: limit for kind, limit in limits.items() if limit is not None}
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), SILENCE) | own
