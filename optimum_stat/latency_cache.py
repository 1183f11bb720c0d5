"""Tables of latencies, remembered: this machine's own, and those in files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import folders, latency
from .budget import options
from .families import find_groups
from .latency import LatencyTable
from .latency_timing import measure_table, shapes_of
from .timing import Setting

logger = logging.getLogger(__name__)
DAMAGED = (OSError, ValueError, TypeError, AttributeError, KeyError)  # what reading a file that holds something else ends in
# in configs; they take no time, or are what we set
NAMES = ("_name_or_path", "architectures", "transformers_version", "id2label", "label2id", "use_cache", "return_dict")


def latency_table(model: Any, round_to: int, setting: Setting, path: str | None = None) -> LatencyTable:
    """The table in the file `path`; without one, this machine's from an earlier run, or measured now and remembered.

    Raises:
        ValueError: the file is no table, is that of another setting, or does not fit the model.
    """
    if path is not None:
        table = _read(Path(path), model, round_to, setting)
        if table.setting.seq_len != setting.seq_len:
            asked = f"{table.setting.seq_len} tokens an example; asked, or the mean of the calibration data, is {setting.seq_len}"
            logger.warning("The latencies in %s are for %s. The budget counts the former.", path, asked)
        return table
    cached = place(model, round_to, setting)
    if cached.exists():
        try:
            return LatencyTable.from_dict(json.loads(cached.read_text()))
        except DAMAGED as error:
            logger.warning("The latencies in %s cannot be read and are measured again: %s", cached, error)
    table = measure_table(model, round_to, setting)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        folders.replace(cached, json.dumps(table.to_dict()).encode())
    except OSError as error:  # the next run measures again; this one goes on
        logger.warning("The latencies could not be remembered in %s: %s", cached.parent, error)
    return table


def place(model: Any, round_to: int, setting: Setting) -> Path:
    """Where the table of such models is remembered, once it is."""
    return latency.cache_folder() / f"{_key(model, round_to, setting)}.json"


def _key(model: Any, round_to: int, setting: Setting) -> str:
    # shapes do not tell how often shared blocks run, which experts do, or what stands between the layers: the config does
    config = {name: value for name, value in model.config.to_dict().items() if name not in NAMES}
    versions = [metadata.version(name) for name in ("optimum-stat", "torch", "transformers")]
    what = [shapes_of(model), config, setting.to_dict(), round_to, versions]
    return hashlib.sha256(json.dumps(what, default=str, sort_keys=True).encode()).hexdigest()[:24]


def _read(path: Path, model: Any, round_to: int, setting: Setting) -> LatencyTable:
    """A table from a file of its own, or from the recipe of a model that was pruned with it."""
    try:
        values = json.loads(path.read_text())
        table = LatencyTable.from_dict(values.get("latency_table") or values)
    except DAMAGED as error:
        raise ValueError(f"latency_table={str(path)!r} asked, but it holds no table of latencies: {error}") from error
    there = table.setting
    if (there.device, there.dtype) != (setting.device, setting.dtype):
        gone = "" if torch.cuda.is_available() or not there.device.startswith("cuda") else ", which this machine does not have"
        raise ValueError(
            f"The latencies in {path} were measured on {there.device}, {there.dtype}{gone}; the model is on {setting.device}, "
            f"{setting.dtype}. Times of one device say nothing about another's: leave latency_table out to measure here, or "
            "prune where they were measured."
        )
    if dataclasses.replace(there, seq_len=setting.seq_len) != setting:
        raise ValueError(f"The latencies in {path} are of {there}, but {setting} is asked.")
    if table.model not in ("", shapes_of(model)):
        raise ValueError(
            f"The latencies in {path} are another model's: its weights have other shapes. Leave latency_table out to measure "
            "this one's."
        )
    _check_sizes(path, table, {group.name: options(group, round_to) for group in find_groups(model)})
    return table


def _check_sizes(path: Path, table: LatencyTable, allowed: Mapping[str, Sequence[int]]) -> None:
    for name in {**allowed, **table.sizes}:
        found, times, own = list(table.sizes.get(name, ())), table.times.get(name, ()), allowed.get(name, [0])
        if not found or found[-1] != own[-1] or not set(found) <= set(own) or len(times) != len(found):
            raise ValueError(
                f"The latencies in {path} are another model's, or of another round_to: of {name} it has the sizes {found}, and "
                f"some of {list(own)} are wanted. Leave latency_table out to measure them."
            )
