"""Pruned models of every family, by chance and by the methods: what the table of `test_table.py` and others look at."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from test_slicing import divide_at_random, random_plan
from tiny import FIXED_STREAM, HIDDEN, MIXTURES, data_of, outputs, tiny
from torch import Tensor
from transformers import PreTrainedModel

from optimum_stat import FisherConfig, FisherPruner, STATConfig, STATPruner, SurgeonConfig, SurgeonPruner, remote_code
from optimum_stat.families import Group
from optimum_stat.routers import counts, keep_experts
from optimum_stat.slicing import slice_model
from optimum_stat.stream import narrow
from optimum_stat.structure import write_record

CHANCE = "chance"
METHODS: dict[str, Any] = {
    "stat": lambda model: STATPruner(model, STATConfig(keep=0.6)),
    "fisher": lambda model: FisherPruner(model, FisherConfig(keep=0.6)),
    "surgeon": lambda model: SurgeonPruner(model, SurgeonConfig(keep=0.6, shots=2)),
}
FEW = ("bert", "gpt2", "llama", "mixtral", "t5", "vit")
"""Pruned by one method each in every run of the tests; `make test-all` has every method prune every family."""


def pruned(family: str, head: str | None = None, seed: int = 0, *, whole: bool = False) -> PreTrainedModel:
    """A model with other sizes in every layer and, unless `whole`, in every head, and with a narrower residual stream."""
    model = tiny(family, head)
    if seed == 0 and family not in FIXED_STREAM:
        narrow(model, torch.arange(1, HIDDEN, 2))
    slice_model(model, random_plan(model, seed))
    if family in MIXTURES:
        keep_experts(model, torch.tensor([expert for expert in range(sum(counts(model))) if expert not in (1, 4, 6)]))
    if not whole:
        divide_at_random(model, seed)
    write_record(model)
    return model


def size_in(group: Group) -> int:
    """One more head, or eight more neurons, from block to block: sizes that no two layers of a stack share."""
    step = 1 if group.structure == "heads" else 8
    return min(group.units, step * (1 + group.block))


@dataclass(frozen=True)
class Made:
    """A model that a method has pruned, and which units of the dense one it has left."""

    model: PreTrainedModel
    plan: Mapping[str, Tensor]


@functools.cache
def made_once(family: str, method: str) -> Made:
    """With `size_in` of every group, whatever the method would choose: what a unit costs matters to other tests."""
    if method == CHANCE:
        return Made(pruned(family), {})
    pruner = METHODS[method](tiny(family))
    left, select, shots = dict[str, Tensor](), pruner.select, list(pruner.schedule())
    allocate = pruner.allocate

    def sizes(groups: list[Group], *others: Any) -> dict[str, int]:
        allocate(groups, *others)  # what else a method decides there
        more = 8 * (len(shots) - 1)
        return {group.name: min(group.units, size_in(group) + more) for group in groups}

    def chosen(*args: Any) -> Any:
        plan = select(*args)
        shots.pop()
        for name, units in plan.items():
            left[name] = left[name][units] if name in left else units
        return plan

    pruner.allocate, pruner.select = sizes, chosen
    return Made(pruner.prune(data_of(family)).eval(), left)


def made(family: str, method: str, *, whole: bool = False) -> PreTrainedModel:
    """A model of the family with other sizes in every layer; by chance, its stream is narrower, its experts are fewer and, unless
    `whole`, its heads divided."""
    return pruned(family, whole=True) if whole and method == CHANCE else copy.deepcopy(made_once(family, method).model)


def save(family: str, method: str, root: Path) -> None:
    """Into a folder of the family's name with the remote-code loader, and beside it what the model predicts."""
    model, name = made(family, method), family if method == CHANCE else f"{family} by {method}"
    model.config.auto_map = remote_code.write(model, root)
    model.save_pretrained(root / name)
    shutil.move(root / "modeling_stat.py", root / name)
    save_file({"outputs": outputs(model, data_of(family)[0])}, root / f"{name}.safetensors")
