"""What a model is worth: the measure of its task, its size, its speed. `measure`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import evaluation_media, evaluation_text
from .blocks import is_encoder_decoder, modalities
from .budget import Lengths, model_cost
from .calls import stack_tokens
from .evaluation_data import Data as Data
from .evaluation_data import data_config as data_config
from .evaluation_data import label_column, to_device
from .evaluation_words import words
from .families import find_groups, task_of
from .probes import device_of, quiet
from .timing import steady_time


@dataclass(frozen=True)
class Measured:
    """What `measure` found."""

    task: str
    metrics: dict[str, float]
    """Under the names that the Hub uses: perplexity, accuracy, f1, wer, pearsonr, spearmanr, exact_match, ..."""
    parameters: int
    macs: int | None
    """Multiply-adds of the blocks for one example of `num_tokens` tokens; None for families that cannot be pruned."""
    seconds: float
    """Wall time of a forward pass over it: the lower quartile of several."""
    num_tokens: Lengths
    """Places in the example that the blocks read: tokens of a text, patches of an image, frames of a sound. One number for each
    list of blocks where there are several: encoder and decoder, or the towers."""
    embeddings: Tensor | None = field(default=None, repr=False)
    """Of models without a head, [examples, hidden], float32 on the CPU: see `scores.cosine`."""
    example: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """The inputs that were timed, of one example."""


_OF_TEXT = {
    "text-generation": evaluation_text.causal,
    "fill-mask": evaluation_text.masked,
    "text-classification": evaluation_text.classification,
    "question-answering": evaluation_text.question_answering,
    "token-classification": words,
    "feature-extraction": evaluation_text.embedding,
}
_OF_MEDIA = {
    "image-classification": evaluation_media.classification,
    "audio-classification": evaluation_media.classification,
    "text2text-generation": evaluation_media.targets,
    "automatic-speech-recognition": evaluation_media.speech,
    "zero-shot-image-classification": evaluation_media.matching,
    "feature-extraction": evaluation_media.embedding,
}


def measure(model: PreTrainedModel, tokenizer: Any, data: Data) -> Measured:
    """The metrics of the model's task on `data`, its size and its latency; the model is left as it was.

    tokenizer: or image processor, feature extractor, or what has several of them inside, as the model's inputs need.

    Raises:
        ValueError: there is no tokenizer, or the data lacks columns or labels.
    """
    task, of_text = task_of(model), _is_of_text(model)
    if of_text and tokenizer is None:
        raise ValueError("There is no tokenizer beside the model; the text cannot be read without it.")
    if data.label_column and data.columns:
        label_column(data)  # also where it would not be read: a wrong name is a mistake
    measures: dict[str, Any] = _OF_TEXT if of_text else _OF_MEDIA
    if task not in measures:
        raise ValueError(
            f"{type(model).__name__} cannot be measured: there is no measure of {task} for models that read "
            f"{' and '.join(modalities(model))}. Known are {', '.join(measures)}."
        )
    with quiet(model), torch.inference_mode():
        metrics, embeddings, example = measures[task](model, tokenizer, data)
        inputs = to_device(example, model)
        seconds = steady_time(lambda: model(**inputs), device_of(model)) / 1e9
        length = example["input_ids"].shape[1] if of_text else _lengths(model, inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Measured(task, metrics, parameters, _macs(model, length), seconds, length, embeddings, example)


def needs_another(model: PreTrainedModel, data: Data) -> bool:
    """Whether all that `measure` has of this model on `data` are embeddings, to be compared with those of another."""
    return task_of(model) == "feature-extraction" and not (_is_of_text(model) and evaluation_text.scored(data))


def _is_of_text(model: PreTrainedModel) -> bool:
    task = task_of(model)
    reads_text = task in _OF_TEXT and modalities(model) == ("text",)
    return reads_text and (task != "feature-extraction" or not is_encoder_decoder(model))


def _lengths(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Lengths:
    counts = stack_tokens(model, inputs)
    return counts[0] if len(counts) == 1 else tuple(counts)


def _macs(model: PreTrainedModel, length: Lengths) -> int | None:
    try:
        find_groups(model)
    except ValueError:
        return None
    return model_cost(model, "macs", length)
