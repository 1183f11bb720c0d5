"""Measures of models that read one text, or a pair. Each returns its metrics, embeddings if it makes some, and an example."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from .blocks import lacks_padding
from .config import PruningConfig
from .data import Batches, lengths, make_batches, repadded
from .evaluation_data import Data, first_example, hidden_states, label_column, numbers, to_device
from .labels import COLUMNS as LABEL_COLUMNS
from .labels import class_ids
from .rows import Rows
from .scores import correlations, of_classes, perplexity_of, refuse_several
from .squad import answers, exact_match_and_f1

MASKED_SHARE = 0.15  # of the tokens, as in BERT's training


def causal(model: Any, tokenizer: Any, data: Data) -> Any:
    """Perplexity of the text."""
    batches = _batches(model, tokenizer, data, causal=True)
    return {"perplexity": perplexity(model, batches)}, None, first_example(batches.items[0])


def masked(model: Any, tokenizer: Any, data: Data) -> Any:
    """Loss and accuracy at masked tokens."""
    batches = _batches(model, tokenizer, data, causal=False)
    return masked_prediction(model, batches, tokenizer, data.config.seed), None, first_example(batches.items[0])


def classification(model: Any, tokenizer: Any, data: Data) -> Any:
    """Accuracy and F1 of classes; correlations where the head predicts a number."""
    refuse_several(model.config)
    texts, found, names = _labelled(data)
    batches = _encoded(model, tokenizer, texts, data.config)
    if model.config.num_labels > 1:
        labels = torch.tensor(class_ids(found, names, model.config))
    else:
        labels = torch.tensor(numbers(found, label_column(data)), dtype=torch.float64)
    logits = torch.cat([model(**to_device(batch, model)).logits.float().cpu() for batch in tqdm(batches, desc="Classifying")])
    return of_classes(logits, labels, model.config), None, first_example(batches[0])


def embedding(model: Any, tokenizer: Any, data: Data) -> Any:
    """With pairs of texts and a score for each (STS): the correlation of their cosine with it. Else embeddings only."""
    if not scored(data):
        batches = _batches(model, tokenizer, data, causal=False)
        return {}, mean_pooled(model, batches.items), first_example(batches.items[0])
    texts, scores, _ = _labelled(data)
    both = _encoded(model, tokenizer, [(text,) for pair in texts for text in pair], data.config)
    embeddings = mean_pooled(model, both)
    cosines = torch.nn.functional.cosine_similarity(embeddings[::2], embeddings[1::2])
    return correlations(cosines.tolist(), numbers(scores, label_column(data))), embeddings, first_example(both[0])


def scored(data: Data) -> bool:
    """Whether there are pairs of texts, and something like a score."""
    columns = Rows(data.dataset, data.text_columns, 1).columns
    return len(columns) > 1 and bool({*filter(None, (data.label_column, *LABEL_COLUMNS))} & {*data.columns})


def question_answering(model: Any, tokenizer: Any, data: Data) -> Any:
    """Exact match and F1 of answers, as in SQuAD."""
    names = ("question", "context", "answers")
    missing = [name for name in names if name not in data.columns]
    if missing:
        found = ", ".join(data.columns)
        raise ValueError(f"Question answering is measured on the columns {', '.join(names)}; there are only {found}.")
    rows = list(itertools.islice(data.dataset, _counted(data)))
    for number, row in enumerate(rows):
        texts, found = (row["question"], row["context"]), row["answers"]
        if not all(isinstance(text, str) for text in texts) or not isinstance(found, dict) or "text" not in found:
            raise ValueError(f"Row {number} has no question, context and answers as SQuAD has them: {row!r}.")
    batch_size, seq_len = data.config.batch_size, _seq_len(model, tokenizer, data.config)
    predicted, example = answers(model, tokenizer, rows, seq_len, batch_size)
    return exact_match_and_f1(predicted, [row["answers"]["text"] for row in rows]), None, first_example(example)


def perplexity(model: Any, batches: Batches) -> float:
    """exp of the mean negative log-likelihood of the real tokens but each window's first; [batch, length] windows."""
    total, count = 0.0, 0
    for batch in tqdm(batches, desc="Perplexity", unit="batch"):
        logits = model(**to_device(batch, model)).logits
        for row, ids, mask in zip(logits, batch["input_ids"], batch["attention_mask"], strict=True):  # spares memory
            real = mask[1:].bool() & mask[:-1].bool()
            wanted = ids[1:][real].to(row.device)
            loss = torch.nn.functional.cross_entropy(row[:-1][real.to(row.device)].float(), wanted, reduction="sum")
            total, count = total + float(loss), count + len(wanted)
    return perplexity_of(total, count)


def masked_prediction(model: Any, batches: Batches, tokenizer: Any, seed: int) -> dict[str, float]:
    """Mean negative log-likelihood, and accuracy, at 15% of the tokens that are not special, replaced by the mask token."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(tokenizer.all_special_ids)
    total, right, count = 0.0, 0, 0
    for batch in tqdm(batches, desc="Masked tokens", unit="batch"):
        ids = batch["input_ids"]
        hidden = torch.rand(ids.shape, generator=generator) < MASKED_SHARE
        hidden &= batch["attention_mask"].bool() & ~torch.isin(ids, special)
        masked = {**batch, "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id)}
        logits = model(**to_device(masked, model)).logits.cpu()[hidden].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[hidden], reduction="sum"))
        right, count = right + int((logits.argmax(-1) == ids[hidden]).sum()), count + len(logits)
    if not count:
        raise ValueError("The data is too small: no token was drawn for masking.")
    return {"masked_lm_loss": total / count, "accuracy": right / count}


def mean_pooled(model: Any, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Mean of the last hidden states over real tokens: [examples, hidden], float32 on the CPU."""
    pooled = []
    for batch in tqdm(batches, desc="Embeddings", unit="batch"):
        hidden = hidden_states(model, model(**to_device(batch, model)))
        mask = batch["attention_mask"].to(hidden)[..., None]
        pooled.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(pooled)


def _batches(model: Any, tokenizer: Any, data: Data, *, causal: bool) -> Batches:
    arguments = {"causal": causal, "tokenizer": tokenizer, "text_columns": data.text_columns}
    return make_batches(data.dataset, model.config, data.config, **arguments)


def _labelled(data: Data) -> tuple[list[tuple[str, ...]], list[Any], list[str] | None]:
    """Texts, labels as they are, and the names of the classes if the dataset has them."""
    columns, label = Rows(data.dataset, data.text_columns, 1).columns, label_column(data)
    if "input_ids" in columns:
        raise ValueError("The dataset is tokenized; labelled examples are measured on raw text.")
    rows = list(itertools.islice(data.dataset.select_columns([*dict.fromkeys((*columns, label))]), _counted(data)))
    return [tuple(row[c] or "" for c in columns) for row in rows], [row[label] for row in rows], data.classes_of(label)


def _encoded(model: Any, tokenizer: Any, texts: Sequence[tuple[str, ...]], config: PruningConfig) -> list[dict[str, Tensor]]:
    """Padded batches in the order of the texts."""
    size = config.batch_size if tokenizer.pad_token is not None and not lacks_padding(model) else 1
    accepted = inspect.signature(model.forward).parameters
    seq_len, batches = _seq_len(model, tokenizer, config), []
    for start in range(0, len(texts), size):
        columns = [list(column) for column in zip(*texts[start : start + size], strict=True)]
        how = {"padding": size > 1, "truncation": True, "max_length": seq_len, "padding_side": "right"}
        encoded = tokenizer(*columns, return_tensors="pt", **how)
        encoded = repadded(encoded, model.config.get_text_config()) if "attention_mask" in encoded else encoded
        batches.append({name: value for name, value in encoded.items() if name in accepted})
    if batches:
        return batches
    raise ValueError("The dataset has no rows to measure on.")


def _seq_len(model: Any, tokenizer: Any, config: PruningConfig) -> int:
    return lengths(config.seq_len, model.config.get_text_config(), tokenizer)[1]


def _counted(data: Data) -> int | None:
    """How many rows to read, all if None."""
    if data.config.num_tokens is not None:
        raise ValueError(f"num_tokens={data.config.num_tokens} asked; rows with labels or answers are counted by max_examples.")
    return data.config.max_examples
