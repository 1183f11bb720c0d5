"""What `stat plan` says beside what a run of STAT takes, on random Llamas of three sizes: seconds, bytes, and the error.

    python examples/benchmarks/run_plan_error.py [--num-tokens 16384] [--keep 0.7] [--metric stream]

Run it on a machine that does nothing else: both sides are times.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
import transformers
from measure import forward_seconds, table

from optimum_stat import STATConfig, STATPruner
from optimum_stat.run_plan import plan_run

SIZES = {"S": (256, 8, 4, 688), "M": (512, 8, 8, 1376), "L": (1024, 6, 16, 2752)}
"""Name -> hidden size, layers, heads, neurons."""
VOCABULARY, SEQ_LEN = 4096, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=16384)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--metric", default="fisher")
    args = parser.parse_args()
    config = STATConfig(keep=args.keep, num_tokens=args.num_tokens, metric=args.metric)
    rows: list[list[str]] = []
    errors: list[float] = []
    for name in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(name, config, Path(folder), errors))
    head = ("model", "seconds planned", "measured", "error", "forward pass planned", "measured", "bytes after planned", "written")
    print(table(head, rows))
    print(f"largest error of the seconds: {max(errors):.0%}; mean {sum(errors) / len(errors):.0%}")


def compare(name: str, config: STATConfig, folder: Path, errors: list[float]) -> list[str]:
    """One row; its error goes into `errors`."""
    generator = torch.Generator().manual_seed(0)
    random_llama(*SIZES[name]).save_pretrained(folder / "dense")
    planned = plan_run(str(folder / "dense"), config)
    pruner = STATPruner.from_pretrained(folder / "dense", config)
    assert config.num_tokens is not None
    data = torch.randint(3, VOCABULARY, (config.num_tokens // SEQ_LEN, SEQ_LEN), generator=generator)
    floor = forward_seconds(pruner.model, [{"input_ids": part} for part in torch.split(data, config.batch_size)])
    pruner.prune(data)
    pruner.save_pretrained(folder / "pruned")
    taken = sum(stage.seconds for stage in pruner.report.stages.values())
    written = sum(path.stat().st_size for path in (folder / "pruned").glob("*.safetensors"))
    errors.append(abs(planned.seconds / taken - 1))
    for stage in planned.stages:
        print(f"{name}: {stage.name} {stage.seconds:.2f} s")
    print(name, {key: dataclasses.astuple(value) for key, value in pruner.report.stages.items()}, planned.statistics_bytes)
    return [
        f"{name}, {planned.dense.params / 1e6:.0f}M",
        f"{planned.seconds:.1f}",
        f"{taken:.1f}",
        f"{planned.seconds / taken - 1:+.0%}",
        f"{planned.forward_seconds:.1f}",
        f"{floor:.1f}",
        f"{planned.bytes_after:,}",
        f"{written:,}",
    ]


def random_llama(hidden: int, layers: int, heads: int, neurons: int) -> transformers.LlamaForCausalLM:
    """A Llama with random weights, float32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        intermediate_size=neurons,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQ_LEN,
    )
    return transformers.LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
