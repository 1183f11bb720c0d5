"""How good predictions are: functions of plain values, under the names that the Hub uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor

Entity = tuple[str, int, int]
"""What it is, its first word, and the word behind its last."""


def of_classes(logits: Tensor, labels: Tensor, config: Any) -> dict[str, float]:
    """Of a head that judges examples: logits [examples, classes], labels [examples]; one class is a regression.

    Raises:
        ValueError: the model gives each example several labels.
    """
    refuse_several(config)
    if config.num_labels == 1:
        return correlations(logits[:, 0].tolist(), labels.tolist())
    return accuracy_and_f1(logits.argmax(-1), labels, config.num_labels)


def refuse_several(config: Any) -> None:
    """Raise if the model's head gives each example several labels."""
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise ValueError(
            "config.problem_type is multi_label_classification: several labels an example, for which there is no measure here. "
            "Measure a model that predicts one of its classes, or a number."
        )


def accuracy_and_f1(predicted: Tensor, labels: Tensor, num_labels: int) -> dict[str, float]:
    """Of class ids [examples]. F1 is that of class 1 for two classes, else the mean over the classes that occur."""
    scores = []
    for label in range(num_labels):
        found, wanted = predicted == label, labels == label
        if bool((found | wanted).any()):
            scores.append(2 * int((found & wanted).sum()) / int(found.sum() + wanted.sum()))
        else:
            scores.append(math.nan)
    occurring = [score for score in scores if not math.isnan(score)]
    f1 = {"f1": scores[1]} if num_labels == 2 else {"f1_macro": sum(occurring) / len(occurring)}
    return {"accuracy": float((predicted == labels).float().mean()), **f1}


def correlations(predicted: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's; NaN if one side is constant."""
    if min(len(set(predicted)), len(set(labels))) < 2:
        return {"pearsonr": math.nan, "spearmanr": math.nan}
    pearson, spearman = stats.pearsonr(predicted, labels), stats.spearmanr(predicted, labels)
    return {"pearsonr": float(pearson.statistic), "spearmanr": float(spearman.statistic)}


def cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine of the rows of two matrices [examples, hidden]."""
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double()).mean())


def perplexity_of(total: float, count: int) -> float:
    """exp(total / count), of the summed negative log-likelihood in nats of so many tokens.

    Raises:
        ValueError: there are no tokens.
    """
    if not count:
        raise ValueError("The data has fewer than two tokens: nothing to predict.")
    return math.exp(min(total / count, 700.0))  # beyond, it is no number any more


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities in the tags of a sentence, "B-..." (the first word of one), "I-..." (a word in one) and others (outside).

    As in CoNLL's script and seqeval: one begins at a "B-", and at an "I-" behind anything but a word of the same kind.
    """
    found, kind, start = set[Entity](), "", 0
    for at, tag in enumerate([*tags, "O"]):
        place, _, own = tag.partition("-")
        own = own if place in ("B", "I") else ""
        if kind and (own != kind or place == "B"):
            found.add((kind, start, at))
            kind = ""
        if own and not kind:
            kind, start = own, at
    return found


def entity_f1(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """F1 of whole entities over all sentences: 2 * right / (predicted + wanted); NaN if there is none on either side.

    One is right if its kind and both of its ends are.
    """
    both = [(entities(own), entities(other)) for own, other in zip(predicted, wanted, strict=True)]
    count = sum(len(own) + len(other) for own, other in both)
    return 2 * sum(len(own & other) for own, other in both) / count if count else math.nan


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """The fewest words to put in, take out or exchange that make one sequence of words the other (Levenshtein's)."""
    row = list(range(len(second) + 1))
    for done, word in enumerate(first, start=1):
        before, row[0] = row[0], done
        for at, other in enumerate(second, start=1):
            before, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, before + (word != other))
    return row[-1]


def word_error_rate(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Word edits between all predicted and wanted texts, over the number of wanted words; words as they are written.

    Raises:
        ValueError: no word is wanted.
    """
    edits = sum(edit_distance(own.split(), other.split()) for own, other in zip(predicted, wanted, strict=True))
    words = sum(len(other.split()) for other in wanted)
    if not words:
        raise ValueError("No transcript of the data has a word: there is nothing to compare with.")
    return edits / words
