"""Folders that are written as a whole, and what may become one."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

RECIPE = "stat_recipe.json"
HALF = "half-written"
WHOLE = "whole"  # the same folder once all is in it, while its parts are moved


def target(folder: Path) -> Path:
    """Of a link, the folder that it points to. Of one that points to itself, a link: it leads nowhere."""
    return Path(os.path.realpath(folder))


def refuse_full(folder: Path, done: str, besides: Collection[Path] = ()) -> None:
    """Raise if `folder` is there and holds anything but what is in `besides`, or is none. done: what was not, in a word."""
    real = target(folder)
    if real.is_symlink() or (real.exists() and (not real.is_dir() or any(path not in besides for path in real.iterdir()))):
        raise FileExistsError(f"{folder} exists and is not an empty folder; nothing was {done}. Choose another place.")


def replace(path: Path, content: bytes) -> None:
    """Write a file, in place of an older one as a whole or not at all: beside it, then renamed."""
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}.new")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def nearest(path: Path) -> Path:
    """What is there of `path`: itself, or what it would be made in."""
    real = target(path)
    return next(each for each in (real, *real.parents) if os.path.lexists(each))


def is_writable(folder: Path) -> bool:
    """Whether something can be made in it."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def half_written(folder: Path) -> list[Path]:
    """What killed processes left of `folder`, by the names that `written_as_a_whole` gives."""
    folder = target(folder)
    return [path for place in (folder.parent, folder) for path in place.glob(_temporary(folder, HALF))]


def moving(folder: Path) -> list[Path]:
    """What a killed process had written as a whole and not yet moved to `folder`; none or one."""
    folder = target(folder)
    return list(folder.glob(_temporary(folder, WHOLE)))


def finish_moving(whole: Path, moved: list[Path] | None = None) -> None:
    """Move what is left of it to the folder that it lies in. The recipe comes last, as it says that all is there."""
    done = [] if moved is None else moved
    for part in sorted(whole.iterdir(), key=lambda part: part.name == RECIPE):
        done.append(part.rename(whole.parent / part.name))
    whole.rmdir()


def _temporary(folder: Path, kind: str) -> str:
    return f".{glob.escape(folder.name)}-????????.{kind}"


@contextmanager
def written_as_a_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder`, which is new or empty, if all goes well and vanishes if not.

    It is a neighbour that is renamed, or, where `folder` is there, in it, and its parts are moved: a mounted folder cannot be
    replaced, nor one whose parent belongs to others, and whoever stands in it is to find the files there.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    inside, moved = folder.exists(), list[Path]()
    half = (folder if inside else folder.parent) / f".{folder.name}-{secrets.token_hex(4)}.{HALF}"
    try:
        half.mkdir(parents=True)
        yield half
        if inside:
            half = half.rename(half.with_suffix(f".{WHOLE}"))
            finish_moving(half, moved)
        else:
            half.rename(folder)
    except BaseException as error:
        for part in moved:
            part.rename(half / part.name)
        shutil.rmtree(half, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(
                getattr(error, "errno", None) or errno.EIO,
                f"Nothing was written to {folder}, and the model in memory is unharmed: {error}. "
                "Make room or choose another place.",
            ) from error
        raise
