"""What to measure a model on, and the parts of reading it that all measures share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import IterableDataset
from torch import Tensor

from .config import PruningConfig
from .labels import COLUMNS as LABEL_COLUMNS
from .probes import device_of


@dataclass(frozen=True)
class Data:
    """What to measure on. Of `config` the data's fields count: seq_len, num_tokens, max_examples, batch_size, seed."""

    dataset: Any
    """A `datasets.Dataset` or `IterableDataset` of raw text, words, images or sounds."""
    config: PruningConfig
    text_columns: Sequence[str] | None = None
    label_column: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The dataset's, of a stream that does not know them those of its first row; none, where there are none."""
        names = getattr(self.dataset, "column_names", None)
        if names is None and isinstance(self.dataset, IterableDataset):
            names = next(iter(self.dataset), ())
        return tuple(names or ())

    def classes_of(self, column: str) -> list[str] | None:
        """The names of the classes in a column, or in its lists, if the dataset has them."""
        feature = (getattr(self.dataset, "features", None) or {}).get(column)
        names = getattr(getattr(feature, "feature", feature), "names", None)
        return None if names is None else list(names)


def data_config(**given: Any) -> PruningConfig:
    """A configuration of the data alone, which reads everything unless told otherwise."""
    return dataclasses.replace(PruningConfig(num_tokens=None), **given)


def label_column(data: Data, usual: Sequence[str] = LABEL_COLUMNS) -> str:
    """The column asked for, or the first of the usual ones.

    Raises:
        ValueError: it is not there.
    """
    wanted = (data.label_column,) if data.label_column else usual
    found = next((name for name in wanted if name in data.columns), None)
    if found is None:
        columns = ", ".join(data.columns) or "unknown"
        raise ValueError(
            f"No label column {' or '.join(wanted)}; the columns are {columns}. Name another with label_column (--label-column)."
        )
    return found


def numbers(values: Sequence[Any], column: str) -> list[float]:
    """What a head that predicts a number is compared with.

    Raises:
        ValueError: one is missing, or is no number.
    """
    for number, value in enumerate(values):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"Row {number} has {value!r} in {column!r}, where a number was expected.")
    return [float(value) for value in values]


def first_example(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first example of a batch, without the padding behind it."""
    found = {name: value[:1] for name, value in batch.items()}
    for of in ("", "decoder_"):
        mask = found.get(f"{of}attention_mask")
        if mask is not None:
            length = int(mask.sum())
            own = (f"{of}input_ids", f"{of}attention_mask", *(("token_type_ids", "position_ids") if not of else ()))
            found |= {name: found[name][:, :length] for name in own if name in found}
    return found


def hidden_states(model: Any, output: Any) -> Tensor:
    """What the last block of a model without a head returns, in float32.

    Raises:
        ValueError: it has a head, of a kind that is not known.
    """
    if "last_hidden_state" in output:
        found: Tensor = output["last_hidden_state"].float()
        return found
    raise ValueError(f"{type(model).__name__} cannot be measured: there is no measure of what it returns, {', '.join(output)}.")


def to_device(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The batch where the model's inputs belong."""
    return {name: value.to(device_of(model)) for name, value in batch.items()}
