"""The cards in model_cards/: every method on MiniLM-L6 for SST-2 and on SmolLM2-135M, pruned, measured and timed.

    python examples/benchmarks/gallery.py DATA MINILM SMOLLM2 [NAME ...]

DATA: a folder with sst2/{train,dev}.parquet and wikitext2_raw/{train_first1MB,test}.txt. MINILM: a folder with a classifier for
SST-2; SMOLLM2: its .gguf file, whose weights of four bits are made float32. NAME: which cards to make; all without one. The
sentences of SST-2 are drawn here: 512, or 12,000 for methods that train. A run takes minutes on one core: those that train are
short, as `max_steps` in their cards says. Each is measured by `optimum_stat.evaluation`, as `optimum-cli stat evaluate` does.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetInfo, NamedSplit
from transformers.utils.logging import set_verbosity_error

from optimum_stat import (
    FisherConfig,
    FisherPruner,
    MovementConfig,
    MovementPruner,
    STATConfig,
    STATPruner,
    SurgeonConfig,
    SurgeonPruner,
    VIBConfig,
    VIBPruner,
    card,
)
from optimum_stat.evaluation import Data, data_config, measure
from optimum_stat.recipe import make_recipe
from optimum_stat.speed import side_by_side

CARDS = Path(__file__).parents[2] / "model_cards"
WINDOW, SENTENCES = 512, 512


@dataclass(frozen=True)
class Run:
    method: Any
    config: Any
    training_args: dict[str, Any] = field(default_factory=dict)


STEPS = {"learning_rate": 1e-4, "lr_scheduler_type": "linear"}
SHORT: dict[str, Any] = {"seq_len": 128, "batch_size": 4, "num_tokens": 14_000}
ENCODER = {
    "stat": Run(STATPruner, STATConfig(keep=0.5, budget="macs")),
    "fisher": Run(FisherPruner, FisherConfig(keep=0.6, budget="latency", serve_batch_size=32)),
    "surgeon": Run(SurgeonPruner, SurgeonConfig(keep=0.7)),
    "movement": Run(MovementPruner, MovementConfig(keep=0.4), {"max_steps": 300, **STEPS}),
    "vib": Run(VIBPruner, VIBConfig(keep=0.5, budget="macs", masks_only=True), {"max_steps": 300}),
}
DECODER = {
    "stat": Run(STATPruner, STATConfig(keep=0.75, num_tokens=8192)),
    "fisher": Run(FisherPruner, FisherConfig(keep=0.85, budget="macs", num_tokens=4096)),
    "surgeon": Run(SurgeonPruner, SurgeonConfig(keep=0.85, shots=1, num_tokens=4096)),
    "movement": Run(MovementPruner, MovementConfig(keep=0.9, **SHORT), {"max_steps": 24, **STEPS}),
    "vib": Run(VIBPruner, VIBConfig(keep=0.9, budget="macs", masks_only=True, **SHORT), {"max_steps": 24}),
}
SPEED = {"minilm-sst2": (("prefill", 1), ("prefill", 32)), "smollm2-135m": (("prefill", 1), ("decode", 1), ("decode", 32))}
RUNS = {f"minilm-sst2-{name}": run for name, run in ENCODER.items()} | {f"smollm2-135m-{name}": r for name, r in DECODER.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("minilm")
    parser.add_argument("smollm2")
    parser.add_argument("names", metavar="NAME", nargs="*", help=", ".join(RUNS))
    args = parser.parse_args()
    set_verbosity_error()
    for name in args.names or RUNS:
        language = name.startswith("smollm2")
        source = args.smollm2 if language else args.minilm
        base = "HuggingFaceTB/SmolLM2-135M-Instruct" if language else f"./{Path(source).name}"
        train, test = (wikitext if language else sst2)(args.data, trained=bool(RUNS[name].training_args))
        make(name, RUNS[name], source, base, train, test)


def make(name: str, run: Run, source: str, base: str, train: Dataset, test: Dataset) -> None:
    """Prune, measure and time one model; its card and what that is rendered from into a folder."""
    pruner = run.method.from_pretrained(source, run.config, dtype=torch.float32)
    dense, tokenizer = copy.deepcopy(pruner.model), pruner.tokenizer
    pruner.prune(train, **({"training_args": run.training_args} if run.training_args else {}))
    print(pruner.report, flush=True)
    data = Data(test, data_config(seq_len=WINDOW, max_examples=12 if name.startswith("smollm2") else None))
    found, before = (measure(model, tokenizer, data).metrics for model in (pruner.model, dense))
    pruner.metrics = [
        {
            "name": metric,
            "dataset": f"{test.info.dataset_name} {test.split}",
            "value": rounded(value),
            "dense": rounded(before[metric]),
        }
        for metric, value in found.items()
    ]
    recipe = make_recipe(pruner)
    recipe["base_model"] = base
    kind, seq_len = name.rpartition("-")[0], 128 if name.startswith("smollm2") else pruner.report.seq_len
    recipe["speed"] = [side_by_side(dense, pruner.model, size, seq_len, phase).to_dict() for phase, size in SPEED[kind]]
    folder = CARDS / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    card.write(folder, recipe, name, pruner.paper)
    print(name, pruner.metrics, flush=True)


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def sst2(data: Path, *, trained: bool) -> tuple[Dataset, Dataset]:
    train, dev = (Dataset.from_parquet(str(data / "sst2" / f"{name}.parquet")) for name in ("train", "dev"))
    sample = train.shuffle(seed=0).select(range(12_000 if trained else SENTENCES))
    return named(sample, "SST-2", "train"), named(dev, "SST-2", "validation")


def wikitext(data: Path, *, trained: bool) -> tuple[Dataset, Dataset]:
    texts = [(data / "wikitext2_raw" / f"{name}.txt").read_text() for name in ("train_first1MB", "test")]
    train, test = (Dataset.from_dict({"text": [text]}) for text in texts)
    return named(train, "WikiText-2", "train"), named(test, "WikiText-2", "test")


def named(dataset: Dataset, name: str, split: str) -> Dataset:
    return Dataset(dataset.data, DatasetInfo(features=dataset.features, dataset_name=name), NamedSplit(split), dataset._indices)


if __name__ == "__main__":
    main()
