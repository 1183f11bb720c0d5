"""From a row with images, sound or texts to the tensors that a model reads, through the parts of its processor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import family_of, is_encoder_decoder, modalities
from .config import PruningConfig
from .data import lengths, pad_id_of
from .families import task_of
from .labels import IGNORED, predicts_next
from .media_ready import check_vocabulary, ready_inputs
from .recordings import is_image, is_sound, pixels, waveform
from .rows import input_columns

TARGETS = ("target", "targets", "summary", "highlights", "answer", "output", "translation")
TEXTS = (
    *("text", "sentence", "caption", "transcription", "transcript", "normalized_text"),
    *("document", "article", "dialogue", "source", "input", "question"),
)


@dataclass(frozen=True)
class Reader:
    """Makes of a row what the model reads: tensors [1, ...]."""

    model: Any
    config: PruningConfig
    processor: Any
    texts: tuple[str, ...]
    targets: bool = False
    """Whether `read` gives, as labels, what a decoder is to predict: [1, length of its input], -100 where nothing counts."""

    @property
    def pad_id(self) -> int:
        """The token that fills what is shorter than the longest of its batch."""
        return pad_id_of(part_of(self.processor, "tokenizer"), self.model.config.get_text_config())

    def read(self, row: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        """What is ready as it is; the rest through the parts of the processor."""
        result = ready_inputs(row, self.model, where, writes(self.model))
        accepted = {*inspect.signature(self.model.forward).parameters, *(("labels",) if writes(self.model) else ())}
        for kind in modalities(self.model):
            own = self._inputs_of(kind)
            if own & accepted and not own & result.keys():
                made = {"image": self._image, "audio": self._sound, "text": self._text}[kind](row, where)
                result |= {name: value for name, value in made.items() if name in accepted}
        return self._with_decoder(result, where)

    def _inputs_of(self, kind: str) -> set[str]:
        """Those of which one says that a row is ready, as far as this kind goes."""
        own = {"image": {"pixel_values"}, "audio": {"input_values", "input_features"}}
        of_decoder = {"labels"} if "audio" in modalities(self.model) and writes(self.model) else set()
        return own.get(kind, {"input_ids", "decoder_input_ids"} | of_decoder)

    def _image(self, row: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        value = _only(row, is_image, "image", where)
        part = needed(part_of(self.processor, "image_processor"), "image processor")
        return {"pixel_values": part(images=pixels(value, where), return_tensors="pt")["pixel_values"]}

    def _sound(self, row: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        value = _only(row, is_sound, "sound", where)
        part = needed(part_of(self.processor, "feature_extractor"), "feature extractor")
        samples = waveform(value, part.sampling_rate, where)
        encoded = part(samples, sampling_rate=part.sampling_rate, return_tensors="pt")
        return {name: value for name, value in encoded.items() if name in ("input_values", "input_features")}

    def _text(self, row: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        found = [row.get(name) for name in self.texts]
        if not all(isinstance(text, str) for text in found):
            raise ValueError(f"{where} has no text in {' and '.join(map(repr, self.texts))}.")
        if not writes(self.model):
            return self._tokenized(*found)
        if self.targets and self.texts[0] == self.texts[-1] and "audio" not in modalities(self.model):
            raise ValueError(
                f"{where} has one text, {self.texts[0]!r}, where a source and a target were expected. Columns: {', '.join(row)}. "
                "Name both, the source first, with text_columns (--text-columns)."
            )
        ids = {"labels": self._tokenized(found[-1])["input_ids"]}
        return ids | ({} if "audio" in modalities(self.model) else self._tokenized(found[0]))

    def _tokenized(self, *texts: Any) -> dict[str, Tensor]:
        """One text, or a pair that is read as one."""
        tokenizer = needed(part_of(self.processor, "tokenizer"), "tokenizer")
        _, seq_len = lengths(self.config.seq_len, self.model.config.get_text_config(), tokenizer)
        filled = family_of(self.model).reads_padding
        options = {"padding": "max_length" if filled else False, "truncation": True, "max_length": seq_len}
        encoded = tokenizer(*texts, **options, return_tensors="pt")
        ids = encoded["input_ids"]
        mask = None if filled else encoded.get("attention_mask")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}

    def _with_decoder(self, found: dict[str, Tensor], where: str) -> dict[str, Tensor]:
        """What a decoder reads: its start token, then all of the target but the last."""
        labels = found.pop("labels", None)
        if is_encoder_decoder(self.model) and "decoder_input_ids" not in found:
            labels = self._without_start(labels, found)
            found |= self._shifted(labels, found, where)
        for of in ("", "decoder_"):
            if f"{of}input_ids" in found:
                check_vocabulary(found[f"{of}input_ids"], self.model.config.get_text_config(), where)
                found.setdefault(f"{of}attention_mask", torch.ones_like(found[f"{of}input_ids"]))
        return found | ({"labels": self._predicted(labels, found)} if self.targets else {})

    def _predicted(self, labels: Tensor | None, found: dict[str, Tensor]) -> Tensor:
        """The targets, but for markers that the tokenizer puts in front of a text; without any, the decoder's next tokens."""
        ids = found["decoder_input_ids"]
        if labels is None:
            labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)
        labels = labels.masked_fill(found["decoder_attention_mask"] == 0, IGNORED)
        tokenizer = part_of(self.processor, "tokenizer")
        markers = [] if tokenizer is None else [own for own in tokenizer.all_special_ids if own != tokenizer.eos_token_id]
        in_front = torch.isin(labels, torch.tensor(markers, dtype=torch.long)).long().cumprod(1).bool()
        return labels.masked_fill(in_front, IGNORED)

    @property
    def _start(self) -> int:
        """The token that a decoder begins with."""
        config = self.model.config
        named = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id"))
        return next((token for token in named if token is not None), self.pad_id)

    def _without_start(self, labels: Tensor | None, found: dict[str, Tensor]) -> Tensor | None:
        """The labels without a start token that the tokenizer puts there already."""
        if labels is None or "decoder_attention_mask" in found:
            return labels
        starts = labels.shape[1] > 1 and bool((labels[:, 0] == self._start).all())
        return labels[:, 1:] if starts else labels

    def _shifted(self, labels: Tensor | None, found: dict[str, Tensor], where: str) -> dict[str, Tensor]:
        """The labels, or what the encoder reads, behind the start token."""
        target = found.get("input_ids") if labels is None else labels
        if target is None:
            raise ValueError(f"{where} has neither decoder_input_ids nor a text for the decoder.")
        before = torch.full_like(target[:, :1], self._start)
        ids = torch.cat([before, target[:, :-1].masked_fill(target[:, :-1] < 0, self.pad_id)], 1)
        mask = found.get("attention_mask")
        if labels is not None:  # behind the last that counts, they are padding
            mask = ((labels >= 0).flip(1).cumsum(1).flip(1) > 0).long()
        return {"decoder_attention_mask": torch.ones_like(ids) if mask is None else mask, "decoder_input_ids": ids} | found


def writes(model: Any) -> bool:
    """Whether a decoder reads a text of its own; one whose head judges a text reads the encoder's again."""
    return is_encoder_decoder(model) and (predicts_next(model) or task_of(model) == "feature-extraction")


def texts_in(model: Any, head: Mapping[str, Any], asked: Sequence[str] | None) -> tuple[str, ...]:
    """The columns of the source and of the target of a model that writes; of any other, those of its one text or pair."""
    asked = (asked,) if isinstance(asked, str) else tuple(asked or ())
    if is_encoder_decoder(model) and not writes(model) and head:
        return input_columns({name: type(value).__name__ for name, value in head.items()}, asked)
    missing, most = [name for name in asked if name not in head], 2 if writes(model) else 1
    if missing or len(asked) > most:
        possible = "one or two are" if most == 2 else "one is"
        problem = f"there is no column {', '.join(map(repr, missing))}" if missing else f"{possible} possible"
        raise ValueError(f"text_columns={asked} asked, but {problem}. Columns: {', '.join(head)}.")
    if asked:
        return asked
    strings = [name for name, value in head.items() if isinstance(value, str)]
    source = next((name for name in TEXTS if name in strings), None) or _only_text(head, strings)
    if source is None and ("text" in modalities(model) or writes(model)):
        raise ValueError(
            f"Which column is the text? There are {', '.join(head)}: name it with text_columns (--text-columns)"
            f"{', the source first' if writes(model) else ''}."
        )
    target = next((name for name in TARGETS if name in strings and name != source), source)
    return (source or "", target or "")[:most]


def _only_text(head: Mapping[str, Any], strings: Sequence[str]) -> str | None:
    """The column that must be the text, as there is no other; a row without any is told of when it is read."""
    others = [name for name in strings if name not in TARGETS] or strings
    unclear = len(others) > 1 or any(name in head for name in TEXTS if name not in strings)
    return None if unclear else others[0] if others else "text"


def part_of(processor: Any, name: str) -> Any:
    """A processor's part of that name, or itself, if it is one."""
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase, SequenceFeatureExtractor

    kinds = {
        "tokenizer": PreTrainedTokenizerBase,
        "image_processor": BaseImageProcessor,
        "feature_extractor": SequenceFeatureExtractor,
    }
    return processor if isinstance(processor, kinds[name]) else getattr(processor, name, None)


def needed(part: Any, what: str) -> Any:
    """The part, or a ValueError that says what is missing."""
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
