"""How far a long run is: a bar on a terminal, a line for every block in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator

import psutil
import torch
from transformers.utils.logging import tqdm

logger = logging.getLogger(__name__)


def each_block(stage: str, first: int, blocks: int, num_tokens: int, device: torch.device, *, shown: bool) -> Iterator[int]:
    """`range(first, blocks)`, telling after each how fast it went, how much memory is in use and how long the rest will take.

    num_tokens: what one block is run on. Not `shown`: nothing is said; of several processes one speaks.
    """
    start = time.monotonic()
    # without a terminal a bar is a heap of lines; there is one line a block instead
    bar = tqdm(desc=stage, unit="block", initial=first, total=blocks, disable=None if shown else True)
    for index in range(first, blocks):
        before = time.monotonic()
        yield index
        now = time.monotonic()
        speed, left = num_tokens / max(now - before, 1e-9), (now - start) / (index + 1 - first) * (blocks - index - 1)
        memory = memory_bytes(device)
        bar.update(1)
        bar.set_postfix_str(f"{speed:,.0f} tokens/s, {memory / 2**30:.1f} GiB")
        if shown:
            told = {"stage": stage, "block": index + 1, "blocks": blocks, "tokens_per_second": round(speed)}
            logger.log(
                logging.DEBUG if sys.stderr.isatty() else logging.INFO,
                "%s: block %s of %s, %s tokens/s, %.1f GiB in use, %s left",
                stage,
                index + 1,
                blocks,
                f"{speed:,.0f}",
                memory / 2**30,
                _duration(left),
                extra={"progress": {**told, "memory_bytes": memory, "seconds_left": round(left)}},
            )
    bar.close()


def memory_bytes(device: torch.device) -> int:
    """What this process uses on the accelerator, or of the machine's memory."""
    return int(torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
