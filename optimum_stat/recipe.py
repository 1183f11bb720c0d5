"""What a run was and what came of it, as plain values: beside the model, and what its card is rendered from."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base_card import inherited
from .remote_code import own_auto_class
from .sources import known
from .structure import KEY
from .timing import describe_device

if TYPE_CHECKING:
    from .pruner import Pruner


def make_recipe(pruner: Pruner[Any]) -> dict[str, Any]:
    """All that is needed to do the run again: method, config, data, versions; and what came of it."""
    libraries = ("optimum-stat", "torch", "transformers")
    source = None if pruner.source is None else known(pruner.source, pruner.model)
    return {
        "method": pruner.method,
        "base_model": source and str(source),
        **({} if source is None else {f"base_{name}": value for name, value in source.found_by.items()}),
        "base_card": {} if source is None else inherited(source),
        "architecture": type(pruner.model).__name__,
        **({"own_class_of": own} if (own := own_auto_class(pruner.model)) else {}),
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
