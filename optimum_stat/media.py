"""From images, sound, captions and pairs of texts to batches, for models that read more than one list of token ids."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Audio, ClassLabel, Dataset, IterableDataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import tqdm

from .blocks import is_encoder_decoder, modalities
from .calls import stack_tokens
from .config import PruningConfig
from .data import Batches, enough, lengths, pad_id_of
from .labels import Labels, find_labels, predicts_next, why_none
from .probes import device_of, quiet
from .recordings import is_image, is_sound, pixels, waveform
from .rows import collection

TARGETS = ("target", "targets", "summary", "highlights", "answer", "output", "translation")
TEXTS = ("text", "sentence", "caption", "transcription", "transcript", "document", "article", "source", "input", "question")
OF_TOKENS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


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
    an audio column gives), and texts, as far as the model reads these; or ready batches, mappings of what its forward reads.
    processor: the image processor, feature extractor, tokenizer, or what has these inside. A decoder reads the target, or, where
    the data has one text only, this. Sounds are never padded: a batch holds those of one length. Where it has labels for the
    model's head, and `labels_for` asks, they are read.

    Raises:
        ValueError: the data is empty, lacks what the model reads, or needs a processor that is not there.
    """
    head, rows = _first(collection(_undecoded(dataset), config.batch_size))
    reader = _Reader(model, config, processor, _texts_in(dataset, head, text_columns))
    labels = _labels(dataset, head, labels_for, label_column)
    if labels_needed and labels is None and not predicts_next(model):
        raise ValueError(why_none(labels_for, tuple(head)))
    examples = list(_taken(rows, reader, labels, model, config))
    names = [name for name in ("labels", "start_positions", "end_positions") if name in examples[0]]
    items = list(_batched(examples, config.batch_size, reader.pad_id))
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
class _Reader:
    """Makes of a row what the model reads: tensors [1, ...]."""

    model: Any
    config: PruningConfig
    processor: Any
    texts: tuple[str, ...]

    @property
    def pad_id(self) -> int:
        return pad_id_of(_part(self.processor, "tokenizer"), self.model.config.get_text_config())

    def read(self, row: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        """Ready tensors as they are; else through the parts of the processor."""
        accepted = inspect.signature(self.model.forward).parameters
        if any(isinstance(row.get(name), Tensor) for name in (self.model.main_input_name, "pixel_values", "decoder_input_ids")):
            ready = {name: value.cpu() for name, value in row.items() if name in accepted and isinstance(value, Tensor)}
            return self._with_decoder(_without_frames(ready, where), where)
        result: dict[str, Tensor] = {}
        for kind in modalities(self.model):
            result |= {"image": self._image, "audio": self._sound, "text": self._text}[kind](row, where)
        return self._with_decoder({name: value for name, value in result.items() if name in accepted}, where)

    def _image(self, row: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        value = _only(row, is_image, "image", where)
        part = _needed(_part(self.processor, "image_processor"), "image processor")
        return {"pixel_values": part(images=pixels(value), return_tensors="pt")["pixel_values"]}

    def _sound(self, row: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        value = _only(row, is_sound, "sound", where)
        part = _needed(_part(self.processor, "feature_extractor"), "feature extractor")
        samples = waveform(value, part.sampling_rate, where)
        encoded = part(samples, sampling_rate=part.sampling_rate, return_tensors="pt")
        return {name: value for name, value in encoded.items() if name in ("input_values", "input_features")}

    def _text(self, row: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        source, target = self.texts[0], self.texts[-1]
        found = [row.get(name) for name in (source, target)]
        if not all(isinstance(text, str) for text in found):
            raise ValueError(f"{where} has no text in {source!r} and {target!r}.")
        tokenizer = _needed(_part(self.processor, "tokenizer"), "tokenizer")
        _, seq_len = lengths(self.config.seq_len, self.model.config.get_text_config(), tokenizer)
        encoded = [tokenizer(text, truncation=True, max_length=seq_len, return_tensors="pt") for text in found]
        if not is_encoder_decoder(self.model):
            return {name: encoded[0][name] for name in ("input_ids", "attention_mask")}
        ids = {"labels": encoded[1]["input_ids"]}
        return ids | ({} if "audio" in modalities(self.model) else {n: encoded[0][n] for n in ("input_ids", "attention_mask")})

    def _with_decoder(self, found: dict[str, Tensor], where: str) -> dict[str, Tensor]:
        """What a decoder reads: its start token, then all of the target but the last."""
        if not is_encoder_decoder(self.model):
            return found
        config = self.model.config
        labels = found.pop("labels", None)
        target = found.get("input_ids") if labels is None else labels
        if "decoder_input_ids" not in found:
            if target is None:
                raise ValueError(f"{where} has neither decoder_input_ids nor a text for the decoder.")
            named = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id"))
            start = next((token for token in named if token is not None), self.pad_id)
            if labels is not None:  # behind the last that counts, they are padding
                found.setdefault("decoder_attention_mask", ((labels >= 0).flip(1).cumsum(1).flip(1) > 0).long())
            elif "attention_mask" in found:
                found.setdefault("decoder_attention_mask", found["attention_mask"])
            before = torch.full_like(target[:, :1], start)
            found["decoder_input_ids"] = torch.cat([before, target[:, :-1].masked_fill(target[:, :-1] < 0, self.pad_id)], 1)
        for of in ("", "decoder_"):
            if f"{of}input_ids" in found:
                found.setdefault(f"{of}attention_mask", torch.ones_like(found[f"{of}input_ids"]))
        return found


def _taken(rows: Iterable[Any], reader: _Reader, labels: Labels | None, model: Any, config: PruningConfig) -> Iterator[Any]:
    """Examples [1, ...], until there are enough; what a ready batch holds, one by one."""
    num_examples, num_tokens, per_value = 0, 0.0, None
    with tqdm(rows, desc="Reading calibration data", unit="row", delay=2) as bar, quiet(model):
        for number, row in enumerate(bar):
            where = f"Row {number}"
            if not isinstance(row, Mapping):
                raise ValueError(f"{where} is a {type(row).__name__}, not a mapping of columns.")
            whole = reader.read(row, where)
            whole = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in whole.items()}
            whole |= labels.read(row, where) if labels else {}
            for i in range(len(next(iter(whole.values())))):
                example = {name: value[i : i + 1] for name, value in whole.items()}
                values = sum(value.numel() for name, value in example.items() if name not in OF_TOKENS)
                if per_value is None:
                    inputs = {name: value for name, value in example.items() if name not in ("labels",)}
                    per_value = min(_counted(model, inputs)) / max(1, values)
                num_examples, num_tokens = num_examples + 1, num_tokens + max(1.0, per_value * values)
                yield example
                if enough(config, num_examples, int(num_tokens)):
                    return


def _bytes(value: Tensor) -> bytes:
    return (value.float() if value.is_floating_point() else value).contiguous().numpy().tobytes()


def _counted(model: Any, item: Mapping[str, Tensor]) -> list[int]:
    return stack_tokens(model, {name: value.to(device_of(model)) for name, value in item.items()})


def _batched(examples: list[dict[str, Tensor]], batch_size: int, pad_id: int) -> Iterator[dict[str, Tensor]]:
    """Batches of one shape but for token ids, which are padded."""

    def shape(example: dict[str, Tensor]) -> Any:
        return [(name, tuple(value.shape[1:])) for name, value in sorted(example.items()) if name not in OF_TOKENS]

    for _, alike in itertools.groupby(sorted(examples, key=shape, reverse=True), key=shape):
        own = list(alike)
        for start in range(0, len(own), batch_size):
            part = own[start : start + batch_size]
            yield {name: _joined(name, [example[name] for example in part], pad_id) for name in part[0]}


def _joined(name: str, values: list[Tensor], pad_id: int) -> Tensor:
    if name not in OF_TOKENS:
        return torch.cat(values)
    return pad_sequence([value[0] for value in values], True, float(pad_id) if name.endswith("input_ids") else 0.0)


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


def _texts_in(dataset: Any, head: Mapping[str, Any], asked: Sequence[str] | None) -> tuple[str, ...]:
    """The columns of the source and of the target."""
    asked = (asked,) if isinstance(asked, str) else tuple(asked or ())
    missing = [name for name in asked if name not in head]
    if missing or len(asked) > 2:
        problem = f"there is no column {', '.join(map(repr, missing))}" if missing else "one or two are possible"
        raise ValueError(f"text_columns={asked} asked, but {problem}. Columns: {', '.join(head)}.")
    if asked:
        return asked
    strings = [name for name, value in head.items() if isinstance(value, str)]
    source = next((name for name in TEXTS if name in strings), strings[0] if strings else "text")
    target = next((name for name in TARGETS if name in strings and name != source), source)
    return (source, target)


def _labels(dataset: Any, head: Mapping[str, Any], model: Any, asked: str | None) -> Labels | None:
    names = {}
    if isinstance(dataset, (Dataset, IterableDataset)) and dataset.features:
        names = {name: feature.names for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
    return None if model is None else find_labels(model, tuple(head), names, asked)


def _part(processor: Any, name: str) -> Any:
    """A processor's part of that name, or itself, if it is one."""
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase, SequenceFeatureExtractor

    kinds = {
        "tokenizer": PreTrainedTokenizerBase,
        "image_processor": BaseImageProcessor,
        "feature_extractor": SequenceFeatureExtractor,
    }
    return processor if isinstance(processor, kinds[name]) else getattr(processor, name, None)


def _needed(part: Any, what: str) -> Any:
    if part is None:
        raise ValueError(f"The dataset is raw and there is no {what}. Pass one with tokenizer=, or ready batches.")
    return part


def _only(row: Mapping[str, Any], fits: Any, what: str, where: str) -> Any:
    found = [name for name, value in row.items() if fits(value)]
    if len(found) != 1:
        has = f"several ({', '.join(found)}): select_columns() one" if found else "none"
        kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
        raise ValueError(f"{where} must have one {what}, and has {has}. Columns: {kinds}.")
    return row[found[0]]


def _without_frames(found: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """A mask over samples is no mask over the tokens that are made of them."""
    if "input_values" in found or "input_features" in found:
        mask = found.pop("attention_mask", None)
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError(f"{where} has padded sounds; give batches of sounds of one length, so that no padding counts.")
    return found
