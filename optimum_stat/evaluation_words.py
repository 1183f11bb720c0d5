"""Token classification, measured word by word: the first token of each counts, as in CoNLL."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

from transformers.utils.logging import tqdm

from .data import lengths, make_batches
from .evaluation_data import Data, first_example, label_column, to_device
from .labels import COLUMNS as LABEL_COLUMNS
from .labels import IGNORED, class_ids
from .scores import entity_f1

logger = logging.getLogger(__name__)
WORDS = ("tokens", "words")
TAGS = ("ner_tags", "labels", "tags", "pos_tags", "chunk_tags", "label")


def words(model: Any, tokenizer: Any, data: Data) -> Any:
    """Accuracy over all words that were read; where labels are B-... and I-... tags, F1 of whole entities besides."""
    ready = "input_ids" in data.columns
    column = label_column(data, LABEL_COLUMNS if ready else TAGS)
    rows = data.dataset if ready else _tokenized(model, tokenizer, data, column)
    own = {"labels_for": model, "label_column": column if ready else "labels"}
    batches = make_batches(rows, model.config, data.config, causal=False, tokenizer=tokenizer, **own)
    predicted, wanted = list[list[int]](), list[list[int]]()
    for batch, labels in zip(tqdm(batches, desc="Words", unit="batch"), batches.labels or (), strict=True):
        found = model(**to_device(batch, model)).logits.argmax(-1).cpu()
        for ids, right in zip(found, labels["labels"], strict=True):
            predicted.append(ids[right != IGNORED].tolist())
            wanted.append(right[right != IGNORED].tolist())
    both = [pair for own, other in zip(predicted, wanted, strict=True) for pair in zip(own, other, strict=True)]
    if not both:
        raise ValueError(f"No word of the data has a label in {column!r}: there is nothing to compare with.")
    metrics = {"accuracy": sum(found == right for found, right in both) / len(both)}
    names = _tags(model.config, data.classes_of(column))
    if names:
        metrics["f1"] = entity_f1(*([[names[i] for i in row] for row in side] for side in (predicted, wanted)))
    return metrics, None, first_example(batches.items[0])


def _tokenized(model: Any, tokenizer: Any, data: Data, column: str) -> list[dict[str, list[int]]]:
    """Rows of tokens, with the label of a word at its first one and none at the others."""
    texts, labels = _words(data, column)
    if not tokenizer.is_fast:
        raise ValueError("Labels of words need a fast tokenizer, which knows whose token each is.")
    known = iter(class_ids([own for row in labels for own in row if own != IGNORED], data.classes_of(column), model.config))
    _, seq_len = lengths(data.config.seq_len, model.config.get_text_config(), tokenizer)
    found, unread = [], 0
    for sentence, tags in zip(texts, labels, strict=True):
        ids = [IGNORED if tag == IGNORED else next(known) for tag in tags]
        encoded = tokenizer(sentence, is_split_into_words=True, truncation=True, max_length=seq_len)
        at = encoded.word_ids()
        first = [here is not None and here != before for before, here in zip([None, *at], at, strict=False)]
        own = [ids[here] if is_first else IGNORED for here, is_first in zip(at, first, strict=True)]
        unread += len({*range(len(ids))} - {*at})
        found.append({**{name: encoded[name] for name in encoded if name != "labels"}, "labels": own})
    if unread:
        logger.warning("%s words are not measured: they are empty, or stand behind the first %s tokens.", f"{unread:,}", seq_len)
    return found


def _words(data: Data, column: str) -> tuple[list[list[str]], list[list[Any]]]:
    """The words of each row, and a label for each."""
    asked = (data.text_columns,) if isinstance(data.text_columns, str) else tuple(data.text_columns or ())
    name = next((own for own in asked or WORDS if own in data.columns), None)
    if name is None or len(asked) > 1:
        raise ValueError(
            f"Token classification is measured on a column with lists of words, {' or '.join(asked or WORDS)}, and one with "
            f"lists of labels; the columns are {', '.join(data.columns)}. Name the first with text_columns (--text-columns)."
        )
    rows = list(itertools.islice(data.dataset.select_columns([name, column]), data.config.max_examples))
    for number, row in enumerate(rows):
        lists = isinstance(row[name], list) and isinstance(row[column], list)
        if not lists or len(row[name]) != len(row[column]) or not all(isinstance(word, str) for word in row[name]):
            raise ValueError(
                f"Row {number} has in {name!r} and {column!r} no list of words with a label for each, but "
                f"{str(row[name])[:60]!r} and {str(row[column])[:60]!r}."
            )
    filled = [row for row in rows if row[name]]
    return [row[name] for row in filled], [row[column] for row in filled]


def _tags(config: Any, of_dataset: Sequence[str] | None) -> list[str]:
    """The names of the model's classes, or of the dataset's, whichever are B-... and I-... tags; none if neither are."""
    own = [str(config.id2label[i]) for i in range(config.num_labels)]
    for names in (own, list(of_dataset or ())):
        places = {name.partition("-")[0] for name in names if "-" in name}
        if len(names) == config.num_labels and places and places <= {"B", "I"}:
            return names
    return []
