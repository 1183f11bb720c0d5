"""A pruned classifier or regressor on a task of GLUE, dense beside pruned, recipe beside recipe, with the time of `prune`.

    python examples/benchmarks/encoder_glue.py TASK MODEL DATA [--keep 0.7 0.6 ...] [--recipes stat fisher ...] [--seeds 0 1 2]

Dev sets are small (872 sentences in SST-2: a difference of half a point is within their noise). --held-out N scores on N training
examples instead. The model was fine-tuned on them, so compare recipes by it, not with published numbers.

TASK: sst2, stsb or cola. MODEL: a folder or Hub id (`finetune_minilm.py` makes one); DATA: a folder with train.parquet and
dev.parquet. Calibration: training examples drawn under the seed, 512 or --examples, with their labels; budget: MACs; score on
dev, float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from ablations import ABLATIONS
from datasets import Dataset
from glue import TASKS, Task, read, score
from measure import in_turn
from results import Result, by_keep
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from optimum_stat import FisherConfig, FisherPruner, Pruner, PruningConfig, STATConfig, STATPruner, SurgeonConfig, SurgeonPruner
from optimum_stat.data import make_batches

TRUNK_TOO = ("heads", "neurons", "hidden", "layers")
RECIPES: dict[str, tuple[type[Pruner[Any]], Callable[..., PruningConfig]]] = {
    "stat": (STATPruner, STATConfig),
    "stat, gradient-free": (STATPruner, lambda **asked: STATConfig(metric="stream", **asked)),
    "stat, paper": (STATPruner, STATConfig.paper),
    "stat, values": (STATPruner, lambda **asked: STATConfig(structures=("heads", "neurons", "values"), **asked)),
    "stat, all structures": (STATPruner, lambda **asked: STATConfig(structures=TRUNK_TOO, **asked)),
    "stat, hidden alone": (STATPruner, lambda **asked: STATConfig(structures=("hidden",), **asked)),
    "stat, layers alone": (STATPruner, lambda **asked: STATConfig(structures=("layers",), **asked)),
    "surgeon": (SurgeonPruner, SurgeonConfig),
    # zeros in rows and columns, of all weights; nothing gets smaller
    "surgeon, lines": (SurgeonPruner, lambda keep, budget: SurgeonConfig(keep=keep, structure="lines")),
    "surgeon, hidden alone": (SurgeonPruner, lambda **asked: SurgeonConfig(structures=("hidden",), **asked)),
    "fisher": (FisherPruner, FisherConfig),
    "fisher, search": (FisherPruner, lambda **asked: FisherConfig(rearrange=False, tune=False, **asked)),
    "fisher, + rearrangement": (FisherPruner, lambda **asked: FisherConfig(tune=False, **asked)),
    "fisher, paper": (FisherPruner, FisherConfig.paper),
    **ABLATIONS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.6, 0.5, 0.4, 0.3])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["stat", "fisher"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, default=512, help="training examples to calibrate on")
    parser.add_argument(
        "--held-out", type=int, default=0, help="score on so many training examples instead of dev: ones that no calibration saw"
    )
    parser.add_argument("--name", help="what to call the model in results (default: as its folder)")
    parser.add_argument("--results", type=Path, help="append a JSON line for each run to this file (see draw_results.py)")
    args = parser.parse_args()
    task, (train, dev) = TASKS[args.task], read(args.data)
    samples = {seed: train.shuffle(seed=seed).select(range(args.examples)) for seed in args.seeds}
    if args.held_out:
        dev = held_out(task, train, samples.values(), args.held_out)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = load(args.model)
    before = score(task, dense, tokenizer, dev)
    print(f"{args.task}: {task.metric} of the dense model {before:.2f}")
    found = []
    for name, keep, seed in product(args.recipes, args.keep, args.seeds):
        method, make = RECIPES[name]
        config, sample = make(keep=keep, budget="macs"), samples[seed]
        pruner = method(load(args.model), config, tokenizer)
        batches = make_batches(sample, dense.config, config, causal=False, tokenizer=tokenizer)
        model = pruner.prune(sample, **({"label_column": task.label} if pruner.labels != "none" else {}))
        before_seconds, after_seconds = in_turn(dense, model, batches=batches)
        result = Result.of(
            pruner,
            benchmark=f"{args.name or Path(args.model).name}, {task.title}{' (training examples)' if args.held_out else ''}",
            metric=task.metric,
            recipe=name,
            seed=seed,
            score=score(task, model, tokenizer, dev),
            dense=before,
            dense_seconds=before_seconds,
            pruned_seconds=after_seconds,
        )
        result.append(args.results)
        found.append(result)
        if seed == args.seeds[-1]:
            print(by_keep(found), flush=True)


def held_out(task: Task, train: Dataset, samples: Iterable[Dataset], count: int) -> Dataset:
    """The first `count` examples, in an order of its own, whose texts are in none of the samples."""
    seen = {text for sample in samples for text in sample[task.columns[0]]}
    order = train.shuffle(seed=12345)
    return order.select([i for i, text in enumerate(order[task.columns[0]]) if text not in seen][:count])


def load(path: str) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    return model.eval()


if __name__ == "__main__":
    main()
