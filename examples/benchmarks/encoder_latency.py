"""How long a model takes that was pruned to a measured latency: asked, predicted and measured, and what the MACs would say.

    python examples/benchmarks/encoder_latency.py MODEL DATA [--keep 0.7 0.5] [--batch-sizes 1 32]

MODEL: a folder or Hub id of an SST-2 classifier; DATA: a folder with train.parquet and dev.parquet. Method: FisherPruner on
512 training sentences. "measured" is the median of ratios to the dense model's time, taken in turn in one process: run it on a
machine that does nothing else. The second part prunes to the same shares of the MACs, to see how much of them is realised.
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
from optimum_stat.speed import side_by_side


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
                    config = FisherConfig(keep=keep, budget=budget, serve_batch_size=batch_size)
                    pruned = FisherPruner(load(args.model), config, tokenizer)
                    pruned.prune(sample)
                report = pruned.report
                assert isinstance(report.seq_len, int)
                measured = side_by_side(dense, pruned.model, batch_size, report.seq_len).ratio
                rows.append(
                    (
                        f"{keep} of the {budget}",
                        str(batch_size),
                        f"{report.latency.predicted / report.latency.dense:.3f}" if report.latency else "",
                        f"{measured.median:.3f}",
                        f"{report.pruned.block_macs / report.dense.block_macs:.3f}",
                        f"{1 / measured.median:.2f}",
                        f"{report.pruned.block_macs / report.dense.block_macs / measured.median:.2f}",
                        f"{score(task, pruned.model, tokenizer, dev):.2f}",
                    )
                )
                head = (
                    "asked",
                    "batch",
                    "predicted latency",
                    "measured latency",
                    "MACs kept",
                    "speed-up",
                    "realised",
                    task.metric,
                )
                print(table(head, rows), flush=True)
    print(f"{report.seq_len} tokens an example, {torch.get_num_threads()} threads; dense {task.metric} ", end="")
    print(f"{score(task, dense, tokenizer, dev):.2f}")


if __name__ == "__main__":
    main()
