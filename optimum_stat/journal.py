"""What a run has finished, in a folder, so that the same run can go on after it was killed.

An entry is some files of tensors (safetensors), written beside and renamed, and a line in journal.json with their checksums,
written in the same way, with a checksum of its own. A run makes its entries always in the same order, so what counts of a
damaged journal is its longest intact beginning; the rest is done again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .locks import Lock, take
from .processes import Processes

FORMAT = 4
INDEX = "journal.json"
OURS = re.compile(rf"\d{{6,}}-\d{{3,}}\.(safetensors|part)|{re.escape(INDEX)}.*")
PROCESS = re.compile(r"\d+-of-\d+")
PIECE = 1 << 26  # bytes, about, in a file: what is written is copied before, so an entry may be larger than what is free


@dataclass
class Journal:
    """Entries by key. Without a folder nothing is ever written or found."""

    folder: Path | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    """What the entries depend on, as plain JSON values."""
    chapter: str = ""
    """Goes in front of every key."""
    _entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    _obsolete: list[str] = field(default_factory=list)
    _lock: Lock | None = None

    @classmethod
    def open(cls, folder: str | Path, run: Mapping[str, Any], processes: Processes) -> Journal:
        """The journal of this run in `folder`, which may be new. Every process has one of its own in it.

        Raises:
            InUse: another process is at work in it.
            ValueError: it is the journal of another run; says what differs.
        """
        counts = {int(path.name.rpartition("-")[2]) for path in Path(folder).glob("*-of-*") if PROCESS.fullmatch(path.name)}
        if counts - {processes.count}:
            raise ValueError(
                f"{folder} holds what a run of {max(counts)} processes has done; here are {processes.count}. Start as many, or "
                "delete the folder."
            )
        own = Path(folder, f"{processes.index + 1}-of-{processes.count}")
        try:
            own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _no_room(own, error) from error
        lock = take(own)
        found = _read(own / INDEX)
        before = (found or {}).get("run", run)
        differs = sorted(name for name in before.keys() | run.keys() if before.get(name) != run.get(name))
        if differs:
            name = differs[0]
            raise ValueError(
                f"{folder} holds what another run has done: its {name} was {before.get(name)!r}, now {run.get(name)!r} is asked. "
                "Ask for the same again, or delete the folder."
            )
        journal = cls(own, dict(run), _lock=lock)
        journal._take((found or {}).get("entries", {}), processes)
        return journal

    def __contains__(self, key: str) -> bool:
        return self.chapter + key in self._entries

    def recall(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, on the CPU; None if there is none. Empty if a later entry has replaced it."""
        return dict(self.read(key)) if key in self else None

    def read(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """What `recall` returns, one after the other, for entries that need not be in memory as a whole."""
        entry = self._entries[self.chapter + key]
        for name in () if self.folder is None or entry.get("gone") else entry["files"]:
            for own, value in load_file(self.folder / name).items():
                # memory of our own: kernels round otherwise where tensors are not aligned, as they are not in a file
                yield own, value.clone()

    def note(self, key: str) -> Any:
        """What stands beside the tensors, also of an entry that was replaced."""
        return self._entries[self.chapter + key]["note"]

    def keep(
        self,
        key: str,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        note: Any = None,
        replaces: str | None = None,
        complete: bool = True,
    ) -> None:
        """Write an entry. The one that it `replaces`, a full key, goes when the next is written: until then others may need it.

        complete: off, it counts only once the next entry does.

        Raises:
            OSError: there is no room; what was written before is intact.
        """
        if self.folder is None:
            return
        try:
            files = dict(_write(self.folder, len(self._entries), tensors))
            self._entries[self.chapter + key] = {"files": files, "note": note, "replaces": replaces, "complete": complete}
            if complete:
                self._settle()
        except (OSError, SafetensorError) as error:
            raise _no_room(self.folder, error) from error

    def _settle(self) -> None:
        """Everything up to now counts; what was replaced before that is not needed any more."""
        assert self.folder is not None
        gone = self._obsolete
        for key in gone:
            self._entries[key]["gone"] = True
        self._obsolete = self._waiting()
        self._write(self._entries)
        for name in (name for key in gone for name in self._entries[key]["files"]):
            (self.folder / name).unlink(missing_ok=True)

    def _waiting(self) -> list[str]:
        """What was replaced and is still there."""
        replaced = {entry["replaces"] for entry in self._entries.values()}
        return [key for key, entry in self._entries.items() if key in replaced and not entry.get("gone")]

    def full(self, key: str) -> str:
        """The key with its chapter."""
        return self.chapter + key

    def last(self, ending: str) -> str | None:
        """The full key of the latest entry whose key ends like that."""
        return next((key for key in reversed(self._entries) if key.endswith(ending)), None)

    def _write(self, entries: Mapping[str, Any]) -> None:
        assert self.folder is not None
        beside = self.folder / f"{INDEX}.part"
        content = {"format": FORMAT, "run": self.run, "entries": entries}
        beside.write_text(json.dumps({**content, "checksum": _checksum(content)}))
        beside.replace(self.folder / INDEX)

    def _take(self, entries: Mapping[str, Any], processes: Processes) -> None:
        """The longest beginning whose files are intact, in all processes; everything else of ours in the folder goes."""
        assert self.folder is not None
        keys = list(entries)
        good = next((at for at, key in enumerate(keys) if not _intact(self.folder, entries[key])), len(keys))
        good = _agreed(processes, entries, good)
        self._entries = {key: dict(entries[key]) for key in keys[:good]}
        files = {name for entry in self._entries.values() if not entry.get("gone") for name in entry["files"]}
        for path in self.folder.iterdir():
            if path.name not in {*files, INDEX} and OURS.fullmatch(path.name):
                path.unlink()
        self._obsolete = self._waiting()
        self._write(self._entries)


def _agreed(processes: Processes, entries: Mapping[str, Any], count: int) -> int:
    """The largest number of first entries, at most `count`, that is closed in all processes."""
    count = _closed(entries, count)
    while len(set(everybodys := processes.everybodys(count))) > 1:  # the same for all, so that all ask equally often
        count = _closed(entries, min(everybodys))
    return count


def _closed(entries: Mapping[str, Any], count: int) -> int:
    """The largest number of first entries, at most `count`, that count without the next, and without what replaced them."""
    keys = list(entries)
    replaced_by = {entry["replaces"]: at for at, entry in enumerate(entries.values()) if entry["replaces"]}
    while count:
        lost = [at for at in range(count) if entries[keys[at]].get("gone") and replaced_by.get(keys[at], count) >= count]
        if not lost and entries[keys[count - 1]]["complete"]:
            break
        count = min([*lost, count - 1])
    return count


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and found.pop("checksum", None) == _checksum(found)
    return found if whole and found.get("format") == FORMAT else None


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _intact(folder: Path, entry: Mapping[str, Any]) -> bool:
    files = {} if entry.get("gone") else entry["files"]
    return all((folder / name).is_file() and _digest(folder / name) == digest for name, digest in files.items())


def _write(folder: Path, number: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """The tensors in files of about PIECE bytes: the files' names and checksums."""
    for piece, part in enumerate(_pieces(tensors)):
        path = folder / f"{number:06}-{piece:03}.safetensors"
        beside = path.with_suffix(".part")
        try:
            save_file(part, beside)
            digest = _digest(beside)
            beside.replace(path)
        except (OSError, SafetensorError):
            beside.unlink(missing_ok=True)
            raise
        yield path.name, digest


def _pieces(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    piece: dict[str, Tensor] = {}
    size = 0
    for name, value in tensors:
        piece[name] = value.detach().cpu().contiguous()
        size += value.numel() * value.element_size()
        if size >= PIECE:
            yield piece
            piece, size = {}, 0
    if piece:
        yield piece


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _no_room(folder: Path, error: Exception) -> OSError:
    return OSError(
        getattr(error, "errno", None) or errno.EIO,
        f"What is finished could not be written to {folder}: {error}. What was written before is intact: make room, and go on "
        "with the same command.",
    )
