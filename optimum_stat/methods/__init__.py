"""The published methods, one file each. To add one: write the file, add its name here."""

from __future__ import annotations

from typing import Any

from ..pruner import Pruner
from .fisher import FisherPruner
from .movement import MovementPruner
from .stat import STATPruner
from .surgeon import SurgeonPruner
from .vib import VIBPruner

METHODS: tuple[type[Pruner[Any]], ...] = (FisherPruner, MovementPruner, STATPruner, SurgeonPruner, VIBPruner)
