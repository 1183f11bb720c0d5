"""Extractive question answering, measured as SQuAD (1606.05250, 1806.03822) does it."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from .probes import device_of

STRIDE = 128  # tokens that two windows of one context share
LONGEST = 30  # tokens of an answer


def answers(
    model: Any, tokenizer: Any, rows: Sequence[Any], seq_len: int, batch_size: int
) -> tuple[list[str], dict[str, Tensor]]:
    """The text that the model points to for each row ("": none), and one encoded window to time the model with.

    Contexts longer than `seq_len` are read in windows. "No answer" is predicted only where some row has none.
    """
    if not tokenizer.is_fast:
        raise ValueError("Question answering needs a fast tokenizer, which knows where each token stands in the text.")
    may_be_none = any(not row["answers"]["text"] for row in rows)
    predicted: list[str] = []
    example: dict[str, Tensor] = {}
    for start in tqdm(range(0, len(rows), batch_size), desc="Answering", unit="batch"):
        part = rows[start : start + batch_size]
        encoded = _windows(tokenizer, part, seq_len)
        inputs = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
        output = model(**{name: value.to(device_of(model)) for name, value in inputs.items()})
        example = example or inputs
        best, none = [(float("-inf"), "")] * len(part), [float("inf")] * len(part)
        for window, row in enumerate(encoded["overflow_to_sample_mapping"].tolist()):
            starts, ends = (output[name][window].float().cpu() for name in ("start_logits", "end_logits"))
            best[row] = max(best[row], _best_span(starts, ends, encoded, window, part[row]["context"]))
            none[row] = min(none[row], float(starts[0] + ends[0]))  # the first token stands for "no answer"
        for (score, text), without in zip(best, none, strict=True):
            predicted.append("" if may_be_none and without > score else text)
    if not predicted:
        raise ValueError("The dataset has no rows to measure on.")
    return predicted, example


def exact_match_and_f1(predicted: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """In percent, as SQuAD reports them: the best over each question's answers, then the mean."""
    pairs = [(text, list(golds) or [""]) for text, golds in zip(predicted, wanted, strict=True)]
    exact = [max(float(normalized(text) == normalized(gold)) for gold in golds) for text, golds in pairs]
    f1 = [max(token_f1(text, gold) for gold in golds) for text, golds in pairs]
    return {"exact_match": 100 * sum(exact) / len(exact), "f1": 100 * sum(f1) / len(f1)}


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(predicted: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the words."""
    first, second = normalized(predicted).split(), normalized(wanted).split()
    if not first or not second:
        return float(first == second)
    common = sum((collections.Counter(first) & collections.Counter(second)).values())
    return 2 * common / (len(first) + len(second))


def _windows(tokenizer: Any, rows: Sequence[Any], seq_len: int) -> Any:
    questions, contexts = ([row[name] for row in rows] for name in ("question", "context"))
    how = {"max_length": seq_len, "stride": min(STRIDE, seq_len // 4), "padding": True, "padding_side": "right"}
    extra = {"return_overflowing_tokens": True, "return_offsets_mapping": True, "return_tensors": "pt"}
    return tokenizer([q.strip() for q in questions], contexts, truncation="only_second", **how, **extra)


def _best_span(starts: Tensor, ends: Tensor, encoded: Any, window: int, context: str) -> tuple[float, str]:
    inside = torch.tensor([part == 1 for part in encoded.sequence_ids(window)])
    sums = starts.masked_fill(~inside, -1e9)[:, None] + ends.masked_fill(~inside, -1e9)[None]
    allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(LONGEST - 1)
    score, at = sums.masked_fill(~allowed, -2e9).flatten().max(0)
    start, end = divmod(int(at), len(starts))
    offsets = encoded["offset_mapping"][window]
    return float(score), context[int(offsets[start, 0]) : int(offsets[end, 1])]
