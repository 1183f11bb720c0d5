"""What a model is worth: the measure of its task, its size, its speed. `measure`; the rest are functions of plain values."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from .blocks import lacks_padding
from .budget import model_cost
from .config import PruningConfig
from .data import SEQ_LEN, Batches, make_batches, repadded
from .families import find_groups, task_of
from .labels import COLUMNS as LABEL_COLUMNS
from .labels import class_ids
from .probes import device_of, quiet
from .rows import Rows
from .squad import answers, exact_match_and_f1
from .timing import steady_time

MASKED_SHARE = 0.15  # of the tokens, as in BERT's training


@dataclass(frozen=True)
class Data:
    """What to measure on. Of `config` the data's fields count: seq_len, num_tokens, max_examples, batch_size, seed."""

    dataset: Any
    """A `datasets.Dataset` or `IterableDataset` of raw text."""
    config: PruningConfig
    text_columns: Sequence[str] | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class Measured:
    """What `measure` found."""

    task: str
    metrics: dict[str, float]
    """Under the names that the Hub uses: perplexity, accuracy, f1, pearsonr, spearmanr, exact_match, ..."""
    parameters: int
    macs: int | None
    """Multiply-adds of the blocks for one example of `num_tokens` tokens; None for families that cannot be pruned."""
    seconds: float
    """Wall time of a forward pass over it: the lower quartile of several."""
    num_tokens: int
    embeddings: Tensor | None = field(default=None, repr=False)
    """Of models without a head, [examples, hidden], float32 on the CPU: see `cosine`."""


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, data: Data) -> Measured:
    """The metrics of the model's task on `data`, its size and its latency; the model is left as it was.

    Raises:
        ValueError: there is no tokenizer, no measure for this kind of model, or the data lacks columns or labels.
    """
    if tokenizer is None:
        raise ValueError("There is no tokenizer beside the model; the text cannot be read without it.")
    task = task_of(model)
    if task not in _MEASURES:
        raise ValueError(f"{type(model).__name__} cannot be measured; known are models for {', '.join(_MEASURES)}.")
    with quiet(model), torch.inference_mode():
        metrics, embeddings, example = _MEASURES[task](model, tokenizer, data)
        inputs = _to(example, model)
        seconds = steady_time(lambda: model(**inputs), device_of(model)) / 1e9
    parameters, length = sum(parameter.numel() for parameter in model.parameters()), example["input_ids"].shape[1]
    macs = _macs(model, length)
    return Measured(task, metrics, parameters, macs, seconds, length, embeddings)


def _macs(model: PreTrainedModel, num_tokens: int) -> int | None:
    try:
        find_groups(model)
    except ValueError:
        return None
    return model_cost(model, "macs", num_tokens)


def perplexity(model: Any, batches: Batches) -> float:
    """exp of the mean negative log-likelihood of the real tokens but each window's first; [batch, length] windows."""
    total, count = 0.0, 0
    for batch in tqdm(batches, desc="Perplexity", unit="batch"):
        logits = model(**_to(batch, model)).logits
        for row, ids, mask in zip(logits, batch["input_ids"], batch["attention_mask"], strict=True):  # spares memory
            real = mask[1:].bool() & mask[:-1].bool()
            wanted = ids[1:][real].to(row.device)
            loss = torch.nn.functional.cross_entropy(row[:-1][real.to(row.device)].float(), wanted, reduction="sum")
            total, count = total + float(loss), count + len(wanted)
    if not count:
        raise ValueError("The data has fewer than two tokens: nothing to predict.")
    return math.exp(min(total / count, 700.0))  # beyond, it is no number any more


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
        logits = model(**_to(masked, model)).logits.cpu()[hidden].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[hidden], reduction="sum"))
        right, count = right + int((logits.argmax(-1) == ids[hidden]).sum()), count + len(logits)
    if not count:
        raise ValueError("The data is too small: no token was drawn for masking.")
    return {"masked_lm_loss": total / count, "accuracy": right / count}


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


def mean_pooled(model: Any, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Mean of the last hidden states over real tokens: [examples, hidden], float32 on the CPU."""
    pooled = []
    for batch in tqdm(batches, desc="Embeddings", unit="batch"):
        hidden = model(**_to(batch, model)).last_hidden_state.float()
        mask = batch["attention_mask"].to(hidden)[..., None]
        pooled.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(pooled)


def cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine of the rows of two matrices [examples, hidden]."""
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double()).mean())


def _causal(model: Any, tokenizer: Any, data: Data) -> Any:
    batches = _batches(model, tokenizer, data, causal=True)
    return {"perplexity": perplexity(model, batches)}, None, _first(batches.items)


def _masked(model: Any, tokenizer: Any, data: Data) -> Any:
    batches = _batches(model, tokenizer, data, causal=False)
    return masked_prediction(model, batches, tokenizer, data.config.seed), None, _first(batches.items)


def _classification(model: Any, tokenizer: Any, data: Data) -> Any:
    texts, found, names = _labelled(data)
    batches = _encoded(model, tokenizer, texts, data.config)
    num_labels = model.config.num_labels
    if num_labels > 1:
        labels = torch.tensor(class_ids(found, names, model.config))
    logits = torch.cat([model(**_to(batch, model)).logits.float().cpu() for batch in tqdm(batches, desc="Classifying")])
    if num_labels == 1:
        return correlations(logits[:, 0].tolist(), [float(label) for label in found]), None, _first(batches)
    return accuracy_and_f1(logits.argmax(-1), labels, num_labels), None, _first(batches)


def _embedding(model: Any, tokenizer: Any, data: Data) -> Any:
    """With pairs of texts and a score for each (STS): the correlation of their cosine with it. Else embeddings only."""
    columns = Rows(data.dataset, data.text_columns, 1).columns
    labelled = set(filter(None, (data.label_column, *LABEL_COLUMNS))) & set(data.dataset.column_names or ())
    if len(columns) < 2 or not labelled:
        batches = _batches(model, tokenizer, data, causal=False)
        return {}, mean_pooled(model, batches.items), _first(batches.items)
    texts, scores, _ = _labelled(data)
    both = _encoded(model, tokenizer, [(text,) for pair in texts for text in pair], data.config)
    embeddings = mean_pooled(model, both)
    cosines = torch.nn.functional.cosine_similarity(embeddings[::2], embeddings[1::2])
    return correlations(cosines.tolist(), [float(score) for score in scores]), embeddings, _first(both)


def _question_answering(model: Any, tokenizer: Any, data: Data) -> Any:
    names = ("question", "context", "answers")
    missing = [name for name in names if name not in (data.dataset.column_names or ())]
    if missing:
        found = ", ".join(data.dataset.column_names or ())
        raise ValueError(f"Question answering is measured on the columns {', '.join(names)}; there are only {found}.")
    rows = list(itertools.islice(data.dataset, data.config.max_examples))
    batch_size, seq_len = data.config.batch_size, _seq_len(model, tokenizer, data.config)
    predicted, example = answers(model, tokenizer, rows, seq_len, batch_size)
    return exact_match_and_f1(predicted, [row["answers"]["text"] for row in rows]), None, _first([example])


_MEASURES = {
    "text-generation": _causal,
    "fill-mask": _masked,
    "text-classification": _classification,
    "question-answering": _question_answering,
    "feature-extraction": _embedding,
}


def _batches(model: Any, tokenizer: Any, data: Data, *, causal: bool) -> Batches:
    arguments = {"causal": causal, "tokenizer": tokenizer, "text_columns": data.text_columns}
    return make_batches(data.dataset, model.config, data.config, **arguments)


def _labelled(data: Data) -> tuple[list[tuple[str, ...]], list[Any], list[str] | None]:
    """Texts, labels as they are, and the names of the classes if the dataset has them."""
    columns = Rows(data.dataset, data.text_columns, 1).columns
    names = list(data.dataset.column_names or ())
    label = next((name for name in filter(None, (data.label_column, *LABEL_COLUMNS)) if name in names), None)
    if label is None or (data.label_column and label != data.label_column):
        raise ValueError(
            f"No label column {data.label_column or ' or '.join(LABEL_COLUMNS)}; the columns are {', '.join(names)}."
        )
    if "input_ids" in columns:
        raise ValueError("The dataset is tokenized; labelled examples are measured on raw text.")
    rows = list(itertools.islice(data.dataset, data.config.max_examples))
    features = data.dataset.features or {}
    return (
        [tuple(row[c] or "" for c in columns) for row in rows],
        [row[label] for row in rows],
        getattr(features.get(label), "names", None),
    )


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
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(config.seq_len or SEQ_LEN, most or SEQ_LEN, tokenizer.model_max_length)


def _first(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The first example, without its padding."""
    return {name: value[:1, : int(batches[0]["attention_mask"][0].sum())] for name, value in batches[0].items()}


def _to(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {name: value.to(device_of(model)) for name, value in batch.items()}


def data_config(**given: Any) -> PruningConfig:
    """A configuration of the data alone, which reads everything unless told otherwise."""
    return dataclasses.replace(PruningConfig(num_tokens=None), **given)
