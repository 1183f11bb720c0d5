"""Accuracy of a pruned SST-2 classifier, dense beside pruned, with the time of `prune` in forward passes.

    python examples/benchmarks/encoder_sst2.py MODEL DATA [--keep 0.5] [--metric fisher] [--seeds 0 1 2]

MODEL: a folder or Hub id of a sequence classifier; DATA: a folder with train.parquet and dev.parquet (sentence, label).
Calibration: 512 training sentences drawn under the seed; budget: MACs; score: accuracy on dev, float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from measure import forward_seconds, table, write_card
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from optimum_stat import STATConfig, STATPruner
from optimum_stat.data import make_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.6, 0.5, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--card", type=Path, help="write the card of the first run of the default recipe into this folder")
    args = parser.parse_args()
    train, dev = (Dataset.from_parquet(str(args.data / f"{name}.parquet")) for name in ("train", "dev"))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = load(args.model)
    rows = [("dense", "1.0", f"{accuracy(dense, tokenizer, dev):.2f}", "")]
    for name, make in {"fisher": STATConfig, "stream": stream, "paper": STATConfig.paper}.items():
        for keep in args.keep:
            config = make(keep=keep, budget="macs")
            scores, ratios = [], []
            for seed in args.seeds:
                sample = train.shuffle(seed=seed).select(range(512))
                pruner = STATPruner(load(args.model), config, tokenizer)
                batches = make_batches(sample, dense.config, config, causal=False, tokenizer=tokenizer)
                floor = forward_seconds(dense, batches)
                model = pruner.prune(sample)
                ratios.append(sum(stage.seconds for stage in pruner.report.stages.values()) / floor)
                scores.append(accuracy(model, tokenizer, dev))
                if args.card and name == "fisher" and keep == 0.5 and seed == args.seeds[0]:
                    result = {"name": "accuracy", "dataset": "SST-2 validation", "value": round(scores[-1], 2)}
                    pruner.metrics.append({**result, "dense": round(float(rows[0][2]), 2)})
                    write_card(pruner, args.card, None, "512 training sentences of SST-2, drawn under seed 0")
            spread = f"{sum(scores) / len(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})"
            rows.append((name, f"{keep}", spread, f"{sorted(ratios)[len(ratios) // 2]:.1f}"))
            print(table(("recipe", "MACs kept", "dev accuracy, mean (range)", "forward passes"), rows), flush=True)


def stream(keep: float, budget: str) -> STATConfig:
    return STATConfig(keep=keep, budget=budget, metric="stream")


def load(path: str) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer: object, dev: Dataset) -> float:
    right = 0
    for start in range(0, len(dev), 64):
        rows = dev[start : start + 64]
        logits = model(**tokenizer(rows["sentence"], padding=True, return_tensors="pt")).logits
        right += int((logits.argmax(-1) == torch.tensor(rows["label"])).sum())
    return 100 * right / len(dev)


if __name__ == "__main__":
    main()
