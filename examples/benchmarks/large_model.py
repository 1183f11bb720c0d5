"""Time and memory of STAT on a Llama of random weights, by default of a 7B one's shape, in bfloat16 on a GPU.

    python examples/benchmarks/large_model.py [--hidden 4096 --neurons 11008 --heads 32 --layers 32] [--keep 0.75]
        [--num-tokens 65536] [--metric fisher] [--distill-epochs 0] [--device cuda]

Neither depends on what the weights are; quality does, and is not looked at. Printed: the report, with its time by stages, and
the time of a forward pass over the same tokens before and after.
"""

from __future__ import annotations

import argparse

import torch
from measure import forward_seconds
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_stat import STATConfig, STATPruner

VOCABULARY, SEQ_LEN = 32000, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--num-tokens", type=int, default=65536)
    parser.add_argument("--metric", default="fisher")
    parser.add_argument("--distill-epochs", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": args.neurons, "num_hidden_layers": args.layers}
    config = LlamaConfig(**sizes, num_attention_heads=args.heads, vocab_size=VOCABULARY, max_position_embeddings=4096)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    print(f"{model.num_parameters():,} parameters on {torch.device(args.device)}", flush=True)
    windows = torch.randint(VOCABULARY, (args.num_tokens // SEQ_LEN, SEQ_LEN))
    batches = [{"input_ids": part} for part in windows.split(8)]
    before = forward_seconds(model, batches)
    pruning = STATConfig(
        keep=args.keep,
        num_tokens=args.num_tokens,
        max_examples=len(windows),
        metric=args.metric,
        distill_epochs=args.distill_epochs,
    )
    pruner = STATPruner(model, pruning)
    pruned = pruner.prune(windows)
    seconds = sum(stage.seconds for stage in pruner.report.stages.values())
    print(pruner.report)
    after = forward_seconds(pruned, batches)
    print(f"prune: {seconds:.1f} s, {seconds / before:.1f} forward passes of {before:.1f} s; a pass is {after:.1f} s now")


if __name__ == "__main__":
    main()
