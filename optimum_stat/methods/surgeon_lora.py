"""First-order corrections between shots: low-rank adapters, trained on the calibration data and merged.

Source: The LLM Surgeon (2312.17244), with rank 8 and Adam. Differences: every layer that can be pruned gets an adapter; all data
is trained on after every shot (theirs: a fortieth of it, and all of it five times at the end); A starts as PEFT starts it (the
authors draw it from N(0, 1), with a lower learning rate); and the adapters are really trained: in the authors' code they are made
but never attached to the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import tqdm

from ..data import Batches
from ..families import task_of, weight
from ..labels import loss_gradients
from ..probes import device_of, small_parts
from ..slicing import set_weight

RANK = 8  # the paper's
LEARNING_RATE = 1e-3  # with A of 1 / sqrt(in) a step, what the paper's 1e-4 is with A of 1


def check(model: nn.Module) -> None:
    """Refuse what cannot be corrected.

    Raises:
        ValueError: the model does not predict the next tokens.
        ImportError: PEFT is not installed.
    """
    if task_of(model) != "text-generation":
        raise ValueError(
            f"lora_epochs asked, but {type(model).__name__} has no next tokens to learn from. "
            "Set lora_epochs=0, and train the pruned model on your labels afterwards."
        )
    _peft()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("lora_epochs asked, which needs PEFT: pip install peft, or set lora_epochs=0.") from None
    return peft


def correct(model: nn.Module, linears: Iterable[nn.Module], batches: Batches, epochs: int, seed: int) -> None:
    """Train adapters on `linears` to predict the next tokens of the data, and merge them.

    Rows and columns that were sliced away are not there any more; weights that are zero when this begins are zero when it ends.
    The layers get new parameters; the old ones stay as they are. Call it inside `probes.quiet(model)`.
    """
    targets = list(linears)
    for linear in targets:
        set_weight(linear, weight(linear).detach())
    empty = {linear: weight(linear) == 0 for linear in targets}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.enable_grad(), _adapted(model, targets) as adapters:
            _train(model, adapters, batches, epochs, seed)
    for linear, mask in empty.items():
        if mask.any():
            set_weight(linear, weight(linear).detach().masked_fill(mask, 0))


@contextmanager
def _adapted(model: nn.Module, linears: list[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """The adapters' parameters while they are in place; merged at the end, dropped after an error."""
    peft = _peft()
    wanted = set(linears)
    names = [name for name, module in model.named_modules() if module in wanted]
    transposed = not all(isinstance(linear, nn.Linear) for linear in linears)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, fan_in_fan_out=transposed)
    wrapped = peft.LoraModel(model, config, "surgeon")  # not get_peft_model, which changes more of the model than its layers
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in adapters:
        parameter.data = parameter.data.float()  # Adam's steps would vanish in half precision
    try:
        yield adapters
    except BaseException:
        wrapped.unload()
        raise
    wrapped.merge_and_unload()


def _train(model: nn.Module, adapters: list[nn.Parameter], batches: Batches, epochs: int, seed: int) -> None:
    """Adam with a learning rate that falls to zero, one step for every 512 tokens or so."""
    parts = small_parts(batches)
    generator = torch.Generator().manual_seed(seed)
    order = [int(at) for _ in range(epochs) for at in torch.randperm(len(parts), generator=generator)]
    optimizer = torch.optim.AdamW(adapters, lr=LEARNING_RATE, weight_decay=0.0)
    for step, at in enumerate(tqdm(order, desc="Low-rank corrections", unit="batch")):
        inputs = {name: value.to(device_of(model)) for name, value in parts[at][0].items()}
        mask = inputs["attention_mask"]
        (logits,), (gradient,) = loss_gradients(model, model(**inputs), inputs, None)
        torch.autograd.backward(logits, gradient / (mask[:, 1:] * mask[:, :-1]).sum().clamp_min(1))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / len(order))
        optimizer.step()
        optimizer.zero_grad()
