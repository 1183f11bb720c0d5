"""Pictures of a pruned model, drawn from its recipe: plain values in, matplotlib figures out.

matplotlib is an extra (`pip install 'optimum-stat[report]'`): without it, `pictures` returns none. Backgrounds are transparent,
and every colour stands out from white and from near-black, as one picture has to be read in a light and in a dark page.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

INK, FAINT = "#7a7d83", "#8b8f9640"
"""Text, at 4 to 1 against #ffffff and #0b0f19; grid lines and what was there before."""
SERIES = ("#3b82f6", "#e0701a", "#1f9d6b", "#b8559c", "#8a6fd1", "#b08900")
DEPTH = ("#4777ea", "#8f5fd6", "#cc4f8f", "#dd6a3c", "#b08900")
SIZE = 7.2  # inches a picture is wide
DPI = 160
Recipe = Mapping[str, Any]


def available() -> bool:
    """Whether there can be pictures."""
    return find_spec("matplotlib") is not None


def pictures(recipe: Recipe) -> dict[str, bytes]:
    """File name -> PNG, of all that the recipe has to show; empty without matplotlib."""
    return {f"{name}.png": png(draw()) for name, draw in drawings(recipe).items()} if available() else {}


def drawings(recipe: Recipe) -> dict[str, Callable[[], Any]]:
    """Name -> what draws it, in the order of the card."""
    report, found = recipe["report"], dict[str, Callable[[], Any]]()
    groups = _by_block(report["groups"]).values()
    if groups:
        found["kept"] = lambda: kept({"": report})
    if any(group.get("curve") for group in groups):
        found["errors"] = lambda: errors(report)
    if recipe.get("speed"):
        found["speed"] = lambda: speed(recipe["speed"], _macs_ratio(report))
    if report.get("latency"):
        found["latency"] = lambda: latency(report["latency"])
    if recipe.get("family"):
        found["pareto"] = lambda: pareto(recipe["family"], report["keep"])
        found["predicted"] = lambda: predicted(recipe["family"], report["keep"])
    return found


def kept(reports: Mapping[str, Any]) -> Any:
    """How many heads and neurons each block keeps, as shares of the dense block: one colour for each report."""
    structures = _structures(next(iter(reports.values())))
    figure, axes = _figure(1 + 1.15 * len(structures), rows=len(structures), sharex=True)
    own = {label: _by_block(report["groups"]) for label, report in reports.items()}
    blocks = sorted({block for found in own.values() for _, block in found})
    width = 0.8 / len(own)
    for axis, structure in zip(axes, structures, strict=True):
        axis.bar(blocks, [1] * len(blocks), 0.8, color=FAINT, zorder=1)
        for at, (label, found) in enumerate(own.items()):
            shares = [
                found[structure, b]["kept"] / found[structure, b]["units"] if (structure, b) in found else 0 for b in blocks
            ]
            places = [block - 0.4 + width * (at + 0.5) for block in blocks]
            axis.bar(places, shares, width if len(own) == 1 else 0.92 * width, color=_colour(at), zorder=2, label=label or None)
        _share_axis(axis)
        axis.set_title(f"{structure} kept", loc="left", fontsize=10, color=INK, fontweight="bold")
    axes[-1].set_xlabel("block")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlim(min(blocks) - 0.6, max(blocks) + 0.6)
    if len(own) > 1:
        _legend(figure, axes[0])
    return figure


def errors(report: Mapping[str, Any]) -> Any:
    """What each block is expected to lose at every size, from early blocks to late ones, and the sizes that were chosen."""
    structures = _structures(report)
    figure, axes = _figure(3.3, columns=len(structures), sharey=True)
    groups = _by_block(report["groups"])
    blocks = sorted({block for _, block in groups})
    for axis, structure in zip(axes, structures, strict=True):
        for block in blocks:
            group = groups.get((structure, block))
            if group is not None and group.get("curve"):
                _curve(axis, group, _depth(block, blocks))
        axis.set_yscale("log")
        _share_axis(axis, of_y=False)
        axis.set_xlabel(f"{structure} kept")
    axes[0].set_ylabel("scores of what goes" if report.get("training") else "expected error")
    _blocks_legend(figure, blocks)
    return figure


def speed(rows: Sequence[Mapping[str, Any]], macs: float) -> Any:
    """How much faster the model is than the dense one, with the middle half of all timings, beside what its MACs promise."""
    figure, (axis,) = _figure(0.9 + 0.42 * len(rows))
    for at, row in enumerate(rows):
        ratio = {name: 1 / row["ratio"][name] for name in ("low", "median", "high")}
        axis.barh(at, ratio["median"], 0.56, color=_colour(0), zorder=2)
        spread = [[ratio["median"] - ratio["high"]], [ratio["low"] - ratio["median"]]]
        axis.errorbar(ratio["median"], at, xerr=spread, color=INK, capsize=3, linewidth=1.4, zorder=3)
        axis.text(0.03, at, f"{ratio['median']:.2f}×", va="center", color="white", fontsize=9, fontweight="bold", zorder=4)
    axis.axvline(1, color=INK, linewidth=1, zorder=3)
    axis.axvline(1 / macs, color=_colour(1), linewidth=1.6, linestyle=(0, (4, 2)), zorder=3)
    axis.set_yticks(range(len(rows)), [workload(row) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    fastest = max(1 / row["ratio"]["low"] for row in rows)
    axis.set_xlim(0, 1.12 * max(1 / macs, fastest, 1))
    axis.set_xlabel("times as fast as the dense model")
    axis.text(1 / macs, -0.62, f"by MACs {1 / macs:.2f}×", color=_colour(1), ha="center", va="bottom", fontsize=9)
    _plain(axis, grid="x")
    return figure


def latency(found: Mapping[str, Any]) -> Any:
    """Milliseconds of the dense model, what was asked and predicted, and what was measured."""
    names = ("dense", "asked", "predicted", "measured")
    figure, (axis,) = _figure(2.3)
    colours = (FAINT, FAINT, _colour(1), _colour(0))
    axis.barh(range(4), [found[name] for name in names], 0.6, color=colours, zorder=2)
    for at, name in enumerate(names):
        axis.text(found[name] + 0.01 * found["dense"], at, f"{found[name]:.2f} ms", va="center", color=INK, fontsize=9)
    axis.set_yticks(range(4), names)
    axis.set_ylim(3.5, -0.5)
    axis.set_xlim(0, 1.15 * max(found[name] for name in names))
    axis.set_xlabel(f"milliseconds for {found['batch_size']} × {found['seq_len']} tokens")
    _plain(axis, grid="x")
    return figure


def pareto(family: Mapping[str, Any], keep: float | None = None) -> Any:
    """Quality over time of all sizes of a sweep, the front as a line; the size `keep` stands out."""
    figure, (axis,) = _figure(3.6)
    metric, sizes = family["metric"], sorted(family["sizes"], key=lambda size: size["speed"]["ratio"]["median"])
    points = [(size["speed"]["ratio"]["median"], size["metrics"][metric]) for size in sizes]
    front = [point for point, size in zip(points, sizes, strict=True) if size["on_front"]]
    axis.plot(*zip(*front, strict=True), color=_colour(0), linewidth=1.5, zorder=2)
    for point, size in zip(points, sizes, strict=True):
        _point(axis, point, f"{size['keep']:g}", size["keep"] == keep, size["on_front"])
    axis.plot([1], [family["dense_metrics"][metric]], "D", color=INK, markersize=7, zorder=3)
    beside = {"xytext": (0, -16), "textcoords": "offset points", "ha": "center"}
    axis.annotate("dense", (1, family["dense_metrics"][metric]), color=INK, fontsize=9, **beside)
    axis.set_xlim(0, 1.06 * max(1, *(x for x, _ in points)))
    axis.margins(y=0.15)
    axis.set_ylabel(metric.replace("_", " "))
    work, what = workload(sizes[0]["speed"]), budget(family["budget"])
    axis.set_xlabel(f"time for {work}, of the dense model's; labels: share of the {what} kept")
    axis.grid(True, axis="x", color=FAINT, linewidth=0.8, zorder=0)
    return figure


def predicted(family: Mapping[str, Any], keep: float | None = None) -> Any:
    """What the method expected of every size of a sweep, beside what the metric lost."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure, (axis,) = _figure(3.2)
    metric, before = family["metric"], family["dense_metrics"][family["metric"]]
    sizes = [size for size in family["sizes"] if size["error"] > 0]
    points = [(size["error"], abs(size["metrics"][metric] - before)) for size in sizes]
    axis.plot(*zip(*points, strict=True), color=FAINT, linewidth=1.5, zorder=2) if points else None
    for point, size in zip(points, sizes, strict=True):
        _point(axis, point, f"{size['keep']:g}", size["keep"] == keep)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.08, y=0.15)
    axis.set_xlabel("expected error")
    axis.set_ylabel(f"distance from dense, {metric.replace('_', ' ')}")
    axis.grid(True, axis="x", color=FAINT, linewidth=0.8, zorder=0)
    return figure


def png(figure: Any) -> bytes:
    """A file for cards."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, transparent=True, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Any, name: str) -> str:
    """An element for pages, whose text is text; `name` keeps the ids of several in one page apart."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(height: float, rows: int = 1, columns: int = 1, **shared: bool) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(SIZE, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = figure.subplots(rows, columns, squeeze=False, **shared).flatten().tolist()
    for axis in axes:
        _plain(axis)
    return figure, axes


def _plain(axis: Any, grid: str = "y") -> None:
    """No frame, no background, thin grid lines behind what is drawn."""
    axis.patch.set_alpha(0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(which="both", colors=INK, labelsize=9, length=0)
    axis.grid(False)
    axis.grid(True, axis=grid, color=FAINT, linewidth=0.8, zorder=0)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=INK, fontsize=9)


def _share_axis(axis: Any, of_y: bool = True) -> None:
    """Shares from 0 to 1 in per cent, along y or x."""
    ticks, labels = [0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"]
    if of_y:
        axis.set_ylim(0, 1.02)
        axis.set_yticks(ticks[::2], labels[::2])
    else:
        axis.set_xlim(0, 1.03)
        axis.set_xticks(ticks, labels)


def _curve(axis: Any, group: Mapping[str, Any], colour: Any) -> None:
    """One group's curve, with a dot where it ended. The last point, no error at all, has no place on a logarithmic axis.

    After several shots it is that of the last, which began with fewer units.
    """
    units = group["units"]
    points = [(size / units, error) for size, error in group["curve"] if error > 0]
    axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, alpha=0.9, zorder=2) if points else None
    chosen = [(size / units, error) for size, error in group["curve"] if size == group["kept"] and error > 0]
    for x, y in chosen:
        axis.plot([x], [y], "o", color=colour, markersize=6, markeredgecolor=INK, markeredgewidth=0.8, zorder=4)


def _point(axis: Any, point: tuple[float, float], label: str, chosen: bool, solid: bool = True) -> None:
    colour = _colour(1 if chosen else 0)
    fill = {} if solid else {"markerfacecolor": "none"}
    axis.plot(*([value] for value in point), "o", color=colour, markersize=9 if chosen else 7, zorder=4, **fill)
    where = {"xytext": (7, -11), "textcoords": "offset points"}
    axis.annotate(label, point, color=colour if chosen else INK, fontsize=9, fontweight="bold" if chosen else "normal", **where)


def _depth(block: int, blocks: Sequence[int]) -> Any:
    """A colour from blue (early) to amber (late), none of them so light or so dark that a page would swallow it."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("depth", DEPTH)
    return colours(blocks.index(block) / max(1, len(blocks) - 1))


def _blocks_legend(figure: Any, blocks: Sequence[int]) -> None:
    from matplotlib.lines import Line2D

    shown = blocks if len(blocks) <= 12 else [blocks[round(i * (len(blocks) - 1) / 5)] for i in range(6)]
    lines = [Line2D([], [], color=_depth(block, blocks), linewidth=2.5, label=f"block {block}") for block in shown]
    chosen = Line2D([], [], color=INK, marker="o", linestyle="", markersize=6, label="chosen")
    figure.legend(handles=[*lines, chosen], loc="outside right center", frameon=False, labelcolor=INK, fontsize=9)


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    columns = min(3, len(labels))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=9)


def _structures(report: Mapping[str, Any]) -> list[str]:
    names = (group["name"].rpartition(".") for group in report["groups"])
    return list(dict.fromkeys(structure for block, _, structure in names if block))


def _by_block(groups: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """(structure, block) -> its group; groups that belong to no block are left out."""
    parts = [(group["name"].rpartition("."), group) for group in groups]
    return {(structure, int(block)): group for (block, _, structure), group in parts if block.isdigit()}


def _macs_ratio(report: Mapping[str, Any]) -> float:
    return float(report["pruned"]["block_macs"] / report["dense"]["block_macs"])


def workload(row: Mapping[str, Any]) -> str:
    """What was timed, in words."""
    phase = "decode, " if row["phase"] == "decode" else ""
    return f"{phase}{row['batch_size']} × {row['seq_len']} tokens"


def budget(name: str) -> str:
    """What `keep` counts, in words."""
    return {"params": "parameters", "macs": "MACs"}.get(name, name)


def _colour(at: int) -> str:
    return SERIES[at % len(SERIES)]
