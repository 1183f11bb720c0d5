"""Pictures: what they show is what the recipe says, and they can be read on white and on black."""

from __future__ import annotations

import copy
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb, to_rgba

from optimum_stat import plots
from optimum_stat.budget import Cost
from optimum_stat.speed import Speed, Spread
from optimum_stat.sweep_report import Size, SweepReport

pytestmark = pytest.mark.pictures

CARDS = Path(__file__).parent.parent / "model_cards"
PAGES = {"light": "#ffffff", "dark": "#0b0f19"}  # the Hub's


@pytest.fixture
def recipe() -> dict[str, Any]:
    return json.loads((CARDS / "minilm-sst2-stat" / "recipe.json").read_text())


def luminance(colour: Any) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def contrast(one: Any, other: Any) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", PAGES)
def test_colours_stand_out_from_both_pages(page: str) -> None:
    assert contrast(plots.INK, PAGES[page]) >= 4
    blocks = list(range(12))
    for colour in (*plots.SERIES, *(plots._depth(block, blocks) for block in blocks)):
        assert contrast(colour, PAGES[page]) >= 3, colour  # WCAG 1.4.11, for what is not text


def test_the_bars_are_what_is_kept(recipe: dict[str, Any]) -> None:
    figure = plots.kept({"": recipe["report"]})
    for axis, structure in zip(figure.axes, ("heads", "neurons"), strict=True):
        assert axis.get_title(loc="left") == f"{structure} kept"
        groups = [group for group in recipe["report"]["groups"] if group["name"].endswith(structure)]
        bars = [bar for bar in axis.patches if to_rgba(bar.get_facecolor()) == to_rgba(plots.SERIES[0])]
        assert [bar.get_height() for bar in bars] == pytest.approx([group["kept"] / group["units"] for group in groups])


def test_several_models_have_a_bar_each(recipe: dict[str, Any]) -> None:
    figure = plots.kept({"one": recipe["report"], "other": recipe["report"]})
    colours = {to_rgba(bar.get_facecolor()) for bar in figure.axes[0].patches}
    assert {to_rgba(colour) for colour in plots.SERIES[:2]} < colours
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "other"]


def test_after_several_shots_the_dots_are_shares_of_the_dense_model(recipe: dict[str, Any]) -> None:
    """The curves are those of the last shot, which began with fewer units."""
    report = copy.deepcopy(recipe["report"])
    for group in report["groups"]:
        group["units"] *= 2
    for axis, structure in zip(plots.errors(report).axes, ("heads", "neurons"), strict=True):
        groups = [group for group in report["groups"] if group["name"].endswith(structure)]
        dots = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
        assert set(dots) <= {group["kept"] / group["units"] for group in groups}
        assert max(dots) <= 0.5


def test_the_dots_lie_on_the_curves_where_the_model_ended(recipe: dict[str, Any]) -> None:
    figure = plots.errors(recipe["report"])
    for axis, structure in zip(figure.axes, ("heads", "neurons"), strict=True):
        assert axis.get_yscale() == "log"
        groups = [group for group in recipe["report"]["groups"] if group["name"].endswith(structure)]
        dots = [line.get_xydata()[0].tolist() for line in axis.lines if line.get_marker() == "o"]
        wanted = [[group["kept"] / group["units"], dict(map(tuple, group["curve"]))[group["kept"]]] for group in groups]
        assert np.allclose(dots, [each for each in wanted if each[1] > 0])
        curves = [line for line in axis.lines if line.get_marker() != "o"]
        assert len(curves) == len(groups)
        assert all((np.diff(line.get_ydata()) <= 0).all() for line in curves)


def test_speed_shows_the_middle_half_and_what_the_macs_promise() -> None:
    row = {"phase": "prefill", "batch_size": 32, "seq_len": 13, "ratio": {"low": 0.5, "median": 0.625, "high": 0.8}}
    (axis,) = plots.speed([row], 0.5).axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([1.6])
    (errors,) = axis.collections
    assert sorted(errors.get_segments()[0][:, 0]) == pytest.approx([1.25, 2.0])
    assert [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1][-1] == pytest.approx(2.0)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["32 × 13 tokens"]


def test_latency_shows_four_times() -> None:
    found = {"dense": 10.0, "asked": 5.0, "predicted": 4.9, "measured": 5.2, "batch_size": 1, "seq_len": 8, "phase": "prefill"}
    (axis,) = plots.latency(found).axes
    assert [bar.get_width() for bar in axis.patches] == [10.0, 5.0, 4.9, 5.2]
    assert [text.get_text() for text in axis.texts] == ["10.00 ms", "5.00 ms", "4.90 ms", "5.20 ms"]


def test_pngs_are_transparent_and_the_same_every_time(recipe: dict[str, Any]) -> None:
    from PIL import Image

    first, again = plots.pictures(recipe), plots.pictures(recipe)
    assert first == again
    assert list(first) == ["kept.png", "errors.png", "speed.png"]
    for content in first.values():
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        assert pixels.shape[2] == 4
        assert (pixels[..., 3] == 0).mean() > 0.3  # the page shows through
        assert (pixels[0, :, 3] == 0).all()  # nothing touches the edge
        assert (pixels[:, -1, 3] == 0).all()


def test_reports_of_old_have_no_curves(recipe: dict[str, Any]) -> None:
    for group in recipe["report"]["groups"]:
        del group["curve"]
    del recipe["speed"]
    assert list(plots.pictures(recipe)) == ["kept.png"]


def test_svgs_are_text_and_keep_their_ids_apart(recipe: dict[str, Any]) -> None:
    class Ids(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: set[str] = set()
            self.scripts = 0

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.scripts += tag == "script"
            self.found |= {value for name, value in attrs if name == "id" and value.startswith("p")}

    parsed = []
    for name in ("one", "other"):
        text = plots.svg(plots.kept({"": recipe["report"]}), name)
        assert text.startswith("<svg")
        assert "neurons kept" in text
        parser = Ids()
        parser.feed(text)
        assert parser.scripts == 0
        parsed.append({each for each in parser.found if len(each) > 9})
    assert parsed[0]
    assert not parsed[0] & parsed[1]


def test_a_hundred_blocks_and_groups_of_the_whole_model_are_drawn() -> None:
    groups = [
        {"name": f"{block}.{structure}", "units": 8, "kept": 1 + block % 8, "curve": [[1, 0.5], [8, 0.0]]}
        for block in range(100)
        for structure in ("heads", "neurons")
    ]
    groups.append({"name": "hidden", "units": 64, "kept": 32, "curve": []})
    recipe = {"report": {"groups": groups}}
    assert len(plots.pictures(recipe)) == 2
    assert len(plots.kept({"": recipe["report"]}).axes) == 2
    assert plots.pictures({"report": {"groups": groups[-1:]}}) == {}


@pytest.fixture
def family() -> dict[str, Any]:
    dense = Cost(100, 80, 60)
    spread = Spread(9.0, 10.0, 11.0)
    values = ((0.8, 0.9, 0.8), (0.6, 0.7, 0.75), (0.5, 0.6, 0.78), (0.4, 0.4, 0.5))  # keep, time, accuracy
    sizes = tuple(
        Size(
            keep,
            dense,
            0.1 / keep,
            400,
            {"accuracy": own},
            Speed("cpu", "prefill", 1, 8, spread, spread, Spread(time, time, time), 9),
        )
        for keep, time, own in values
    )
    return SweepReport("stat", "macs", dense, 500, sizes, "SST-2", {"accuracy": 0.82}).to_dict()


def test_the_front_is_what_nothing_else_beats(family: dict[str, Any]) -> None:
    assert [size["on_front"] for size in family["sizes"]] == [True, False, True, True]
    (axis,) = plots.pareto(family, 0.5).axes
    line = axis.lines[0].get_xydata().tolist()
    assert line == [[0.4, 0.5], [0.6, 0.78], [0.9, 0.8]]
    marks = [(line.get_xdata()[0], line.get_color()) for line in axis.lines[1:] if line.get_marker() == "o"]
    assert dict(marks)[0.6] == plots.SERIES[1]  # the model whose card it is
    assert {colour for time, colour in marks if time != 0.6} == {plots.SERIES[0]}
    assert [text.get_text() for text in axis.texts] == ["0.4", "0.5", "0.6", "0.8", "dense"]


def test_less_perplexity_is_better() -> None:
    cost = Cost(100, 80, 60)
    sizes = [Size(keep, Cost(1, 1, macs), 0.1, 4, {"perplexity": own}) for keep, macs, own in ((0.9, 50, 20.0), (0.5, 30, 19.0))]
    assert SweepReport("stat", "macs", cost, 5, tuple(sizes)).front == (False, True)


def test_expected_beside_measured(family: dict[str, Any]) -> None:
    (axis,) = plots.predicted(family).axes
    wanted = [[0.1 / keep, 0.82 - own] for keep, own in ((0.8, 0.8), (0.6, 0.75), (0.5, 0.78), (0.4, 0.5))]
    assert np.allclose(axis.lines[0].get_xydata(), wanted)
