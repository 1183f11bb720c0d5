"""Predicted beside measured latency: a table of single blocks' times against whole models with random sizes.

    python examples/benchmarks/latency_prediction.py MODEL [--phase decode] [--batch-size 1] [--seq-len 128] [--round-to 8]

MODEL: a folder, .gguf file or Hub id. Every group keeps about the share that a row says, give or take a third, drawn under
seed 0; the first units stay, since which ones makes no difference to the time. "measured" is the ratio to the dense model's time,
both taken in turn. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import copy
import random

import torch
from measure import table

from optimum_stat import checkpoint
from optimum_stat.latency_timing import measure_table
from optimum_stat.probes import quiet
from optimum_stat.slicing import slice_model
from optimum_stat.timing import Setting, Workload, steady_ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--phase", default="prefill")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--round-to", type=int, default=8)
    args = parser.parse_args()
    dense, _, _ = checkpoint.load(args.model, dtype=torch.float32)
    draw, rows = random.Random(0), []
    with quiet(dense):
        setting = Setting.of(dense, args.phase, args.batch_size, args.seq_len)
        times = measure_table(dense, args.round_to, setting)
        for share in (0.9, 0.75, 0.5, 0.3):
            wanted = {name: share * draw.uniform(0.67, 1.33) * sizes[-1] for name, sizes in times.sizes.items()}
            kept = {name: min(sizes, key=lambda size: abs(size - wanted[name])) for name, sizes in times.sizes.items()}
            small = copy.deepcopy(dense)
            slice_model(small, {name: torch.arange(size) for name, size in kept.items()})
            with quiet(small):
                run, beside = (Workload(model, setting).run_model() for model in (small, dense))
                measured = steady_ratio(run, beside, torch.device("cpu"), seconds=5.0)
            predicted = times.predicted(kept) / times.total
            rows.append((f"{share}", f"{predicted:.3f}", f"{measured:.3f}", f"{predicted / measured - 1:+.1%}"))
    print(f"{setting}, {times.total / 1e6:.1f} ms")
    print(table(("about kept", "predicted", "measured", "off"), rows))


if __name__ == "__main__":
    main()
