"""The measures against brute force: one example at a time, without padding, by hand where possible."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from optimum_stat import STATConfig, STATPruner, squad
from optimum_stat.data import make_batches
from optimum_stat.evaluation import Data, data_config, measure
from optimum_stat.evaluation_text import perplexity
from optimum_stat.scores import accuracy_and_f1, correlations, cosine

WORDS = [f"w{i}" for i in range(40)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    own = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    own.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=64, **special)


def bert(head: Any, **config: Any) -> Any:
    model = head(BertConfig(vocab_size=45, max_position_embeddings=64, **SIZES, **config)).eval()
    for parameter in model.parameters():  # far enough from zero for the answers to differ
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def llama() -> Any:
    config = LlamaConfig(vocab_size=45, num_key_value_heads=2, max_position_embeddings=64, **SIZES)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def text(length: int) -> str:
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,)))


def one(model: Any, *texts: str) -> Any:
    with torch.no_grad():
        return model(**tokenizer()(*texts, truncation=True, return_tensors="pt"))


def test_perplexity_is_that_of_every_predicted_token() -> None:
    model, own = llama(), tokenizer()
    data = Data([text(60), text(3), text(41)], data_config(seq_len=16, batch_size=4))
    batches = make_batches(data.dataset, model.config, data.config, causal=True, tokenizer=own)
    losses = []
    for batch in batches:
        for ids in batch["input_ids"]:
            logs = model(ids[None]).logits[0].double().log_softmax(-1)
            losses += [-float(logs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    found = measure(model, own, data)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found.task == "text-generation"
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_perplexity_leaves_padding_out() -> None:
    model = llama()
    rows = [{"input_ids": torch.randint(45, (1, 9))}, {"input_ids": torch.randint(45, (1, 4))}]
    separate = make_batches(rows, model.config, data_config(), causal=True)
    padded = {"input_ids": torch.zeros(2, 9, dtype=torch.long), "attention_mask": torch.zeros(2, 9, dtype=torch.long)}
    for i, row in enumerate(rows):
        padded["input_ids"][i, : row["input_ids"].shape[1]] = row["input_ids"][0]
        padded["attention_mask"][i, : row["input_ids"].shape[1]] = 1
    together = make_batches([padded], model.config, data_config(), causal=True)
    assert perplexity(model, together) == pytest.approx(perplexity(model, separate), rel=1e-5)


def test_masked_prediction_counts_the_masked_tokens_only() -> None:
    model, own = bert(BertForMaskedLM), tokenizer()
    data = Data([text(20), text(30)], data_config(batch_size=2))
    (batch,) = make_batches(data.dataset, model.config, data.config, causal=False, tokenizer=own)
    hidden = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.15
    losses, right = [], []
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        at = [i for i in range(len(ids)) if hidden[row, i] and ids[i] > 4]
        real = int(mask.sum())
        masked = ids.clone()
        masked[at] = own.mask_token_id
        logits = model(masked[None, :real]).logits[0].double()
        losses += [-float(logits[i].log_softmax(-1)[ids[i]]) for i in at]
        right += [int(logits[i].argmax()) == int(ids[i]) for i in at]
    found = measure(model, own, data).metrics
    assert found["masked_lm_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("pad", [0, 7, None])
def test_a_decoder_finds_the_end_of_an_example_by_its_own_padding(pad: int | None) -> None:
    """Whatever the tokenizer pads with; what has none is given one example at a time."""
    config = LlamaConfig(
        vocab_size=45, max_position_embeddings=64, num_labels=3, pad_token_id=pad, initializer_range=0.5, **SIZES
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    texts = [text(3 + 5 * (i % 7)).replace("w2", "w3") for i in range(30)]  # no word that is padding
    labels = [int(one(model, each).logits.argmax()) for each in texts]
    data = Data(Dataset.from_dict({"text": texts, "label": labels}), data_config(batch_size=8))
    assert measure(model, tokenizer(), data).metrics["accuracy"] == 1
    pruner = STATPruner.from_pretrained(model, STATConfig(keep=0.6, batch_size=8), tokenizer=tokenizer())
    if pad is None:
        with pytest.raises(ValueError, match="finds the end of an example by config"):
            pruner.prune(texts)
        pruner.prune([{"input_ids": tokenizer()(each, return_tensors="pt")["input_ids"]} for each in texts])
    else:
        (batch, *_) = make_batches(texts, config, data_config(batch_size=8), causal=False, tokenizer=tokenizer())
        wrong = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 9)
        (ready,) = make_batches([batch | {"input_ids": wrong}], config, data_config(), causal=False)
        assert torch.equal(ready["input_ids"], batch["input_ids"])
        whole = model(**batch).logits
        for row, mask in enumerate(batch["attention_mask"]):
            alone = model(input_ids=batch["input_ids"][row : row + 1, : int(mask.sum())]).logits
            torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_classification_predicts_as_one_by_one_does(num_labels: int) -> None:
    model = bert(BertForSequenceClassification, num_labels=num_labels)
    texts = [text(3 + 5 * (i % 7)) for i in range(30)]
    labels = torch.randint(num_labels, (30,)).tolist()
    predicted = [int(one(model, each).logits.argmax()) for each in texts]
    whole = measure(model, tokenizer(), Data(Dataset.from_dict({"text": texts, "label": labels}), data_config()))
    found = whole.metrics
    assert whole.num_tokens == 3 + 2  # the first text, without the padding of its batch
    assert found["accuracy"] == pytest.approx(sum(p == y for p, y in zip(predicted, labels, strict=True)) / 30)
    scores = []
    for label in range(num_labels):
        true = sum(p == y == label for p, y in zip(predicted, labels, strict=True))
        precision, recall = true / max(1, predicted.count(label)), true / max(1, labels.count(label))
        scores.append(2 * precision * recall / (precision + recall) if true else 0.0)
    wanted = {"f1": scores[1]} if num_labels == 2 else {"f1_macro": sum(scores) / 3}
    assert found == pytest.approx({"accuracy": found["accuracy"], **wanted})


def test_f1_by_hand() -> None:
    predicted, labels = torch.tensor([1, 1, 1, 0, 0]), torch.tensor([1, 1, 0, 1, 0])
    assert accuracy_and_f1(predicted, labels, 2) == pytest.approx({"accuracy": 0.6, "f1": 2 / 3})
    never = accuracy_and_f1(torch.tensor([0, 0]), torch.tensor([0, 1]), 3)  # class 2 does not occur
    assert never == pytest.approx({"accuracy": 0.5, "f1_macro": (2 / 3 + 0) / 2})


def test_labels_are_matched_by_name_where_both_sides_name_them() -> None:
    model = bert(
        BertForSequenceClassification, id2label={0: "no", 1: "maybe", 2: "yes"}, label2id={"no": 0, "maybe": 1, "yes": 2}
    )
    texts = [text(8) for _ in range(12)]
    names = [model.config.id2label[int(one(model, each).logits.argmax())] for each in texts]
    classes = ClassLabel(names=["Yes", "Maybe", "No"])  # another order, as MNLI's differs between models
    features = Features({"text": Value("string"), "label": classes})
    ids = [classes.str2int(name.capitalize()) for name in names]
    for labels, kind in ((ids, features), (names, None)):
        data = Data(Dataset.from_dict({"text": texts, "label": labels}, features=kind), data_config())
        assert measure(model, tokenizer(), data).metrics["accuracy"] == 1


@pytest.mark.parametrize(("labels", "says"), [([0, 2], "2 for one; the model has 2"), ([-1, -1], "has -1"), (["a", "b"], "'a'")])
def test_labels_that_the_model_lacks_are_refused(labels: list[Any], says: str) -> None:
    data = Data(Dataset.from_dict({"text": ["w1", "w2"], "label": labels}), data_config())
    with pytest.raises(ValueError, match=says):
        measure(bert(BertForSequenceClassification), tokenizer(), data)


def test_no_label_column_is_refused_by_name() -> None:
    model, rows = bert(BertForSequenceClassification), Dataset.from_dict({"text": ["w1"], "stars": [1]})
    with pytest.raises(ValueError, match="the columns are text, stars"):
        measure(model, tokenizer(), Data(rows, data_config()))
    with pytest.raises(ValueError, match="No label column mood"):
        measure(model, tokenizer(), Data(rows, data_config(), label_column="mood"))
    found = measure(model, tokenizer(), Data(rows, data_config(), label_column="stars"))
    assert set(found.metrics) == {"accuracy", "f1"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"num_tokens": 9}, "num_tokens=9 asked; rows with labels or answers are counted by max_examples"),
        ({"seq_len": 65}, "seq_len=65 asked, but the model takes at most 64 tokens"),
    ],
)
def test_what_would_not_be_heeded_is_refused(asked: dict[str, int], says: str) -> None:
    rows = Dataset.from_dict({"text": ["w1", "w2"], "label": [0, 1]})
    with pytest.raises(ValueError, match=says):
        measure(bert(BertForSequenceClassification), tokenizer(), Data(rows, data_config(**asked)))


@pytest.mark.parametrize("label", [None, "good", math.nan])
def test_what_is_no_number_is_refused_by_its_row(label: Any) -> None:
    rows = Dataset.from_list([{"text": "w1", "label": 1.0}, {"text": "w2", "label": label}]) if label != "good" else None
    rows = rows or Dataset.from_dict({"text": ["w1", "w2"], "label": ["good", "bad"]})
    with pytest.raises(ValueError, match=r"Row [01] has .* in 'label', where a number was expected"):
        measure(bert(BertForSequenceClassification, num_labels=1), tokenizer(), Data(rows, data_config()))


def test_a_head_of_no_known_kind_is_told() -> None:
    with pytest.raises(ValueError, match=r"BertForPreTraining cannot be measured: .* prediction_logits, seq_relationship_logits"):
        measure(bert(BertForPreTraining), tokenizer(), Data(Dataset.from_dict({"text": ["w1"]}), data_config()))


def test_a_wrong_label_column_is_refused_where_none_is_read() -> None:
    with pytest.raises(ValueError, match="No label column stars; the columns are text"):
        measure(bert(BertModel), tokenizer(), Data(Dataset.from_dict({"text": ["w1"]}), data_config(), label_column="stars"))


def test_the_columns_of_a_stream_are_those_of_its_first_row() -> None:
    rows = [{"text": f"w{i}", "label": i % 2} for i in range(6)]
    model = bert(BertForSequenceClassification)
    streamed = measure(model, tokenizer(), Data(IterableDataset.from_generator(lambda: iter(rows)), data_config()))
    assert streamed.metrics == measure(model, tokenizer(), Data(Dataset.from_list(rows), data_config())).metrics


def test_regression_correlates_ranks_and_values() -> None:
    model = bert(BertForSequenceClassification, num_labels=1)
    pairs = [(text(4 + i), text(9)) for i in range(15)]
    scores = torch.rand(15).tolist()
    rows = {"sentence1": [a for a, _ in pairs], "sentence2": [b for _, b in pairs], "label": scores}
    found = measure(model, tokenizer(), Data(Dataset.from_dict(rows), data_config(batch_size=4))).metrics
    predicted = torch.tensor([float(one(model, *pair).logits) for pair in pairs])

    def pearson(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])

    wanted = torch.tensor(scores)
    assert found["pearsonr"] == pytest.approx(pearson(predicted, wanted), abs=1e-4)
    ranks = (predicted.argsort().argsort(), wanted.argsort().argsort())
    assert found["spearmanr"] == pytest.approx(pearson(*ranks), abs=1e-6)
    assert math.isnan(correlations([1.0, 1.0], [1.0, 2.0])["spearmanr"])


def test_embeddings_are_means_over_real_tokens() -> None:
    model, texts = bert(BertModel), [text(5), text(17), text(9)]
    found = measure(model, tokenizer(), Data(Dataset.from_dict({"text": texts}), data_config()))
    alone = torch.cat([one(model, each).last_hidden_state.mean(1) for each in sorted(texts, key=lambda t: -len(t.split()))])
    assert found.metrics == {}
    assert found.embeddings is not None
    torch.testing.assert_close(found.embeddings, alone, rtol=1e-4, atol=1e-5)
    assert cosine(torch.eye(2), torch.tensor([[3.0, 0], [1, 1]])) == pytest.approx((1 + 0.5**0.5) / 2)


def test_pairs_with_a_score_are_measured_as_sts() -> None:
    model, pairs = bert(BertModel), [(text(5), text(6 + i)) for i in range(9)]
    scores = torch.rand(9).tolist()
    rows = {"sentence1": [a for a, _ in pairs], "sentence2": [b for _, b in pairs], "score": scores}
    found = measure(model, tokenizer(), Data(Dataset.from_dict(rows), data_config())).metrics
    both = [[one(model, each).last_hidden_state.mean(1) for each in pair] for pair in pairs]
    cosines = [float(torch.cosine_similarity(a, b)) for a, b in both]
    assert found == pytest.approx(correlations(cosines, scores), abs=1e-4)


def test_answers_are_the_best_spans_over_all_windows() -> None:
    model, own = bert(BertForQuestionAnswering), tokenizer()
    rows = [{"question": text(4), "context": text(length), "answers": {"text": ["w1"]}} for length in (12, 70, 30, 101)]
    with torch.no_grad():
        found, _ = squad.answers(model, own, rows, 40, 2)
    for row, answer in zip(rows, found, strict=True):
        question, words = row["question"].split(), row["context"].split()
        room, best = 40 - len(question) - 3, (-1e9, "")
        starts = [0]
        while starts[-1] + room < len(words):
            starts.append(starts[-1] + room - 10)  # the stride: a quarter of the window
        for first in starts:
            part = words[first : first + room]
            output = one(model, row["question"], " ".join(part))
            start, end = output.start_logits[0, len(question) + 2 :], output.end_logits[0, len(question) + 2 :]
            for i in range(len(part)):
                for j in range(i, min(i + 30, len(part))):
                    best = max(best, (float(start[i] + end[j]), " ".join(part[i : j + 1])))
        assert answer == best[1]


def test_no_answer_is_predicted_only_where_the_data_has_it() -> None:
    model = bert(BertForQuestionAnswering)
    model.qa_outputs.bias.data.zero_()
    hooked = model.qa_outputs.register_forward_hook(lambda module, args, out: out.index_fill(1, torch.tensor([0]), 99.0))
    row = {"question": "w1", "context": "w2 w3", "answers": {"text": ["w2"]}}
    none = {**row, "answers": {"text": []}}
    with hooked, torch.no_grad():
        assert squad.answers(model, tokenizer(), [row], 40, 2)[0] != [""]
        assert squad.answers(model, tokenizer(), [row, none], 40, 2)[0] == ["", ""]


def test_answers_score_as_in_squad() -> None:
    assert squad.normalized("The  cat's, a Hat!") == "cats hat"
    assert squad.token_f1("the big black cat", "a black cat sat") == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    scores = squad.exact_match_and_f1(["The Cat", "dog", ""], [["x", "cat"], ["a big dog"], []])
    assert scores == pytest.approx({"exact_match": 100 * 2 / 3, "f1": 100 * (1 + 2 / 3 + 1) / 3})


def test_question_answering_as_a_whole() -> None:
    model, context = bert(BertForQuestionAnswering), "w5 w6 w7 w8"
    with torch.no_grad():
        (best,), _ = squad.answers(
            model, tokenizer(), [{"question": "w1", "context": context, "answers": {"text": ["w5"]}}], 40, 1
        )
    answers = [{"text": [best], "answer_start": [0]}, {"text": ["nothing of it"], "answer_start": [0]}]
    rows = Dataset.from_dict({"question": ["w1", "w1"], "context": [context] * 2, "answers": answers})
    found = measure(model, tokenizer(), Data(rows, data_config()))
    assert found.metrics == {"exact_match": 50.0, "f1": 50.0}
    for wrong in ({"question": None}, {"context": None}, {"answers": None}, {"answers": {"start": [0]}}):
        row = Dataset.from_list([{"question": "w1", "context": context, "answers": answers[0], **wrong}])
        with pytest.raises(ValueError, match="Row 0 has no question, context and answers as SQuAD has them"):
            measure(model, tokenizer(), Data(row, data_config()))
    with pytest.raises(ValueError, match="question, context, answers; there are only text"):
        measure(model, tokenizer(), Data(Dataset.from_dict({"text": ["w1"]}), data_config()))


def test_the_model_is_left_as_it_was() -> None:
    model = bert(BertForSequenceClassification).train().requires_grad_(True)
    measure(model, tokenizer(), Data(Dataset.from_dict({"text": ["w1 w2"], "label": [1]}), data_config()))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_measured_is_refused() -> None:
    data = Data(Dataset.from_dict({"text": ["w1"], "label": [0]}), data_config())
    model = bert(BertForSequenceClassification)
    model.input_modalities = ("text", "image")
    with pytest.raises(ValueError, match="BertForSequenceClassification cannot be measured: there is no measure of text-class"):
        measure(model, tokenizer(), data)
    with pytest.raises(ValueError, match="several labels an example, for which there is no measure"):
        measure(bert(BertForSequenceClassification, problem_type="multi_label_classification"), tokenizer(), data)
    with pytest.raises(ValueError, match="no tokenizer"):
        measure(bert(BertModel), None, data)
