"""Memory and time of STAT on a random Llama (bf16) whose blocks stay on the disk, under a hard limit of the memory.

    python examples/benchmarks/offload_memory.py [--hidden 2560 --neurons 6912 --heads 20 --layers 34] [--keep 0.7]
        [--num-tokens 8192] [--metric stream] [--limit 2.5] [--in-memory | --ratio]

The defaults are about 2.5 billion parameters, 5 GB on the disk. The model is made in a process of its own. Printed is the peak of
the resident set above what the bare imports take; --limit, in GB above them, is set as RLIMIT_DATA once the model is there:
beyond it the system refuses memory, and a resident set beyond it, mapped files included, ends the run. --in-memory prunes the
same model loaded whole, without a limit, for comparison; --ratio does both, in turn, and prints how the times compare.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

VOCABULARY, SEQ_LEN = 32000, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--neurons", type=int, default=6912)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--num-tokens", type=int, default=8192)
    parser.add_argument("--metric", default="stream")
    parser.add_argument("--limit", type=float, default=2.5)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--in-memory", action="store_true")
    how.add_argument("--ratio", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the model is, or is to be made (default: a temporary folder)")
    parser.add_argument("--step", choices=("make", "prune", "prune-in-memory"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        args.in_memory = args.in_memory or args.step == "prune-in-memory"
        (make if args.step == "make" else prune)(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        where = args.folder or Path(folder)
        again = [sys.executable, __file__, *sys.argv[1:], "--folder", str(where), "--step"]
        if not (where / "dense" / "config.json").exists():
            subprocess.run([*again, "make"], check=True)
        if not args.ratio:
            subprocess.run([*again, "prune"], check=True)
            return
        seconds = []
        for step in ("prune", "prune-in-memory"):
            done = subprocess.run([*again, step], check=True, stdout=subprocess.PIPE, text=True)
            print(done.stdout, end="", flush=True)
            found = json.loads(done.stdout)
            seconds.append(found["prune_seconds"] + found["save_seconds"])
        print(f"offloaded: {seconds[0] / seconds[1]:.2f} times the seconds in memory, saving included")


def make(args: argparse.Namespace) -> None:
    """The model, with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.neurons,
        num_attention_heads=args.heads,
        num_key_value_heads=max(1, args.heads // 4),
        num_hidden_layers=args.layers,
        vocab_size=args.vocabulary,
        max_position_embeddings=SEQ_LEN,
        dtype="bfloat16",
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.folder / "dense", max_shard_size="500MB")


def prune(args: argparse.Namespace) -> None:
    """Under the limit; prints one JSON object."""
    import torch

    from optimum_stat import STATConfig, STATPruner

    pruned = args.folder / ("pruned-in-memory" if args.in_memory else "pruned")
    if pruned.exists():
        raise SystemExit(f"{pruned} exists, from an earlier run: name another --folder, or delete it.")
    before, data, peaks = _bytes("VmRSS"), _bytes("VmData"), [0]
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("optimum_stat").setLevel(logging.INFO)
    most = None if args.in_memory else before + int(args.limit * 1e9)
    threading.Thread(target=_watch, args=(peaks, most), daemon=True).start()
    embeddings = 2 * args.vocabulary * args.hidden
    offload = args.folder / "offload"
    placing = (
        {} if args.in_memory else {"device_map": "auto", "max_memory": {"cpu": int(embeddings * 1.3)}, "offload_folder": offload}
    )
    config = STATConfig(keep=args.keep, metric=args.metric)
    pruner = STATPruner.from_pretrained(args.folder / "dense", config, **placing)
    if not args.in_memory:  # from_pretrained maps all files at once, which takes addresses but no memory
        limit = int(data + args.limit * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    tokens = torch.randint(3, args.vocabulary, (args.num_tokens // SEQ_LEN, SEQ_LEN))
    start = time.perf_counter()
    pruner.prune(tokens)
    seconds = time.perf_counter() - start
    pruner.save_pretrained(pruned)
    found = {
        "method": pruner.method,
        "parameters": pruner.report.dense.params,
        "left": pruner.report.pruned.params,
        "offloaded": not args.in_memory,
        "prune_seconds": round(seconds, 1),
        "save_seconds": round(time.perf_counter() - start - seconds, 1),
        "peak_gb_above_imports": round((max(peaks) - before) / 1e9, 3),
        "imports_gb": round(before / 1e9, 3),
        "limit_gb": None if args.in_memory else args.limit,
        "stages": {name: round(stage.seconds, 1) for name, stage in pruner.report.stages.items()},
    }
    print(json.dumps(found))


def _watch(peaks: list[int], most: int | None) -> None:
    """The highest resident set since the last look: the pruner forgets it at the start of each stage, for its own report."""
    while True:
        peaks[0] = max(peaks[0], _bytes("VmHWM"))
        if most is not None and peaks[0] > most:
            print(f"the resident set was {peaks[0] / 1e9:.2f} GB, the limit is {most / 1e9:.2f} GB", file=sys.stderr)
            os._exit(1)
        time.sleep(0.05)


def _bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
