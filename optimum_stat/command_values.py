"""What stands behind an option, as a value; what cannot be read is answered with what is wanted."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 230  # bytes in a folder's name: file systems take 255, and while it is written something stands around it


def names(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(text.split(","))


def number(text: str) -> int | None:
    """A whole number, or None for "none" and "all"."""
    with _understood(text, "a whole number, or none"):
        return None if text.lower() in ("none", "all") else int(text)


def numbers(text: str) -> list[int]:
    """Whole numbers above 0, with commas between them."""
    with _understood(text, "whole numbers above 0 with commas between them, such as 1,32"):
        found = [int(part) for part in text.split(",")]
        if min(found) < 1:
            raise ValueError
        return found


def real(text: str) -> float | None:
    """A number, or None for "none"."""
    with _understood(text, "a number, or none"):
        return None if text.lower() == "none" else float(text)


def place(text: str) -> Path:
    """A folder to write; one of which parts lead back up exists only once they do."""
    path = Path(text)
    path = path.resolve() if ".." in path.parts else path
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:  # what writes weights takes no other names
        raise argparse.ArgumentTypeError(f"{text!r} asked, which is no name in UTF-8.") from None
    if (length := len(path.absolute().name.encode())) > LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} asked; a name can have {LONGEST} bytes, this one has {length}.")
    return path


def file(text: str) -> Path:
    """A file to write, refused before any work if that cannot be."""
    path = Path(text)
    above = path.absolute().parent
    if path.is_dir() or not above.is_dir() or not os.access(path if path.exists() else above, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} asked, but no file can be written there.")
    return path


@contextmanager
def _understood(text: str, what: str) -> Iterator[None]:
    """Say what is wanted where `text` cannot be read."""
    try:
        yield
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} asked; it must be {what}.") from None
