"""What `plan` predicts beside what is measured: the loss that a pruned model adds, over many sizes from one calibration.

    python examples/benchmarks/predicted_error.py lm DATA MODEL [--gguf-file FILE] [--keep 0.95 0.9 ...]
    python examples/benchmarks/predicted_error.py TASK DATA MODEL [--keep ...]

lm: WikiText-2, as in decoder_wikitext.py; TASK: sst2 or cola, 512 training examples. Predicted: STATPruner's error, in nats a
prediction. Measured: the mean Kullback-Leibler divergence of the pruned model's predictions from the dense model's, on the
evaluation data. The last line is the correlation of the logarithms, and of the ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from decoder_wikitext import SEQ_LEN, calibration
from glue import TASKS, read
from measure import table
from scipy import stats

from optimum_stat import STATConfig, STATPruner

SHARES = [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["lm", "sst2", "cola"])
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("--gguf-file")
    parser.add_argument("--keep", type=float, nargs="+", default=SHARES)
    args = parser.parse_args()
    extra: dict[str, Any] = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    if args.task == "lm":
        pruner = STATPruner.from_pretrained(args.model, STATConfig(budget="params"), dtype=torch.float32, **extra)
        sample: Any = calibration(pruner.tokenizer, args.data, 16)
        tokenizer: Any = pruner.tokenizer
        ids = tokenizer((args.data / "valid.txt").read_text(), return_tensors="pt")["input_ids"][0]
        evaluation = [{"input_ids": row[None]} for row in ids[: 12 * SEQ_LEN].view(12, SEQ_LEN)]
    else:
        pruner = STATPruner.from_pretrained(args.model, STATConfig(budget="params"), dtype=torch.float32)
        train, dev = read(args.data)
        sample = train.shuffle(seed=0).select(range(512))
        texts = [dev[start : start + 64][TASKS[args.task].columns[0]] for start in range(0, len(dev), 64)]
        tokenizer = pruner.tokenizer
        evaluation = [tokenizer(rows, padding=True, truncation=True, return_tensors="pt") for rows in texts]
    rows, predicted, measured = [], [], []
    for small in pruner.sweep(sample, args.keep):
        predicted.append(small.report.error)
        measured.append(divergence(pruner.model, small.model, evaluation))
        rows.append((f"{small.config.keep}", f"{predicted[-1]:.4f}", f"{measured[-1]:.4f}"))
        print(table(("kept", "predicted", "measured"), rows), flush=True)
    logs = torch.tensor([predicted, measured], dtype=torch.float64).log()
    rank = stats.spearmanr(predicted, measured).statistic
    print(f"correlation of logarithms {float(torch.corrcoef(logs)[0, 1]):.3f}, of ranks {rank:.3f}")


@torch.no_grad()
def divergence(dense: Any, small: Any, evaluation: list[Any]) -> float:
    """Mean KL(dense || small), nats a prediction."""
    total, count = 0.0, 0
    for inputs in evaluation:
        wanted, found = (model.eval()(**inputs).logits.float().log_softmax(-1).flatten(0, -2) for model in (dense, small))
        total += float((wanted.exp() * (wanted - found)).sum())
        count += len(wanted)
    return total / count


if __name__ == "__main__":
    main()
