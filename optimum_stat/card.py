"""The model card that goes with a pruned model: rendered from its recipe, nothing written by hand."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import transformers
from huggingface_hub import EvalResult, ModelCardData
from transformers.models.auto import modeling_auto

from . import folders, plots, remote_code
from .budget import in_words
from .config import PruningConfig
from .families import task_of_class
from .hub import is_hub_id, shown


@dataclass(frozen=True)
class Paper:
    """The publication a method implements."""

    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        """Where to read it."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def bibtex(self) -> str:
        """An entry for a bibliography."""
        key = next(word for word in self.title.replace(":", "").lower().split() if word not in ("a", "an", "the"))
        return (
            f"@misc{{{key}{self.year},\n  title = {{{self.title}}},\n  author = {{{' and '.join(self.authors.split(', '))}}},\n"
            f"  year = {{{self.year}}},\n  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}},\n}}"
        )


PICTURES = "pictures"
DENSE = "the dense model"  # as its own teacher
ALT = {
    "kept": "The share of its heads and neurons that each block keeps",
    "errors": "The expected error of each block at every size, and the sizes that were chosen",
    "speed": "How many times as fast as the dense model the pruned one is, beside what its multiply-adds promise",
    "latency": "Milliseconds of the dense model, asked, predicted, and measured",
    "pareto": "Quality over time of all sizes of the family, the front as a line",
    "predicted": "What the method expected of every size of the family, beside what was measured",
}


def write(folder: Path, recipe: dict[str, Any], repo_id: str, paper: Paper) -> None:
    """README.md, and the pictures in it if there is matplotlib, each in place of an earlier one."""
    files = {f"{PICTURES}/{name}": content for name, content in plots.pictures(recipe).items()}
    names = [Path(name).stem for name in files]
    if files:
        (folder / PICTURES).mkdir(exist_ok=True)
    for name, content in {**files, "README.md": render(recipe, repo_id, paper, names).encode()}.items():
        folders.replace(folder / name, content)


def render(recipe: dict[str, Any], repo_id: str, paper: Paper, pictures: Sequence[str] = ()) -> str:
    """The card's text. `recipe` is what `recipe.make_recipe` returns, or `stat_recipe.json` read back; `pictures`: which of
    `plots.drawings` lie beside it.
    """
    recipe = recipe | {"base_model": shown(recipe["base_model"])}
    report = recipe["report"]
    task = task_of_class(recipe["architecture"])
    data = ModelCardData(
        base_model=recipe["base_model"] if is_hub_id(recipe["base_model"]) else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["optimum", "optimum-stat", "pruned", "structured-pruning", recipe["method"]],
        model_name=repo_id.rpartition("/")[2],
        eval_results=_results(recipe, task) or None,
        **recipe.get("base_card", {}),  # recipes of old have none
    )
    return _template().render(
        card_data=data.to_yaml(),
        repo_id=repo_id,
        task=task,
        recipe=recipe,
        on_hub=is_hub_id(recipe["base_model"]),
        report=report,
        length=in_words(report["seq_len"]),
        paper=paper,
        auto_class=recipe.get("own_class_of") or _auto_class(recipe["architecture"]),
        layers=_layers(report["groups"]),
        trunk={group["name"]: group for group in report["groups"] if "." not in group["name"]},
        grouped=recipe["record"]["heads"] != recipe["record"]["key_value_heads"],
        divided=_divided(report["groups"]),
        zeros=report.get("counts") == "weights",
        training=report.get("training"),
        teacher=_teacher(report.get("training") or {}),
        of_loss=recipe["config"].get("metric") != "stream",
        passes=sum(value for name, value in recipe["config"].items() if name.endswith("_epochs")),
        notes=_notes(report["groups"]),
        config_json=json.dumps(recipe["config"]),
        asks=_asks(recipe["config"]),
        pictures={name: f"![{ALT[name]}]({PICTURES}/{name}.png)" for name in pictures},
        seconds=sum(stage["seconds"] for stage in report["stages"].values()),
        peak=max((stage["peak_bytes"] or 0 for stage in report["stages"].values()), default=0),
        speed=_speed(recipe.get("speed", ())),
        family=_family(recipe.get("family"), report["keep"]),
        macs_ratio=report["pruned"]["block_macs"] / report["dense"]["block_macs"],
    )


@functools.cache
def _template() -> jinja2.Template:
    """Once a process: a family has many cards, and compiling takes longer than rendering."""
    return jinja2.Template((resources.files("optimum_stat") / "card_template.md").read_text("utf-8"))


def _asks(config: dict[str, Any]) -> dict[str, Any]:
    """The options that ask for this configuration: all that were set, and those that were unset against their default."""
    defaults = PruningConfig().to_dict()
    serving = {name for name in config if name.startswith("serve_")}
    aside = {"latency_table"} if config["budget"] in ("latency", "memory") else {"latency_table", *serving}
    aside |= {"keep"} if config.get("milliseconds") is not None else set()
    aside |= {"structures"} if config.get("structures") == defaults["structures"] else set()
    return {
        name: "none" if value is None else ",".join(value) if isinstance(value, list) else value
        for name, value in config.items()
        if name not in aside and (value is not None or defaults.get(name) is not None)
    }


def _teacher(training: dict[str, Any]) -> str | None:
    """What `--teacher` has to say."""
    name: str | None = training.get("teacher")
    return None if name in (None, DENSE) else name if is_hub_id(name) else "TEACHER"


def _results(recipe: dict[str, Any], task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=metric["dataset"],
            dataset_name=metric["dataset"],
            metric_type=metric["name"],
            metric_value=metric["value"],
        )
        for metric in recipe["metrics"]
    ]


def _speed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's rows, as text."""
    found = []
    for row in rows:
        behind = "one token each, behind" if row["phase"] == "decode" else "forward pass over"
        faster = {name: 1 / row["ratio"][other] for name, other in (("low", "high"), ("median", "median"), ("high", "low"))}
        each = {name: f"{row[f'{name}_tokens_per_second']:,.0f}" for name in ("dense", "pruned")}
        spreads = {name: _spread(own) for name, own in (("dense", row["dense"]), ("pruned", row["pruned"]), ("faster", faster))}
        found.append({"work": f"{behind} {row['batch_size']} × {row['seq_len']} tokens", "rates": each, **spreads})
    return found


def _family(family: dict[str, Any] | None, keep: float) -> dict[str, Any] | None:
    """The table's rows, as text; the dense model first."""
    if family is None:
        return None
    names, dense = list(family["dense_metrics"]), family["dense"]
    rows = [("dense", dense, family["dense_bytes"], 0.0, family["dense_metrics"], 1.0, "")]
    for size in family["sizes"]:
        name = f"**{size['keep']:g}**" if size["keep"] == keep else f"{size['keep']:g}"
        time, on_front = size["speed"]["ratio"]["median"], "yes" if size["on_front"] else ""
        rows.append((name, size["cost"], size["weight_bytes"], size["error"], size["metrics"], time, on_front))
    table = [
        [
            *(name, f"{cost['params']:,}", f"{cost['block_macs'] / dense['block_macs']:.2f}"),
            *(f"{size / 1e6:,.1f}", f"{error:.2g}"),
            *(f"{metrics[each]:g}" for each in names),
            *(f"{time:.2f}", on_front),
        ]
        for name, cost, size, error, metrics, time, on_front in rows
    ]
    head = ["kept", "parameters", "MACs", "MB", "expected error", *names, "time", "on the front"]
    return {**family, "head": head, "rows": table}


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f})"


def _auto_class(architecture: str) -> str:
    """What loads it: of transformers' Auto classes that make it the last, as the first are of no task; its own, without any."""
    autos = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    known = [name for name, auto in autos.items() if architecture in remote_code.made_by(auto)]
    return known[-1] if known else architecture if hasattr(transformers, architecture) else "AutoModel"


def _notes(groups: list[dict[str, Any]]) -> list[str]:
    """Where dropping a unit changed others too, and why. Recipes of old have no notes."""
    found = {
        f"{each['name'].partition('.')[2]}: {each['note']}"
        for each in groups
        if each.get("note") and each["kept"] < each["units"]
    }
    return sorted(found)


def _divided(groups: list[dict[str, Any]]) -> list[str]:
    """Of which dimensions heads have different numbers."""
    lost = {group["name"].rpartition(".")[2] for group in groups if group["kept"] < group["units"]}
    return [name for name in ("pairs", "values") if lost & {name, f"cross_{name}"}]


def _layers(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a block: {"block": i, "heads": "9 of 12", "neurons": "1,024 of 1,536"}."""
    rows: dict[int, dict[str, Any]] = {}
    for group in groups:
        block, _, structure = group["name"].partition(".")
        if structure:
            rows.setdefault(int(block), {"block": int(block)})[structure] = f"{group['kept']:,} of {group['units']:,}"
    return list(rows.values())
