"""Smaller but slower: a whole model whose blocks keep an odd number of neurons, beside the dense one.

    python examples/benchmarks/alignment_trap.py MODEL [--batch-size 32] [--seq-len 13] [--neurons 1535 1533 1529 1528]

Ratio of the lower quartiles of times taken in turn, the median of five such rounds and their range.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from measure import table

from optimum_stat import checkpoint
from optimum_stat.families import find_groups
from optimum_stat.probes import quiet
from optimum_stat.slicing import slice_model
from optimum_stat.timing import Setting, Workload, steady_ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=13)
    parser.add_argument("--neurons", type=int, nargs="+", default=[1535, 1533, 1529, 1528, 1504])
    args = parser.parse_args()
    dense, _, _ = checkpoint.load(args.model, dtype=torch.float32)
    setting, rounds = Setting.of(dense, "prefill", args.batch_size, args.seq_len), dict[int, list[float]]()
    smaller = {neurons: copy.deepcopy(dense) for neurons in args.neurons}
    for neurons, model in smaller.items():
        names = [group.name for group in find_groups(model) if group.structure == "neurons"]
        slice_model(model, {name: torch.arange(neurons) for name in names})
    for _ in range(5):
        for neurons, model in smaller.items():
            with quiet(dense), quiet(model):
                run, beside = (Workload(each, setting).run_model() for each in (model, dense))
                rounds.setdefault(neurons, []).append(steady_ratio(run, beside, torch.device("cpu"), seconds=2.0))
    rows = [(f"{n:,}", f"{statistics.median(own):.3f} ({min(own):.3f} to {max(own):.3f})") for n, own in rounds.items()]
    print(setting)
    print(table(("neurons in every block", "time, of the dense model's"), rows))


if __name__ == "__main__":
    main()
