"""What of a training run stays in `output_dir` beside Trainer's checkpoints, so that the same run can go on, and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

RUN, FINETUNE, MASKED = "stat_run.json", "stat-finetune", "masked.safetensors"
WITHOUT_STATE = ("save_only_model", "ignore_data_skip")


def begin(args: TrainingArguments, run: Mapping[str, Any], resume: str | Path | bool | None) -> None:
    """Write down what the run is; of one that goes on, look whether it is the same.

    Raises:
        ValueError: it is another, or its arguments are such that it could not end as if it had never stopped.
    """
    here, now = Path(args.output_dir), json.loads(json.dumps(run))
    if not resume:
        if args.should_save and args.save_strategy != "no":
            _forget(here)
            here.mkdir(parents=True, exist_ok=True)
            (here / RUN).write_text(json.dumps(now))
        return
    wrong = next((name for name in WITHOUT_STATE if getattr(args, name)), None)
    if wrong is not None:
        raise ValueError(f"{wrong}=True asked of a run that is resumed: it would end elsewhere than one that was never stopped.")
    place = here if resume is True else Path(resume).parent
    before = _written(place) or now
    name = next((name for name in {**before, **now} if before.get(name) != now.get(name)), None)
    if name is not None:
        raise ValueError(
            f"{place} holds the checkpoints of another run: its {name} was {before.get(name)!r}, now {now.get(name)!r} is asked. "
            "Ask for the same again, or name another output_dir."
        )
    if resume is not True and args.should_save:
        _forget(here)  # what came of later checkpoints than the one that is named


def finished(args: TrainingArguments) -> Path:
    """Where the weights and masks are kept while what is left trains."""
    return Path(args.output_dir) / FINETUNE / MASKED


def _written(folder: Path) -> dict[str, Any]:
    """Empty if nothing, or something else, stands there."""
    try:
        found = json.loads((folder / RUN).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _forget(folder: Path) -> None:
    """The fine-tuning that an earlier run had come to."""
    (folder / FINETUNE / MASKED).unlink(missing_ok=True)
    for checkpoint in (folder / FINETUNE).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
