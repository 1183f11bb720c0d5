"""How fast a device does the kinds of work that pruning is made of, measured in about a second."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .elimination import backward_elimination
from .linalg import add_to_gram, damped, solve_psd

TOKENS, WIDTH = 2048, 1024


@dataclass(frozen=True)
class Speeds:
    """Multiply-adds in a second, if nothing else is said."""

    device: str
    forward: float
    """Of linear layers, in the model's dtype."""
    element: float
    """Elements of what stands between them: activation functions and the like, in the model's dtype."""
    gram: float
    """Of sums of products: single precision, added up in double."""
    factor: float
    """Of factorisations and solutions, in double precision."""
    elimination: float
    """Of backward elimination, in single precision; it takes `unit` besides."""
    unit: float
    """Seconds for every unit that is eliminated, however narrow the layer."""

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Speeds:
        """On `device`, which should do nothing else."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(TOKENS, WIDTH, generator=generator).to(device)
        gram = (rows.T @ rows).double()
        weight, total = rows[:WIDTH].clone(), torch.zeros_like(gram)
        half, own = rows.to(dtype), weight.to(dtype)
        products = _seconds(lambda: torch.nn.functional.linear(half, own), device)
        between = _seconds(lambda: torch.nn.functional.silu(half) * half, device)
        sums = _seconds(lambda: add_to_gram(total, rows), device)
        solved = _seconds(lambda: solve_psd(damped(gram, 0.01), gram), device)
        wide = _seconds(lambda: backward_elimination(gram.float(), weight, 1, 0.01), device, repeats=1)
        few = WIDTH // 8
        small = gram[:few, :few].float()
        narrow = _seconds(lambda: backward_elimination(small, weight[:, :few], 1, 0.01), device, repeats=2)
        # two sizes, two unknowns: what a unit takes, and what the multiply-adds of `run_work` take besides
        work = [width**3 * 1.6 + 0.6 * width**2 * WIDTH for width in (few, WIDTH)]
        pace = max((wide - WIDTH / few * narrow) / (work[1] - WIDTH / few * work[0]), 1e-15)
        return cls(
            device=_name(device),
            forward=TOKENS * WIDTH**2 / products,
            element=TOKENS * WIDTH / between,
            gram=0.58 * TOKENS * WIDTH**2 / sums,
            factor=(WIDTH**3 / 3 + WIDTH**3) / solved,
            elimination=1 / pace,
            unit=max(0.0, (wide - work[1] * pace) / WIDTH),
        )


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """The best of `repeats`, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        _finish(device)
        start = time.perf_counter()
        work()
        _finish(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
