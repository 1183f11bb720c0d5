"""Perplexity of a pruned causal language model on WikiText-2, dense beside pruned, with the time of `prune`.

    python examples/benchmarks/decoder_wikitext.py DATA MODEL [--gguf-file FILE] [--keep 0.75] [--recipes stat] [--seeds 0 1 2]

DATA: a folder with train_first3MB.txt and valid.txt. Calibration: 16 windows of 512 tokens of the training text, starts drawn
with torch.randint under the seed. Score: exp of the mean negative log-likelihood over the first 12 windows of 512 tokens of
valid.txt. Budget: parameters of the decoder layers. float32. On a GPU with `--device cuda`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ablations import ABLATIONS
from measure import in_turn, table
from results import Result, by_keep
from transformers import AutoModelForCausalLM

from optimum_stat import FisherConfig, FisherPruner, STATConfig, STATPruner, VIBConfig, VIBPruner

SEQ_LEN = 512
TIMED = 16  # windows of the forward passes that are timed, of both models in turn; more take as long each
VALUES = ("heads", "neurons", "values")
RECIPES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "stat": (STATPruner, STATConfig),
    "stat, gradient-free": (STATPruner, lambda **asked: STATConfig(metric="stream", **asked)),
    "stat, distilled": (STATPruner, lambda **asked: STATConfig(distill_epochs=1, **asked)),
    "stat, distilled 3 times": (STATPruner, lambda **asked: STATConfig(distill_epochs=3, **asked)),
    "stat, values": (STATPruner, lambda **asked: STATConfig(structures=VALUES, **asked)),
    "stat, values, distilled": (STATPruner, lambda **asked: STATConfig(structures=VALUES, distill_epochs=1, **asked)),
    "stat, neurons alone": (STATPruner, lambda **asked: STATConfig(structures=("neurons",), **asked)),
    "stat, pairs": (STATPruner, lambda **asked: STATConfig(structures=("neurons", "pairs"), **asked)),
    "stat, pairs and values": (STATPruner, lambda **asked: STATConfig(structures=("neurons", "pairs", "values"), **asked)),
    "fisher": (FisherPruner, FisherConfig),
    # one pass over the windows, one at a time: as many tokens seen as the others have
    "vib, gates alone": (VIBPruner, lambda **asked: VIBConfig(masks_only=True, batch_size=1, **asked)),
    **ABLATIONS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("--gguf-file")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["stat", "stat, gradient-free"])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", help="what to call the model in results (default: as its folder)")
    parser.add_argument("--results", type=Path, help="append a JSON line for each run to this file (see draw_results.py)")
    args = parser.parse_args()
    extra: dict[str, Any] = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **extra).to(args.device).eval()
    before, found = None, []
    for keep, recipe, seed in product(args.keep, args.recipes, args.seeds):
        method, make = RECIPES[recipe]
        pruner = method.from_pretrained(args.model, make(keep=keep, budget="params", seed=seed), dtype=torch.float32, **extra)
        pruner.model.to(args.device)
        windows = calibration(pruner.tokenizer, args.data, args.windows, seed)
        if before is None:
            before = perplexity(dense, pruner.tokenizer, args.data)
            print(f"{args.model}: perplexity of the dense model {before:.2f}; {windows.numel():,} tokens", flush=True)
        model = pruner.prune(windows)
        dense_seconds, pruned_seconds = in_turn(
            dense, model, batches=[{"input_ids": part} for part in torch.split(windows[:TIMED], 8)]
        )
        share = len(windows[:TIMED]) / len(windows)
        result = Result.of(
            pruner,
            benchmark=f"{args.name or Path(args.model).name}, WikiText-2" + f", {args.windows} windows" * (args.windows != 16),
            metric="perplexity",
            recipe=recipe,
            seed=seed,
            score=perplexity(model, pruner.tokenizer, args.data),
            dense=before,
            dense_seconds=dense_seconds / share,
            pruned_seconds=pruned_seconds / share,
        )
        result.append(args.results)
        found.append(result)
        print(f"{by_keep(found)}\n\n{memory(found)}\n", flush=True)


def memory(results: list[Result]) -> str:
    """What each recipe needed beside the model."""
    rows = [(r.recipe, str(r.kept), f"{r.peak_mib:,}" if r.peak_mib else "", f"{r.latency:.2f}") for r in results]
    return table(("recipe", "kept", "peak MiB over the model", "time of a forward pass, dense = 1"), rows)


def calibration(tokenizer: Any, data: Path, windows: int, seed: int = 0) -> torch.Tensor:
    ids = tokenizer((data / "train_first3MB.txt").read_text(), return_tensors="pt")["input_ids"][0]
    starts = torch.randint(0, len(ids) - SEQ_LEN - 1, (windows,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start : start + SEQ_LEN] for start in starts])


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokenizer: Any, data: Path, windows: int = 12) -> float:
    ids = tokenizer((data / "valid.txt").read_text(), return_tensors="pt")["input_ids"][0]
    rows = ids[: windows * SEQ_LEN].view(windows, SEQ_LEN).to(next(model.parameters()).device)
    model.eval()
    losses = [F.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:]).item() for row in rows]
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()
