"""How long a model takes that was pruned to a measured latency: asked, predicted and measured, and what the MACs would say.

    python examples/benchmarks/encoder_latency.py MODEL DATA [--keep 0.7 0.5] [--batch-sizes 1 32]

MODEL: a folder or Hub id of an SST-2 classifier; DATA: a folder with train.parquet and dev.parquet. Method: FisherPruner on
512 training sentences. "measured" is the median of ratios to the dense model's time, taken in turn in one process: run it on
a machine that does nothing else. The second part prunes to the same shares of the MACs, to see how much of them is realised.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from encoder_glue import load
from glue import TASKS, read, score
from measure import table
from transformers import AutoTokenizer

from optimum_stat import FisherConfig, FisherPruner
from optimum_stat.latency import median_ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    args = parser.parse_args()
    task, (train, dev) = TASKS["sst2"], read(args.data)
    tokenizer, dense = AutoTokenizer.from_pretrained(args.model), load(args.model)
    sample, rows = train.shuffle(seed=0).select(range(512)), []
    for budget in ("latency", "macs"):
        for keep in args.keep:
            pruned = None
            for batch_size in args.batch_sizes:
                if pruned is None or budget == "latency":
                    config = FisherConfig(keep=keep, budget=budget, latency_batch_size=batch_size)
                    pruned = FisherPruner(load(args.model), config, tokenizer)
                    pruned.prune(sample)
                report = pruned.report
                measured = ratio(pruned.model, dense, batch_size, report.seq_len)
                rows.append(
                    (
                        f"{keep} of the {budget}",
                        str(batch_size),
                        f"{report.latency.predicted / report.latency.dense:.3f}" if report.latency else "",
                        f"{measured:.3f}",
                        f"{report.pruned.block_macs / report.dense.block_macs:.3f}",
                        f"{1 / measured:.2f}",
                        f"{score(task, pruned.model, tokenizer, dev):.2f}",
                    )
                )
                head = ("asked", "batch", "predicted latency", "measured latency", "MACs kept", "speed-up", task.metric)
                print(table(head, rows), flush=True)
    print(f"{report.seq_len} tokens an example, {torch.get_num_threads()} threads; dense {task.metric} ", end="")
    print(f"{score(task, dense, tokenizer, dev):.2f}")


@torch.no_grad()
def ratio(model: torch.nn.Module, dense: torch.nn.Module, batch_size: int, seq_len: int) -> float:
    ids = torch.randint(1000, 2000, (batch_size, seq_len), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return median_ratio(lambda: model(**inputs), lambda: dense(**inputs), torch.device("cpu"))


if __name__ == "__main__":
    main()
