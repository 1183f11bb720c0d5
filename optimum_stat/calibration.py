"""From the arguments of `prune` to what a pruner works on: models that can be pruned, batches, and the journal of the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .anatomy import attentions
from .blocks import find_stacks, is_causal, lacks_padding, reads_tokens_alone
from .config import PruningConfig
from .data import Batches, make_batches
from .families import task_of
from .few_pairs import FewPairs
from .few_values import OfFewValues
from .journal import Journal
from .media import make_media_batches
from .offload import is_offloaded
from .processes import Processes
from .trial import refuse_unlike

if TYPE_CHECKING:
    from .pruner import Pruner


def read(
    pruner: Pruner[Any],
    dataset: Any,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    use: str = "",
    config: PruningConfig | None = None,
) -> Batches:
    """Batches for the pruner's model, shared among the processes there are. use: of labels, see `Pruner.labels`, the default.

    config: which of the data to read, the pruner's by default.
    """
    model, use, config = pruner.model, use or pruner.labels, config or pruner.config
    if use == "none" and label_column is not None:
        raise ValueError(f"label_column={label_column!r} asked, but {pruner.method} with this config reads no labels.")
    asked: dict[str, Any] = {"labels_for": None if use == "none" else model, "labels_needed": use == "data"}
    asked |= {"text_columns": text_columns, "label_column": label_column}
    if reads_tokens_alone(model):
        causal = is_causal(model) and task_of(model) in ("text-generation", "feature-extraction")
        batches = make_batches(dataset, model.config, config, causal=causal, tokenizer=pruner.tokenizer, **asked)
    else:
        batches = make_media_batches(dataset, model, config, processor=pruner.tokenizer, **asked)
    if lacks_padding(model) and any(len(item["input_ids"]) > 1 for item in batches):
        raise ValueError(
            f"A {type(model).__name__} finds the end of an example by config.pad_token_id, and has none: set it to the id that "
            "its texts will be padded with (the tokenizer's pad_token_id), or ask for batch_size=1."
        )
    refuse_unlike(model, config.structures, batches)
    return replace(batches, processes=Processes.launched())


def refuse_unprunable(model: nn.Module) -> None:
    """Raise if weights cannot be cut and corrected: quantized, under adapters, of heads divided already, of a compiled model."""
    if any(isinstance(module, (FewPairs, OfFewValues)) for module in model.modules()):
        raise ValueError(
            "The heads of this model have lost single dimensions, and what is left of them cannot be cut again: prune the dense "
            "model to the size that you want."
        )
    adapter = next((name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")), None)
    if adapter is not None:
        raise ValueError(
            f"The model has adapters ({adapter or type(model).__name__}): merge them first, merge_and_unload() does."
        )
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or (name and getattr(module, "_compiled_call_impl", None)):
            what = f"{name}, a part of the model, is compiled" if name else "A compiled model was passed"
            raise ValueError(f"{what}: pass the one that was compiled, prune it, then compile the result.")
        if isinstance(module, (nn.Linear, Conv1D)) and (hasattr(module, "parametrizations") or hasattr(module, "weight_orig")):
            raise ValueError(
                f"The weight of {name} is computed from others: make it an ordinary one first, as prune.remove and "
                "parametrize.remove_parametrizations of torch.nn.utils do."
            )
    if getattr(model, "is_quantized", False) or getattr(getattr(model, "config", None), "quantization_config", None):
        method = getattr(model, "quantization_method", None) or "an unknown method"
        raise ValueError(
            f"The weights of this model are quantized ({getattr(method, 'value', method)}); pruning has to correct them. "
            "Load the unquantized model (or model.dequantize() where the method has it), prune it, then quantize the "
            "pruned model: the two compose in that order."
        )
    stacks = find_stacks(model)
    if len(stacks) == 1 and any(found.cross for block in stacks[0].blocks for found in attentions(block)):
        raise ValueError(
            f"A {type(model).__name__} has attention that reads an encoder, but no encoder: prune the whole that it comes from."
        )


def refuse_unusable(pruner: type[Pruner[Any]], model: nn.Module, config: Any) -> None:
    """Raise if the model cannot be pruned, or the configuration is not of this method."""
    refuse_unprunable(model)
    if not isinstance(config, pruner.config_class):
        wanted = pruner.config_class.__name__
        raise TypeError(f"config is a {type(config).__name__}; a {pruner.__name__} takes a {wanted}, such as {wanted}(keep=0.7).")


def refuse_offloaded(pruner: Pruner[Any]) -> None:
    """Raise if some weights are not in memory and the run needs all of them at once."""
    config = pruner.config
    if is_offloaded(pruner.model) and (config.trunk or config.distill_epochs or config.budget in ("latency", "memory")):
        raise ValueError(
            f"structures={config.structures!r}, distill_epochs={config.distill_epochs} and budget={config.budget!r} asked of a "
            "model with offloaded weights, of which one block at a time can be worked on: ask for no layers, hidden dimensions "
            "or experts, for no distillation, and for a budget of params or macs."
        )
    if is_offloaded(pruner.model) and pruner.counts == "weights":
        raise ValueError("Some weights of the model are offloaded: only whole units can be pruned, not single weights.")


def unjournaled(pruner: Pruner[Any]) -> str | None:
    """What there is about the pruner's runs that no journal keeps; None if they can be resumed."""
    if not reads_tokens_alone(pruner.model):
        return f"a {type(pruner.model).__name__}, which has several stacks of blocks, or reads no tokens"
    if not pruner.resumable:
        return "a run that makes zeros, trains adapters or cuts the trunk in shots"
    return None


def open_journal(pruner: Pruner[Any], folder: str | Path | None, batches: Batches) -> Journal:
    """The journal in `folder` of this pruner's run on these batches, before anything is derived from its config.

    Raises:
        ValueError: the folder holds another run's, or the run does things that no journal keeps.
    """
    if folder is None:
        return Journal()
    if (why := unjournaled(pruner)) is not None:
        raise ValueError(f"resume_from_checkpoint asked of {why}: that starts anew. Leave it (--resume) out.")
    run = {
        "method": pruner.method,
        "model": pruner.source,
        **pruner.config.to_dict(),
        "data": batches.fingerprint,
        "labels of the data": _digest(batches.labels or ()),
        "weights": _fingerprint(pruner.model),
        "versions": {name: metadata.version(name) for name in ("optimum-stat", "torch", "transformers")},
    }
    return Journal.open(folder, json.loads(json.dumps(run)), batches.processes)


def _digest(labels: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for own in labels:
        digest.update(json.dumps({name: value.tolist() for name, value in sorted(own.items())}).encode())
    return digest.hexdigest()


def _fingerprint(model: nn.Module) -> str:
    """Of every parameter's name, type, shape and, where it is in memory, a few of its values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = [] if parameter.device.type == "meta" else parameter.detach().flatten()[:: max(1, parameter.numel() // 8)].tolist()
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)} {some}".encode())
    return digest.hexdigest()
