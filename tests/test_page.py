"""The page that compares models: whole in itself, and true to the recipes."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from optimum_stat import page, plots
from optimum_stat.commands import main

pytestmark = pytest.mark.pictures

CARDS = Path(__file__).parent.parent / "model_cards"
FOLDERS = [CARDS / "minilm-sst2-stat", CARDS / "minilm-sst2-vib", CARDS / "smollm2-135m-stat"]
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags that close as they opened, and every address that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "srcset", "data", "action")]
        self.loaded += [value or "" for name, value in attrs if name.endswith("href") and tag != "a"]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing() -> None:
    pytest.importorskip("matplotlib")
    text = page.html(page.read(FOLDERS))
    found = Page(text)
    assert found.open == []
    assert "script" not in found.tags
    assert "svg" in found.tags
    assert all(address.startswith("#") for address in found.loaded), found.loaded
    assert not re.findall(r"url\((?!#)", text)
    assert not re.findall(r"@import|@font-face", text)
    clips = [each for each in found.ids if re.fullmatch(r"p[0-9a-f]{10}", each)]
    assert len(clips) == len(set(clips)) > 3


def test_it_says_what_the_recipes_say() -> None:
    recipes = page.read(FOLDERS)
    assert list(recipes) == [folder.name for folder in FOLDERS]
    rows = dict(page.summary(recipes))
    assert rows["method"] == ["stat", "vib", "stat"]
    report = recipes["minilm-sst2-stat"]["report"]
    assert (
        rows["parameters"][0] == f"{report['pruned']['params']:,} ({report['pruned']['params'] / report['dense']['params']:.1%})"
    )
    assert rows["expected error"][1] == ""  # scores that were learned are no losses
    (accuracy,) = [values for name, values in rows.items() if name.startswith("accuracy")]
    assert accuracy[2] == ""
    text = page.html(recipes)
    for _, values in page.summary(recipes):
        for value in filter(None, values):
            assert f"<td>{value}</td>" in text, value
    for group in report["groups"]:
        assert f"<td>{group['kept']:,} of {group['units']:,}</td>" in text


def test_what_stands_in_a_recipe_is_text(tmp_path: Path) -> None:
    recipe = json.loads((FOLDERS[0] / "recipe.json").read_text())
    recipe["base_model"] = "/home/me/<script>alert(1){{ 7 * 6 }}"
    (tmp_path / "stat_recipe.json").write_text(json.dumps(recipe))
    text = page.html(page.read([tmp_path]))
    assert "<script" not in text
    assert "./&lt;script&gt;alert(1){{ 7 * 6 }}" in text
    assert "/home/me" not in text  # where it lies is for this machine


def test_without_matplotlib_there_are_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    main(["report", *map(str, FOLDERS), "--html", str(tmp_path / "page.html")])
    assert "so the page has no pictures: pip install 'optimum-stat[report]'" in capsys.readouterr().err
    found = Page((tmp_path / "page.html").read_text())
    assert "svg" not in found.tags
    assert "table" in found.tags


def test_names_are_as_short_as_they_can_be_told_apart(tmp_path: Path) -> None:
    for name in ("one/0.5", "other/0.5"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(FOLDERS[0] / "recipe.json", tmp_path / name / "stat_recipe.json")
    (tmp_path / "one" / "0.5" / "model.safetensors").write_bytes(b"0" * 1_500_000)
    recipes = page.read([tmp_path / "one" / "0.5", tmp_path / "other" / "0.5"])
    assert list(recipes) == ["one/0.5", "other/0.5"]
    assert dict(page.summary(recipes))["weights on disk"] == ["1.5 MB", ""]
    assert page.text(recipes).splitlines()[0].split() == ["one/0.5", "other/0.5"]
    with pytest.raises(ValueError, match="is named twice"):
        page.read([tmp_path / "one" / "0.5"] * 2)


def test_what_is_no_pruned_model_is_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--html", str(tmp_path / "page.html")])
    assert "holds no recipe of a pruned model" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
    (tmp_path / "stat_recipe.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no recipe of a pruned model"):
        page.read([tmp_path])
