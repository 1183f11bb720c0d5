"""From images, sounds and pairs of texts to what the model reads."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Audio, ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from scipy.io import wavfile
from tiny import PAD, data_of, outputs, tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MODEL_MAPPING, AutoModel, PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from optimum_stat import FisherConfig, FisherPruner, MovementConfig, MovementPruner, STATConfig, STATPruner
from optimum_stat.config import PruningConfig
from optimum_stat.families import find_groups
from optimum_stat.inspection import sizes
from optimum_stat.media import make_media_batches
from optimum_stat.recordings import waveform
from optimum_stat.slicing import restored_on_error
from optimum_stat.structure import write_record

RATE = 16_000


def images(count: int = 10) -> list[Picture.Image]:
    generator = np.random.default_rng(0)
    return [Picture.fromarray(generator.integers(0, 255, (15 + i, 20, 3), dtype=np.uint8)) for i in range(count)]


def image_processor() -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 12, "width": 12})


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", *(f"w{i}" for i in range(60))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", model_max_length=32)


def sounds(count: int = 6) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(size=200 + 60 * (i % 2)).astype(np.float32) for i in range(count)]


def labelled_images() -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"]), "id": Value("int64")})
    return Dataset.from_dict({"image": images(), "label": [i % 3 for i in range(10)], "id": list(range(10))}, features=features)


def test_an_image_column_goes_through_the_processor_and_keeps_its_labels():
    model = tiny("vit")
    model.config.label2id = {"a": 0, "b": 1, "c": 2}
    found = make_media_batches(
        labelled_images(), model, PruningConfig(batch_size=4), processor=image_processor(), labels_for=model
    )
    wanted = image_processor()(images(), return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat([item["pixel_values"] for item in found]), wanted)
    assert [len(item["pixel_values"]) for item in found] == [4, 4, 2]
    assert torch.cat([own["labels"] for own in found.labels]).tolist() == [i % 3 for i in range(10)]
    assert (found.num_examples, found.seq_len, found.num_tokens) == (10, 10, 100)  # nine patches and one for all
    few = make_media_batches(labelled_images(), model, PruningConfig(num_tokens=35), processor=image_processor())
    assert few.num_examples == 4


def test_pruning_images_from_a_dataset_to_a_folder_and_back(tmp_path: Path):
    pruner = FisherPruner.from_pretrained(tiny("vit"), FisherConfig(keep=0.6, labels="data"), tokenizer=image_processor())
    pruner.prune(labelled_images())
    pruner.save_pretrained(tmp_path / "small")
    again = STATPruner.from_pretrained(tmp_path / "small", STATConfig(keep=0.9))
    assert torch.equal(outputs(again.model, data_of("vit")[0]), outputs(pruner.model, data_of("vit")[0]))
    again.prune([{"image": np.asarray(image)} for image in images()])  # with the processor of the folder
    assert again.report.num_examples == 10


def seen_in(image: Any) -> Any:
    """What the processor makes of it."""
    (item,) = make_media_batches([{"image": image}], tiny("vit"), PruningConfig(), processor=image_processor())
    return item["pixel_values"]


@pytest.mark.parametrize(
    ("of_eight_bits", "other"),
    [
        (images(1)[0], np.asarray(images(1)[0]) / 255),
        (images(1)[0], np.asarray(images(1)[0], np.float32) / 255),
        (images(1)[0], np.asarray(images(1)[0], np.float32)),
        (images(1)[0], np.asarray(images(1)[0]).astype(np.uint16) * 257),
        (images(1)[0], np.asarray(images(1)[0]).astype(np.int64)),
        (images(1)[0].convert("L"), Picture.fromarray(np.asarray(images(1)[0].convert("L")).astype(np.uint16) * 257)),
        (images(1)[0].convert("L"), np.asarray(images(1)[0].convert("L"))[:, :, None]),
    ],
    ids=["double", "single", "whole", "16 bits", "wide integers", "picture of 16 bits", "one channel"],
)
def test_an_image_looks_the_same_in_every_type(of_eight_bits: Any, other: Any):
    assert torch.equal(seen_in(other), seen_in(of_eight_bits))


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.full((9, 9), 256.0), "float64 from 256 to 256"),
        (np.full((9, 9, 3), -0.5), "float64 from -0.5 to -0.5"),
        (np.full((9, 9), np.nan), "float64 from nan to nan"),
        (np.full((9, 9), 256), "int64 from 256 to 256"),
        (np.zeros((9, 9, 5), np.uint8), r"\[9, 9, 5\]; give \[height, width\]"),
    ],
)
def test_an_image_of_unknown_range_is_refused(image: Any, found: str):
    with pytest.raises(ValueError, match=f"Row 0 has an image (of )?{found}"):
        seen_in(image)


def wav(samples: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    wavfile.write(file, rate, samples)
    return file.getvalue()


@pytest.mark.parametrize("form", ["arrays", "dicts", "files", "column"])
def test_sounds_in_every_form_and_of_one_length_in_a_batch(form: str, tmp_path: Path):
    model, extractor = tiny("wav2vec2"), Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    own = sounds()
    rows: Any = [{"audio": each} for each in own]
    if form == "dicts":
        rows = [{"audio": {"array": each, "sampling_rate": RATE}} for each in own]
    if form in ("files", "column"):
        rows = [{"audio": {"bytes": wav(each, RATE), "path": None}} for each in own]
    if form == "column":
        rows = Dataset.from_list(
            rows, features=Features({"audio": {"bytes": Value("binary"), "path": Value("string")}})
        ).cast_column("audio", Audio())
    found = make_media_batches(rows, model, PruningConfig(batch_size=2), processor=extractor)
    shapes = [tuple(item["input_values"].shape) for item in found]
    assert shapes == [(2, 260), (1, 260), (2, 200), (1, 200)]
    wanted = [extractor(each, sampling_rate=RATE, return_tensors="pt")["input_values"] for each in own]
    torch.testing.assert_close(found.items[0]["input_values"], torch.cat([wanted[1], wanted[3]]))
    frames = [model._get_feat_extract_output_lengths(n) for n in (260, 200)]
    assert found.num_tokens == 3 * sum(int(n) for n in frames)


def test_other_rates_and_channels_are_converted():
    time = np.arange(4000) / 8000
    wave = np.sin(2 * np.pi * 440 * time)
    both = (np.stack([wave, wave], 1) * 32767).astype(np.int16)
    seen = []

    class Extractor(Wav2Vec2FeatureExtractor):
        def __call__(self, samples: np.ndarray, **kwargs: Any) -> Any:
            seen.append(samples)
            return super().__call__(samples, **kwargs)

    rows = [{"audio": {"bytes": wav(both, 8000)}}]
    make_media_batches(rows, tiny("wav2vec2"), PruningConfig(), processor=Extractor(sampling_rate=RATE))
    wanted = np.sin(2 * np.pi * 440 * np.arange(8000) / RATE)
    assert len(seen[0]) == 8000
    assert np.abs(seen[0] - wanted)[500:-500].max() < 0.01


@pytest.mark.parametrize("form", ["array", "dict", "tensor"])
def test_channels_are_averaged_on_whichever_side_they_stand(form: str):
    one, other = sounds()[0], sounds()[2]
    both: Any = np.stack([one, other])
    both = torch.tensor(both) if form == "tensor" else both
    for layout in (both, both.T):
        value = layout if form == "array" else {"array": layout, "sampling_rate": RATE}
        np.testing.assert_allclose(waveform(value, RATE, "Row 0"), (one + other) / 2, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
def test_samples_of_every_type_are_fractions_around_zero(kind: Any):
    wave = np.sin(np.arange(2000) / 20) / 2
    stored = wave.astype(kind)
    if kind is not np.float32:
        half = np.iinfo(kind).max // 2 + 1 if kind is np.uint8 else np.iinfo(kind).max
        stored = np.rint(wave * half + (half if kind is np.uint8 else 0)).astype(kind)
    for form in ({"bytes": wav(stored, RATE)}, {"array": stored, "sampling_rate": RATE}, stored):
        np.testing.assert_allclose(waveform(form, RATE, "Row 0"), wave, atol=1 / 127)
    with pytest.raises(ValueError, match="Row 0 has a sound of int64, of no known scale"):
        waveform({"array": [3, 5], "sampling_rate": RATE}, RATE, "Row 0")


def test_a_decoder_reads_the_target_behind_its_start():
    rows = [{"document": "w3 w4 w5 w6", "summary": "w7 w8 w9"}, {"document": "w10", "summary": "w11 w12"}]
    found = make_media_batches(rows, tiny("t5"), PruningConfig(), processor=tokenizer())
    (item,) = found.items
    assert item["input_ids"].tolist() == [[6, 7, 8, 9], [13, PAD, PAD, PAD]]
    assert item["decoder_input_ids"].tolist() == [[PAD, 10, 11], [PAD, 14, PAD]]  # the start is the family's padding
    assert item["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (found.seq_len, found.num_tokens) == ((2, 2), 5)
    padded = {"input_ids": item["input_ids"], "labels": torch.tensor([[10, -100, 12, -100], [14, 15, -100, -100]])}
    (read,) = make_media_batches([padded], tiny("t5"), PruningConfig(), processor=tokenizer())
    assert [int(mask.sum()) for mask in read["decoder_attention_mask"]] == [3, 2], "behind the last label is padding"
    alone = make_media_batches([{"text": "w3 w4"}], tiny("t5"), PruningConfig(), processor=tokenizer())
    assert alone.items[0]["decoder_input_ids"].tolist() == [[PAD, 6]]


def test_texts_with_a_target_are_read_until_the_shorter_of_both_has_enough_tokens():
    rows = [{"document": "w3 w4 w5 w6", "summary": "w7 w8 w9 w10 w11 w12"} for _ in range(40)]
    found = make_media_batches(rows, tiny("t5"), PruningConfig(num_tokens=22), processor=tokenizer())
    assert (found.num_examples, found.num_tokens) == (6, 24)
    ready = [{"input_ids": torch.tensor([[3, 4, 5, 6]] * 4), "labels": torch.tensor([[3, 4, 5]] * 4)}] * 4
    assert make_media_batches(ready, tiny("t5"), PruningConfig(num_tokens=22)).num_examples == 8


@pytest.mark.parametrize(
    ("family", "row"),
    [
        ("t5", {"id": "w3", "talk": "w4 w5", "summary": "w6"}),
        ("clip", {"image": images(1)[0], "caption": ["w3", "w4"], "split": "w5"}),
    ],
)
def test_one_of_several_columns_is_not_taken_for_the_text(family: str, row: dict[str, Any]):
    with pytest.raises(ValueError, match=r"Which column is the text\? There are .*: name it with text_columns"):
        make_media_batches([row], tiny(family), PruningConfig(), processor=tokenizer())


def test_the_only_column_with_text_beside_a_target_is_the_source():
    row = {"talk": "w4 w5", "summary": "w6"}
    (item,) = make_media_batches([row], tiny("t5"), PruningConfig(), processor=tokenizer())
    assert (item["input_ids"].tolist(), item["decoder_input_ids"].tolist()) == ([[7, 8]], [[PAD]])


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_decoder_without_a_head_reads_the_target_too(family: str):
    rows = [{"document": "w5 w6 w7", "summary": "w9 w10"}]
    (alone,) = make_media_batches(rows, tiny(family, ""), PruningConfig(), processor=tokenizer())
    (whole,) = make_media_batches(rows, tiny(family), PruningConfig(), processor=tokenizer())
    assert alone["decoder_input_ids"].tolist() == whole["decoder_input_ids"].tolist()


def ending(before: str = "<s>", special: Any = (("<s>", 0), ("</s>", 2))) -> PreTrainedTokenizerFast:
    """A tokenizer that marks where texts end."""
    marking = tokenizer()
    marking._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A </s>", pair=f"{before} $A </s> </s> $B </s>", special_tokens=list(special)
    )
    return marking


def test_a_head_that_judges_pairs_reads_both_texts_in_both_of_its_stacks():
    model = tiny("bart", "SequenceClassification")
    rows = Dataset.from_dict({"premise": ["w3 w4", "w5"], "hypothesis": ["w6", "w7"], "label": [2, 1]})
    found = make_media_batches(rows, model, PruningConfig(), processor=ending(), labels_for=model)
    (item,) = found.items
    assert item["input_ids"].tolist() == [[0, 6, 7, 2, 2, 9, 2], [0, 8, 2, 2, 10, 2, PAD]]
    assert item["decoder_input_ids"].tolist() == [[0, 0, 6, 7, 2, 2, 9], [0, 0, 8, 2, 2, 10, PAD]]
    assert torch.equal(item["decoder_attention_mask"], item["attention_mask"])
    assert [own["labels"].tolist() for own in found.labels or ()] == [[2, 1]]
    ready = {"input_ids": item["input_ids"], "attention_mask": item["attention_mask"], "labels": torch.tensor([2, 1])}
    again = make_media_batches([ready], model, PruningConfig(), labels_for=model)
    assert torch.equal(again.items[0]["decoder_attention_mask"], item["attention_mask"])
    assert torch.equal(again.items[0]["decoder_input_ids"][0], item["decoder_input_ids"][0])
    alone = make_media_batches(rows, model, PruningConfig(), processor=ending(), text_columns="hypothesis")
    assert alone.items[0]["input_ids"].tolist() == [[0, 9, 2], [0, 10, 2]]
    with pytest.raises(ValueError, match="No text column recognised"):
        make_media_batches([{"a": "w3", "b": "w4"}], model, PruningConfig(), processor=ending())
    with pytest.raises(ValueError, match="but one is possible"):
        make_media_batches([{"a": "w3", "b": "w4"}], tiny("clip"), PruningConfig(), text_columns=("a", "b"))


def test_sound_with_a_transcript_and_image_with_a_caption():
    extractor = WhisperFeatureExtractor(feature_size=8, n_fft=400, hop_length=400, chunk_length=1)
    processor = SimpleNamespace(feature_extractor=extractor, tokenizer=tokenizer())
    rows = [{"audio": each, "text": "w3 w4 w5"} for each in sounds()]
    pruner = STATPruner.from_pretrained(tiny("whisper"), STATConfig(keep=0.7), tokenizer=processor)
    pruner.prune(rows)
    assert pruner.report.seq_len == (20, 3)
    processor = SimpleNamespace(image_processor=image_processor(), tokenizer=tokenizer())
    pruner = STATPruner.from_pretrained(tiny("clip"), STATConfig(keep=0.7), tokenizer=processor)
    pruner.prune([{"image": image, "caption": "w3 w4"} for image in images()])
    assert pruner.report.seq_len == (2, 10)


FORMS: dict[str, Any] = {
    "lists": lambda value: value.tolist(),
    "arrays": lambda value: np.asarray(value),
    "tensors": lambda value: torch.as_tensor(value),
}


@pytest.mark.parametrize("form", [*FORMS, "numpy dataset", "torch dataset", "dataset"])
def test_preprocessed_rows_are_taken_as_trainer_takes_them(form: str):
    def read(family: str, rows: list[dict[str, Any]]) -> Any:
        made: Any = [{name: FORMS.get(form, FORMS["lists"])(value) for name, value in row.items()} for row in rows]
        if "dataset" in form:
            made = Dataset.from_list(made)
            made = made if form == "dataset" else made.with_format(form.split()[0])
        return make_media_batches(made, tiny(family), PruningConfig(batch_size=2), processor=None).items

    pictures = image_processor()(images(3), return_tensors="pt")["pixel_values"]
    found = read("vit", [{"pixel_values": each} for each in pictures])
    torch.testing.assert_close(torch.cat([item["pixel_values"] for item in found]), pictures)
    waves = sounds(3)
    found = read("wav2vec2", [{"input_values": each, "attention_mask": np.ones(len(each), np.int64)} for each in waves])
    assert [tuple(item["input_values"].shape) for item in found] == [(1, 260), (2, 200)]
    torch.testing.assert_close(found[0]["input_values"][0], torch.tensor(waves[1]))
    heard = torch.rand(8, 40)
    (item,) = read("whisper", [{"input_features": heard, "labels": torch.tensor([0, *ids])} for ids in ([5, 6], [7])])
    torch.testing.assert_close(item["input_features"], torch.stack([heard, heard]))
    assert item["decoder_input_ids"].tolist() == [[0, 5], [0, PAD]]
    texts: list[dict[str, Any]] = [
        {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([9, 2, -100])},
        {"input_ids": torch.tensor([8]), "labels": torch.tensor([10, 11, 2])},
    ]
    (item,) = read("t5", texts)
    assert item["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert item["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert item["decoder_input_ids"].tolist() == [[PAD, 9, 2], [PAD, 10, 11]]
    assert item["decoder_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_a_row_may_be_ready_in_part_and_its_texts_without_a_mask_are_padded_with_one():
    rows = [{"image": image, "input_ids": list(range(3, 5 + i))} for i, image in enumerate(images(2))]
    (item,) = make_media_batches(rows, tiny("clip"), PruningConfig(), processor=image_processor())
    assert item["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert len(item["pixel_values"]) == 2
    with pytest.raises(ValueError, match="Row 0 has in input_ids no numbers of one shape"):
        make_media_batches([{"input_ids": [[3, 4], [5]]}], tiny("t5"), PruningConfig())


def test_the_start_of_a_transcript_stands_once_before_it():
    extractor = WhisperFeatureExtractor(feature_size=8, n_fft=400, hop_length=400, chunk_length=1)
    for before, wanted in (("<s> w0", [0, 3, 13, 14]), ("w0", [0, 3, 13, 14])):
        marking = ending(before, (("<s>", 0), ("w0", 3), ("</s>", 2)))
        processor = SimpleNamespace(feature_extractor=extractor, tokenizer=marking)
        rows = [{"audio": sounds()[0], "text": "w10 w11"}]
        (item,) = make_media_batches(rows, tiny("whisper"), PruningConfig(), processor=processor)
        assert item["decoder_input_ids"].tolist() == [wanted]


def test_texts_whose_padding_is_read_are_filled_and_never_padded_in_a_batch():
    without_mask, limitless = tokenizer(), tokenizer()
    without_mask.model_input_names = ["input_ids"]
    limitless.model_max_length = int(1e30)
    for own, width in ((without_mask, 32), (limitless, 64)):
        processor = SimpleNamespace(image_processor=image_processor(), tokenizer=own)
        rows = [{"image": image, "text": "w3 w4"} for image in images(2)]
        (item,) = make_media_batches(rows, tiny("siglip"), PruningConfig(), processor=processor)
        assert item["input_ids"].tolist() == [[6, 7] + [PAD] * (width - 2)] * 2
        assert item["attention_mask"].tolist() == [[1] * width] * 2
    pixel_values = item["pixel_values"][:1]
    ready = [{"pixel_values": pixel_values, "input_ids": torch.full((1, length), 5)} for length in (3, 4, 3)]
    found = make_media_batches(ready, tiny("siglip"), PruningConfig())
    assert [item["input_ids"].tolist() for item in found] == [[[5] * 4], [[5] * 3] * 2]
    (item,) = make_media_batches(rows, tiny("clip"), PruningConfig(), processor=processor)
    assert item["input_ids"].tolist() == [[6, 7]] * 2


WRONG: dict[str, tuple[str, Any, Any, str]] = {
    "no processor": ("vit", [{"image": images()[0]}], None, "there is no image processor. Pass one with tokenizer=, or ready"),
    "no image": ("vit", [{"label": 3}], image_processor(), r"Row 0 must have one image, and has none. Columns: label \(int\)"),
    "two images": ("vit", [dict.fromkeys("ab", images()[0])], image_processor(), r"has several \(a, b\): select_columns\(\) one"),
    "nothing": ("vit", [], image_processor(), "The dataset is empty"),
    "strings": ("vit", ["a cat"], image_processor(), "Row 0 is a str, not a mapping of columns"),
    "no WAV": ("wav2vec2", [{"audio": {"bytes": b"OggS"}}], Wav2Vec2FeatureExtractor(), "holds a sound that is no WAV file"),
    "padded sounds": (
        "wav2vec2",
        [{"input_values": torch.zeros(2, 200), "attention_mask": torch.tensor([[1] * 200, [1] * 100 + [0] * 100])}],
        None,
        "Row 0 has padded sounds; give batches of sounds of one length",
    ),
    "no sound": (
        "wav2vec2",
        [{"audio": {"path": None, "bytes": None}}],
        Wav2Vec2FeatureExtractor(),
        "Row 0 holds no sound: it has",
    ),
    "broken WAV": (
        "wav2vec2",
        [{"audio": {"bytes": b"RIFF1234WAVE"}}],
        Wav2Vec2FeatureExtractor(),
        "has a WAV file that cannot",
    ),
    "empty sound": ("wav2vec2", [{"audio": np.zeros(0)}], Wav2Vec2FeatureExtractor(), r"Row 0 has a sound of samples \[0\]"),
    "no number": ("wav2vec2", [{"audio": np.full(400, np.nan)}], Wav2Vec2FeatureExtractor(), "Row 0 has a sound of samples that"),
    "other token": (
        "t5",
        [{"input_ids": [3], "labels": [500, 3]}],
        None,
        "Row 0 has token id 500, but the model's vocabulary has 67",
    ),
    "no text": ("t5", [{"number": 3}], tokenizer(), "Row 0 has no text in 'text' and 'text'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_refused_with_the_reason(case: str):
    family, rows, processor, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make_media_batches(rows, tiny(family), PruningConfig(), processor=processor)


def test_columns_are_named_and_methods_that_train_refuse():
    with pytest.raises(ValueError, match=r"text_columns=.*asked, but there is no column 'body'. Columns: text"):
        make_media_batches([{"text": "w3"}], tiny("t5"), PruningConfig(), processor=tokenizer(), text_columns="body")
    with pytest.raises(ValueError, match="movement trains on token ids, and T5ForConditionalGeneration reads something else"):
        MovementPruner.from_pretrained(tiny("t5"), MovementConfig(distill=1.0)).prune(data_of("t5"))
    with pytest.raises(ValueError, match="Time asked of ViTForImageClassification, which reads more than token ids"):
        STATPruner.from_pretrained(tiny("vit"), STATConfig(budget="latency")).prune(data_of("vit"))


def test_what_the_decoder_reads_is_its_own_label():
    model = tiny("bart")
    pruner = FisherPruner.from_pretrained(model, FisherConfig(keep=0.8, labels="data"))
    pruner.prune(data_of("bart"))
    assert pruner.report.reached <= 0.8


TOWERS: dict[str, tuple[str, str]] = {
    "CLIPTextModel": ("clip", "text"),
    "CLIPTextModelWithProjection": ("clip", "text"),
    "CLIPVisionModel": ("clip", "vision"),
    "CLIPVisionModelWithProjection": ("clip", "vision"),
    "SiglipTextModel": ("siglip", "text"),
    "SiglipVisionModel": ("siglip", "vision"),
}
"""Class -> whose tower it is, and what this reads."""
OFTEN = ("CLIPTextModelWithProjection", "SiglipTextModel")
EACH_TOWER = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.full) for name in TOWERS],
)


def read_by(name: str) -> list[dict[str, Any]]:
    family, kind = TOWERS[name]
    return [
        {column: value for column, value in batch.items() if (column == "pixel_values") == (kind == "vision")}
        for batch in data_of(family)
    ]


@EACH_TOWER
def test_a_tower_out_of_a_dense_whole_is_pruned_and_loads_through_its_class(name: str, tmp_path: Path):
    whole, kind = tiny(TOWERS[name][0]), getattr(transformers, name)
    getattr(whole.config, f"{TOWERS[name][1]}_config").projection_dim = getattr(whole.config, "projection_dim", None)
    whole.save_pretrained(tmp_path / "whole")
    model = kind.from_pretrained(tmp_path / "whole")
    dense = outputs(model, read_by(name)[0])
    pruner = STATPruner(model, STATConfig(keep=0.5))
    pruner.prune(read_by(name))
    pruner.save_pretrained(tmp_path / "small")
    wanted = outputs(model, read_by(name)[0])
    assert not torch.equal(wanted, dense)
    assert torch.equal(outputs(kind.from_pretrained(tmp_path / "small"), read_by(name)[0]), wanted)
    again = STATPruner.from_pretrained(tmp_path / "small")
    assert type(again.model) is kind
    assert torch.equal(outputs(again.model, read_by(name)[0]), wanted)
    if type(model.config) in MODEL_MAPPING:
        found = AutoModel.from_pretrained(tmp_path / "small")
        assert torch.equal(found(**read_by(name)[0]).last_hidden_state, model(**read_by(name)[0]).last_hidden_state)
    else:  # transformers itself has no Auto class for it, but the remote code has
        found = AutoModel.from_pretrained(tmp_path / "small", trust_remote_code=True)
        assert torch.equal(outputs(found, read_by(name)[0]), wanted)


@EACH_TOWER
def test_a_tower_loads_alone_out_of_a_pruned_whole(name: str, tmp_path: Path):
    family, reads = TOWERS[name]
    whole = tiny(family)
    getattr(whole.config, f"{reads}_config").projection_dim = getattr(whole.config, "projection_dim", None)
    pruner = FisherPruner(whole, FisherConfig(keep=0.6))
    pruner.prune(data_of(family))
    pruner.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(whole).from_pretrained(tmp_path), data_of(family)[0]), outputs(whole, data_of(family)[0]))
    tower, batch = getattr(transformers, name).from_pretrained(tmp_path), read_by(name)[0]
    what = "text" if reads == "text" else "image"
    wanted = getattr(whole, f"get_{what}_features")(**batch)
    found = tower(**batch)
    if name.endswith("Projection"):
        assert torch.equal(found[f"{what}_embeds"], wanted.pooler_output)
    else:
        assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)
    own = [group.units for group in find_groups(whole) if (group.mask == "") == (reads == "vision")]
    assert [group.units for group in find_groups(tower)] == own
    assert sizes(str(tmp_path)).dense["neurons"] == [44] * 4  # without the parts of the record


def test_an_error_takes_the_records_of_the_towers_back():
    model = tiny("clip")
    before = model.config.to_dict()

    def fail() -> None:
        with restored_on_error(model):
            write_record(model)
            assert model.config.to_dict()["text_config"]["stat_pruning"]["neurons"] == [44, 44]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert model.config.to_dict() == before
