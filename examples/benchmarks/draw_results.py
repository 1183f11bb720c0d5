"""Tables and pictures of what the benchmarks wrote with --results, beside the numbers of other libraries.

    python examples/benchmarks/draw_results.py RESULTS.jsonl ... [--pictures FOLDER]

Prints a Markdown table for each benchmark, and one of peers.json: other libraries on the same model and data, each with its
source; a single seed, so for orientation. Of perplexities at many shares, also what the method expected of each. With --pictures,
three for each benchmark: score against size, score against the latency that was measured, and what each block keeps at each size.
Needs matplotlib (pip install 'optimum-stat[report]').
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

from measure import table
from results import Result, by_keep, read_results

PEERS = json.loads(Path(__file__).with_name("peers.json").read_text())
INK, FAINT = "#7a7d83", "#8b8f9640"  # readable on white and on near-black pages
COLOURS = ("#3b82f6", "#e0701a", "#1f9d6b", "#b8559c", "#8a6fd1", "#b08900")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--pictures", type=Path)
    args = parser.parse_args()
    every = read_results(args.results)
    for benchmark in dict.fromkeys(result.benchmark for result in every):
        own = [result for result in every if result.benchmark == benchmark]
        peers = [peer for peer in PEERS if peer["benchmark"] == benchmark]
        print(f"{benchmark}: {own[0].metric}, dense {own[0].dense:.2f}; {own[0].tokens:,} tokens\n\n{by_keep(own)}\n")
        if peers:
            rows = [(peer["recipe"], str(peer["kept"]), str(peer["score"]), peer["source"]) for peer in peers]
            print(table(("other", "kept", own[0].metric, "source"), rows) + "\n")
        print("\n\n".join(forecasts(own)) + "\n")
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "-", benchmark.lower()).strip("-")
            save(against_size(own, peers), args.pictures / f"{name}-size.png")
            save(against_latency(own), args.pictures / f"{name}-latency.png")
            save(per_layer(own), args.pictures / f"{name}-layers.png")


def forecasts(results: list[Result]) -> list[str]:
    """Of perplexities: the increase of the loss that a recipe expected at each share, beside the one that came; seeds' means."""
    found = []
    for recipe, points in curves(results).items() if results[0].metric == "perplexity" else ():
        pairs = {
            keep: (fmean(r.expected for r in own), fmean(math.log(r.score / r.dense) for r in own))
            for keep, own in sorted(points.items(), reverse=True)
        }
        if len(pairs) > 3:
            rows = [(str(keep), *(f"{value:.3f}" for value in pair)) for keep, pair in pairs.items()]
            close = correlation(*([math.log(value) for value in own] for own in zip(*pairs.values(), strict=True)))
            shown = table(("kept", f"loss that {recipe} expected", "measured"), rows)
            found.append(f"{shown}\n\ncorrelation of logarithms {close:.3f}")
    return found


def against_size(results: list[Result], peers: list[dict[str, Any]]) -> Any:
    """Mean over seeds, with the range as a bar; others as crosses."""
    figure, (axis,) = new_figure("share kept", results[0].metric)
    for colour, (recipe, points) in zip(COLOURS, curves(results).items(), strict=False):
        shares = sorted(points, reverse=True)
        means = [fmean(result.score for result in points[share]) for share in shares]
        low = [mean - min(result.score for result in points[share]) for mean, share in zip(means, shares, strict=True)]
        high = [max(result.score for result in points[share]) - mean for mean, share in zip(means, shares, strict=True)]
        axis.errorbar(shares, means, yerr=[low, high], marker="o", color=colour, label=recipe, linewidth=1.8, capsize=3)
    markers = "xP*v^s<>D"
    for marker, recipe in zip(markers, dict.fromkeys(peer["recipe"] for peer in peers), strict=False):
        own = [peer for peer in peers if peer["recipe"] == recipe]
        axis.plot(
            [peer["kept"] for peer in own],
            [peer["score"] for peer in own],
            marker,
            color=INK,
            label=recipe,
            markersize=7,
            markerfacecolor="none",
        )
    finish(axis, results, [peer["score"] for peer in peers])
    axis.invert_xaxis()
    return figure


def against_latency(results: list[Result]) -> Any:
    """One point a run."""
    figure, (axis,) = new_figure("time of a forward pass, dense = 1", results[0].metric)
    for colour, (recipe, points) in zip(COLOURS, curves(results).items(), strict=False):
        own = sorted((result for runs in points.values() for result in runs), key=lambda result: result.latency)
        axis.plot([r.latency for r in own], [r.score for r in own], "o", color=colour, label=recipe, markersize=6)
    finish(axis, results, [])
    axis.invert_xaxis()
    return figure


def per_layer(results: list[Result]) -> Any:
    """Shares of neurons and of heads that the first recipe keeps, block by block, at each size (mean over seeds)."""
    import numpy as np

    points = next(iter(curves(results).values()))
    shares = sorted(points, reverse=True)
    kinds = [kind for kind in ("heads", "neurons") if any(name.endswith(kind) for name in results[0].sizes)]
    figure, axes = new_figure("block", "", columns=len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        names = sorted((n for n in results[0].sizes if n.endswith(f".{kind}")), key=lambda name: int(name.partition(".")[0]))
        grid = np.array([[fmean(result.sizes[name] for result in points[share]) for name in names] for share in shares])
        shown = axis.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="cividis")
        axis.set_yticks(range(len(shares)), [f"{share:g}" for share in shares])
        axis.set_title(f"share of the {kind} kept", color=INK, fontsize=10, loc="left")
        axis.grid(False)
    axes[0].set_ylabel("share kept of all", color=INK, fontsize=9)
    bar = figure.colorbar(shown, ax=axes, shrink=0.9)
    bar.ax.tick_params(colors=INK, labelsize=8, length=0)
    bar.outline.set_visible(False)
    return figure


def curves(results: list[Result]) -> dict[str, dict[float, list[Result]]]:
    """Recipe -> share -> its runs."""
    found: dict[str, dict[float, list[Result]]] = {}
    for result in results:
        found.setdefault(result.recipe, {}).setdefault(result.keep, []).append(result)
    return found


def new_figure(x: str, y: str, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.set_xlabel(x, color=INK, fontsize=9)
        axis.set_ylabel(y, color=INK, fontsize=9)
        axis.tick_params(which="both", colors=INK, labelsize=9, length=0)
        axis.grid(True, color=FAINT, linewidth=0.8)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, axes


def finish(axis: Any, results: list[Result], others: list[float]) -> None:
    """The dense model's line, a logarithmic axis where numbers lie far apart, a legend."""
    from matplotlib.ticker import ScalarFormatter

    axis.axhline(results[0].dense, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    scores = [result.score for result in results] + others
    if min(scores) > 0 and max(scores) > 3 * min(scores) and results[0].metric == "perplexity":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
    legend = axis.legend(frameon=False, labelcolor=INK, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    legend.set_title(f"dense: {results[0].dense:g}", prop={"size": 8})
    legend.get_title().set_color(INK)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=160, transparent=True, metadata={"Software": None})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
