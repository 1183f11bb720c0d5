"""The LLM Surgeon on WikiText-2: structured beside STAT, 2:4 and unstructured beside SparseGPT and Wanda.

    python examples/benchmarks/surgeon_wikitext.py DATA MODEL [--gguf-file FILE] RUN [RUN ...]

RUN: a recipe and how much it keeps, with the configuration's fields that differ from its defaults: `surgeon:0.75`,
`surgeon:0.5:shots=8`, `surgeon:0.5:structure=2:4`, `paper:0.75:structure=units,shots=4`, `stat:0.75`,
`surgeon:0.75:structures=heads+neurons+hidden`, and `sparsegpt:0.5:structure=2:4` or `wanda:0.5:structure=elements`, which keep
half and know these two structures. DATA, protocol and calibration are those of decoder_wikitext.py.
SparseGPT (2301.00774) and Wanda (2306.11695) stand below, layer after layer on the already pruned network; SparseGPT's update
is checked against brute force whenever it is about to run. float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decoder_wikitext import calibration, perplexity
from measure import forward_seconds, table
from torch import Tensor

from optimum_stat import STATConfig, STATPruner, SurgeonConfig, SurgeonPruner
from optimum_stat.data import make_batches
from optimum_stat.families import Group, find_groups, weight
from optimum_stat.linalg import add_to_gram, symmetrize
from optimum_stat.probes import quiet
from optimum_stat.walk import BlockWalk

HEAD = ("recipe", "kept", "perplexity", "forward passes", "per shot", "peak MiB over the model")
Empty = Callable[[Tensor, Tensor, int], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--gguf-file")
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    extra: dict[str, Any] = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    rows: list[tuple[str, ...]] = []
    floor = 0.0
    for run, (recipe, keep, fields) in [(run, parse(run)) for run in args.runs]:
        pruner = make(recipe, keep, fields, args.model, dtype=torch.float32, **extra)
        windows = calibration(pruner.tokenizer, args.data, args.windows)
        if not rows:
            rows.append(("dense", "1.0", f"{perplexity(pruner.model, pruner.tokenizer, args.data):.2f}", "", "", ""))
            floor = forward_seconds(pruner.model, [{"input_ids": part} for part in torch.split(windows, 8)])
        if recipe in ("sparsegpt", "wanda"):
            start = time.perf_counter()
            reached = prune_to_half(pruner, windows, recipe, fields["structure"])
            numbers = [(time.perf_counter() - start) / floor]
        else:
            pruner.prune(windows)
            reached, *numbers = report_numbers(pruner.report, floor)
        score = perplexity(pruner.model, pruner.tokenizer, args.data)
        cells = [f"{number:,.1f}" for number in numbers]
        rows.append((run, f"{reached:.4f}", f"{score:.2f}", *cells, *[""] * (3 - len(cells))))
        print(table(HEAD, rows), flush=True)


def parse(run: str) -> tuple[str, float, dict[str, Any]]:
    """`recipe:keep[:field=value,field=value]`."""
    recipe, keep, *rest = run.split(":", 2)
    pairs = [pair.split("=") for pair in rest[0].split(",")] if rest else []
    fields = {name: read(getattr(SurgeonConfig(), name, ""), value) for name, value in pairs}
    if recipe in ("sparsegpt", "wanda") and (float(keep) != 0.5 or fields.get("structure") not in ("2:4", "elements")):
        raise SystemExit(f"{run} asked; it must be {recipe}:0.5:structure=2:4 or {recipe}:0.5:structure=elements.")
    return recipe, float(keep), fields


def read(default: Any, value: str) -> Any:
    return tuple(value.split("+")) if isinstance(default, tuple) else (int if default is None else type(default))(value)


def make(recipe: str, keep: float, fields: dict[str, Any], model: str, **extra: Any) -> Any:
    if recipe == "stat":
        return STATPruner.from_pretrained(model, STATConfig(keep=keep, **fields), **extra)
    config = SurgeonConfig.paper(keep, **fields) if recipe == "paper" else SurgeonConfig(keep=keep, **fields)
    return SurgeonPruner.from_pretrained(model, config, **extra)


def report_numbers(report: Any, floor: float) -> tuple[float, float, float, float]:
    """(share kept, forward passes, forward passes per shot, peak MiB)."""
    seconds, stages = sum(stage.seconds for stage in report.stages.values()), report.stages
    shots = sum(name.startswith("measure") for name in stages)
    peak = max(stage.peak_bytes or 0 for stage in stages.values())
    return report.reached, seconds / floor, seconds / floor / shots, peak / 2**20


@torch.no_grad()
def prune_to_half(pruner: Any, windows: Tensor, recipe: str, structure: str) -> float:
    """Empty half of each layer, on what the pruned network before its block has become; the share of weights left."""
    if recipe == "sparsegpt":
        check_sparsegpt()
    empty: Empty = sparsegpt if recipe == "sparsegpt" else wanda
    group_of = 4 if structure == "2:4" else 0
    batches = make_batches(windows, pruner.model.config, pruner.config, causal=True)
    left = total = 0
    with quiet(pruner.model):
        walk = BlockWalk(pruner.model, batches)
        for index in walk.steps(recipe):
            linears = [[*(p.linear for p in g.producers), g.consumer] for g in find_groups(pruner.model) if g.block == index]
            readers = [part for own in linears for part in (own[:-1], own[-1:])]  # those of one part read the same
            probes = [Group(str(i), index, "", (), part[0], 1, part[0]) for i, part in enumerate(readers)]
            grams = {probe.name: square(weight(probe.consumer).shape[1]) for probe in probes}
            walk.run(index, probes, partial(add_to, grams))
            for probe, part in zip(probes, readers, strict=True):
                gram = symmetrize(grams[probe.name]).float() / batches.num_tokens
                for linear in part:
                    value = empty(weight(linear), gram, group_of)
                    weight(linear).copy_(value)
                    left, total = left + int(value.count_nonzero()), total + value.numel()
            walk.advance(index)
    return left / total


def add_to(grams: dict[str, Tensor], probe: Group, z: Tensor) -> None:
    add_to_gram(grams[probe.name], z)


def square(width: int) -> Tensor:
    return torch.zeros(width, width, dtype=torch.float64)


def wanda(value: Tensor, gram: Tensor, group_of: int) -> Tensor:
    """Half of each row (or of every four) goes where |W_ij| ||x_j|| is least; nothing is corrected."""
    score = value.abs() * gram.diagonal().sqrt()
    width = group_of or value.shape[1]
    lowest = score.view(len(value), -1, width).topk(width // 2, largest=False).indices
    mask = torch.zeros(len(value), value.shape[1] // width, width, dtype=torch.bool).scatter_(2, lowest, True)
    return value.masked_fill(mask.view_as(value), 0)


def sparsegpt(value: Tensor, gram: Tensor, group_of: int, run: int = 128, damping: float = 0.01) -> Tensor:
    """Column after column: what goes is emptied, and the columns to its right take over; masks are chosen four by four, or run by
    run of 128 columns (half of the run's weights, where `W_ij^2 / U_jj^2` is least)."""
    result = value.clone()
    factor = upper_factor(gram, damping)
    result[:, gram.diagonal() == 0] = 0
    for start in range(0, value.shape[1], run):
        stop = min(start + run, value.shape[1])
        columns = slice(start, stop)
        if not group_of:
            score = result[:, columns].square() / factor.diagonal()[columns].square()
            mask = score <= score.flatten().kthvalue(score.numel() // 2).values
        else:
            mask = torch.zeros(len(value), stop - start, dtype=torch.bool)
        errors = torch.zeros(len(value), stop - start)
        for j in range(start, stop):
            if group_of and (j - start) % group_of == 0:
                score = result[:, j : j + group_of].square() / factor.diagonal()[j : j + group_of].square()
                mask[:, j - start : j - start + group_of].scatter_(1, score.topk(group_of // 2, largest=False).indices, True)
            gone = mask[:, j - start]
            errors[:, j - start] = result[:, j] * gone / factor[j, j]
            result[:, j:stop] -= errors[:, j - start, None] * factor[j, j:stop]
            result[gone, j] = 0
        result[:, stop:] -= errors @ factor[columns, stop:]
    return result


def upper_factor(gram: Tensor, damping: float) -> Tensor:
    """U with U^T U = (H + damping * mean(diag H) I)^-1, in float64 and back."""
    h = gram.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    factor: Tensor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    return factor.to(gram.dtype)


def check_sparsegpt() -> None:
    """Each emptied weight must move the columns to its right to the exact least-squares optimum, all left of it held."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator, dtype=torch.float64) @ torch.randn(8, 8, generator=generator, dtype=torch.float64)
    value, gram = torch.randn(5, 8, generator=generator, dtype=torch.float64), x.T @ x / 40
    for group_of in (0, 4):
        found = sparsegpt(value.float(), gram.float(), group_of, run=4, damping=0.0).double()
        expected = value.clone()
        for j in range(8):
            rows = (found[:, j] == 0).nonzero().flatten()
            right = list(range(j + 1, 8))
            lost = expected[rows, j, None]  # min over D of ||x_j lost - x_right D||
            move = torch.linalg.solve(gram[right][:, right], gram[right, j]) if right else gram.new_zeros(0)
            expected[rows[:, None], right] += lost * move
            expected[rows, j] = 0
        assert torch.allclose(found, expected, atol=1e-4), "SparseGPT's update is not what brute force says"
        assert (found == 0).float().mean() == 0.5


if __name__ == "__main__":
    main()
