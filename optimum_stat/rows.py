"""The rows of whatever a user passes to `prune`: which columns are the input, and what each row holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value
from torch import Tensor

from .labels import POSITIONS, Labels, find_labels

PAIRS = "sentence1 sentence2, premise hypothesis, question1 question2, text_a text_b, question sentence, question context"
SINGLES = "sentence, content, document"
TEXT_COLUMNS = [tuple(names.split()) for names in f"text, {PAIRS}, {SINGLES}".split(", ")]  # the first match wins
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
REMEDY = """Pass a datasets.Dataset (raw text or tokenized), a list of strings, of string pairs or of dicts, or ready \
batches (mappings whose input_ids is a tensor [examples, length])."""


class Rows:
    """The rows of whatever was passed, each a tuple of texts or a dict of tensors; counts what it reads.

    With `labels_for`, a model, the labels that it can use are read too, where there are some: see `with_labels`.
    """

    def __init__(
        self,
        dataset: Any,
        text_columns: Sequence[str] | None,
        batch_size: int,
        labels_for: Any = None,
        label_column: str | None = None,
    ) -> None:
        self.read, self.kind, self.name, self.masked = 0, "", "", False
        self.columns: tuple[str, ...] = ()
        self.all_columns: tuple[str, ...] = ()
        self.labels: Labels | None = None
        self._labels_for = labels_for
        names: dict[str, Sequence[str]] = {}
        self._asked = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns or ())
        if isinstance(dataset, (Dataset, IterableDataset)):
            self.name = name_of(dataset)
            dataset, own = _as_stored(dataset)
            if own and dataset.features and (isinstance(dataset, IterableDataset) or len(dataset)):  # unknown for some streams
                types = {k: f.dtype if isinstance(f, Value) else type(f).__name__ for k, f in dataset.features.items()}
                self.columns, self.all_columns = input_columns(types, self._asked), tuple(types)
                names = {k: f.names for k, f in dataset.features.items() if isinstance(f, ClassLabel)}
                self.labels = labels_for and find_labels(labels_for, self.all_columns, names, label_column)
                wanted = {*self.columns, *(self.labels.columns if self.labels else ())}
                dataset = dataset.select_columns([k for k in types if k in wanted])  # images beside the text are not decoded
        elif isinstance(dataset, Tensor):
            self.name = f"tensor of {' x '.join(map(str, dataset.shape))} token ids"
        rows = iter(collection(dataset, batch_size))
        try:
            head = next(rows)
        except StopIteration:
            raise ValueError("The dataset is empty: it has no rows. Pass at least one example.") from None
        if not self.all_columns:
            self.all_columns = tuple(head) if isinstance(head, Mapping) else ()
            self.labels = labels_for and find_labels(labels_for, self.all_columns, names, label_column)
        self._rows, self.kind = itertools.chain([head], rows), _kind(self._convert(head))

    def __iter__(self) -> Iterator[Any]:
        return (row for row, _ in self.with_labels())

    def with_labels(self) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        """Every row and its labels; no labels if none are read, or if they stand among the row's tensors (one a token)."""
        for row in self._rows:
            converted = self._convert(row)
            if _kind(converted) != self.kind:
                raise ValueError(f"Row {self.read} is of another kind ({_kind(converted)}) than row 0 ({self.kind}).")
            self._refuse_late_labels(row)
            apart = self.labels is not None and not self.labels.per_token
            labels = self.labels.read(row, f"Row {self.read}") if self.labels and apart else {}
            if labels and self.kind == "tokenized rows" and "attention_mask" in row:
                labels = _moved(labels, torch.as_tensor(row["attention_mask"]), f"Row {self.read}")
            examples = len(converted["input_ids"]) if isinstance(converted, dict) and self.kind == "ready batches" else 1
            for name, value in labels.items():
                if len(value) != examples:
                    raise ValueError(f"Row {self.read} has {len(value)} {name} for {examples} examples.")
            self.read += 1
            yield converted, labels

    def source(self) -> str:
        """One line on what was read."""
        columns = f", columns {' and '.join(self.columns)}" if self.columns and self.kind.startswith("string") else ""
        return (self.name or f"{self.read} {'rows' if columns else self.kind}") + columns

    def _refuse_late_labels(self, row: Any) -> None:
        """Raise if this row has labels, for a model that reads them, and the first one had not: all would be left out."""
        if self._labels_for is None or not isinstance(row, Mapping) or row.keys() <= {*self.all_columns}:
            return
        late = find_labels(self._labels_for, tuple(row), {}, None)
        if late is not None and not {*late.columns} <= {*self.all_columns}:
            columns, seen = " and ".join(late.columns), ", ".join(self.all_columns) or "none, the row is plain"
            raise ValueError(
                f"Row {self.read} has labels ({columns}), but row 0 has none there; its columns: {seen}. Give all rows labels, "
                "or none."
            )

    def _convert(self, row: Any) -> tuple[str, ...] | dict[str, Tensor]:
        row = "" if row is None else row
        texts = (row,) if isinstance(row, str) else row
        if isinstance(texts, (list, tuple)) and 0 < len(texts) < 3 and all(isinstance(text, str) for text in texts):
            if self._asked:
                raise ValueError(f"text_columns={self._asked} asked, but the rows are strings: leave text_columns out.")
            return tuple(texts)
        row = row if isinstance(row, Mapping) else {"input_ids": row}
        self.columns = self.columns or input_columns({k: type(v).__name__ for k, v in row.items()}, self._asked)
        if "input_ids" not in self.columns:
            return _texts(row, self.columns, f"Row {self.read}")
        self.masked |= "attention_mask" in row
        here = dict.fromkeys((*self.columns, *({"attention_mask"} & row.keys())))  # maybe not every row has a mask
        if self.labels is None or not self.labels.per_token:
            return tensors(row, tuple(here), f"Row {self.read}")
        (column,) = self.labels.columns
        result = tensors(row, (*here, column), f"Row {self.read}")
        result["labels"] = result.pop(column)
        self.labels.check_tokens(result["labels"], f"Row {self.read}")
        return result


def name_of(dataset: Any) -> str:
    """What a `datasets` dataset is called, with its configuration and split; "" for one that has no name, and for all else."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return ""
    info, split = dataset.info, dataset.split and f"split {dataset.split}"
    name = (info.dataset_name or info.builder_name, info.config_name, split)
    return ", ".join(part for part in name if part and part != "default")


def input_columns(types: Mapping[str, str], asked: tuple[str, ...]) -> tuple[str, ...]:
    """What to read: the columns asked for, or token ids, or text under a conventional name, or the only text column."""
    seen = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    missing = [name for name in asked if name not in types]
    if missing or len(asked) > 2:
        problem = f"there is no column {', '.join(map(repr, missing))}" if missing else "one or two are possible"
        raise ValueError(f"text_columns={asked} asked, but {problem}. Columns: {seen}.")
    if asked or "input_ids" in types:
        return asked or tuple(name for name in INPUTS if name in types)
    strings = [name for name, kind in types.items() if kind in ("str", "string", "large_string")]
    known = [names for names in TEXT_COLUMNS if set(names) <= set(strings)]
    if not known and len(strings) != 1:
        raise ValueError(f"No text column recognised. Columns: {seen}. Name one, or two for pairs, with text_columns=.")
    return known[0] if known else (strings[0],)


def collection(dataset: Any, batch_size: int) -> Iterable[Any]:
    """What to iterate over; what would iterate over the wrong thing is refused."""
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        splits = list(map(repr, dataset))
        raise ValueError(f"The dataset has several splits: {', '.join(splits)}. Pass one, such as dataset[{splits[0]}].")
    if isinstance(dataset, Mapping) and "input_ids" in dataset:  # what a tokenizer returns
        return [dataset]
    if isinstance(dataset, Tensor) and dataset.dim() == 2:
        return torch.split(dataset, batch_size)
    if isinstance(dataset, torch.utils.data.DataLoader):  # batches of texts; those of tensors are ready
        return (row for batch in dataset for row in (batch if _are_texts(batch) else [batch]))
    if isinstance(dataset, torch.utils.data.Dataset) and not isinstance(dataset, Iterable):
        return (dataset[i] for i in range(len(dataset)))  # type: ignore[arg-type]  # map-style datasets have a length
    refused = isinstance(dataset, (str, bytes, Mapping, Tensor)) or type(dataset).__name__ == "DataFrame"
    if refused or not isinstance(dataset, Iterable):
        raise TypeError(f"The dataset is a {type(dataset).__name__}, not a collection of examples. {REMEDY}")
    return dataset


def _are_texts(batch: Any) -> bool:
    return isinstance(batch, list) and all(isinstance(each, str) for each in batch)


def _as_stored(dataset: Any) -> tuple[Any, bool]:
    """Without its format, but for the columns that this shows; and whether its features say what its rows are."""
    if isinstance(dataset, IterableDataset) or dataset.format["type"] == "custom":  # somebody's function makes the rows
        return dataset, isinstance(dataset, IterableDataset)
    shown = dataset.column_names if dataset.format["output_all_columns"] else dataset.format["columns"]
    return dataset.with_format(None).select_columns(shown), True


def _texts(row: Mapping[str, Any], columns: Sequence[str], where: str) -> tuple[str, ...]:
    for column in columns:
        if not isinstance(row.get(column, 0), (str, type(None))):
            found = f"{type(row[column]).__name__} in" if column in row else "no"
            raise ValueError(f"{where} has {found} column {column!r}, where text was expected.")
    return tuple(row[column] or "" for column in columns)


def tensors(row: Mapping[str, Any], columns: Sequence[str], where: str) -> dict[str, Tensor]:
    """The inputs of a ready batch, [examples, length], or of one example's real tokens, [length]; with a mask."""
    try:
        result = {column: torch.as_tensor(row[column]) for column in columns}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{where} does not hold token ids in {', '.join(columns)}: {error!r}. {REMEDY}") from error
    ids = result["input_ids"]
    mask = result.setdefault("attention_mask", torch.ones_like(ids)) != 0
    fits = ids.dim() in (1, 2) and all(tensor.shape == ids.shape for tensor in result.values())
    if not fits or (ids.is_floating_point() and ids.numel()):
        found = ", ".join(f"{key} {list(tensor.shape)} {tensor.dtype}" for key, tensor in result.items())
        raise ValueError(f"{where} has {found}; expected integers of one shape, [length] or [examples, length].")
    if bool((mask != result["attention_mask"]).any()):
        raise ValueError(f"{where} has an attention_mask with other numbers than 1, for real tokens, and 0, for padding.")
    if ids.dim() == 1:  # one example: positions are counted anew once it is cut and padded
        result = {key: tensor[mask] for key, tensor in result.items() if key != "position_ids"}
    return {key: tensor.cpu().long() for key, tensor in result.items()}


def _moved(labels: dict[str, Tensor], mask: Tensor, where: str) -> dict[str, Tensor]:
    """Positions of an answer, once padding before it is cut away."""
    for name in {*POSITIONS} & labels.keys():
        at = int(labels[name])
        if 0 <= at < len(mask) and not mask[at]:
            raise ValueError(f"{where} has {name} {at}, which is padding by its attention_mask.")
        labels = labels | {name: labels[name] - (mask[: max(at, 0)] == 0).sum()}
    return labels


def _kind(row: tuple[str, ...] | dict[str, Tensor]) -> str:
    if isinstance(row, tuple):
        return "strings" if len(row) == 1 else "string pairs"
    return "tokenized rows" if row["input_ids"].dim() == 1 else "ready batches"
