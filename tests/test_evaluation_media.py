"""The measures of images, sounds, targets and words against brute force: one example at a time, by another way where there is."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from test_media import RATE, ending, image_processor, images, sounds
from test_media import tokenizer as word_tokenizer
from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
)

from optimum_stat import media
from optimum_stat.budget import model_cost
from optimum_stat.checkpoint import TASKS
from optimum_stat.commands import main
from optimum_stat.evaluation import _OF_MEDIA, _OF_TEXT, Data, Measured, data_config, measure
from optimum_stat.scores import edit_distance, entities, entity_f1, word_error_rate
from optimum_stat.speed import side_by_side

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
OFTEN = 52  # the token that the model of sounds says most often
EXTRACTOR = WhisperFeatureExtractor(feature_size=8, n_fft=400, hop_length=400, chunk_length=1)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def measured(model: Any, processor: Any, rows: Any, **how: Any) -> Measured:
    columns = {name: how.pop(name) for name in ("text_columns", "label_column") if name in how}
    return measure(model, processor, Data(rows, data_config(**{"batch_size": 3, **how}), **columns))


def in_floats(value: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(value))[None]


def test_every_task_that_can_be_pruned_is_measured() -> None:
    assert {*_OF_TEXT} | {*_OF_MEDIA} == {*TASKS}


def test_entities_are_the_spans_that_conll_defines() -> None:
    """A span of one kind that nothing of this kind continues, before or behind it."""
    for length in (1, 2, 3, 4):
        for tags in itertools.product(TAGS, repeat=length):
            wanted = set()
            for start, end in itertools.combinations(range(length + 1), 2):
                kinds = {tag[2:] for tag in tags[start:end]}
                if len(kinds) > 1 or kinds == {""} or any(tag[0] == "B" for tag in tags[start + 1 : end]):
                    continue
                (kind,) = kinds
                begins = tags[start][0] == "B" or start == 0 or tags[start - 1][2:] != kind
                if begins and (end == length or tags[end] != f"I-{kind}"):
                    wanted.add((kind, start, end))
            assert entities(tags) == wanted, tags


def test_entity_f1_by_hand() -> None:
    wanted = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "O"], ["B-LOC"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["O", "B-LOC"], ["I-LOC"]]
    assert entity_f1(predicted, wanted) == pytest.approx(2 * 2 / (4 + 3))
    assert entity_f1(wanted, wanted) == 1
    assert math.isnan(entity_f1([["O"]], [["O"]]))


def test_edit_distance_is_the_cheapest_of_all_alignments() -> None:
    for one, other in itertools.product(
        ["".join(own) for length in range(5) for own in itertools.product("ab", repeat=length)], ("", "a", "ab", "bba", "abab")
    ):
        costs = [
            len(one) + len(other) - 2 * count + sum(one[i] != other[j] for i, j in zip(left, right, strict=True))
            for count in range(min(len(one), len(other)) + 1)
            for left in itertools.combinations(range(len(one)), count)
            for right in itertools.combinations(range(len(other)), count)
        ]
        assert edit_distance(list(one), list(other)) == min(costs), (one, other)
    assert word_error_rate(["a b c", "d"], ["a c", "d e f g"]) == pytest.approx((1 + 3) / 6)
    with pytest.raises(ValueError, match="No transcript of the data has a word"):
        word_error_rate(["a"], [""])


def pictures(labels: Any = None, kind: Any = None, **more: Any) -> Dataset:
    features = {"image": Image(), **({} if labels is None else {"label": kind}), **dict.fromkeys(more, Value("string"))}
    columns = {"image": images(), **({} if labels is None else {"label": labels}), **more}
    return Dataset.from_dict(columns, features=Features(features))


def of_picture(image: Any) -> torch.Tensor:
    return image_processor()(image, return_tensors="pt")["pixel_values"]


def test_images_are_classified_as_one_by_one_and_labels_matched_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "WINDOW", 4)
    model = tiny("vit").train()
    model.config.id2label, model.config.label2id = {0: "cat", 1: "dog", 2: "cow"}, {"cat": 0, "dog": 1, "cow": 2}
    model.eval()
    predicted = [int(model(of_picture(image)).logits.argmax()) for image in images()]
    assert len({*predicted}) > 1
    wanted = [*predicted[:7], *((own + 1) % 3 for own in predicted[7:])]
    classes = ClassLabel(names=["Dog", "Cow", "Cat"])
    ids = [classes.str2int(model.config.id2label[own].capitalize()) for own in wanted]
    model.train()
    found = measured(model, image_processor(), pictures(ids, classes))
    assert model.training
    assert found.metrics["accuracy"] == pytest.approx(0.7)
    scores = []
    for label in {*predicted, *wanted}:
        right = sum(own == other == label for own, other in zip(predicted, wanted, strict=True))
        scores.append(2 * right / (predicted.count(label) + wanted.count(label)))
    assert found.metrics["f1_macro"] == pytest.approx(sum(scores) / len(scores))
    assert (found.task, found.num_tokens) == ("image-classification", 10)  # nine patches and one for all
    assert found.macs == model_cost(model, "macs", 10)
    few = measured(model, image_processor(), pictures(ids, classes), max_examples=7)
    assert few.metrics["accuracy"] == 1


def test_no_more_images_are_in_memory_than_a_window_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "WINDOW", 4)
    read, seen = [], []
    model = tiny("vit")
    model.register_forward_pre_hook(lambda *_: seen.append(len(read)))
    rows = pictures([0] * 10, Value("int64"))
    monkeypatch.setattr(media.MediaRows, "_of_row", _counting(media.MediaRows._of_row, read))
    measured(model, image_processor(), rows)
    assert seen[:5] == [4, 4, 8, 8, 10]


def _counting(method: Any, calls: list[int]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(1)
        return method(*args)

    return counted


@pytest.mark.parametrize("family", ["wav2vec2", "whisper"])
def test_sounds_are_classified_as_one_by_one(family: str) -> None:
    model = tiny(family, "AudioClassification")
    extractor = EXTRACTOR if family == "whisper" else Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    own, name = sounds(), "input_features" if family == "whisper" else "input_values"
    encoded = [extractor(each, sampling_rate=RATE, return_tensors="pt")[name] for each in own]
    predicted = [int(model(each).logits.argmax()) for each in encoded]
    labels = [*predicted[:4], *((each + 1) % 3 for each in predicted[4:])]
    rows = Dataset.from_list(
        [{"audio": {"array": each, "sampling_rate": RATE}, "kind": k} for each, k in zip(own, labels, strict=True)]
    )
    found = measured(model, extractor, rows, label_column="kind")
    assert found.metrics["accuracy"] == pytest.approx(4 / 6)
    assert found.task == "audio-classification"
    frames = 20 if family == "whisper" else int(model._get_feat_extract_output_lengths(200))
    assert found.num_tokens == frames
    assert found.macs == model_cost(model, "macs", frames)


def test_perplexity_of_targets_is_that_of_every_token_given_the_source() -> None:
    """Markers in front of a text are not counted; its end is."""
    rows = Dataset.from_dict(
        {"document": ["w3 w4 w5 w6", "w10", "w9 w8", "w3"], "summary": ["w7 w8 w9", "w11 w12", "w13 w14 w15 w16 w17", ""]}
    )
    for family, own in (("t5", ending("w0", (("w0", 3), ("</s>", 2)))), ("bart", ending("<s> <s>"))):
        own.bos_token = "<s>"
        model, losses = tiny(family), []
        for row in rows:
            source, target = (own(row[name], return_tensors="pt")["input_ids"] for name in ("document", "summary"))
            target = target[:, 1:] if family == "bart" else target  # the start token that the model itself puts there
            before = torch.tensor([[model.config.decoder_start_token_id]])
            logits = model(input_ids=source, decoder_input_ids=torch.cat([before, target[:, :-1]], 1)).logits[0].double()
            marks = 1 if family == "bart" else 0
            losses += [-float(logits[i].log_softmax(-1)[token]) for i, token in enumerate(target[0]) if i >= marks]
        found = measured(model, own, rows, batch_size=4)
        assert found.metrics == {"perplexity": pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)}
        assert len(losses) == 3 + 2 + 5 + 4 + (4 if family == "t5" else 0)  # the ends, and a mark that is no special token
        assert found.num_tokens == (
            4 + len(own("w0")["input_ids"]) - 1,
            3 + len(own("w0")["input_ids"]) - (2 if family == "bart" else 1),
        )
        assert found.macs == model_cost(model, "macs", found.num_tokens)
        lengths = tuple(found.example[name].shape[1] for name in ("input_ids", "decoder_input_ids"))
        assert lengths == found.num_tokens  # what is timed has no padding
    ready = [{"input_ids": own(row["document"])["input_ids"], "labels": own(row["summary"])["input_ids"]} for row in rows]
    again = measured(model, own, Dataset.from_list(ready), batch_size=4)
    assert again.metrics == pytest.approx(found.metrics)


def letters(folder: Path) -> Wav2Vec2CTCTokenizer:
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *(chr(0x430 + i) for i in range(63))])}
    vocab = {"|" if i == OFTEN else token: i for token, i in vocab.items()}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))


def test_transcripts_of_ctc_are_compared_word_by_word(tmp_path: Path) -> None:
    model, extractor = tiny("wav2vec2"), Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    processor = Wav2Vec2Processor(extractor, letters(tmp_path))
    names = {i: letter for letter, i in processor.tokenizer.get_vocab().items()}
    said = []
    for each in sounds():
        best = model(extractor(each, sampling_rate=RATE, return_tensors="pt")["input_values"]).logits[0].argmax(-1).tolist()
        ids = [one for one, _ in itertools.groupby(best) if one != 1]
        said.append("".join(" " if one == OFTEN else names[one] for one in ids).strip())
    assert any(" " in text for text in said)
    wanted = ["one two", *said[1:4], "x " + said[4], said[5]]
    rows = Dataset.from_list(
        [{"audio": {"array": own, "sampling_rate": RATE}, "sentence": text} for own, text in zip(sounds(), wanted, strict=True)]
    )
    found = measured(model, processor, rows)
    words = sum(len(text.split()) for text in wanted)
    errors = edit_distance(said[0].split(), ["one", "two"]) + edit_distance(said[4].split(), wanted[4].split())
    assert found.metrics == {"wer": pytest.approx(errors / words)}
    assert found.metrics["wer"] > 0
    assert found.num_tokens == int(model._get_feat_extract_output_lengths(200))


def test_whisper_transcribes_greedily_and_its_perplexity_is_that_of_the_words() -> None:
    model = tiny("whisper", seed=2)
    model.generation_config.max_length = 9
    marking = ending("<s> w0", (("<s>", 0), ("w0", 3), ("</s>", 2)))
    marking.bos_token, marking.unk_token = "<s>", "w0"
    processor = SimpleNamespace(feature_extractor=EXTRACTOR, tokenizer=marking)
    said, losses, wanted = [], [], ["w10 w11", "w12", "w13 w14 w15", "w9", "w8 w7", "w6"]
    with torch.no_grad():
        for each, text in zip(sounds(), wanted, strict=True):
            heard = EXTRACTOR(each, sampling_rate=RATE, return_tensors="pt")["input_features"]
            ids = [0]
            while len(ids) < 1 + 9 and ids[-1] != 2:
                logits = model(input_features=heard, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
                ids.append(int(logits.argmax()))
            said.append(marking.decode([one for one in ids if one > 3]))
            text = said[-1] if len(said) == 3 else text
            target = marking(text)["input_ids"][1:]
            logits = model(input_features=heard, decoder_input_ids=torch.tensor([[0, *target[:-1]]])).logits[0].double()
            losses += [-float(logits[i].log_softmax(-1)[token]) for i, token in enumerate(target) if i > 0]
    wanted[2] = said[2]
    assert len(said[2].split()) == 9
    rows = Dataset.from_list(
        [{"audio": {"array": own, "sampling_rate": RATE}, "text": text} for own, text in zip(sounds(), wanted, strict=True)]
    )
    found = measured(model, processor, rows)
    errors = sum(edit_distance(own.split(), text.split()) for own, text in zip(said, wanted, strict=True))
    assert list(found.metrics) == ["wer", "perplexity"]
    assert found.metrics["wer"] == pytest.approx(errors / sum(len(text.split()) for text in wanted))
    assert found.metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found.num_tokens[0] == 20
    assert found.macs == model_cost(model, "macs", found.num_tokens)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_images_are_matched_with_the_names_of_their_classes(family: str) -> None:
    model, own, names = tiny(family), word_tokenizer(), ["w1", "w2_w3", "w4", "w5 w6"]
    processor = SimpleNamespace(image_processor=image_processor(), tokenizer=own)
    how = {"padding": "max_length", "max_length": 32} if family == "siglip" else {}
    prompts = [own(f"a photo of a {name.replace('_', ' ')}", return_tensors="pt", **how) for name in names]
    best = []
    for image in images():
        one = of_picture(image)
        texts = [{"input_ids": text["input_ids"], "attention_mask": torch.ones_like(text["input_ids"])} for text in prompts]
        logits = [float(model(pixel_values=one, **text).logits_per_image) for text in texts]
        best.append(max(range(4), key=lambda i: logits[i]))
    assert len({*best}) > 1
    labels = [*best[:6], *((each + 1) % 4 for each in best[6:])]
    found = measured(model, processor, pictures(labels, ClassLabel(names=names)))
    assert found.metrics == {"accuracy": pytest.approx(0.6)}
    assert found.num_tokens in {"clip": ((5, 10), (6, 10)), "siglip": ((32, 9),)}[family]
    assert found.macs == model_cost(model, "macs", found.num_tokens)
    few = measured(model, processor, pictures(labels, ClassLabel(names=names)), max_examples=2, num_tokens=100)
    assert few.metrics == {"accuracy": 1}  # of two images, with the texts of all classes
    as_text = pictures([names[i] for i in labels], Value("string"))  # classes that do not occur have no text
    assert measured(model, processor, as_text).metrics["accuracy"] >= 0.6 - (len({*labels}) < 4)


def test_images_are_matched_with_all_different_captions() -> None:
    model, own = tiny("clip"), word_tokenizer()
    captions = ["w4", "w2 w3", "w10", "w4", "w5 w6 w7", "w8", "w11 w12", "w10", "w11 w12", "w2 w3"]
    different = list(dict.fromkeys(captions))
    best = []
    for image in images():
        logits = [float(model(pixel_values=of_picture(image), **own(t, return_tensors="pt")).logits_per_image) for t in different]
        best.append(different[max(range(len(logits)), key=lambda i: logits[i])])
    captions[3], captions[7] = best[3], best[7]
    wanted = sum(own == other for own, other in zip(captions, best, strict=True)) / 10
    assert {*captions} == {*different}
    processor = SimpleNamespace(image_processor=image_processor(), tokenizer=own)
    found = measured(model, processor, pictures(caption=captions))
    assert found.metrics == {"retrieval_accuracy": pytest.approx(wanted)}
    assert found.metrics["retrieval_accuracy"] >= 0.2
    named = measured(model, processor, pictures([0] * 10, ClassLabel(names=["w1"]), caption=captions), text_columns=["caption"])
    assert named.metrics == found.metrics


def pieces() -> PreTrainedTokenizerFast:
    """Of letters: a word has as many tokens."""
    letters = [chr(97 + i) for i in range(26)]
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, *(f"##{own}" for own in letters)])}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", model_max_length=32)


SENTENCES = [["anna", "lives", "in", "rome"], ["bob"], ["no", "names", "here"], ["carl", "dee", "met", "eve", "x"]]


def tagger(names: Any = TAGS) -> Any:
    model = tiny("bert", "TokenClassification", num_labels=5)
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    return model


def tagged(model: Any) -> tuple[list[list[str]], list[list[str]]]:
    """What the model says of the first letter of each word; and the same with one word of each sentence changed."""
    predicted = []
    for words in SENTENCES:
        ids, at = [0], []
        for word in words:
            at.append(len(ids))
            ids += pieces()(word, add_special_tokens=False)["input_ids"]
        found = model(input_ids=torch.tensor([[*ids, 2]])).logits[0].argmax(-1)
        predicted.append([TAGS[int(found[i])] for i in at])
    wanted = [[TAGS[(TAGS.index(row[0]) + 1) % 5], *row[1:]] for row in predicted]
    return predicted, wanted


def test_words_are_judged_by_their_first_tokens_and_entities_as_wholes() -> None:
    model = tagger()
    predicted, wanted = tagged(model)
    assert len({tag for row in predicted for tag in row}) > 2
    kind = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=TAGS[::-1]))})
    ids = [[TAGS[::-1].index(tag) for tag in row] for row in wanted]  # the dataset has its own order of names
    both = {"accuracy": pytest.approx(1 - 4 / 13), "f1": pytest.approx(entity_f1(predicted, wanted))}
    found = measured(model, pieces(), Dataset.from_dict({"tokens": SENTENCES, "ner_tags": ids}, features=kind))
    assert (found.metrics, found.task) == (both, "token-classification")
    assert found.num_tokens == 2 + max(sum(map(len, words)) for words in SENTENCES)
    assert found.macs == model_cost(model, "macs", found.num_tokens)
    named = Dataset.from_dict({"words": SENTENCES, "labels": wanted})
    assert measured(model, pieces(), named).metrics == both
    own = {"text_columns": "sentence", "label_column": "kinds"}
    assert measured(model, pieces(), named.rename_columns({"words": "sentence", "labels": "kinds"}), **own).metrics == both
    plain = tagger(["a", "b", "c", "d", "e"])
    nameless = Dataset.from_dict({"tokens": SENTENCES, "ner_tags": [[TAGS.index(tag) for tag in row] for row in wanted]})
    assert measured(plain, pieces(), nameless).metrics == {"accuracy": both["accuracy"]}


def test_tokenized_words_are_taken_as_trainer_takes_them() -> None:
    model = tagger()
    _, wanted = tagged(model)
    raw = Dataset.from_dict({"tokens": SENTENCES, "ner_tags": [[TAGS.index(tag) for tag in row] for row in wanted]})

    def aligned(row: Any) -> dict[str, Any]:
        encoded = pieces()(row["tokens"], is_split_into_words=True)
        at = encoded.word_ids()
        labels = [-100 if w is None or at.index(w) != i else row["ner_tags"][w] for i, w in enumerate(at)]
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    assert measured(model, pieces(), raw.map(aligned)).metrics == measured(model, pieces(), raw).metrics


def test_words_that_are_not_read_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tagger()
    predicted, _ = tagged(model)
    rows = Dataset.from_dict({"tokens": SENTENCES, "ner_tags": [[TAGS.index(tag) for tag in row] for row in predicted]})
    found = measured(model, pieces(), rows, seq_len=8)
    assert found.num_tokens == 8
    assert "6 words are not measured: they are empty, or stand behind the first 8 tokens" in caplog.text


def test_media_without_a_head_are_means_over_all_places() -> None:
    model = tiny("vit", "")
    found = measured(model, image_processor(), pictures())
    alone = torch.cat([model(of_picture(image)).last_hidden_state.mean(1) for image in images()])
    assert found.embeddings is not None
    torch.testing.assert_close(found.embeddings, alone, rtol=1e-4, atol=1e-5)
    model, own = tiny("t5", ""), word_tokenizer()
    rows = Dataset.from_dict({"text": ["w3 w4 w5", "w6 w9"]})
    found = measured(model, own, rows)
    alone = []
    for row in rows:
        ids = own(row["text"], return_tensors="pt")["input_ids"]
        before = torch.cat([torch.full((1, 1), 1), ids[:, :-1]], 1)
        alone.append(model(input_ids=ids, decoder_input_ids=before).last_hidden_state.mean(1))
    assert found.embeddings is not None
    torch.testing.assert_close(found.embeddings, torch.cat(alone), rtol=1e-4, atol=1e-5)


PAIR = SimpleNamespace(image_processor=image_processor(), tokenizer=word_tokenizer())
HEARD = [{"audio": {"array": sounds()[0], "sampling_rate": RATE}, "speaker": 3}]
WRONG: dict[str, tuple[Any, Any, Any, str]] = {
    "no class": (("vit",), image_processor(), pictures(), "No label column label or labels or .*; the columns are image. Name"),
    "other class": (("vit",), image_processor(), pictures([3] * 10, Value("int64")), "Row 0: 1 of 1 labels are none of the mod"),
    "no processor": (("vit",), None, pictures([1] * 10, Value("int64")), "there is no image processor"),
    "one text": (
        ("t5",),
        word_tokenizer(),
        Dataset.from_dict({"text": ["w1"]}),
        "Row 0 has one text, 'text', where a source and",
    ),
    "no transcript": (
        ("whisper",),
        SimpleNamespace(feature_extractor=EXTRACTOR, tokenizer=word_tokenizer()),
        Dataset.from_list(HEARD),
        "Speech is measured on a column with transcripts, such as text, .*; there is none. Columns: audio, speaker",
    ),
    "no tokenizer": (("wav2vec2",), Wav2Vec2FeatureExtractor(), Dataset.from_list(HEARD), "there is no tokenizer"),
    "no names": (("clip",), PAIR, pictures([1] * 10, Value("int64")), "such as 1, and the dataset has no names for them"),
    "no label": (("clip",), PAIR, pictures([-1] * 10, ClassLabel(names=["w1"])), "Row 0 has label -1 in 'label', which is none"),
    "nothing to match": (
        ("clip",),
        PAIR,
        pictures(),
        "Images are matched with a column of labels .*; there is none. Columns: image",
    ),
    "no words": (
        ("bert", "TokenClassification"),
        pieces(),
        Dataset.from_dict({"labels": [[1]]}),
        "lists of words, tokens or wor",
    ),
    "no label of words": (
        ("bert", "TokenClassification"),
        pieces(),
        Dataset.from_dict({"tokens": [["a"]]}),
        "No label column ner",
    ),
    "other lengths": (
        ("bert", "TokenClassification"),
        pieces(),
        Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[1]]}),
        "Row 0 has in 'tokens' and 'ner_tags' no list of words with a label for each",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_measured_is_refused_before_any_pass(case: str) -> None:
    family, processor, rows, message = WRONG[case]
    model = tiny(*family)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made"))
    with pytest.raises(ValueError, match=message):
        measured(model, processor, rows)


def of_images(folder: Path) -> None:
    model = tiny("vit")
    model.config.id2label, model.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    model.save_pretrained(folder / "dense")
    image_processor().save_pretrained(folder / "dense")
    pictures([i % 3 for i in range(10)], ClassLabel(names=["a", "b", "c"])).save_to_disk(folder / "data")


def of_summaries(folder: Path) -> None:
    tiny("t5").save_pretrained(folder / "dense")
    word_tokenizer().save_pretrained(folder / "dense")
    Dataset.from_dict({"document": ["w3 w4 w5"] * 9, "summary": ["w6 w7"] * 9}).save_to_disk(folder / "data")


def pruned(folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Made, pruned, and the command that evaluates it beside its dense model."""
    monkeypatch.setattr("optimum_stat.speed.SECONDS", 0.05)
    make(folder)
    dense, small, data = (str(folder / name) for name in ("dense", "small", "data"))
    main(["prune", small, "-m", dense, "-d", data, "--keep", "0.7", "--metric", "stream", "--quiet"])
    return ["evaluate", small, "-d", data, "--speed", "2", "--save", "--quiet"]


def test_encoder_and_decoder_are_measured_timed_and_saved_with_the_lengths_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = pruned(tmp_path, of_summaries, monkeypatch)
    capsys.readouterr()
    main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["dense"]["num_tokens"] == found["pruned"]["num_tokens"] == [3, 2]
    recipe = json.loads((tmp_path / "small" / "stat_recipe.json").read_text())
    for side in ("dense", "pruned"):  # all examples have these lengths
        assert found[side]["macs"] == recipe["report"][side]["block_macs"]
    assert recipe["metrics"] == found["metrics"]
    assert [(metric["name"], metric["dataset"]) for metric in found["metrics"]] == [("perplexity", "data")]
    assert [(row["batch_size"], row["seq_len"]) for row in found["speed"]] == [(2, 5)]
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| multiply-adds of the blocks, 3 + 2 tokens |" in card
    assert "| forward pass over 2 × 5 tokens |" in card


def test_images_are_measured_timed_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = pruned(tmp_path, of_images, monkeypatch)
    capsys.readouterr()
    main(command)
    table = capsys.readouterr().out
    rows = {line[:22].strip(): line[22:].split() for line in table.splitlines()}
    assert len(rows["accuracy"]) == 3
    assert {"M MACs, 10 tokens", "ms for 10 tokens"} <= rows.keys()
    assert "prefill 2 x 10 tokens: " in table
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"| accuracy | data | {float(rows['accuracy'][0]):g} | {float(rows['accuracy'][1]):g} |" in card
    assert "| forward pass over 2 × 10 tokens |" in card


def test_sweep_measures_images_and_finds_out_before_any_work_what_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("optimum_stat.speed.SECONDS", 0.05)
    of_images(tmp_path)
    of_summaries(tmp_path / "other")
    data = str(tmp_path / "data")
    command = [
        "sweep",
        str(tmp_path / "out"),
        "-m",
        str(tmp_path / "dense"),
        "-d",
        data,
        "--keep",
        "0.9,0.7",
        "--metric",
        "stream",
    ]
    for more, message in (
        (["--eval-dataset", str(tmp_path / "other" / "data")], "the columns are document, summary"),
        (["--eval-dataset", data, "--serve-phase", "decode"], "only its whole forward pass can be timed"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *more, "--quiet"])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    main([*command, "--eval-dataset", data, "--json", "--quiet"])
    found = json.loads(capsys.readouterr().out)
    assert [{*size["metrics"]} for size in found["sizes"]] == [{"accuracy", "f1_macro"}] * 2
    assert [size["speed"]["seq_len"] for size in found["sizes"]] == [10, 10]
    main(["evaluate", str(tmp_path / "dense"), "-d", data, "--json", "--quiet"])
    alone = json.loads(capsys.readouterr().out)["metrics"]
    assert found["dense_metrics"] == {metric["name"]: metric["value"] for metric in alone}


def test_speed_is_that_of_so_many_copies_of_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_stat.speed.SECONDS", 0.01)
    model, seen = tiny("vit"), set()
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.add(len(kwargs["pixel_values"])), with_kwargs=True)
    found = side_by_side(model, model, 3, 0, example={"pixel_values": of_picture(images(1)[0])})
    assert (found.batch_size, found.seq_len, found.tokens) == (3, 10, 30)
    assert seen == {1, 3}  # one to see how long it is
