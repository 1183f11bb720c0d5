"""The methods that train, on a task of GLUE, dense beside pruned, with the time of `prune` and of a forward pass.

    python examples/benchmarks/trained_glue.py TASK MODEL DATA RUN [RUN ...] [--seeds 0 1]

TASK: sst2, stsb or cola. MODEL: a folder or Hub id (`finetune_minilm.py` makes one); DATA: a folder with train.parquet and
dev.parquet. RUN: a method, how much it keeps, and what else differs from the defaults, of its configuration or of Trainer's
arguments: `movement:0.3`, `movement:0.3:variant=hybrid-filled,finetune_epochs=1,learning_rate=1e-4`, `fisher:0.4:budget=macs`.
Methods that train read the whole training set and are distilled from the dense model; the others get
512 examples, as in `encoder_glue.py`. Score on dev, float32; the speed-up is that of a forward pass over 64 dev examples.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from encoder_glue import load
from glue import TASKS, read, score
from measure import forward_seconds, table
from transformers import AutoTokenizer

from optimum_stat.methods import METHODS
from optimum_stat.trained import TrainedPruner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    task, (train, dev) = TASKS[args.task], read(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = load(args.model)
    some = dev[:64]
    batch = tokenizer(*(some[name] for name in task.columns), padding=True, truncation=True, return_tensors="pt")
    print(f"{args.task}: {task.metric} of the dense model {score(task, dense, tokenizer, dev):.2f}", flush=True)
    rows = []
    for run in args.runs:
        scores, minutes, speedups, reached = [], [], [], 0.0
        for seed in args.seeds:
            pruner, training_args = make(run, args.model, tokenizer, seed)
            trains = isinstance(pruner, TrainedPruner)
            start = time.perf_counter()
            sample = train if trains else train.shuffle(seed=seed).select(range(512))
            model = pruner.prune(sample, label_column=task.label, **({"training_args": training_args} if trains else {})).eval()
            minutes.append((time.perf_counter() - start) / 60)
            scores.append(score(task, model, tokenizer, dev))
            ratios = [forward_seconds(dense, [batch], 1) / forward_seconds(model, [batch], 1) for _ in range(15)]
            speedups.append(float(torch.tensor(ratios).median()))
            reached = pruner.report.reached
        spread = f" ({min(scores):.2f} to {max(scores):.2f})" if len(scores) > 1 else ""
        mean = f"{sum(scores) / len(scores):.2f}{spread}"
        rows.append((run, f"{reached:.4f}", mean, f"{sum(minutes) / len(minutes):.1f}", f"{sum(speedups) / len(speedups):.2f}"))
        print(pruner.report, flush=True)
        print(table(("run", "kept", task.metric, "minutes", "speed-up"), rows), flush=True)


def make(run: str, model: str, tokenizer: Any, seed: int) -> tuple[Any, dict[str, Any]]:
    """The pruner of one run, and what it passes to Trainer."""
    name, keep, *rest = run.split(":", 2)
    method = next(method for method in METHODS if method.method == name)
    asked = dict(pair.split("=") for pair in rest[0].split(",")) if rest else {}
    own = {field.name for field in dataclasses.fields(method.config_class)}
    values = {key: value_of(text) for key, text in asked.items()}
    config = method.config_class(**{"keep": float(keep), "seed": seed, **{k: v for k, v in values.items() if k in own}})
    return method(load(model), config, tokenizer), {k: v for k, v in values.items() if k not in own}


def value_of(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
