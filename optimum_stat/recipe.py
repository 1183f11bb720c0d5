"""What a run was and what came of it, as plain values: beside the model, and what its card is rendered from."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base_card import inherited
from .structure import KEY
from .timing import describe_device

if TYPE_CHECKING:
    from .pruner import Pruner


def make_recipe(pruner: Pruner[Any]) -> dict[str, Any]:
    """All that is needed to do the run again: method, config, data, versions; and what came of it."""
    libraries = ("optimum-stat", "torch", "transformers")
    return {
        "method": pruner.method,
        "base_model": pruner.source,
        "base_card": inherited(pruner.source, getattr(pruner.model.config, "_commit_hash", None)),
        "architecture": type(pruner.model).__name__,
        "config": _config(pruner),
        "record": getattr(pruner.model.config, KEY),
        "report": pruner.report.to_dict(),
        "metrics": pruner.metrics,
        **({"latency_table": pruner.currency.table.to_dict()} if pruner.currency.table else {}),
        "versions": {name: metadata.version(name) for name in libraries},
        "environment": {
            "device": describe_device(pruner.model),
            "dtype": str(pruner.model.dtype).removeprefix("torch."),
            "system": platform.platform(terse=True),
            "python": platform.python_version(),
        },
    }


def _config(pruner: Pruner[Any]) -> dict[str, Any]:
    """The run's, without the folder on this machine where it found its latencies: they are in the recipe."""
    config = pruner.config.to_dict()
    table = config["latency_table"]
    return config | {"latency_table": table and Path(table).name}
