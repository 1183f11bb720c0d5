"""One page that shows several pruned models side by side: no scripts, nothing loaded from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from . import plots
from .folders import RECIPE
from .hub import shown

Rows = list[tuple[str, list[str]]]


def read(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Name -> recipe of each folder, with the bytes of its weights; names are as short as they can be told apart.

    Raises:
        ValueError: a folder has no recipe that can be read, or is named twice.
    """
    found = {}
    for name, folder in zip(_names(folders), folders, strict=True):
        path = next((folder / each for each in (RECIPE, "recipe.json") if (folder / each).is_file()), folder / RECIPE)
        try:
            recipe = json.loads(path.read_text("utf-8"))
            _ = recipe["report"]["groups"], recipe["method"], recipe["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds no recipe of a pruned model ({path.name}): {error}") from error
        files = list(folder.glob("*.safetensors"))
        found[name] = recipe | {"weight_bytes": sum(file.stat().st_size for file in files)}
    return found


def summary(recipes: Mapping[str, Mapping[str, Any]]) -> Rows:
    """(what, its value for each model), as text; what no model has is left out."""
    own = list(recipes.values())
    rows: Rows = [
        ("method", [each["method"] for each in own]),
        ("base model", [shown(each["base_model"]) or "" for each in own]),
        ("asked", [f"{each['report']['keep']:.0%} of the {plots.budget(each['report']['budget'])}" for each in own]),
        ("reached", [f"{each['report']['reached']:.2%}" for each in own]),
        ("parameters", [_of_dense(each, "params") for each in own]),
        ("parameters of the blocks", [_of_dense(each, "block_params") for each in own]),
        ("multiply-adds of the blocks", [_of_dense(each, "block_macs") for each in own]),
        ("weights on disk", [f"{each['weight_bytes'] / 1e6:,.1f} MB" if each["weight_bytes"] else "" for each in own]),
        ("expected error", [_error(each["report"]) for each in own]),
        *_metrics(own),
        *_speeds(own),
        ("data", [f"{each['report']['data']}, {each['report']['num_tokens']:,} tokens" for each in own]),
        ("time of the run", [f"{sum(s['seconds'] for s in each['report']['stages'].values()):,.0f} s" for each in own]),
        ("on", [(each.get("environment") or {}).get("device", "") for each in own]),
    ]
    return [(name, values) for name, values in rows if any(values)]


def text(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary for a terminal."""
    rows = [("", list(recipes)), *summary(recipes)]
    first = max(len(name) for name, _ in rows)
    widths = [max(len(values[at]) for _, values in rows) for at in range(len(recipes))]
    lines = [
        f"{name:<{first}}" + "".join(f"  {value:<{width}}" for value, width in zip(values, widths, strict=True))
        for name, values in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def html(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """The page. Without matplotlib it has tables only."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files("optimum_stat") / "page_template.html").read_text("utf-8"))
    structures = dict.fromkeys(s for recipe in recipes.values() for s in _sizes(recipe))
    blocks = max((len(own) for recipe in recipes.values() for own in _sizes(recipe).values()), default=0)
    return template.render(
        names=list(recipes),
        colours=[plots.SERIES[at % len(plots.SERIES)] for at in range(len(recipes))],
        summary=summary(recipes),
        kept=_svg(lambda: plots.kept({name: recipe["report"] for name, recipe in recipes.items()}), "kept", any(structures)),
        pictures={name: _pictures(recipe, at) for at, (name, recipe) in enumerate(recipes.items())},
        sizes={s: [[_cell(_sizes(recipe), s, b) for recipe in recipes.values()] for b in range(blocks)] for s in structures},
        versions=sorted({", ".join(f"{k} {v}" for k, v in recipe["versions"].items()) for recipe in recipes.values()}),
    )


def _pictures(recipe: Mapping[str, Any], at: int) -> list[tuple[str, str]]:
    """(caption, SVG) of what is one model's own."""
    captions = {
        "errors": "What each block is expected to lose at every size; dots are the sizes that were chosen",
        "speed": "Speed beside the dense model, with the middle half of all timings",
        "latency": "Latency asked, predicted and measured",
        "pareto": "All sizes of its family",
        "predicted": "Expected beside measured",
    }
    drawings = plots.drawings(recipe)
    return [(captions[name], _svg(drawings[name], f"{name}{at}")) for name in captions if name in drawings and plots.available()]


def _svg(draw: Any, name: str, wanted: bool = True) -> str:
    return plots.svg(draw(), name) if wanted and plots.available() else ""


def _names(folders: Sequence[Path]) -> list[str]:
    whole = [folder.absolute() for folder in folders]
    if len(set(whole)) < len(whole):
        twice = next(folder for at, folder in enumerate(folders) if whole[at] in whole[:at])
        raise ValueError(f"{twice} is named twice; a report compares different models.")
    for depth in range(1, max((len(path.parts) for path in whole), default=1) + 1):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in whole]


def _of_dense(recipe: Mapping[str, Any], what: str) -> str:
    pruned, dense = recipe["report"]["pruned"][what], recipe["report"]["dense"][what]
    return f"{pruned:,} ({pruned / dense:.1%})"


def _error(report: Mapping[str, Any]) -> str:
    """Scores that were learned are in no unit of the loss."""
    return "" if report.get("training") else f"{report['error']:.3g}"


def _metrics(recipes: Iterable[Mapping[str, Any]]) -> Rows:
    found = [{(m["name"], m["dataset"]): m for m in recipe["metrics"]} for recipe in recipes]
    names = dict.fromkeys(key for own in found for key in own)
    return [(f"{name}, {dataset}", [_metric(own.get((name, dataset))) for own in found]) for name, dataset in names]


def _metric(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return ""
    return f"{metric['value']:g}" + ("" if metric["dense"] is None else f" (dense {metric['dense']:g})")


def _speeds(recipes: Iterable[Mapping[str, Any]]) -> Rows:
    found = [{plots.workload(row): row for row in recipe.get("speed", ())} for recipe in recipes]
    names = dict.fromkeys(key for own in found for key in own)
    return [(f"speed, {name}", [_speed(own.get(name)) for own in found]) for name in names]


def _speed(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    ratio = row["ratio"]
    return f"{1 / ratio['median']:.2f}× ({1 / ratio['high']:.2f} to {1 / ratio['low']:.2f}), {row['pruned']['median']:.2f} ms"


def _sizes(recipe: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Structure -> block -> what it keeps."""
    found: dict[str, dict[int, str]] = {}
    for group in recipe["report"]["groups"]:
        block, _, structure = group["name"].rpartition(".")
        if block.isdigit():
            found.setdefault(structure, {})[int(block)] = f"{group['kept']:,} of {group['units']:,}"
    return found


def _cell(sizes: Mapping[str, Mapping[int, str]], structure: str, block: int) -> str:
    return sizes.get(structure, {}).get(block, "")
