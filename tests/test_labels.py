"""Labels come with the examples they belong to, are what the model predicts, and define the gradient of transformers' loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from test_data import ENCODER, WIDE, sentence
from tiny import LABELS, VOCAB, batches, tiny
from torch import Tensor

from optimum_stat import FisherConfig, FisherPruner
from optimum_stat.config import PruningConfig
from optimum_stat.data import Batches, make_batches
from optimum_stat.labels import IGNORED, loss_gradients

CLASSIFIER = tiny("bert", "SequenceClassification")


def read(dataset: Any, model: Any = CLASSIFIER, needed: bool = True, **kwargs: Any) -> Batches:
    config = kwargs.pop("config", WIDE)
    return make_batches(
        dataset, model.config, config, causal=False, tokenizer=ENCODER, labels_for=model, labels_needed=needed, **kwargs
    )


def pairs(found: Batches) -> set[tuple[tuple[int, ...], Any]]:
    """(real token ids, label) of every example."""
    assert found.labels is not None
    rows = []
    for item, labels in zip(found, found.labels, strict=True):
        for ids, mask, label in zip(item["input_ids"], item["attention_mask"], labels["labels"], strict=True):
            rows.append((tuple(ids[mask.bool()].tolist()), tuple(label.tolist()) if label.dim() else label.item()))
    return set(rows)


TEXTS = [sentence(length, start) for start, length in enumerate((3, 9, 0, 1, 14, 5))]  # one is empty and is left out
CLASSES = [0, 1, 2, 2, 0, 1]
WANTED = {(tuple(ENCODER(t)["input_ids"]), c) for t, c in zip(TEXTS, CLASSES, strict=True) if t}


@pytest.mark.parametrize("column", ["label", "labels"])
def test_labels_stay_with_their_texts_through_sorting_and_padding(column: str) -> None:
    rows = [{"text": text, column: label, "other": 9} for text, label in zip(TEXTS, CLASSES, strict=True)]
    for form in (rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        assert pairs(read(form)) == WANTED
    assert "labels" not in read(rows).items[0]


def test_labels_stay_with_token_ids_and_ready_batches() -> None:
    encoded = [{**ENCODER(text), "label": label} for text, label in zip(TEXTS, CLASSES, strict=True) if text]
    assert pairs(read(encoded)) == WANTED
    ready = {**ENCODER([t for t in TEXTS if t], padding=True, return_tensors="pt")}
    ready["labels"] = torch.tensor([c for t, c in zip(TEXTS, CLASSES, strict=True) if t])
    assert pairs(read([ready])) == WANTED


def test_another_column_by_name() -> None:
    rows = [{"text": text, "label": 0, "mood": mood} for text, mood in zip(TEXTS, CLASSES, strict=True)]
    assert pairs(read(rows, label_column="mood")) == WANTED
    with pytest.raises(ValueError, match=r"label_column='mod' asked.*Columns: text, label, mood"):
        read(rows, label_column="mod")


def test_classes_go_by_name_where_both_sides_have_the_same_names() -> None:
    model = tiny(
        "bert", "SequenceClassification", id2label={0: "no", 1: "maybe", 2: "yes"}, label2id={"no": 0, "maybe": 1, "yes": 2}
    )
    features = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no", "maybe"])})
    dataset = Dataset.from_dict({"text": ["w1", "w2 w3", "w4 w5 w6"], "label": [0, 1, 2]}, features=features)
    assert sorted((len(ids), label) for ids, label in pairs(read(dataset, model))) == [(3, 2), (4, 0), (5, 1)]


def test_regression_takes_any_finite_number() -> None:
    model = tiny("bert", "SequenceClassification", num_labels=1)
    rows = [{"text": "w1", "score": 2.5}, {"text": "w2 w3", "score": 4}]
    assert sorted(label for _, label in pairs(read(rows, model))) == [2.5, 4.0]
    for wrong in (math.nan, math.inf, "good"):
        with pytest.raises(ValueError, match=r"Row 1: label .* is no finite number.*regression"):
            read([rows[0], {"text": "w2", "score": wrong}], model)


def test_several_labels_at_once() -> None:
    model = tiny("bert", "SequenceClassification", problem_type="multi_label_classification")
    assert {label for _, label in pairs(read([{"text": "w1", "labels": [1, 0, 1]}], model))} == {(1.0, 0.0, 1.0)}
    with pytest.raises(ValueError, match="are not 3 zeros and ones"):
        read([{"text": "w1", "labels": [1, 0, 2]}], model)
    for wrong in (1, [1, 0], [1, 0, 1, 0, 0, 1]):
        with pytest.raises(ValueError, match=r"Row 0: labels .* are not 3 zeros and ones"):
            read([{"text": "w1", "labels": wrong}], model)


@pytest.mark.parametrize("missing", [0, 1])
def test_labels_that_some_rows_lack_are_refused(missing: int) -> None:
    rows: list[dict[str, Any]] = [{"text": "w1 w2", "label": 1}, {"text": "w3", "label": 0}]
    del rows[missing]["label"]
    said = (r"Row 1 has labels \(label\), but row 0 has none there; its columns: text\.", "Row 1 has no label")
    with pytest.raises(ValueError, match=said[missing]):
        read(rows, needed=False)
    other = [{"text": "w1 w2"}, {"text": "w3", "mood": 0}]
    assert read(other, needed=False).labels is None


@pytest.mark.parametrize("form", [np.asarray, torch.tensor, list, lambda values: list(np.asarray(values))])
def test_labels_in_any_form(form: Any) -> None:
    """Of rows and of ready batches: those that numpy has, too."""
    rows = [{"text": text, "label": form([label])[0]} for text, label in zip(TEXTS, CLASSES, strict=True)]
    assert pairs(read(rows)) == WANTED
    plain = [{"text": text, "label": label} for text, label in zip(TEXTS, CLASSES, strict=True)]
    assert pairs(read(Dataset.from_list(plain).with_format("numpy"))) == WANTED
    ready = {**ENCODER([t for t in TEXTS if t], padding=True, return_tensors="pt")}
    ready["labels"] = form([c for t, c in zip(TEXTS, CLASSES, strict=True) if t])
    assert pairs(read([ready])) == WANTED
    regression = tiny("bert", "SequenceClassification", num_labels=1)
    assert {label for _, label in pairs(read([{"text": "w1", "label": form([0.5])[0]}], regression))} == {0.5}


def test_only_some_rows_have_a_mask() -> None:
    rows = [{"input_ids": [3, 4, 5], "label": 0}, {"input_ids": [3, 4, 1, 1, 1], "attention_mask": [1, 1, 0, 0, 0], "label": 1}]
    assert pairs(read(rows)) == {((3, 4, 5), 0), ((3, 4), 1)}


def test_a_row_that_is_none_is_left_out_as_an_empty_one_is() -> None:
    assert pairs_of_texts(["w1 w2", None, "w3"]) == pairs_of_texts(["w1 w2", "", "w3"])


def pairs_of_texts(texts: list[str | None]) -> list[list[list[int]]]:
    found = make_batches(texts, CLASSIFIER.config, WIDE, causal=False, tokenizer=ENCODER)
    return [item["input_ids"].tolist() for item in found]


@pytest.mark.parametrize("count", [4, 6])
def test_a_ready_batch_has_a_label_for_every_example(count: int) -> None:
    ready = {**ENCODER([t for t in TEXTS if t], padding=True, return_tensors="pt"), "labels": torch.zeros(count).long()}
    with pytest.raises(ValueError, match=f"Row 0 has {count} labels for 5 examples"):
        read([ready])


def test_labels_of_tokens_are_cut_and_padded_with_them() -> None:
    model = tiny("bert", "TokenClassification")
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [0, IGNORED, 2, 1]}, {"input_ids": [9, 10], "labels": [1, 1]}]
    found = read(rows, model, config=PruningConfig(seq_len=3, num_tokens=None))
    assert found.labels is not None
    assert found.labels[0]["labels"].tolist() == [[0, IGNORED, 2], [1, 1, IGNORED]]
    with pytest.raises(ValueError, match=r"Row 0 has label 3 for a token; the model has 3 outputs"):
        read([{"input_ids": [5, 6], "labels": [0, 3]}], model)


def test_positions_of_answers() -> None:
    model = tiny("bert", "QuestionAnswering")
    rows = [
        {"input_ids": [5, 6, 7], "start_positions": 1, "end_positions": 2},
        {"input_ids": [9], "start_positions": 0, "end_positions": 0},
    ]
    found = read(rows, model)
    assert found.labels is not None
    assert {name: value.tolist() for name, value in found.labels[0].items()} == {
        "start_positions": [1, 0],
        "end_positions": [2, 0],
    }


def test_positions_of_answers_behind_padding() -> None:
    model = tiny("bert", "QuestionAnswering")
    left = {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "start_positions": 3, "end_positions": 4}
    right = {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "start_positions": 1, "end_positions": 2}
    found = read([left, right], model).labels
    assert found is not None
    assert {name: value.tolist() for name, value in found[0].items()} == {"start_positions": [1, 1], "end_positions": [2, 2]}
    for wrong in (left | {"start_positions": 1}, right | {"end_positions": 3}):
        with pytest.raises(ValueError, match=r"Row 0 has (start|end)_positions \d, which is padding"):
            read([wrong], model)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (3, r"Row 1: 1 of 1 labels are none of the model's classes, 3 for one; the model has 3"),
        (-1, "test split without labels has -1"),
        (0.5, "none of the model's classes, 0.5"),
        ("bad", "none of the model's classes, 'bad'"),
        (None, "Row 1 has no label"),
    ],
)
def test_labels_that_are_none_of_the_models_classes_are_refused(label: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read([{"text": "w1", "label": 0}, {"text": "w2", "label": label}])


@pytest.mark.parametrize(
    ("head", "rows", "said"),
    [
        ("SequenceClassification", ["w1"], r"label is looked for in label, labels.*none, the rows are plain.*labels='model'"),
        ("SequenceClassification", [{"text": "w1", "mood": 1}], r"Columns: text, mood\."),
        ("TokenClassification", [{"text": "w1", "labels": [0]}], "tokenized rows with labels for every token"),
        ("QuestionAnswering", [{"question": "w1", "context": "w2"}], "start_positions and end_positions"),
        ("MaskedLM", ["w1"], "labels for the masked tokens"),
        ("", ["w1"], "BertModel has no head"),
    ],
)
def test_data_without_labels_is_refused_before_any_work(head: str, rows: Any, said: str) -> None:
    model = tiny("bert", head)
    model.forward = None  # type: ignore[assignment]  # the model must not even be asked
    pruner = FisherPruner(model, FisherConfig(labels="data"), ENCODER)
    with pytest.raises(ValueError, match=said):
        pruner.prune(rows)


def test_without_labels_they_are_drawn_and_with_labels_those_count() -> None:
    rows = [{"text": sentence(7, start), "label": start % 3} for start in range(12)]
    other = [{**row, "label": (row["label"] + 1) % 3} for row in rows]
    bare = [{"text": row["text"]} for row in rows]

    def importance(data: Any, **asked: Any) -> Tensor:
        pruner = FisherPruner(tiny("bert", "SequenceClassification"), FisherConfig(**asked), ENCODER)
        pruner.prune(data)
        return torch.tensor([group.error for group in pruner.report.groups])

    assert not torch.equal(importance(rows), importance(other))
    assert torch.equal(importance(rows), importance(rows, labels="data"))
    assert torch.equal(importance(bare), importance(other, labels="model"))


def test_a_method_that_reads_no_labels_says_so() -> None:
    pruner = FisherPruner(CLASSIFIER, FisherConfig(labels="model"), ENCODER)
    with pytest.raises(ValueError, match=r"label_column='mood' asked, but fisher with this config reads no labels"):
        pruner.prune([{"text": "w1", "mood": 1}], label_column="mood")


def losses() -> dict[str, tuple[Any, dict[str, Tensor], float]]:
    """Name -> model, labels of one batch of three, and what transformers' mean loss counts as one."""
    generator = torch.Generator().manual_seed(3)
    classes = torch.randint(LABELS, (3,), generator=generator)
    mask = batches()[0]["attention_mask"]
    tokens = torch.randint(LABELS, mask.shape, generator=generator).masked_fill(mask == 0, IGNORED)
    words = torch.randint(VOCAB, mask.shape, generator=generator).masked_fill(
        torch.rand(mask.shape, generator=generator) < 0.7, IGNORED
    )
    flags, scores = (torch.rand(3, LABELS, generator=generator) < 0.5).float(), torch.randn(3, generator=generator)
    kind = "SequenceClassification"
    return {
        "classes": (tiny("bert", kind), {"labels": classes}, 3),
        "a decoder's classes": (tiny("llama", kind), {"labels": classes}, 3),
        "regression": (tiny("bert", kind, num_labels=1), {"labels": scores}, 3 / 2),
        "several": (tiny("bert", kind, problem_type="multi_label_classification"), {"labels": flags}, 3 * LABELS),
        "tokens": (tiny("bert", "TokenClassification"), {"labels": tokens}, float((tokens != IGNORED).sum())),
        "masked words": (tiny("bert", "MaskedLM"), {"labels": words}, float((words != IGNORED).sum())),
        "next words": (tiny("gpt2"), {}, float(mask[:, 1:].sum())),
    }


@pytest.mark.parametrize("name", losses())
def test_the_gradient_is_that_of_transformers_own_loss(name: str) -> None:
    model, labels, counted = losses()[name]
    inputs = {key: value for key, value in batches()[0].items()}
    own = labels or {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)}
    output = model(**inputs, **own)
    (logits,), (found,) = loss_gradients(model, output, inputs, labels or None)
    (wanted,) = torch.autograd.grad(output.loss, logits)
    torch.testing.assert_close(found, wanted * counted, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_answers_ignores_padding_and_positions_that_were_cut_off() -> None:
    model, inputs = tiny("bert", "QuestionAnswering"), batches()[0]
    labels = {"start_positions": torch.tensor([2, 0, 99]), "end_positions": torch.tensor([3, 1, 99])}
    output = model(**inputs)
    values, found = loss_gradients(model, output, inputs, labels)
    for value, gradient, name in zip(values, found, labels, strict=True):
        masked = value.masked_fill(inputs["attention_mask"] == 0, -torch.inf)
        loss = torch.nn.functional.cross_entropy(masked[:2], labels[name][:2], reduction="sum")
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, value, retain_graph=True)[0], rtol=1e-4, atol=1e-6)
        assert not gradient[2].any()


def test_the_gradient_of_the_next_token_loss_counts_real_pairs_only() -> None:
    logits = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    ids = torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    spans = (slice(0, 6), slice(2, 6), slice(0, 3))
    loss = sum(
        torch.nn.functional.cross_entropy(row[span][:-1], own[span][1:], reduction="sum")
        for row, own, span in zip(logits, ids, spans, strict=True)
    )
    loss.backward()
    _, (found,) = loss_gradients(tiny("gpt2"), {"logits": logits}, {"input_ids": ids, "attention_mask": mask}, None)
    torch.testing.assert_close(found, logits.grad, rtol=1e-12, atol=1e-12)
