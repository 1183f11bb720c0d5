"""optimum-stat: structured pruning of transformers. `STATPruner.from_pretrained(...).prune(dataset)`.

Importing this package is cheap (no torch, no transformers) and lets transformers load pruned models from then on.
"""

from __future__ import annotations

from importlib import import_module

from . import autoload

TYPE_CHECKING = False  # as typing has it, without the time to import typing at every start of Python
if TYPE_CHECKING:
    from typing import Any

    from .config import PruningConfig as PruningConfig
    from .methods.fisher import FisherConfig as FisherConfig
    from .methods.fisher import FisherPruner as FisherPruner
    from .methods.movement import MovementConfig as MovementConfig
    from .methods.movement import MovementPruner as MovementPruner
    from .methods.stat import STATConfig as STATConfig
    from .methods.stat import STATPruner as STATPruner
    from .methods.surgeon import SurgeonConfig as SurgeonConfig
    from .methods.surgeon import SurgeonPruner as SurgeonPruner
    from .methods.vib import VIBConfig as VIBConfig
    from .methods.vib import VIBPruner as VIBPruner
    from .pruner import Pruner as Pruner
    from .semi_structured import to_sparse_semi_structured as to_sparse_semi_structured

__version__ = "0.1.0.dev0"
_HOME = {
    "FisherConfig": "methods.fisher",
    "FisherPruner": "methods.fisher",
    "MovementConfig": "methods.movement",
    "MovementPruner": "methods.movement",
    "Pruner": "pruner",
    "PruningConfig": "config",
    "STATConfig": "methods.stat",
    "STATPruner": "methods.stat",
    "SurgeonConfig": "methods.surgeon",
    "SurgeonPruner": "methods.surgeon",
    "VIBConfig": "methods.vib",
    "VIBPruner": "methods.vib",
    "to_sparse_semi_structured": "semi_structured",
}
__all__ = [
    "FisherConfig",
    "FisherPruner",
    "MovementConfig",
    "MovementPruner",
    "Pruner",
    "PruningConfig",
    "STATConfig",
    "STATPruner",
    "SurgeonConfig",
    "SurgeonPruner",
    "VIBConfig",
    "VIBPruner",
    "__version__",
    "to_sparse_semi_structured",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


autoload.install()
