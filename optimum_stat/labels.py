"""What a model's head is to predict: where a dataset keeps it, and the gradient of the loss that it defines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import is_encoder_decoder
from .families import task_of

COLUMNS = ("label", "labels", "score", "similarity_score")
POSITIONS = ("start_positions", "end_positions")
WITHOUT_LABELS = ("feature-extraction", "automatic-speech-recognition", "zero-shot-image-classification")
IGNORED = -100  # the label of tokens that no loss counts, as in transformers


@dataclass(frozen=True)
class Labels:
    """Where the labels for one model stand in a dataset, and what they have to be."""

    columns: tuple[str, ...]
    """One column, or the two of answer positions."""
    task: str
    config: Any
    """The model's."""
    names: Sequence[str] | None = None
    """Of the classes, where the dataset has them; they may stand in another order than the model's."""

    @property
    def per_token(self) -> bool:
        """Whether there is one for every token: they are cut and padded like token ids, with -100."""
        return self.task in ("token-classification", "fill-mask")

    def read(self, row: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        """The labels of one row [1], or of a ready batch [examples], under the names that the model's forward has.

        Raises:
            ValueError: one is missing, of another kind, or none of the model's classes.
        """
        missing = [column for column in self.columns if row.get(column) is None]
        if missing:
            raise ValueError(f"{where} has no {missing[0]}, where {', '.join(self.columns)} was expected.")
        try:
            if self.task == "question-answering":
                return {column: self._positions(row[column]) for column in self.columns}
            return {"labels": self._of_head(row[self.columns[0]])}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error

    def check_tokens(self, labels: Tensor, where: str) -> None:
        """Raise if a token's label is none of the model's."""
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= self._outputs))]
        if len(wrong):
            raise ValueError(
                f"{where} has label {int(wrong[0])} for a token; the model has {self._outputs} outputs. "
                f"Tokens without a label have {IGNORED}."
            )

    @property
    def _outputs(self) -> int:
        config = self.config.get_text_config() if self.task == "fill-mask" else self.config
        return int(config.vocab_size if self.task == "fill-mask" else config.num_labels)

    def _of_head(self, value: Any) -> Tensor:
        plain = value.tolist() if hasattr(value, "tolist") else value  # tensors, and what numpy has
        if self.config.problem_type == "multi_label_classification":
            flags = torch.as_tensor(plain, dtype=torch.float32)
            flags = flags[None] if flags.dim() == 1 else flags
            if flags.dim() != 2 or flags.shape[1] != self.config.num_labels or not bool(((flags == 0) | (flags == 1)).all()):
                raise ValueError(f"labels {value!r} are not {self.config.num_labels} zeros and ones, one for each class.")
            return flags
        values = list(plain) if isinstance(plain, (list, tuple)) else [plain]
        while values and isinstance(values[0], list):
            values = [each for part in values for each in part]
        values = [each.item() if hasattr(each, "item") else each for each in values]
        if self.config.num_labels > 1:
            return torch.tensor(class_ids(values, self.names, self.config))
        wrong = [v for v in values if not isinstance(v, (int, float)) or not math.isfinite(v)]
        if wrong:
            raise ValueError(f"label {wrong[0]!r} is no finite number, as the model's one output (a regression) needs it.")
        return torch.tensor(values, dtype=torch.float32)

    def _positions(self, value: Any) -> Tensor:
        positions = torch.as_tensor(value).reshape(-1)
        if positions.is_floating_point():
            raise ValueError(f"{value!r} is no position of a token.")
        return positions.long()


def find_labels(model: Any, columns: Sequence[str], names: Mapping[str, Sequence[str]], asked: str | None) -> Labels | None:
    """The labels that fit the model's head among the `columns` of a dataset; None if there are none.

    names: column -> names of its classes, for the columns that have some. Raises ValueError if `asked` is not there.
    """
    task = task_of(model)
    if asked is not None and asked not in columns:
        found = ", ".join(columns) or "none, the rows are plain"
        raise ValueError(f"label_column={asked!r} asked, but there is no such column. Columns: {found}.")
    if predicts_next(model) or task in WITHOUT_LABELS:
        return None  # the next token is the label, or there is none
    if task == "question-answering":
        return Labels(POSITIONS, task, model.config) if set(POSITIONS) <= set(columns) else None
    column = asked or next((name for name in COLUMNS if name in columns), None)
    return None if column is None else Labels((column,), task, model.config, names.get(column))


def predicts_next(model: Any) -> bool:
    """Whether the next token is what the model's head predicts: the data then has its labels in itself."""
    return task_of(model) in ("text-generation", "text2text-generation") or (
        task_of(model) == "automatic-speech-recognition" and is_encoder_decoder(model)
    )


def why_none(model: Any, columns: Sequence[str]) -> str:
    """What to tell somebody whose method needs labels that the data does not have."""
    task, found = task_of(model), ", ".join(columns) or "none, the rows are plain"
    of_example = f"a label is looked for in {', '.join(COLUMNS)}; name another column with label_column="
    wanted = {
        "feature-extraction": f"{type(model).__name__} has no head, so no label could say how good it is",
        "question-answering": f"question answering needs tokenized rows with {' and '.join(POSITIONS)}",
        "fill-mask": "a masked language model needs tokenized rows with labels for the masked tokens",
        "token-classification": "token classification needs tokenized rows with labels for every token",
        "automatic-speech-recognition": "a loss over alignments is not among those that are known",
        "zero-shot-image-classification": "how near the right pairs are is not among the losses that are known",
        **dict.fromkeys(("text-classification", "image-classification", "audio-classification"), of_example),
    }[task]
    return f"Labels are needed: {wanted}. Columns: {found}. Or use labels='model' or, where training, distill=1: they need none."


def class_ids(labels: Sequence[Any], names: Sequence[str] | None, config: Any) -> list[int]:
    """The model's class of each label: by name where both sides have the same names, else by number."""
    known = {str(name).lower(): int(i) for name, i in config.label2id.items()}
    if names is not None and {name.lower() for name in names} == set(known):  # maybe in another order (MNLI's are)
        labels = [names[label] if 0 <= label < len(names) else label for label in labels]
    ids: list[Any] = [known.get(label.lower(), label) if isinstance(label, str) else label for label in labels]
    ids = [int(label) if isinstance(label, float) and label.is_integer() else label for label in ids]
    wrong = [label for label in ids if type(label) not in (int, bool) or not 0 <= label < config.num_labels]
    if wrong:
        hint = " A test split without labels has -1." if wrong[0] == -1 else ""
        raise ValueError(
            f"{len(wrong)} of {len(ids)} labels are none of the model's classes, {wrong[0]!r} for one; the model has "
            f"{config.num_labels}: {', '.join(config.label2id)}.{hint}"
        )
    return [int(label) for label in ids]


def loss_gradients(
    model: Any, output: Any, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The model's predictions, and at each the gradient of the loss, summed over examples and tokens.

    Cross entropy (`softmax(logits) - onehot(label)`), of the next token for causal language models; binary cross entropy
    for several labels at once (`sigmoid(logits) - labels`); half the squared error for regression (`prediction - label`).
    Sums, so that the gradient of one example does not depend on what stands beside it in the batch.
    """
    if task_of(model) == "question-answering":
        assert labels is not None
        mask = inputs["attention_mask"]
        values = [output["start_logits"], output["end_logits"]]
        return values, [_minus_target(v, labels[name], mask) for v, name in zip(values, POSITIONS, strict=True)]
    logits = output["logits"]
    if predicts_next(model):
        of = "decoder_" if is_encoder_decoder(model) else ""
        ids, mask = inputs[f"{of}input_ids"], inputs[f"{of}attention_mask"]
        target = torch.full_like(ids, IGNORED)
        target[:, :-1] = ids[:, 1:].masked_fill((mask[:, 1:] * mask[:, :-1]) == 0, IGNORED)
        return [logits], [_minus_target(logits, target)]
    assert labels is not None
    target = labels["labels"].to(logits.device)
    if target.is_floating_point():
        value = _at_least_single(logits)
        predicted = value.sigmoid() if target.dim() == 2 else value.view(target.shape)
        return [logits], [(predicted - target).view(logits.shape).to(logits.dtype)]
    return [logits], [_minus_target(logits, target)]


def _minus_target(logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """`softmax(logits) - onehot(target)` along the last dimension, zero where the target is none of its places."""
    values, target = _at_least_single(logits), target.to(logits.device)
    if mask is not None:
        values = values.masked_fill(mask == 0, -torch.inf)
    counts = (target >= 0) & (target < values.shape[-1])
    gradient = values.softmax(-1)
    gradient.scatter_add_(-1, target.where(counts, 0)[..., None], -torch.ones_like(gradient[..., :1]))
    return gradient.mul_(counts[..., None]).to(logits.dtype)


def _at_least_single(logits: Tensor) -> Tensor:
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
