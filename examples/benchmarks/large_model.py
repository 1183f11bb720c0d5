"""Time and memory of pruning a Llama of random weights, by default of the 7B one's shape, in bfloat16 on a GPU.

    python examples/benchmarks/large_model.py [--hidden 4096 --neurons 11008 --heads 32 --kv-heads 32 --layers 32]
        [--method stat] [--keep 0.75] [--structures heads neurons] [--num-tokens 65536] [--device cuda]

Neither depends on what the weights are; quality does, and is not looked at. Printed: the report, with its time by stages, the
peak of the GPU's memory, and the time of a forward pass over the same tokens before and after.
"""

from __future__ import annotations

import argparse
import time

import torch
from measure import forward_seconds
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_stat.methods import METHODS

VOCABULARY, SEQ_LEN = 32000, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--method", default="stat", choices=["fisher", "stat", "surgeon"])
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--structures", nargs="+", default=["heads", "neurons"])
    parser.add_argument("--num-tokens", type=int, default=65536)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.neurons,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        vocab_size=VOCABULARY,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    print(f"{model.num_parameters():,} parameters on {torch.device(args.device)}", flush=True)
    windows = torch.randint(VOCABULARY, (args.num_tokens // SEQ_LEN, SEQ_LEN))
    batches = [{"input_ids": part} for part in torch.split(windows, 8)]
    before = forward_seconds(model, batches)
    method = next(each for each in METHODS if each.method == args.method)
    asked = {"keep": args.keep, "structures": tuple(args.structures), "num_tokens": args.num_tokens, "max_examples": len(windows)}
    pruner = method(model, method.config_class(**asked))
    start = time.perf_counter()
    pruned = pruner.prune(windows)
    seconds = time.perf_counter() - start
    print(pruner.report)
    if args.device == "cuda":
        print(f"peak of the GPU's memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    after = forward_seconds(pruned, batches)
    print(f"prune: {seconds:.1f} s, {seconds / before:.1f} forward passes of {before:.2f} s; a pass is {after:.2f} s now")


if __name__ == "__main__":
    main()
