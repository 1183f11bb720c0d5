"""What the benchmarks share: the floor that a run is compared with, a table, a card for the gallery."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from optimum_stat import Pruner, card, checkpoint


@torch.no_grad()
def forward_seconds(model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], repeats: int = 2) -> float:
    """Best of `repeats` forward passes of the whole model over the calibration batches."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for batch in batches:
            model(**batch)
        times.append(time.perf_counter() - start)
    return min(times)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_card(pruner: Pruner[Any], folder: Path, base_model: str | None, data: str) -> None:
    """The card of a run and the recipe it is rendered from, into a folder of model_cards/."""
    recipe = checkpoint.make_recipe(pruner)
    recipe["base_model"], recipe["report"]["data"] = base_model, data
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    (folder / "README.md").write_text(card.render(recipe, folder.name, pruner.paper))
