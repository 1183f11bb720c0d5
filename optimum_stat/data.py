"""From what a user passes to `prune` to padded batches of real tokens: `make_batches`."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from .budget import Lengths
from .config import PruningConfig
from .labels import IGNORED, POSITIONS, predicts_next, why_none
from .processes import ALONE, Processes
from .rows import INPUTS, Rows, tensors

logger = logging.getLogger(__name__)
SEQ_LEN = 512  # when the user asks for none and the model takes as many
LABELS = ("labels", *POSITIONS)
PIECE = 1 << 16  # characters given to the tokenizer at once: one row may be a whole book


@dataclass(frozen=True)
class Batches:
    """Calibration data: padded batches on the CPU, ready to be unpacked into the model."""

    items: tuple[dict[str, Tensor], ...]
    """`input_ids` and `attention_mask` [examples, length], int64; `token_type_ids` and `position_ids` where given. Or what else
    the model reads: pixels, waveforms, a decoder's tokens."""
    num_tokens: int
    """Real tokens; padding does not count. Of a model with several lists of blocks, those of the one that sees the fewest."""
    num_examples: int
    seq_len: Lengths
    """Mean real tokens per example, rounded: the length at which multiply-adds are counted. One number for each list of blocks
    where there are several."""
    fingerprint: str
    """SHA-256 (hex) of the real token ids, or pixels, of each example, in the order of the data. Batch size does not enter."""
    source: str
    """What the data was, in one line."""
    labels: tuple[dict[str, Tensor], ...] | None = None
    """One dict an item, under the names that the model's forward has (`labels`, `start_positions`, ...); None: no labels."""
    processes: Processes = ALONE
    """Who shares the work. Everybody has all items, so that it is known whose part is whose."""

    def warn_if_few(self, columns: int) -> None:
        """Warn if there are fewer than 10 real tokens for each of `columns`, the unknowns of a least-squares problem."""
        if self.num_tokens < 10 * columns:
            logger.warning(
                "%s calibration tokens for up to %s kept columns are %.1f tokens each; below 10 the corrections fit noise. "
                "Give more data, or raise num_tokens.",
                f"{self.num_tokens:,}",
                f"{columns:,}",
                self.num_tokens / columns,
            )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def make_batches(
    dataset: Any,
    model_config: PreTrainedConfig,
    config: PruningConfig,
    *,
    causal: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_columns: Sequence[str] | None = None,
    labels_for: Any = None,
    label_column: str | None = None,
    labels_needed: bool = False,
) -> Batches:
    """Read, tokenize, cut and batch calibration data; reading stops as soon as `config` has enough.

    Encoders get one example a row, truncated to `seq_len`, longest first, padded on the right. Causal language models
    get windows of `seq_len` tokens, without padding: the rows' texts joined by newlines, and in front of each window
    what the tokenizer puts before a text (token id rows are joined as they are, or kept if all have one length).
    Ready batches stay as they are, but for what the mask hides. With `labels_for`, a model, the labels that its head is trained
    on are read too, where the data has some; `labels_needed` refuses data without. Raises ValueError if the data is empty, lacks
    the columns, needs a tokenizer or does not fit the model's vocabulary, length or classes; TypeError if it is no collection.
    """
    text_config = model_config.get_text_config()
    longest, seq_len = lengths(config.seq_len, text_config, tokenizer)
    rows = Rows(dataset, text_columns, config.batch_size, labels_for, label_column)
    if rows.labels and rows.labels.per_token and rows.kind.startswith("string"):
        rows.labels = None  # nobody knows which of the tokens to come a label would belong to
    if labels_needed and rows.labels is None and not predicts_next(labels_for):
        raise ValueError(why_none(labels_for, rows.all_columns))
    tally = _Tally(config, getattr(text_config, "vocab_size", None), longest)
    items = list(tally.take(_examples(rows, config, seq_len, causal, tokenizer)))
    if not items:
        raise ValueError(f"The dataset has no tokens to calibrate on: {rows.read} rows read, all of them empty.")
    if (getattr(text_config, "type_vocab_size", None) or 0) < 2:  # the model refuses token types, or has no second one
        items = [{key: value for key, value in item.items() if key != "token_type_ids"} for item in items]
    if not rows.masked and not rows.kind.startswith("string"):
        _warn_of_padding(items, pad_id_of(tokenizer, text_config))
    if rows.kind == "ready batches":
        items = [repadded(item, text_config) for item in items]
    else:
        items = _pad(items, config.batch_size, pad_id_of(tokenizer, text_config))
    names = [name for name in LABELS if name in items[0]]
    labels = tuple({name: item.pop(name) for name in names} for item in items) if names else None
    mean, digest = round(tally.num_tokens / tally.num_examples), tally.digest.hexdigest()
    return Batches(tuple(items), tally.num_tokens, tally.num_examples, mean, digest, rows.source(), labels)


def lengths(asked: int | None, text_config: Any, tokenizer: Any) -> tuple[int | None, int]:
    """The most tokens the model takes (None: any number), and those an example or window gets.

    The tokenizer is asked too: where positions start at an offset, `max_position_embeddings` counts a few too many.
    """
    limits = {"max_position_embeddings": getattr(text_config, "max_position_embeddings", None)}  # may be relative: none
    if tokenizer is not None:
        limits["the tokenizer's model_max_length"] = tokenizer.model_max_length  # 1e30 when unknown
    known = {name: int(limit) for name, limit in limits.items() if limit is not None and 0 < limit < 1e9}
    longest = min(known.values(), default=None)
    if longest is not None and asked is not None and asked > longest:
        why = ", ".join(f"{name} {limit}" for name, limit in known.items())
        raise ValueError(f"seq_len={asked} asked, but the model takes at most {longest} tokens ({why}). Lower seq_len.")
    return longest, asked or min(SEQ_LEN, longest or SEQ_LEN)


class _Tally:
    """Counts, checks and hashes the real tokens of each example, and knows when there are enough."""

    def __init__(self, config: PruningConfig, vocab_size: int | None, longest: int | None) -> None:
        self.num_tokens = self.num_examples = 0
        self.digest = hashlib.sha256()
        self._config, self._vocab_size, self._longest = config, vocab_size, longest

    def take(self, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Batches without their empty examples, up to and including the example that fills the bounds."""
        about = {"desc": "Reading calibration data", "unit": "tok", "unit_scale": True, "delay": 2}
        with tqdm(total=self._config.num_tokens, **about) as bar:
            for batch in batches:
                self._check(batch["input_ids"])
                before = self.num_tokens
                kept = [row for row in range(len(batch["input_ids"])) if self._add(batch, row)]
                bar.update(self.num_tokens - before)
                if kept:
                    yield {key: tensor[kept] for key, tensor in batch.items()}
                if enough(self._config, self.num_examples, self.num_tokens):
                    return

    def _check(self, ids: Tensor) -> None:
        if self._longest is not None and ids.shape[1] > self._longest:
            raise ValueError(f"A ready batch has {ids.shape[1]} tokens, but the model takes at most {self._longest}.")
        if self._vocab_size is None or not ids.numel():
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(
                f"Token id {low if low < 0 else high} found, but the model's vocabulary has {self._vocab_size} tokens: "
                "the tokenizer does not match this model. Pass the tokenizer that the model was trained with."
            )

    def _add(self, batch: dict[str, Tensor], row: int) -> bool:
        real = batch["input_ids"][row][batch["attention_mask"][row] != 0]
        if not len(real) or enough(self._config, self.num_examples, self.num_tokens):
            return False
        self.digest.update(len(real).to_bytes(8, "little") + real.numpy().astype("<i8").tobytes())
        self.num_examples += 1
        self.num_tokens += len(real)
        return True


def enough(config: PruningConfig, num_examples: int, num_tokens: int) -> bool:
    """Whether `config` asks for no more than these."""
    bounds = ((config.max_examples, num_examples), (config.num_tokens, num_tokens))
    return any(bound is not None and count >= bound for bound, count in bounds)


def _examples(rows: Rows, config: PruningConfig, seq_len: int, causal: bool, tokenizer: Any) -> Iterable[dict[str, Tensor]]:
    """One batch of one for each example or window; ready batches as they are."""
    if rows.kind == "ready batches":
        return ({**batch, **labels} for batch, labels in rows.with_labels())
    if rows.kind == "tokenized rows" and causal:
        return _id_windows((row["input_ids"].tolist() for row in rows), seq_len, config)
    if rows.kind == "tokenized rows":
        return ({k: v[None, :seq_len] for k, v in row.items()} | labels for row, labels in rows.with_labels())
    if tokenizer is None:
        raise ValueError("The dataset is raw text and there is no tokenizer. Pass tokenizer=, or tokenized rows.")
    special = tokenizer.num_special_tokens_to_add(pair=rows.kind == "string pairs")
    if seq_len <= special:  # the tokenizer would not truncate at all
        raise ValueError(f"seq_len={seq_len} leaves no room for text beside {special} special tokens. Raise seq_len.")
    own = copy.deepcopy(tokenizer)  # calls change truncation and padding, which would be saved with the user's model
    return _text_windows(rows, own, seq_len) if causal else _truncated(rows, own, seq_len)


def _truncated(rows: Rows, tokenizer: Any, seq_len: int) -> Iterator[dict[str, Tensor]]:
    for texts, labels in rows.with_labels():
        if any(text.strip() for text in texts):
            encoded = tokenizer(*texts, truncation=True, max_length=seq_len)
            found = tensors(encoded, [key for key in INPUTS if key in encoded], "The tokenizer's output")
            yield {key: tensor[None] for key, tensor in found.items()} | labels


def _text_windows(rows: Iterable[tuple[str, ...]], tokenizer: Any, seq_len: int) -> Iterator[dict[str, Tensor]]:
    marked, bare = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
    special = next((i for i in range(len(marked)) if marked[i : i + len(bare)] == bare), 0)  # those before a text
    ids = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in _pieces(rows))
    return _cut(ids, seq_len - special, marked[:special])


def _pieces(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """The rows' text joined by newlines, in pieces. One row is read ahead, to know the last.

    Each line comes with its newline (many vocabularies have tokens such as ".\\n"), blank lines with the next one.
    """
    lines: list[str] = []
    for texts in itertools.chain(rows, [None]):
        if any(line.strip() for line in lines[-2:]):
            text, stop = "\n".join(lines) + ("" if texts is None else "\n"), 0
            while stop < len(text):
                start, stop = stop, min(stop + PIECE, len(text))
                stop = stop if stop == len(text) else text.rfind("\n", start, stop) + 1 or stop
                yield text[start:stop]
            lines = []
        lines.extend(texts or ())


def _id_windows(rows: Iterator[list[int]], seq_len: int, config: PruningConfig) -> Iterator[dict[str, Tensor]]:
    """Rows as they are, as far as `config` needs them, if they have one length <= seq_len; else joined and cut."""
    head: list[list[int]] = []
    for ids in filter(None, rows):
        head.append(ids)
        if len(ids) > seq_len or len(ids) != len(head[0]):
            return _cut(itertools.chain(head, rows), seq_len)
        if enough(config, len(head), len(head) * len(ids)):
            break
    return _cut(head, len(head[0]) if head else seq_len)


def _cut(stream: Iterable[list[int]], length: int, before: Sequence[int] = ()) -> Iterator[dict[str, Tensor]]:
    """Windows of `length` ids of the joined stream, behind `before`; a shorter rest only if it is all there is."""
    rest: list[int] = []
    cut = False
    for ids in stream:
        joined = rest + ids
        rest = joined[len(joined) // length * length :]
        for start in range(0, len(joined) - len(rest), length):
            cut = True
            yield tensors({"input_ids": [[*before, *joined[start : start + length]]]}, ["input_ids"], "A window")
    if rest and not cut:
        yield tensors({"input_ids": [[*before, *rest]]}, ["input_ids"], "A window")


def pad_id_of(tokenizer: Any, text_config: Any) -> int:
    """What to pad with: the mask hides it, but the model looks it up, and decoders that classify find an example's end by it.

    Their config says by which; a tokenizer may have another, that somebody gave it.
    """
    known = (getattr(text_config, "pad_token_id", None), None if tokenizer is None else tokenizer.pad_token_id)
    vocab_size = getattr(text_config, "vocab_size", None) or 1
    return next((pad for pad in known if pad is not None and 0 <= pad < vocab_size), 0)


def repadded(batch: dict[str, Tensor], text_config: Any) -> dict[str, Tensor]:
    """The same with the config's token for padding where the mask hides one."""
    if getattr(text_config, "pad_token_id", None) is None:
        return batch
    return {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad_id_of(None, text_config))}


def _warn_of_padding(items: list[dict[str, Tensor]], pad_id: int) -> None:
    """Of token ids that came without a mask: two tokens for padding at an end are no text."""
    all_ids = [item["input_ids"] for item in items if item["input_ids"].shape[1] > 2]
    padded = sum(int(((ids[:, :2] == pad_id).all(1) | (ids[:, -2:] == pad_id).all(1)).sum()) for ids in all_ids)
    if padded:
        logger.warning(
            "%s of %s examples begin or end in the token for padding, %s, and are calibrated on with it, for there is no mask: "
            "pass attention_mask.",
            *(f"{count:,}" for count in (padded, sum(len(item["input_ids"]) for item in items), pad_id)),
        )


def _pad(examples: list[dict[str, Tensor]], batch_size: int, pad_id: int) -> list[dict[str, Tensor]]:
    """Batches of like length, the longest first, so that memory runs out at once or never."""
    examples = sorted(examples, key=lambda example: -example["input_ids"].shape[1])
    parts = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    return [{key: joined(key, [example[key] for example in part], pad_id) for key in part[0]} for part in parts]


def joined(key: str, values: list[Tensor], pad_id: int) -> Tensor:
    """What belongs to tokens is padded to one length, [examples, length]; what belongs to examples is not."""
    if key in LABELS and (values[0].dim() == 1 or values[0].is_floating_point()):
        return torch.cat(values)
    fill = {"input_ids": float(pad_id), "labels": float(IGNORED)}
    return pad_sequence([value[0] for value in values], True, fill.get(key, 0.0))
