"""What of a saved model goes to the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import folders
from .hub import Destination, is_hub_id, shown


def publish(
    folder: Path,
    to: Destination,
    message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    *,
    instead: Mapping[str, bytes] | None = None,
) -> str:
    """Push all files of a saved model but hidden ones, in one commit; returns its address. instead: contents of some.

    Where on this machine a local base model lies stands in the recipe, for `evaluate`; it stays here.
    """
    recipe = json.loads((folder / folders.RECIPE).read_text())
    inside = {each.relative_to(folder): each for each in sorted(folder.rglob("*")) if each.is_file()}
    files = {path.as_posix(): each for path, each in inside.items() if not any(part.startswith(".") for part in path.parts)}
    public = {folders.RECIPE: f"{json.dumps(_public(recipe), indent=2)}\n".encode()}
    message = message or f"Pruned with optimum-stat ({recipe['method']})"
    return to.upload({**files, **(instead or {}), **public}, message, revision, create_pr)


def _public(recipe: dict[str, Any]) -> dict[str, Any]:
    base = shown(recipe["base_model"])
    here = () if is_hub_id(base) else ("base_subfolder",)
    return {name: value for name, value in recipe.items() if name not in here} | {"base_model": base}
