"""A pruned model beside its dense one: measured on data, or the sizes of their blocks."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from torch import Tensor
from transformers import AutoConfig
from transformers.utils.logging import tqdm

from . import checkpoint, folders
from .blocks import reads_tokens_alone
from .budget import in_words
from .evaluation import Data, Measured, measure, needs_another
from .families import task_of
from .hub import impatient
from .rows import name_of
from .scores import cosine
from .sources import Source, located
from .speed import Speed, side_by_side

logger = logging.getLogger(__name__)
_NO_DENSE = "The speed of {} beside its dense model asked, and there is none. Name it with --dense."

_NOTHING = (
    "{} has no head: what is measured is how close its embeddings are to those of its dense model, and there is "
    "none to compare with. Name it with --dense, or give pairs of texts with a score (--label-column)."
)


@dataclass(frozen=True)
class Side:
    """One of the two models: what it is called, what `measure` found, and the bytes of its weights' files."""

    name: str
    measured: Measured
    size_on_disk: int | None

    @property
    def megabytes(self) -> float | None:
        """`size_on_disk` for people."""
        return self.size_on_disk and self.size_on_disk / 1e6

    @property
    def millions_of_macs(self) -> float | None:
        """Multiply-adds of the blocks, for people."""
        return self.measured.macs and self.measured.macs / 1e6

    @property
    def milliseconds(self) -> float:
        """The forward pass's time for people."""
        return self.measured.seconds * 1e3


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `str()` is a table; `to_dict()` holds plain JSON values."""

    pruned: Side
    dense: Side | None
    dataset: str
    speed: tuple[Speed, ...] = ()
    """Both in memory, timed in turn."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """As recipes hold them: name, dataset, value, dense."""
        beside = self.dense.measured.metrics if self.dense else {}
        found = {name: (value, beside.get(name)) for name, value in self.pruned.measured.metrics.items()}
        ours, theirs = self.pruned.measured.embeddings, self.dense.measured.embeddings if self.dense else None
        if ours is not None and theirs is not None:
            found["cosine_with_dense"] = (cosine(ours, theirs), 1.0)
        return [
            {"name": name, "dataset": self.dataset, "value": _short(value), "dense": _short(dense)}
            for name, (value, dense) in found.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "task": self.pruned.measured.task,
            "dataset": self.dataset,
            "metrics": self.metrics,
            "pruned": _plain(self.pruned),
            "dense": None if self.dense is None else _plain(self.dense),
            "speed": [each.to_dict() for each in self.speed],
        }

    def __str__(self) -> str:
        pruned, dense = self.pruned, self.dense
        tokens = in_words(pruned.measured.num_tokens)
        rows = [("", "dense" if dense else "", "model", "ratio" if dense else "")]
        rows += [_row(m["name"], m["dense"], m["value"], "{:.4f}") for m in self.metrics]
        rows.append(_row("parameters", dense.measured.parameters if dense else None, pruned.measured.parameters, "{:,}"))
        macs = f"M MACs, {tokens}"
        rows.append(_row(macs, dense.millions_of_macs if dense else None, pruned.millions_of_macs, "{:,.0f}"))
        rows.append(_row("MB on disk", dense.megabytes if dense else None, pruned.megabytes, "{:,.1f}"))
        rows.append(_row(f"ms for {tokens}", dense.milliseconds if dense else None, pruned.milliseconds, "{:,.1f}"))
        width = max(22, *(len(name) + 1 for name, *_ in rows))
        lines = [f"{name:<{width}}{dense:>16}{value:>16}{ratio:>8}".rstrip() for name, dense, value, ratio in rows]
        about = [f"model: {self.pruned.name}", *([f"dense: {self.dense.name}"] if self.dense else []), f"data: {self.dataset}"]
        return "\n".join([*about, *lines, *map(str, self.speed)])


def speeds(
    model: str,
    dense: str,
    batch_sizes: Sequence[int],
    seq_len: Any,
    task: str,
    device: Any,
    example: dict[str, Tensor],
    **kwargs: Any,
) -> list[Speed]:
    """Both models in memory, in one dtype, timed in turn on batches of these sizes; of language models, decoding too.

    On `seq_len` tokens; models that read anything else than token ids, on so many of `example`.
    """
    both = [checkpoint.load(path, task=task, **own)[0] for path, own in ((model, kwargs), (dense, _of_dense(dense, kwargs)))]
    both = [each.to(device=device, dtype=both[0].dtype) for each in both]
    phases = ("prefill", "decode") if task == "text-generation" else ("prefill",)
    work = [(phase, size) for phase in phases for size in batch_sizes]
    own = None if reads_tokens_alone(both[0]) else example
    return [side_by_side(both[1], both[0], size, seq_len, phase, example=own) for phase, size in tqdm(work, desc="Speed")]


def compare(
    model: str,
    dense: str | None,
    data: Data,
    *,
    must: bool,
    task: str | None,
    device: Any,
    speed: Sequence[int] = (),
    **kwargs: Any,
) -> Comparison:
    """Measure `model`, then `dense`, one in memory at a time; then, for batch sizes in `speed`, both together: see `speeds`.

    `kwargs` go to from_pretrained. If `dense` cannot be loaded and need not be (`must`), it is left out with a warning.
    """
    lost = _out_of_reach(dense, kwargs) if dense is not None and not must else None
    if lost is not None:
        _leave_out(dense, lost)
        dense = None
    if speed and dense is None:
        raise ValueError(_NO_DENSE.format(model))
    pruned, task = _side(model, data, task, device, alone=dense is None, **kwargs)
    beside = None
    if dense is not None:
        try:
            beside, _ = _side(dense, data, task, device, **_of_dense(dense, kwargs))
        except (OSError, ValueError) as error:
            if must:
                raise
            _leave_out(dense, error)
    if not pruned.measured.metrics and beside is None:
        raise ValueError(_NOTHING.format(model))
    found = Comparison(pruned, beside, name_of(data.dataset) or "data without a name")
    if not speed:
        return found
    if dense is None or beside is None:
        raise ValueError(_NO_DENSE.format(model))
    seq_len = pruned.measured.num_tokens
    with suppress(OSError, ValueError):  # which `base_model` has told
        recipe = _recipe(model, kwargs.get("revision"), kwargs.get("subfolder"))
        seq_len = (recipe.get("report") or {}).get("seq_len") or seq_len
    try:
        example = pruned.measured.example
        return replace(found, speed=tuple(speeds(model, dense, speed, seq_len, task, device, example, **kwargs)))
    except (ValueError, RuntimeError) as error:  # such as no memory for both: what was measured before counts
        logger.warning("the speed beside the dense model could not be measured: %s", " ".join(str(error).split()))
        return found


def _out_of_reach(dense: str, kwargs: dict[str, Any]) -> Exception | None:
    """Why not even the config of a model can be read, which is found out at once; None: it can be, or takes reading it all."""
    try:
        place, gguf = located(dense)
        if not gguf:
            own = _of_dense(dense, kwargs)
            with impatient(place):
                AutoConfig.from_pretrained(place, **{name: own[name] for name in checkpoint.CONFIG_ARGUMENTS if name in own})
    except (OSError, ValueError) as error:
        return error
    return None


def _leave_out(dense: str | None, error: Exception) -> None:
    reason = " ".join(str(error).split())
    logger.warning("the dense model %s cannot be loaded, so it is not measured: %s", dense, reason)


def base_model(model: str, revision: str | None, subfolder: str | None = None) -> Source | None:
    """What the recipe of a pruned model says it was made from, unless that is a folder of which it has no more than the name."""
    try:
        recipe = _recipe(model, revision, subfolder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        told = "%s of %s cannot be read, so what to measure beside it is not known: name it with --dense. (%s)"
        logger.warning(told, folders.RECIPE, model, reason)
        return None
    source = recipe.get("base_model")
    if source is None:
        return None
    if str(source).startswith("./"):
        logger.warning("%s was made from %s, which may lie anywhere, so it is not measured: name it with --dense.", model, source)
        return None
    return Source(str(source), recipe.get("base_revision"), recipe.get("base_subfolder") or "")


def _recipe(model: str, revision: str | None, subfolder: str | None = None) -> dict[str, Any]:
    """Empty if the model was not pruned by us, or not as a whole.

    Raises:
        OSError: it cannot be read, or the Hub does not say whether there is one.
        ValueError: it is damaged.
    """
    if Path(model).exists():
        path = Path(model, subfolder or "", folders.RECIPE)
        found = json.loads(path.read_text()) if path.is_file() else {}
    else:
        try:
            path = Path(hf_hub_download(model, folders.RECIPE, subfolder=subfolder, revision=revision))
            found = json.loads(path.read_text())
        except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            return {}
    return found if isinstance(found, dict) else {}


def _side(path: str, data: Data, task: str | None, device: Any, alone: bool = False, **kwargs: Any) -> tuple[Side, str]:
    model, tokenizer, _ = checkpoint.load(path, task=task, **kwargs)
    if alone and needs_another(model, data):
        raise ValueError(_NOTHING.format(path))
    if device is not None:
        model.to(device)
    found = Side(path, measure(model, tokenizer, data), _size_on_disk(path, kwargs)), task_of(model)
    del model
    gc.collect()
    return found


def _of_dense(dense: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the pruned model is found by holds of no other; a recipe says what its base model is found by."""
    own = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder", "gguf_file")}
    return {**own, **(dense.found_by if isinstance(dense, Source) else {})}


def _size_on_disk(path: str, kwargs: dict[str, Any]) -> int | None:
    """Bytes of the weights' files; None if they cannot be found."""
    folder, inside = Path(path), kwargs.get("subfolder", "")
    if folder.is_file():  # a .gguf
        return folder.stat().st_size
    folder = folder / inside
    if not folder.is_dir():
        cached = try_to_load_from_cache(path, str(Path(inside, "config.json")), revision=kwargs.get("revision"))
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    patterns = [kwargs["gguf_file"]] if "gguf_file" in kwargs else ["*.safetensors", "*.bin"]
    found = next((files for pattern in patterns if (files := list(folder.glob(pattern)))), [])
    return sum(file.stat().st_size for file in found) or None


def _plain(side: Side) -> dict[str, Any]:
    apart = ("embeddings", "metrics", "task", "example")
    measured = {name: value for name, value in vars(side.measured).items() if name not in apart}
    return {"name": side.name, **measured, "size_on_disk": side.size_on_disk}


def _short(value: float | None) -> float | None:
    """Six digits; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _row(name: str, dense: float | None, value: float | None, how: str) -> tuple[str, str, str, str]:
    ratio = f"{value / dense:.2f}" if value is not None and dense else ""
    return name, "" if dense is None else how.format(dense), "" if value is None else how.format(value), ratio
