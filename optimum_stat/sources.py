"""Where a model comes from, and what finds it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import try_to_load_from_cache

from .hub import is_hub_id

ACCESS = ("token", "cache_dir", "local_files_only")


class Source(str):
    """A Hub id, or a folder, which begins with "/"; of a GGUF file, with its name behind."""

    revision: str | None
    """The commit, where it is known, or what was asked for; None: of a folder, or not known."""
    subfolder: str
    access: Mapping[str, Any]
    """With what it was read; for nobody's eyes, as a token may be in it."""

    def __new__(
        cls, name: str, revision: str | None = None, subfolder: str = "", access: Mapping[str, Any] | None = None
    ) -> Source:
        """Of a folder there is no revision."""
        own = str.__new__(cls, name)
        own.subfolder, own.access = subfolder, access or {}
        own.revision = revision if is_hub_id(own.place) else None
        return own

    @property
    def place(self) -> str:
        """The repo or folder, of a GGUF file that which it lies in."""
        return self.rpartition("/")[0] if self.endswith(".gguf") else str(self)

    @property
    def found_by(self) -> dict[str, str]:
        """What from_pretrained needs besides the name."""
        given = {"revision": self.revision, "subfolder": self.subfolder}
        return {name: value for name, value in given.items() if value}


def source_of(path: str, model: Any = None, asked: Mapping[str, Any] | None = None) -> Source | None:
    """Where a model came from that was read from `path`. Of folders the whole path: nobody takes that for a Hub id, and it is the
    same wherever one stands. asked: what from_pretrained was given, if it has just been called.
    """
    if not path:
        return None
    name = str(Path(path).absolute()) if Path(path).exists() else path
    given = asked or {}
    access = {each: given[each] for each in ACCESS if given.get(each) is not None}
    source = Source(name, given.get("revision") or _noted(model), given.get("subfolder") or "", access)
    if asked is not None and is_hub_id(source.place):
        source.revision = _commit(source, asked.get("gguf_file")) or source.revision
    return source


def known(source: str, model: Any) -> Source:
    """A source that somebody may have given as a plain name."""
    return source if isinstance(source, Source) else Source(source, _noted(model))


def _noted(model: Any) -> str | None:
    """The commit that a config holds of transformers before 5.24."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def _commit(source: Source, gguf: str | None) -> str | None:
    """What the cache says that a repo's files were read from just now."""
    name = str(PurePosixPath(source.subfolder, gguf or "config.json"))
    found = try_to_load_from_cache(source.place, name, source.access.get("cache_dir"), source.revision)
    return Path(found).parents[name.count("/")].name if isinstance(found, str) else None


def located(model: str | Path) -> tuple[str, dict[str, str]]:
    """What from_pretrained takes for a model that is named as recipes name it: a folder or Hub id, and a GGUF file in it.

    Raises:
        FileNotFoundError: there is no such GGUF file in the folder.
        ValueError: it is another file.
    """
    path = str(model)
    if path.endswith(".gguf"):
        folder, _, name = path.rpartition("/")
        folder = folder or ("/" if path.startswith("/") else ".")
        if Path(folder).is_dir() and not Path(path).is_file():
            raise FileNotFoundError(f"model {path} asked, but there is no such file.")
        return folder, {"gguf_file": name}
    if Path(path).is_file():
        raise ValueError(
            f"model {path} asked, which is a file: name the folder that config.json and the weights are in, or a .gguf file."
        )
    return path, {}
