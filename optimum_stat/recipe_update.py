"""Enter what was measured afterwards into a saved model's recipe, and render its card anew."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import card, folders


def enter(folder: Path, metrics: Sequence[Mapping[str, Any]] = (), **values: Any) -> None:
    """`metrics` take the place of older ones on the same data; other `values` (speed, family) that of what has their name.

    Raises:
        ValueError: the recipe is of a method that this version lacks.
    """
    recipe = json.loads((folder / folders.RECIPE).read_text())
    new = {(metric["name"], metric["dataset"]): metric for metric in metrics if metric["value"] is not None}
    recipe["metrics"] = [m for m in recipe["metrics"] if (m["name"], m["dataset"]) not in new] + list(new.values())
    recipe |= {name: value for name, value in values.items() if value}
    card.write(folder, recipe, folder.absolute().name, paper_of(folder, recipe))
    folders.replace(folder / folders.RECIPE, f"{json.dumps(recipe, indent=2)}\n".encode())


def paper_of(folder: Path, recipe: Mapping[str, Any]) -> card.Paper:
    """The publication of the method that a recipe names.

    Raises:
        ValueError: this version lacks it.
    """
    from .methods import METHODS

    found = next((method.paper for method in METHODS if method.method == recipe["method"]), None)
    if found is None:
        raise ValueError(f"{folder / folders.RECIPE} names method {recipe['method']!r}, which this optimum-stat lacks.")
    return found
