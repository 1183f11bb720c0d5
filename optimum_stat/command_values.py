"""What stands behind an option, as a value; what cannot be read is answered with what is wanted."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def _understood(text: str, what: str) -> Iterator[None]:
    """Say what is wanted where `text` cannot be read."""
    try:
        yield
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} asked; it must be {what}.") from None
