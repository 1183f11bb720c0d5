"""From images, sound, captions and pairs of texts to batches, for models that read more than one list of token ids."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Audio, ClassLabel, Dataset, IterableDataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import tqdm

from .blocks import family_of
from .calls import stack_tokens
from .config import PruningConfig
from .data import LABELS, Batches, enough
from .labels import IGNORED, Labels, find_labels, predicts_next, why_none
from .media_reader import Reader, texts_in
from .probes import device_of, quiet
from .rows import collection

OF_TOKENS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
BESIDE = (*LABELS, "row")
"""What is no input: labels, and which of its reader's notes belongs to the row."""
WINDOW = 256  # examples in memory at once, where not all are
Example = dict[str, Tensor]


def make_media_batches(
    dataset: Any,
    model: Any,
    config: PruningConfig,
    *,
    processor: Any = None,
    text_columns: Sequence[str] | None = None,
    labels_for: Any = None,
    label_column: str | None = None,
    labels_needed: bool = False,
) -> Batches:
    """Read, convert and batch calibration data for a model that reads images, sound, or a decoder's tokens beside its input.

    dataset: a `datasets.Dataset` or a list of dicts with an image (PIL, array [height, width, channels]), a sound (array, or what
    an audio column gives), and texts, as far as the model reads these; or what its forward reads, of one example or of a batch.
    processor: the image processor, feature extractor, tokenizer, or what has these inside. A decoder reads the target, or, where
    the data has one text only, this. Sounds are never padded: a batch holds those of one length. Where it has labels for the
    model's head, and `labels_for` asks, they are read.

    Raises:
        ValueError: the data is empty, lacks what the model reads, or needs a processor that is not there.
    """
    rows = MediaRows.of(dataset, model, config, processor, text_columns)
    labels = _labels(dataset, rows.head, labels_for, label_column)
    if labels_needed and labels is None and not predicts_next(model):
        raise ValueError(why_none(labels_for, tuple(rows.head)))
    with quiet(model):
        examples = list(rows.examples("Reading calibration data", labels.read if labels else None))
    names = [name for name in BESIDE if name in examples[0]]
    items = list(rows.batched(examples))
    own = tuple({name: item.pop(name) for name in names} for item in items) if names else None
    with quiet(model):
        counts = torch.tensor([_counted(model, item) for item in items]).sum(0).tolist()
    num_examples = sum(len(next(iter(item.values()))) for item in items)
    means = tuple(round(count / num_examples) for count in counts)
    digest = hashlib.sha256()
    for example in examples:
        for name in sorted(example.keys() - set(names)):
            digest.update(name.encode() + _bytes(example[name]))
    source = f"{num_examples} examples with {', '.join(k for k in examples[0] if k not in names)}"
    seq_len = means if len(means) > 1 else means[0]
    return Batches(tuple(items), min(counts), num_examples, seq_len, digest.hexdigest(), source, own)


@dataclass(frozen=True)
class MediaRows:
    """The rows of a dataset, which are read one by one, as the model reads them."""

    rows: Iterable[Any]
    head: Mapping[str, Any]
    """The first of them."""
    reader: Reader

    @classmethod
    def of(
        cls,
        dataset: Any,
        model: Any,
        config: PruningConfig,
        processor: Any = None,
        text_columns: Sequence[str] | None = None,
        targets: bool = False,
    ) -> MediaRows:
        """The same as `make_media_batches` reads. targets: keep, as labels, what a decoder is to predict."""
        head, rows = _first(collection(_undecoded(dataset), config.batch_size))
        return cls(rows, head, Reader(model, config, processor, texts_in(model, head, text_columns), targets))

    def examples(self, about: str, beside: Callable[[Any, str], Example] | None = None) -> Iterator[Example]:
        """Examples [1, ...], until there are enough; what a ready batch holds, one by one.

        beside: what of a row goes with them and is no input, under names in BESIDE. about: what a bar says.
        """
        model, config = self.reader.model, self.reader.config
        num_examples, num_tokens, per_value = 0, 0.0, None
        with tqdm(self.rows, desc=about, unit="row", delay=2) as bar:
            for number, row in enumerate(bar):
                for example in self._of_row(row, f"Row {number}", beside):
                    inputs = {name: value for name, value in example.items() if name not in BESIDE}
                    values = sum(value.numel() for name, value in inputs.items() if name not in OF_TOKENS)
                    if values and per_value is None:
                        # one pass of the first layers, which whoever reads everything need not wait for
                        per_value = 0.0 if config.num_tokens is None else min(_counted(model, inputs)) / values
                    num_examples += 1
                    num_tokens += max(1.0, (per_value or 0.0) * values if values else _shortest(inputs))
                    yield example
                    if enough(config, num_examples, int(num_tokens)):
                        return

    def windows(self, about: str, beside: Callable[[Any, str], Example] | None = None) -> Iterator[list[Example]]:
        """Batches of WINDOW examples at a time, so that not all are in memory; within each, those of one shape together."""
        examples = self.examples(about, beside)
        while part := list(itertools.islice(examples, WINDOW)):
            yield list(self.batched(part))

    def batched(self, examples: list[Example]) -> Iterator[Example]:
        """Batches of one shape but for what may be padded."""
        model, config = self.reader.model, self.reader.config
        padded = (*(() if family_of(model).reads_padding else OF_TOKENS), *(("labels",) if self.reader.targets else ()))

        def shape(example: Example) -> Any:
            return [(name, tuple(value.shape[1:])) for name, value in sorted(example.items()) if name not in padded]

        for _, alike in itertools.groupby(sorted(examples, key=shape, reverse=True), key=shape):
            own = list(alike)
            for start in range(0, len(own), config.batch_size):
                part = own[start : start + config.batch_size]
                yield {name: self._joined(name, [example[name] for example in part]) for name in part[0]}

    def _of_row(self, row: Any, where: str, beside: Callable[[Any, str], Example] | None) -> Iterator[Example]:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} is a {type(row).__name__}, not a mapping of columns.")
        dtype = self.reader.model.dtype
        whole = self.reader.read(row, where)
        whole = {name: value.to(dtype) if value.is_floating_point() else value for name, value in whole.items()}
        count = len(next(iter(whole.values())))
        whole |= beside(row, where) if beside else {}
        wrong = next((name for name, value in whole.items() if len(value) != count), None)
        if wrong is not None:
            raise ValueError(f"{where} has {count} examples and {len(whole[wrong])} of {wrong}; give one for each.")
        for i in range(count):
            yield {name: value[i : i + 1] for name, value in whole.items()}

    def _joined(self, name: str, values: list[Tensor]) -> Tensor:
        if name not in OF_TOKENS and not (name == "labels" and self.reader.targets):
            return torch.cat(values)
        fill = IGNORED if name == "labels" else self.reader.pad_id if name.endswith("input_ids") else 0
        return pad_sequence([value[0] for value in values], True, float(fill))


def _shortest(inputs: Mapping[str, Tensor]) -> int:
    """Real tokens of the shorter of an example's texts, that of the encoder or that of the decoder."""
    of_tokens = {name: value for name, value in inputs.items() if name in OF_TOKENS}
    return min(int(value.sum()) if name.endswith("mask") else value.numel() for name, value in of_tokens.items())


def _bytes(value: Tensor) -> bytes:
    return (value.float() if value.is_floating_point() else value).contiguous().numpy().tobytes()


def _counted(model: Any, item: Mapping[str, Tensor]) -> list[int]:
    return stack_tokens(model, {name: value.to(device_of(model)) for name, value in item.items()})


def _first(rows: Iterable[Any]) -> tuple[Mapping[str, Any], Iterable[Any]]:
    rows = iter(rows)
    head = next(rows, None)
    if head is None:
        raise ValueError("The dataset is empty: it has no rows. Pass at least one example.")
    return head if isinstance(head, Mapping) else {}, itertools.chain([head], rows)


def _undecoded(dataset: Any) -> Any:
    """Audio columns as they are stored: decoding them needs more than most have installed."""
    if isinstance(dataset, (Dataset, IterableDataset)):
        for name, feature in (dataset.features or {}).items():
            if isinstance(feature, Audio):
                dataset = dataset.cast_column(name, Audio(decode=False))
    return dataset


def _labels(dataset: Any, head: Mapping[str, Any], model: Any, asked: str | None) -> Labels | None:
    names = {}
    if isinstance(dataset, (Dataset, IterableDataset)) and dataset.features:
        names = {name: feature.names for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
    return None if model is None else find_labels(model, tuple(head), names, asked)
