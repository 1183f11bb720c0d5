"""The model card that goes with a pruned model: rendered from its recipe, nothing written by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .config import PruningConfig
from .families import TASK_OF_HEAD, task_of_class


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


def render(recipe: dict[str, Any], repo_id: str, paper: Paper) -> str:
    """The card's text. `recipe` is what `checkpoint.make_recipe` returns, or `stat_recipe.json` read back."""
    report = recipe["report"]
    task = task_of_class(recipe["architecture"])
    data = ModelCardData(
        base_model=recipe["base_model"] if is_hub_id(recipe["base_model"]) else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["optimum", "optimum-stat", "pruned", "structured-pruning", recipe["method"]],
        model_name=repo_id.rpartition("/")[2],
        eval_results=_results(recipe, task) or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=(resources.files("optimum_stat") / "card_template.md").read_text(),
        repo_id=repo_id,
        task=task,
        recipe=recipe,
        on_hub=is_hub_id(recipe["base_model"]),
        report=report,
        paper=paper,
        auto_class=_auto_class(recipe["architecture"]),
        layers=_layers(report["groups"]),
        trunk={group["name"]: group for group in report["groups"] if "." not in group["name"]},
        grouped=recipe["record"]["heads"] != recipe["record"]["key_value_heads"],
        zeros=report.get("counts") == "weights",
        training=report.get("training"),
        passes=sum(value for name, value in recipe["config"].items() if name.endswith("_epochs")),
        notes=_notes(report["groups"]),
        config_json=json.dumps(recipe["config"]),
        asks=_asks(recipe["config"]),
    )
    return str(card)


def is_hub_id(source: str | None) -> bool:
    """Whether a source is a name on the Hub and not a folder."""
    return source is not None and source.count("/") <= 1 and not source.startswith((".", "/", "~"))


def _asks(config: dict[str, Any]) -> dict[str, Any]:
    """The options that ask for this configuration: all that were set, and those that were unset against their default."""
    defaults = PruningConfig().to_dict()
    aside = {"structures"} if config.get("structures") == defaults["structures"] else set()
    aside |= {"latency_table"} if config["budget"] == "latency" else {"latency_table", "latency_batch_size"}
    return {
        name: "none" if value is None else " ".join(value) if isinstance(value, list) else value
        for name, value in config.items()
        if name not in aside and (value is not None or defaults.get(name) is not None)
    }


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


def _auto_class(architecture: str) -> str:
    heads = {"LMHeadModel": "CausalLM"}
    for head in TASK_OF_HEAD:
        if architecture.endswith(head):
            return f"AutoModelFor{heads.get(head, head)}"
    return "AutoModel"


def _notes(groups: list[dict[str, Any]]) -> list[str]:
    """Where dropping a unit changed others too, and why. Recipes of old have no notes."""
    found = {
        f"{each['name'].partition('.')[2]}: {each['note']}"
        for each in groups
        if each.get("note") and each["kept"] < each["units"]
    }
    return sorted(found)


def _layers(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a block: {"block": i, "heads": "9 of 12", "neurons": "1,024 of 1,536"}."""
    rows: dict[int, dict[str, Any]] = {}
    for group in groups:
        block, _, structure = group["name"].partition(".")
        if structure:
            rows.setdefault(int(block), {"block": int(block)})[structure] = f"{group['kept']:,} of {group['units']:,}"
    return list(rows.values())
