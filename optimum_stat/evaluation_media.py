"""Measures of models that read images, sound, or a text for a decoder. Each returns what those of `evaluation_text` do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .blocks import is_encoder_decoder
from .evaluation_data import Data, first_example, hidden_states, label_column, to_device
from .labels import COLUMNS as LABEL_COLUMNS
from .labels import IGNORED, find_labels
from .media import BESIDE, Example, MediaRows
from .media_reader import TEXTS, needed, part_of
from .scores import of_classes, perplexity_of, refuse_several, word_error_rate

Beside = Callable[[Any, str], Example]
PROMPT = "a photo of a {}"  # of CLIP's paper (2103.00020, section 3.1.4)
LONGEST = 448  # tokens of a transcript, where neither the model nor its generation_config says how many


class Passes:
    """Batches on the model's device and what stands beside them; remembers one of their examples to time the model with.

    Of sounds it is the one in the middle by length, of those first read.
    """

    def __init__(self, model: Any, rows: MediaRows, about: str, beside: Beside | None = None) -> None:
        self.example: Example = {}
        self._model, self._windows = model, rows.windows(about, beside)

    def __iter__(self) -> Iterator[tuple[Example, Example]]:
        for window in self._windows:
            for batch in window:
                own = {name: batch.pop(name) for name in BESIDE if name in batch}
                yield to_device(batch, self._model), own
            self.example = self.example or first_example(window[len(window) // 2])


def classification(model: Any, processor: Any, data: Data) -> Any:
    """Accuracy and F1 of the classes of images or sounds; correlations where the head predicts a number."""
    refuse_several(model.config)
    column = label_column(data)
    names = data.classes_of(column)
    labels = find_labels(model, data.columns, {} if names is None else {column: names}, column)
    assert labels is not None
    passes = Passes(model, _rows(model, processor, data), "Classifying", labels.read)
    both = [(model(**inputs).logits.float().cpu(), own["labels"]) for inputs, own in passes]
    logits, wanted = (torch.cat(side) for side in zip(*both, strict=True))
    return of_classes(logits, wanted, model.config), None, passes.example


def embedding(model: Any, processor: Any, data: Data) -> Any:
    """Means of the last hidden states over all places, of a decoder over its real tokens: [examples, hidden]."""
    passes, pooled = Passes(model, _rows(model, processor, data), "Embeddings"), []
    for inputs, _ in passes:
        hidden = hidden_states(model, model(**inputs))
        mask = inputs.get("decoder_attention_mask", torch.ones(hidden.shape[:2])).to(hidden)[..., None]
        pooled.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return {}, torch.cat(pooled), passes.example


def targets(model: Any, processor: Any, data: Data) -> Any:
    """Perplexity of the targets, each token given the source and the tokens of the target before it."""
    passes = Passes(model, _rows(model, processor, data, targets=True), "Perplexity")
    losses = [_loss(model(**inputs).logits, own["labels"]) for inputs, own in passes]
    return {"perplexity": perplexity_of(*map(sum, zip(*losses, strict=True)))}, None, passes.example


def speech(model: Any, processor: Any, data: Data) -> Any:
    """Word error rate of greedy transcripts; of a model with a decoder also the perplexity of the right ones."""
    writes = is_encoder_decoder(model)
    rows, tokenizer = _rows(model, processor, data, targets=writes), needed(part_of(processor, "tokenizer"), "tokenizer")
    column = rows.reader.texts[-1]
    _refuse_missing(rows.head, column, f"speech is measured on a column with transcripts, such as {', '.join(TEXTS[:5])}")
    texts: list[str] = []
    passes = Passes(model, rows, "Transcribing", _noted(column, texts))
    predicted, wanted, losses = list[str](), list[str](), list[tuple[float, int]]()
    for inputs, own in passes:
        logits = model(**inputs).logits
        if writes:
            losses.append(_loss(logits, own["labels"]))
            ids = _generated(model, inputs)
            predicted += tokenizer.batch_decode(ids, skip_special_tokens=True)
        else:
            predicted += tokenizer.batch_decode(logits.argmax(-1))
        wanted += [texts[int(at)] for at in own["row"]]
    metrics = {"wer": word_error_rate(predicted, wanted)}
    if writes:
        metrics["perplexity"] = perplexity_of(*map(sum, zip(*losses, strict=True)))
    return metrics, None, passes.example


def matching(model: Any, processor: Any, data: Data) -> Any:
    """Share of the images whose nearest text (by the cosine) is theirs.

    With labels: `accuracy` among all classes of the dataset, each as "a photo of a ...". With texts: `retrieval_accuracy` among
    all different texts that were read; it falls with their number.
    """
    with_texts = bool(data.text_columns) and not data.label_column
    if not with_texts and any(name in data.columns for name in (data.label_column, *LABEL_COLUMNS)):
        return _matched(model, *_classes(model, processor, data), "accuracy")
    if data.label_column:
        label_column(data)  # which is not there, and says so
    rows, texts = _rows(model, processor, data), list[str]()
    column = rows.reader.texts[-1]
    _refuse_missing(rows.head, column, "images are matched with a column of labels (--label-column) or of texts (--text-columns)")
    return _matched(model, rows, _noted(column, texts, once=True), texts, "retrieval_accuracy")


def _classes(model: Any, processor: Any, data: Data) -> tuple[MediaRows, Beside, list[str]]:
    """Rows with the text of their class, how to read which it is, and the texts of all classes."""
    column = label_column(data)
    names = data.classes_of(column)
    if names is None:
        labels = data.dataset.select_columns([column])
        found = {row[column] for row in itertools.islice(labels, data.config.max_examples)}
        wrong = [label for label in found if not isinstance(label, str)]
        if wrong:
            raise ValueError(
                f"The labels in {column!r} are such as {wrong[0]!r}, and the dataset has no names for them, with which the "
                "images are to be matched. Give names, or cast the column to datasets.ClassLabel."
            )
        names = sorted(found)
    prompts = [PROMPT.format(name.replace("_", " ")) for name in names]

    def index(row: Mapping[str, Any], where: str) -> int:
        label = names.index(row[column]) if isinstance(row[column], str) else row[column]
        if label is None or not 0 <= label < len(names):
            raise ValueError(f"{where} has label {label!r} in {column!r}, which is none of the dataset's {len(names)} classes.")
        return int(label)

    rows = ({**row, "text": prompts[index(row, f"Row {number}")]} for number, row in enumerate(data.dataset))
    own = MediaRows.of(rows, model, data.config, processor, ("text",))
    return own, lambda row, where: {"row": torch.tensor([index(row, where)])}, prompts


def _matched(model: Any, rows: MediaRows, beside: Beside, texts: list[str], name: str) -> Any:
    passes, images, wanted, inputs = Passes(model, rows, "Images", beside), list[Tensor](), list[int](), Example()
    for inputs, own in passes:
        one = {each: value if each == "pixel_values" else value[:1] for each, value in inputs.items()}
        images.append(model(**one).image_embeds.float().cpu())
        wanted += own["row"].tolist()
    image = inputs["pixel_values"][:1]  # both towers run, whichever is asked
    everything = replace(rows.reader.config, max_examples=None, num_tokens=None)
    reader = replace(rows.reader, texts=("text",), config=everything)
    prompts = Passes(model, MediaRows([{"text": text, "pixel_values": image} for text in texts], {}, reader), "Texts")
    embeds = torch.cat([model(**{**batch, "pixel_values": image}).text_embeds.float().cpu() for batch, _ in prompts])
    nearest = (torch.cat(images) @ embeds.T).argmax(1)  # texts are padded or filled to one length, so they stay in their order
    return {name: float((nearest == torch.tensor(wanted)).float().mean())}, None, passes.example


def _rows(model: Any, processor: Any, data: Data, targets: bool = False) -> MediaRows:
    return MediaRows.of(data.dataset, model, data.config, processor, data.text_columns, targets)


def _noted(column: str, texts: list[str], once: bool = False) -> Beside:
    """Puts a row's text into `texts`, one that is there already not again if `once`; reads where there it stands."""
    known = dict[str, int]()

    def read(row: Mapping[str, Any], where: str) -> Example:
        text = row[column]
        if not isinstance(text, str):
            raise ValueError(f"{where} has no text in {column!r}.")
        if not once or text not in known:
            known[text] = len(texts)
            texts.append(text)
        return {"row": torch.tensor([known[text]])}

    return read


def _refuse_missing(head: Mapping[str, Any], column: str, wanted: str) -> None:
    if not isinstance(head.get(column), str):
        raise ValueError(f"{wanted[0].upper()}{wanted[1:]}; there is none. Columns: {', '.join(head)}.")


def _loss(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Summed negative log-likelihood of the labels [examples, length] that count, and how many these are."""
    total, count = 0.0, 0
    for row, wanted in zip(logits, labels.to(logits.device), strict=True):  # spares memory
        real = wanted != IGNORED
        total += float(torch.nn.functional.cross_entropy(row[real].float(), wanted[real], reduction="sum"))
        count += int(real.sum())
    return total, count


def _generated(model: Any, inputs: Example) -> Tensor:
    """Greedily, as long as the model's generation_config allows, or its decoder."""
    read = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    most = model.generation_config.max_length or getattr(model.config, "max_target_positions", None) or LONGEST
    found: Tensor = model.generate(**read, max_length=most, do_sample=False, num_beams=1)
    return found
