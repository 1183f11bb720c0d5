"""What the processes of tests/test_processes.py do: prune a tiny model and leave what came of it in a folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import batches, tiny

from optimum_stat import (
    FisherConfig,
    FisherPruner,
    MovementConfig,
    MovementPruner,
    STATConfig,
    STATPruner,
    SurgeonConfig,
    SurgeonPruner,
    VIBConfig,
    VIBPruner,
    journal,
    processes,
    walk,
)

METHODS: dict[str, tuple[Any, Any]] = {
    "stat": (STATPruner, STATConfig(keep=0.6, round_to=1)),
    "stat, stream": (STATPruner, STATConfig(keep=0.6, round_to=1, metric="stream")),
    "stat, paper": (STATPruner, STATConfig.paper(keep=0.6)),
    "stat, hidden": (STATPruner, STATConfig(keep=0.6, round_to=1, structures=("hidden",))),
    "stat, values": (STATPruner, STATConfig(keep=0.5, round_to=1, structures=("heads", "neurons", "values"))),
    "stat, pairs and values": (STATPruner, STATConfig(keep=0.5, round_to=1, structures=("neurons", "pairs", "values"))),
    "fisher": (FisherPruner, FisherConfig(keep=0.6, round_to=1)),
    "fisher, paper": (FisherPruner, FisherConfig(keep=0.6, round_to=1, labels="model", published=True)),
    "surgeon": (SurgeonPruner, SurgeonConfig(keep=0.6, round_to=1, shots=2)),
    "surgeon, elements": (SurgeonPruner, SurgeonConfig(keep=0.6, shots=1, structure="elements")),
}
TRAINED: dict[str, tuple[Any, Any]] = {
    "movement": (MovementPruner, MovementConfig(keep=0.6, round_to=1, batch_size=4, finetune_epochs=1.0)),
    "vib": (VIBPruner, VIBConfig(keep=0.6, round_to=1, batch_size=4)),
}
FAMILIES = ("llama", "bert")
CHUNK = 60  # tokens: the data must be worth sharing


def examples(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Lengths that no number of processes divides."""
    lengths = tuple(5 + (7 * i) % 13 for i in range(47))
    return batches(lengths, batch_size=4, seed=seed)


def families_of(name: str) -> tuple[str, ...]:
    """BERT turns no pairs; what trains has labels."""
    return FAMILIES[1:] if name in TRAINED else FAMILIES[:1] if "pairs" in name else FAMILIES


def trained(name: str) -> Any:
    """A pruner that has trained, with an evaluation."""
    method, config = TRAINED[name]
    rows = [{"input_ids": row["input_ids"][0].tolist(), "label": i % 3} for i, row in enumerate(batches(range(5, 29), 1))]
    pruner = method(tiny("bert", "SequenceClassification"), config)
    pruner.prune(rows, rows[:6], {"disable_tqdm": True, "report_to": "none", "learning_rate": 1e-3, "num_train_epochs": 2})
    return pruner


def main(rank: int, environment: dict[str, str], folder: Path, names: list[str], fate: str) -> None:
    """In a process of its own. What goes wrong stands in a file afterwards."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    walk.CHUNK = CHUNK
    torch.set_num_threads(1)
    try:
        prune(rank, folder, names, fate)
    except BaseException as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def prune(rank: int, folder: Path, names: list[str], fate: str) -> None:
    """All methods that are named, on all families. fate: "killed", or "resumed FOLDER [RANK ENTRY]": that one dies there."""
    if fate == "killed" and rank == 1:
        _die_after(processes.Processes, "add_up", 4)
    place, *when = fate.split()[1:] if fate.startswith("resumed") else (None,)
    if when and rank == int(when[0]):
        _die_after(journal.Journal, "keep", int(when[1]))
    seen = _watched()
    for name in names:
        for family in families_of(name):
            if name in TRAINED:
                pruner = trained(name)
            else:
                method, config = METHODS[name]
                pruner = method(tiny(family), config)
                pruner.prune(examples(), resume_from_checkpoint=place and Path(place, name, family))
            where = folder / name / family
            pruner.save_pretrained(where)
            assert (where / "model.safetensors").exists(), "the others go on only when it is there"
            report = pruner.report.to_dict()
            if rank:  # every process has the same model, though the main one alone writes it
                state = {key: value.contiguous().clone() for key, value in pruner.model.state_dict().items()}
                save_file(state, folder / f"{name}-{family}-{rank}.safetensors")
            else:
                (folder / f"{name}-{family}.json").write_text(json.dumps([report["groups"], report["num_tokens"]]))
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


def _die_after(owner: Any, method: str, count: int) -> None:
    """At the call of `method` with this number."""
    plain, calls = getattr(owner, method), []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *args, **kwargs)

    setattr(owner, method, counted)


def _watched() -> list[list[list[int]]]:
    """The examples that each walk of this process reads."""
    seen: list[list[list[int]]] = []
    plain = walk.BlockWalk._own

    def own(self: Any, items: Any) -> Any:
        found = plain(self, items)
        seen.append([ids.tolist() for item in found for ids in item["input_ids"]])
        return found

    walk.BlockWalk._own = own  # type: ignore[method-assign]
    return seen
