"""A Hugging Face Hub on 127.0.0.1: what the real clients need to push, look up and load model repos.

Supported: public and private model repos with branches. Not supported: pull requests, tags, large file
storage. Every file travels base64 inside its commit, so neither LFS nor Xet takes part.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_FOREIGN_SETTINGS = re.compile("(HF_|HUGGING|TRANSFORMERS_).*|.*_proxy", re.IGNORECASE)


class HubServer:
    """A Hub for as long as the `with` block lasts; clients are separate processes started with `client_env`."""

    def __init__(self, user: str = "user", token: str = "hf_of_the_test_user", role: str = "write") -> None:
        self.user = user
        self.role = role
        self.token = token
        self.fail_commits = False  # the connection breaks in the middle of every commit, nothing is stored
        self.commit_answers: dict[str, bytes] = {}  # by repo: commits are stored and answered so; empty: the answer is lost
        self.silent_at: tuple[str, ...] = ()  # requests with one of these in their path are never answered
        self.cut_next_download_at: int | None = None  # the next download breaks after this many bytes, only that one
        self.requests: list[str] = []  # "GET /path", and the Range header where there was one
        self.repos: dict[str, Repo] = {}
        self.lock = threading.Lock()
        self.stopped = False
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopped = True
        self._http.shutdown()
        self._http.server_close()

    def client_env(self, home: str | os.PathLike[str]) -> dict[str, str]:
        """The whole environment of a logged-in client; without `HF_TOKEN` it is an anonymous one."""
        inherited = {name: value for name, value in os.environ.items() if not _FOREIGN_SETTINGS.fullmatch(name)}
        return inherited | {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": os.fspath(home),
            **{f"HF_HUB_DISABLE_{what}": "1" for what in ("TELEMETRY", "UPDATE_CHECK", "PROGRESS_BARS", "XET")},
            "NO_PROXY": "*",  # for callers that merge this into an environment with proxies
        }

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Path to content, at the newest commit."""
        return dict(self.repos[repo_id].at().files)

    def commits(self, repo_id: str) -> list[str]:
        """Commit messages, oldest first; every repo begins with an `initial commit`."""
        return [commit.message for commit in self.repos[repo_id].history]

    def is_private(self, repo_id: str) -> bool:
        return self.repos[repo_id].private


@dataclass(frozen=True)
class Commit:
    message: str
    files: Mapping[str, bytes]
    sha: str = field(default_factory=partial(secrets.token_hex, 20))


@dataclass(frozen=True)
class Repo:
    repo_id: str
    private: bool
    history: list[Commit]
    branches: dict[str, list[Commit]] = field(default_factory=dict)  # all but main

    def at(self, revision: str = "main") -> Commit:
        for name, history in {"main": self.history, **self.branches}.items():
            for commit in reversed(history):
                if revision in (name, commit.sha):
                    return commit
        raise _HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class _HubError(Exception):
    """Becomes an HTTP answer; the client picks its exception type by the code."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message, **headers} | ({"X-Error-Code": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one write: in two, Nagle and delayed ACK cost 40 ms per answer

    def __init__(self, hub: HubServer, *connection: Any) -> None:
        self.hub = hub
        super().__init__(*connection)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        length = int(self.headers.get("Content-Length", 0))
        while not self.hub.stopped and any(part in url.path for part in self.hub.silent_at):
            time.sleep(0.05)
        if self.hub.stopped or (self.hub.fail_commits and "/commit/" in url.path):
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(length)  # before any refusal, or the next request would begin in the middle of it
        self.hub.requests.append(f"{self.command} {url.path} {self.headers.get('Range', '')}".rstrip())
        try:
            self._route(url.path)
        except _HubError as error:
            self._json({"error": error.message}, error.status, error.headers)

    do_HEAD = do_POST = do_GET

    def _route(self, path: str) -> None:
        action, access, arguments = _find_route(self.command, path)
        known = self._is_known()
        if access == "login" and not known:
            raise _HubError(401, "Invalid username or password.")
        if "repo" in arguments:
            arguments["repo"] = self._find_repo(arguments["repo"], known, writes=access == "write")
        action(self, **arguments)

    def _is_known(self) -> bool:
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.hub.token}"):
            # As on the Hub, a wrong token is refused even where none is needed.
            raise _HubError(401, "Invalid credentials in Authorization header")
        return authorization is not None

    def _find_repo(self, repo_id: str, known: bool, writes: bool) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is not None and (known or not (repo.private or writes)):
            return repo
        if known:
            raise _HubError(404, "Repository not found", "RepoNotFound")
        # To a stranger a missing repo and a closed one look the same. Every 401 about a repo is RepositoryNotFoundError
        # to the client, but it recognises such a URL only on https; the code makes it do the same here.
        raise _HubError(401, "Invalid username or password.", "RepoNotFound")

    def whoami(self) -> None:
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.hub.role}}
        self._json({"type": "user", "name": self.hub.user, "orgs": [], "auth": auth})

    def create(self) -> None:
        asked = json.loads(self.body)
        if asked.get("type", "model") != "model":
            raise _HubError(400, f"This Hub has model repos only, not {asked['type']!r}")
        repo_id = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        private = asked.get("visibility") == "private" or asked.get("private") is True
        new = Repo(repo_id, private, [Commit("initial commit", {".gitattributes": b""})])
        taken = self.hub.repos.setdefault(repo_id, new) is not new
        error = {"error": "You already created this model repo"} if taken else {}
        self._json({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, **error}, 409 if taken else 200)

    def validate_yaml(self) -> None:
        header = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(self.body)["content"], re.DOTALL)
        errors, warnings = [], [] if header else [{"message": "empty or missing yaml metadata in repo card"}]
        try:
            yaml.safe_load(header[1] if header else "")
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self._json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def info(self, repo: Repo, revision: str = "main") -> None:
        commit = repo.at(revision)
        siblings = [{"rfilename": path, "size": len(commit.files[path])} for path in sorted(commit.files)]
        flags = {"private": repo.private, "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}
        self._json({"_id": "0", "id": repo.repo_id, "sha": commit.sha, "siblings": siblings, **flags})

    def refs(self, repo: Repo) -> None:
        names = ("main", *repo.branches)
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": repo.at(name).sha} for name in names]
        self._json({"branches": branches, "tags": [], "converts": []})

    def tree(self, repo: Repo, revision: str, path: str = "") -> None:
        files = repo.at(revision).files
        folder = f"{path}/" if path else ""
        inside = [name for name in sorted(files) if name.startswith(folder)]
        if not inside:
            raise _HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive") != ["true"]:
            inside = list(dict.fromkeys(folder + name.removeprefix(folder).split("/")[0] for name in inside))
        self._json([_tree_entry(name, files.get(name)) for name in inside])

    def preupload(self, repo: Repo, revision: str) -> None:
        files = repo.at(revision).files
        paths = [asked["path"] for asked in json.loads(self.body)["files"]]
        oids = {path: _blob_id(files[path]) for path in paths if path in files}
        common = {"uploadMode": "regular", "shouldIgnore": False}
        self._json({"files": [{"path": path, "oid": oids.get(path), **common} for path in paths]})

    def branch(self, repo: Repo, revision: str) -> None:
        if revision in ("main", *repo.branches):
            raise _HubError(409, f"Reference {revision} exists already")
        repo.branches[revision] = [repo.at()]
        self._json({})

    def commit(self, repo: Repo, revision: str) -> None:
        if revision not in ("main", *repo.branches) or "create_pr" in self.query:
            raise _HubError(400, f"This Hub takes commits to branches only, not to {revision!r}, and no pull requests")
        header, *changes = map(json.loads, self.body.splitlines())
        with self.hub.lock:
            files = dict(repo.at(revision).files)
            for change in changes:
                _apply(files, change["key"], change["value"])
            commit = Commit(header["value"]["summary"], files)
            repo.branches.get(revision, repo.history).append(commit)
        answer = self.hub.commit_answers.get(repo.repo_id)
        if answer is not None:
            self.close_connection = not answer
            return self._send(200, answer, {}) if answer else None
        url = f"{self.hub.endpoint}/{repo.repo_id}/commit/{commit.sha}"
        self._json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        content = commit.files.get(path)
        if content is None:
            raise _HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        headers["ETag"] = f'"{_blob_id(content)}"'
        status, size = 200, len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
            if first > last:
                raise _HubError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            status, content = 206, content[first : last + 1]
        self._send(status, content, headers)

    def _json(self, data: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if "ETag" in headers and self.hub.cut_next_download_at is not None:
            body, self.hub.cut_next_download_at = body[: self.hub.cut_next_download_at], None
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `HubServer.requests` is the log."""


def _blob_id(content: bytes) -> str:
    # git's own hash: the client computes it too, to leave unchanged files out of a commit.
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(path: str, content: bytes | None) -> dict[str, Any]:
    if content is None:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    return {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}


def _apply(files: dict[str, bytes], key: str, change: Mapping[str, str]) -> None:
    path = change["path"]
    if key == "file":
        files[path] = base64.b64decode(change["content"])
    elif key == "deletedFile" and path in files:
        del files[path]
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
            del files[name]
    else:
        raise _HubError(400, f"This Hub cannot do {key!r} to {path!r}")


_MODEL = "/api/models/(?P<repo>[^/]+(?:/[^/]+)?)"
_REVISION = "(?P<revision>[^/]+)"
_ROUTES = (  # method (GET is HEAD too), path, who may: anybody, with the token, or by the repo; what answers
    ("GET", "/api/whoami-v2", "login", _Handler.whoami),
    ("POST", "/api/repos/create", "login", _Handler.create),
    ("POST", "/api/validate-yaml", "anybody", _Handler.validate_yaml),
    ("GET", f"{_MODEL}/refs", "read", _Handler.refs),
    ("GET", f"{_MODEL}/tree/{_REVISION}(?:/(?P<path>.+))?", "read", _Handler.tree),
    ("POST", f"{_MODEL}/preupload/{_REVISION}", "write", _Handler.preupload),
    ("POST", f"{_MODEL}/branch/{_REVISION}", "write", _Handler.branch),
    ("POST", f"{_MODEL}/commit/{_REVISION}", "write", _Handler.commit),
    ("GET", f"{_MODEL}(?:/revision/{_REVISION})?", "read", _Handler.info),
    ("GET", f"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/{_REVISION}/(?P<path>.+)", "read", _Handler.resolve),
)


def _find_route(command: str, path: str) -> tuple[Callable[..., None], str, dict[str, Any]]:
    for method, pattern, access, action in _ROUTES:
        match = re.fullmatch(pattern, path)
        if match and method == command.replace("HEAD", "GET"):
            return action, access, {name: unquote(text) for name, text in match.groupdict().items() if text}
    raise _HubError(404, f"This Hub has no {command} {path}")
