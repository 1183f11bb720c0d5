"""Who teaches the methods that train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from . import checkpoint
from .families import task_of
from .hub import shown
from .sources import source_of


def name_of(asked: str | Path | PreTrainedModel | None) -> str | None:
    """How a report calls the teacher, of a folder by what the folder is called; None: it is the dense model."""
    if isinstance(asked, PreTrainedModel):
        return shown(source_of(asked.name_or_path)) or type(asked).__name__
    return None if asked is None else shown(source_of(str(asked)))


def teacher_for(model: PreTrainedModel, asked: str | Path | PreTrainedModel | None) -> Any:
    """A copy of the teacher asked for, by default of the model as it is, ready to predict.

    Raises:
        ValueError: it predicts something else than the model.
    """
    teacher: Any = checkpoint.load(str(asked))[0] if isinstance(asked, (str, Path)) else copy.deepcopy(asked or model)
    tasks = [task_of(each) for each in (model, teacher)]
    if len(set(tasks)) > 1:
        raise ValueError(f"The teacher {type(teacher).__name__} is for {tasks[1]}, the model for {tasks[0]}: no common loss.")
    for name in ("num_labels", "vocab_size"):
        here, there = (getattr(each.config.get_text_config(), name, None) for each in (model, teacher))
        if here != there:
            raise ValueError(f"The teacher's {name} is {there}, the model's {here}: it has to predict the same.")
    own, other = ({str(label).lower(): at for label, at in each.config.label2id.items()} for each in (model, teacher))
    if own != other and own.keys() == other.keys():
        raise ValueError(
            f"The teacher's classes stand in another order, {', '.join(sorted(other, key=other.__getitem__))}, than the model's, "
            f"{', '.join(sorted(own, key=own.__getitem__))}: what it says of one would be taken for another."
        )
    for name, value in {"use_cache": False, "return_dict": True}.items():
        setattr(teacher.config, name, value)
    return teacher.eval().requires_grad_(False)
