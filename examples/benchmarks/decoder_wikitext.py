"""Perplexity of a pruned causal language model on WikiText-2, dense beside pruned, with the time of `prune`.

    python examples/benchmarks/decoder_wikitext.py DATA MODEL [--gguf-file FILE] [--keep 0.75] [--recipes stat fisher]

DATA: a folder with train_first3MB.txt and valid.txt. Calibration: 16 windows of 512 tokens of the training text, starts drawn
with torch.randint under seed 0. Score: exp of the mean negative log-likelihood over the first 12 windows of 512 tokens of
valid.txt. Budget: parameters of the decoder layers. float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import forward_seconds, table

from optimum_stat import FisherConfig, FisherPruner, STATConfig, STATPruner

SEQ_LEN = 512
RECIPES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "stat": (STATPruner, STATConfig),
    "stat, gradient-free": (STATPruner, lambda **asked: STATConfig(metric="stream", **asked)),
    "stat, distilled": (STATPruner, lambda **asked: STATConfig(distill_epochs=1, **asked)),
    "stat, distilled 3 times": (STATPruner, lambda **asked: STATConfig(distill_epochs=3, **asked)),
    "fisher": (FisherPruner, FisherConfig),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("--gguf-file")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["stat", "stat, gradient-free"])
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    extra: dict[str, Any] = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    rows = []
    for keep in args.keep:
        for recipe in args.recipes:
            method, make = RECIPES[recipe]
            pruner = method.from_pretrained(args.model, make(keep=keep, budget="params"), dtype=torch.float32, **extra)
            windows = calibration(pruner.tokenizer, args.data, args.windows)
            batches = [{"input_ids": part} for part in windows.split(8)]
            if not rows:
                rows.append(("dense", "1.0", f"{perplexity(pruner.model, pruner.tokenizer, args.data):.2f}", "", ""))
            floor = forward_seconds(pruner.model, batches)
            model = pruner.prune(windows)
            stages = pruner.report.stages.values()
            ratio = sum(stage.seconds for stage in stages) / floor
            peak = max(stage.peak_bytes or 0 for stage in stages) / 2**20
            score = f"{perplexity(model, pruner.tokenizer, args.data):.2f}"
            rows.append((recipe, f"{pruner.report.reached:.4f}", score, f"{ratio:.1f}", f"{peak:,.0f}"))
            print(table(("recipe", "kept", "perplexity", "forward passes", "peak MiB over the model"), rows), flush=True)


def calibration(tokenizer: Any, data: Path, windows: int) -> torch.Tensor:
    ids = tokenizer((data / "train_first3MB.txt").read_text(), return_tensors="pt")["input_ids"][0]
    starts = torch.randint(0, len(ids) - SEQ_LEN - 1, (windows,), generator=torch.Generator().manual_seed(0))
    return torch.stack([ids[start : start + SEQ_LEN] for start in starts])


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokenizer: Any, data: Path, windows: int = 12) -> float:
    ids = tokenizer((data / "valid.txt").read_text(), return_tensors="pt")["input_ids"][0]
    rows = ids[: windows * SEQ_LEN].view(windows, SEQ_LEN)
    model.eval()
    losses = [F.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:]).item() for row in rows]
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()
