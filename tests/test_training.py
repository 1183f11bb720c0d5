"""What every method that trains has to keep: its loss, its checkpoints, and what it says when something is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import batches, many, one_in_three, outputs, tiny
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging as hf_logging

from optimum_stat import MovementConfig, MovementPruner, VIBConfig, VIBPruner, calibration
from optimum_stat.commands import PruneCommand
from optimum_stat.families import Group, find_groups
from optimum_stat.teacher_losses import of_layers, of_outputs
from optimum_stat.trained import TrainedPruner
from optimum_stat.training import Diverged, Masks, PruningTrainer, masks_in
from optimum_stat.training_data import Collator, examples, metrics_of, scores
from optimum_stat.training_state import trainable

QUIET = {"disable_tqdm": True, "report_to": "none"}
METHODS: dict[str, Any] = {
    "movement": lambda **asked: (MovementPruner, MovementConfig(**asked)),
    "movement-filled": lambda **asked: (
        MovementPruner,
        MovementConfig(variant="hybrid-filled", block_size=8, finetune_epochs=2.0, **asked),
    ),
    "vib": lambda **asked: (VIBPruner, VIBConfig(**asked)),
    "vib-faster": lambda **asked: (VIBPruner, VIBConfig(masks_only=True, **asked)),
}
EACH_METHOD = pytest.mark.parametrize("method", METHODS)


def pruner_for(method: str, model: Any, **asked: Any) -> TrainedPruner[Any]:
    pruner, config = METHODS[method](**{"keep": 0.6, "batch_size": 4, **asked})
    return pruner.from_pretrained(model, config)


def labelled(num: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = batches(tuple(range(5, 5 + num)), batch_size=1, seed=seed)
    return [{"input_ids": row["input_ids"][0].tolist(), "label": int(torch.randint(3, (), generator=generator))} for row in rows]


class Stopped(Exception):
    """The power went off."""


@contextmanager
def power_cut(monkeypatch: pytest.MonkeyPatch, step: int):
    """Raise in the given training step, counted over all phases of a run."""
    original, count = PruningTrainer.training_step, 0

    def training_step(self: Any, *arguments: Any, **named: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == step:
            raise Stopped
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(PruningTrainer, "training_step", training_step)
        with pytest.raises(Stopped):
            yield


@EACH_METHOD
@pytest.mark.parametrize("step", [8, 21])  # 24 examples, 4 a step: 18 steps, and 12 more where what is left is trained
def test_an_interrupted_run_goes_on_and_ends_the_same(method: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if step == 21 and method != "movement-filled":
        step = 17
    args = {**QUIET, "save_steps": 5, "learning_rate": 1e-3, "num_train_epochs": 3}
    whole = pruner_for(method, tiny("bert", "SequenceClassification"))
    whole.prune(labelled(), training_args={**args, "output_dir": str(tmp_path / "whole")})
    model = tiny("bert", "SequenceClassification")
    dense = model.state_dict()
    args["output_dir"] = str(tmp_path / "cut")
    with power_cut(monkeypatch, step):
        pruner_for(method, model).prune(labelled(), training_args=args)
    after = model.state_dict()
    assert after.keys() == dense.keys()
    assert all(torch.equal(after[name], dense[name]) for name in dense)
    resumed = pruner_for(method, model)
    resumed.prune(labelled(), training_args=args, resume_from_checkpoint=True)
    wanted, found = whole.model.state_dict(), resumed.model.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert resumed.report.groups == whole.report.groups


class OnlyPenalty(Masks):
    """One parameter, whose penalty has the gradient 3."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.one = nn.Parameter(torch.zeros(()))

    @contextmanager
    def attached(self):
        yield

    def step(self, progress: float) -> None:
        pass

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.one], "lr": 0.1}]

    def penalty(self) -> Tensor:
        return 3 * self.one

    def scores(self, group: Group) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("family", ["bert", "llama"])  # the latter's loss takes the number of items over all accumulated batches
def test_gradient_accumulation_does_not_change_the_penalty(family: str, tmp_path: Path):
    found = []
    for accumulate in (1, 4):
        model, masks = tiny(family, "SequenceClassification" if family == "bert" else None), OnlyPenalty()
        args = TrainingArguments(
            str(tmp_path / str(accumulate)),
            optim="sgd",
            max_steps=1,
            gradient_accumulation_steps=accumulate,
            per_device_train_batch_size=4 // accumulate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            dataloader_pin_memory=False,
            **QUIET,
        )
        rows = examples(_read(model, labelled(4)))
        with masks_in(model, masks), trainable(model, []):
            masks.one.requires_grad_(True)
            PruningTrainer(model, args, rows, None, pad_id=1, masks=masks, teacher=None, distill=0.0).train()
        found.append(masks.one.item())
    assert found == pytest.approx([-0.3, -0.3])


def _read(model: Any, rows: Any) -> Any:
    return calibration.read(MovementPruner(model, MovementConfig(batch_size=4)), rows, None, None)


@EACH_METHOD
def test_a_run_that_diverges_stops_and_says_where_the_last_good_state_is(method: str, tmp_path: Path):
    model = tiny("bert", "SequenceClassification")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wild = {"learning_rate": 1e19, "max_grad_norm": 0.0, "num_train_epochs": 3}
    args = {**QUIET, **wild, "output_dir": str(tmp_path), "save_steps": 1}
    asked = {"mask_learning_rate": 1e30} if method == "vib-faster" else {}
    with pytest.raises(
        Diverged, match=r"in step \d+ of 18: the loss is (nan|-?inf)\. .*; the last good state is (.*)\. Lower"
    ) as caught:
        pruner_for(method, model, **asked).prune(labelled(), training_args=args)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    last = Path(str(caught.value).partition("the last good state is ")[2].partition(". Lower")[0])
    assert all(bool(torch.isfinite(value).all()) for value in load_file(last / "model.safetensors").values())
    with pytest.raises(Diverged, match="no checkpoint was written"):
        pruner_for(method, model, **asked).prune(labelled(), training_args={**QUIET, **wild})


def test_a_gradient_that_is_no_number_does_not_reach_the_weights(tmp_path: Path):
    model = tiny("bert", "SequenceClassification")
    layer = find_groups(model)[0].consumer
    handle = layer.register_full_backward_hook(lambda m, given, out: tuple(g * torch.nan for g in given))
    with pytest.raises(Diverged, match="a gradient is NaN or infinite"):
        pruner_for("movement", model).prune(labelled(), training_args=QUIET)
    handle.remove()


@EACH_METHOD
def test_data_without_labels_is_refused_before_any_work(method: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PruningTrainer, "train", None)
    with pytest.raises(ValueError, match=r"Labels are needed: .* where training, distill=1"):
        pruner_for(method, tiny("bert", "SequenceClassification")).prune(many())
    with pytest.raises(ValueError, match=r"^eval_dataset: Labels are needed: .* Or leave eval_dataset out\.$"):
        pruner_for(method, tiny("bert", "SequenceClassification"), distill=1.0).prune(many(), eval_dataset=many())


@pytest.mark.parametrize(
    ("args", "has_eval", "message"),
    [
        ({"metric_for_best_model": "f1"}, True, r"metric_for_best_model='f1' asked; for Bert\w+ there are loss, accuracy"),
        ({"metric_for_best_model": "eval_accuracy"}, False, "nothing to evaluate on: pass eval_dataset="),
        ({"eval_strategy": "epoch"}, False, "nothing to evaluate on: pass eval_dataset="),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}, True, "hardly pruned yet"),
        ({"eval_do_concat_batches": False}, True, "metrics are those of all examples"),
    ],
)
def test_evaluations_that_cannot_be_are_refused_before_any_work(
    args: dict[str, Any], has_eval: bool, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(PruningTrainer, "train", None)
    pruner = pruner_for("movement", tiny("bert", "SequenceClassification"))
    with pytest.raises(ValueError, match=message):
        pruner.prune(labelled(), labelled(5) if has_eval else None, training_args={**QUIET, **args})


@pytest.mark.parametrize(
    ("method", "of"),
    one_in_three(
        METHODS,
        [("bert", "SequenceClassification"), ("roberta", "TokenClassification"), ("bert", "QuestionAnswering"), ("gpt2", None)],
    ),
)
def test_metrics_before_and_after_go_into_the_card(method: str, of: tuple[str, str | None], tmp_path: Path):
    family, head = of
    model = tiny(family, head)
    rows = labelled()
    if head == "TokenClassification":
        rows = [{"input_ids": row["input_ids"], "labels": [id % 3 for id in row["input_ids"]]} for row in rows]
    if head == "QuestionAnswering":
        rows = [{"input_ids": row["input_ids"], "start_positions": 1, "end_positions": 3} for row in rows]
    pruner = pruner_for(method, model)
    args = TrainingArguments(
        str(tmp_path / "out"), save_strategy="no", eval_strategy="epoch", dataloader_pin_memory=False, **QUIET
    )
    pruner.prune(Dataset.from_list(rows), Dataset.from_list(rows[:6]), args)
    name = {"TokenClassification": "accuracy", "QuestionAnswering": "exact_match", None: "loss"}.get(head, "accuracy")
    (metric,) = pruner.metrics
    assert metric.keys() == {"name", "dataset", "value", "dense"}
    assert metric["name"] == name
    if head == "SequenceClassification":
        right = [int(tiny(family, head)(torch.tensor([row["input_ids"]])).logits.argmax()) == row["label"] for row in rows[:6]]
        assert metric["dense"] == pytest.approx(sum(right) / 6, abs=1e-4)
    pruner.save_pretrained(tmp_path / "pruned")
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert name in card
    assert "without retraining" not in card
    assert "- Teacher: the dense model" in card
    parser = argparse.ArgumentParser()
    PruneCommand.parse_args(parser)
    (line,) = (line for line in card.splitlines() if line.startswith("optimum-cli stat prune "))
    asked = parser.parse_args(shlex.split(line)[3:])
    assert (str(asked.output), asked.method) == ("OUTPUT", pruner.method)
    assert "eval_strategy=epoch" in asked.training_args
    assert str(tmp_path) not in card
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "pruned"), many()[0]), outputs(pruner.model, many()[0]))


@pytest.mark.parametrize(
    ("method", "changes"), [("movement", True), ("movement-filled", True), ("vib", True), ("vib-faster", False)]
)
def test_which_weights_train(method: str, changes: bool, monkeypatch: pytest.MonkeyPatch):
    """All of the blocks', under the masks too; none where only the masks do. What the user froze stays."""
    model = tiny("bert", "SequenceClassification")
    frozen = find_groups(model)[1].consumer.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    pruner = pruner_for(method, model)
    found: dict[str, bool] = {}

    def repair(*arguments: Any) -> None:
        found.update({name: not torch.equal(value, before[name]) for name, value in model.named_parameters()})
        raise Stopped

    monkeypatch.setattr(pruner, "repair", repair)
    with pytest.raises(Stopped):
        pruner.prune(labelled(), training_args=QUIET)
    ours = {name for name, value in before.items() if "encoder" in name and value.dim() == 2}
    frozen_name = next(name for name, value in model.named_parameters() if value is frozen)
    assert len(ours) == 12
    assert not found[frozen_name]
    assert {found[name] for name in ours - {frozen_name}} == {changes}


def test_a_larger_teacher():
    model = tiny("bert", "SequenceClassification")
    teacher = tiny("bert", "SequenceClassification", seed=3, num_hidden_layers=3, hidden_size=40)
    before = outputs(teacher, batches()[0])
    pruner_for("movement", model, distill=1.0).prune(many(), teacher=teacher, training_args=QUIET)
    assert torch.equal(outputs(teacher, batches()[0]), before)
    with pytest.raises(ValueError, match="The teacher's num_labels is 5, the model's 3"):
        pruner_for("movement", model).prune(labelled(), teacher=tiny("bert", "SequenceClassification", num_labels=5))
    with pytest.raises(
        ValueError, match="The teacher BertForQuestionAnswering is for question-answering, the model for text-class"
    ):
        pruner_for("movement", model).prune(labelled(), teacher=tiny("bert", "QuestionAnswering"))
    other_order = tiny("bert", "SequenceClassification", seed=3)
    other_order.config.label2id = {"LABEL_1": 0, "LABEL_0": 1, "LABEL_2": 2}
    with pytest.raises(
        ValueError, match="classes stand in another order, label_1, label_0, label_2, than the model's, label_0, l"
    ):
        pruner_for("movement", model).prune(labelled(), teacher=other_order)
    with pytest.raises(ValueError, match="distill=0 asks for none"):
        pruner_for("movement", model, distill=0.0).prune(labelled(), teacher=teacher)


def test_distillation_is_the_divergence_from_the_teacher_at_temperature_two():
    model, mask = tiny("bert", "SequenceClassification"), torch.tensor([[1, 1, 0], [1, 1, 1]])
    own, other = torch.randn(2, 3), torch.randn(2, 3)
    found = of_outputs(model, ModelOutput(logits=own), ModelOutput(logits=other), mask)
    p, q = (other / 2).softmax(-1), (own / 2).softmax(-1)
    assert found.item() == pytest.approx(4 * float((p * (p / q).log()).sum()) / 2, rel=1e-5)
    # one distribution a token: padding does not count
    own, other = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = (other / 2).softmax(-1)[mask.bool()], (own / 2).softmax(-1)[mask.bool()]
    found = of_outputs(model, ModelOutput(logits=own), ModelOutput(logits=other), mask)
    assert found.item() == pytest.approx(4 * float((p * (p / q).log()).sum()) / 5, rel=1e-5)
    # answers: over the real tokens of each example, mean of start and end
    spans = [ModelOutput(start_logits=torch.randn(2, 3), end_logits=torch.randn(2, 3)) for _ in range(2)]
    total = 0.0
    for name in ("start_logits", "end_logits"):
        for row in range(2):
            real = int(mask[row].sum())
            p, q = ((spans[i][name][row, :real] / 2).softmax(-1) for i in (1, 0))
            total += 4 * float((p * (p / q).log()).sum()) / 2 / 2
    assert of_outputs(model, *spans, mask).item() == pytest.approx(total, rel=1e-5)
    one = tiny("bert", "SequenceClassification", num_labels=1)
    own, other = torch.randn(2, 1), torch.randn(2, 1)
    found = of_outputs(one, ModelOutput(logits=own), ModelOutput(logits=other), mask)
    assert found.item() == pytest.approx(float((own - other).square().mean()), rel=1e-5)


def test_the_distance_of_layers_is_relative_for_every_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    own, other = ([torch.randn(2, 3, 4) for _ in range(3)] for _ in range(2))
    total = 0.0
    for here, there in zip(own[1:], other[1:], strict=True):  # the embeddings do not count
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
            a, b = here[row, column], there[row, column]
            total += float((a - b).square().sum() / b.square().sum()) / 5 / 2
    found = of_layers(ModelOutput(hidden_states=own), ModelOutput(hidden_states=other), mask)
    assert found.item() == pytest.approx(total, rel=1e-5)
    assert of_layers(ModelOutput(hidden_states=own), ModelOutput(hidden_states=other[:2]), mask).item() == 0


def test_the_loss_is_shared_between_labels_and_teacher(tmp_path: Path):
    model, teacher = tiny("bert", "SequenceClassification"), tiny("bert", "SequenceClassification", seed=5)
    args = TrainingArguments(str(tmp_path), **QUIET)
    rows = examples(_read(model, labelled(4)))
    trainer = PruningTrainer(model, args, rows, None, pad_id=1, masks=None, teacher=teacher, distill=0.25, layers=3.0)
    batch = Collator(1, False)(rows)
    pair = [each(**batch, output_hidden_states=True) for each in (model, teacher)]
    wanted = of_outputs(model, *pair, batch["attention_mask"]) + 3 * of_layers(*pair, batch["attention_mask"])
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = trainer.compute_loss(model, batch)
    assert found.item() == pytest.approx((0.75 * model(**batch).loss + 0.25 * wanted).item(), rel=1e-4)
    model.eval()
    assert trainer.compute_loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_examples_have_no_padding_and_the_collator_puts_it_back():
    read = _read(tiny("gpt2"), batches((7, 4, 6), batch_size=3))
    rows = examples(read)
    assert [len(row["input_ids"]) for row in rows] == [7, 4, 6]
    batch = Collator(1, True)(rows)
    assert torch.equal(batch["input_ids"], batches((7, 4, 6), batch_size=3)[0]["input_ids"])
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert metrics_of(tiny("gpt2")) == ()


def test_scores_are_those_of_the_task():
    class Prediction:
        def __init__(self, predictions: Any, label_ids: Any) -> None:
            self.predictions, self.label_ids = predictions, label_ids

    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]).numpy()
    model = tiny("bert", "SequenceClassification")
    assert scores(model, Prediction(logits, torch.tensor([0, 2]).numpy())) == {"accuracy": 0.5}
    flags = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).numpy()
    assert scores(model, Prediction(logits, flags)) == {"accuracy": pytest.approx(5 / 6)}
    spans = (logits, logits), (torch.tensor([0, 1]).numpy(), torch.tensor([[0], [2]]).numpy())
    assert scores(tiny("bert", "QuestionAnswering"), Prediction(*spans)) == {"exact_match": 0.5}
    tokens = torch.tensor([[[2.0, 1.0], [0.0, 1.0]]]).numpy()
    assert scores(tiny("bert", "TokenClassification"), Prediction(tokens, torch.tensor([[0, -100]]).numpy())) == {"accuracy": 1.0}


def test_mixed_precision_leaves_the_forward_as_it_was():
    model = tiny("bert", "SequenceClassification")
    pruner_for("movement", model).prune(labelled(), training_args={**QUIET, "bf16": True, "use_cpu": True})
    assert "forward" not in model.__dict__
    assert model.dtype == torch.float32


@EACH_METHOD
def test_a_model_of_half_precision_trains_with_parts_frozen(method: str):
    model = tiny("bert", "SequenceClassification").to(torch.bfloat16)
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    pruner = pruner_for(method, model)
    pruner.prune(Dataset.from_list(labelled()), training_args={"num_train_epochs": 1, "report_to": "none"})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 asked"),
        ({"num_train_epochs": 0}, "Not one training step was made: 24 examples"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(asked: dict[str, Any], message: str):
    model = tiny("bert", "SequenceClassification")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pruner_for("movement", model).prune(Dataset.from_list(labelled()), training_args={"report_to": "none", **asked})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("asked", [{"prediction_loss_only": True}, {"batch_eval_metrics": True}, {"label_names": ["label"]}])
def test_an_evaluation_without_its_metrics_is_refused(asked: dict[str, Any]):
    rows = Dataset.from_list(labelled())
    with pytest.raises(ValueError, match=f"{next(iter(asked))}=.* asked, but the metrics are those of the model's task"):
        pruner_for("movement", tiny("bert", "SequenceClassification")).prune(rows, rows, {"report_to": "none", **asked})


def test_the_loss_from_a_teacher_is_the_one_of_the_model_at_hand(monkeypatch: pytest.MonkeyPatch):
    """Not the one that the teacher's config names."""
    rows = [{**row, "label": [1.0, 0.0, 1.0]} for row in labelled()]
    model = tiny("bert", "SequenceClassification", problem_type="multi_label_classification")
    monkeypatch.setattr("optimum_stat.teacher_losses._divergence", None)
    pruner_for("movement", model).prune(rows, teacher=tiny("bert", "SequenceClassification"), training_args=QUIET)


def test_with_an_evaluation_training_is_prepared_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Mixed precision goes on in every phase, and what accelerate notes of the model is gone in the end."""
    model, seen, original = tiny("bert", "SequenceClassification"), set[torch.dtype](), PruningTrainer.compute_loss

    def compute_loss(*arguments: Any, **named: Any) -> Any:
        with model.classifier.register_forward_hook(lambda module, args, output: seen.add(output.dtype)):
            return original(*arguments, **named)

    monkeypatch.setattr(PruningTrainer, "compute_loss", compute_loss)
    tiny("bert", "SequenceClassification", seed=1).save_pretrained(tmp_path / "teacher")
    asked = {**QUIET, "bf16": True, "use_cpu": True, "log_level": "info", "eval_strategy": "epoch"}
    pruner, verbosity = pruner_for("movement", model, finetune_epochs=1.0, max_examples=8), hf_logging.get_verbosity()
    for _ in range(2):  # what the first has measured is not the second's
        pruner.prune(labelled(), labelled(9), asked, teacher=tmp_path / "teacher")
        assert [metric["dataset"] for metric in pruner.metrics] == ["9 tokenized rows"]
    assert seen == {torch.bfloat16}
    assert "_is_accelerate_prepared" not in model.__dict__
    assert hf_logging.get_verbosity() == verbosity


def test_an_evaluation_drops_nothing():
    pruner = pruner_for("movement", tiny("bert", "SequenceClassification"))
    pruner.prune(labelled(), labelled(3), {**QUIET, "dataloader_drop_last": True})  # of batches of four
    assert len(pruner.metrics) == 1


def test_a_caller_may_be_in_inference_mode():
    model = tiny("bert", "SequenceClassification")
    with torch.inference_mode():
        pruner_for("movement", model, finetune_epochs=1.0).prune(labelled(), labelled(5), QUIET)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_metric_that_is_no_number_is_left_out(tmp_path: Path):
    model = tiny("bert", "SequenceClassification", num_labels=1)
    rows = [{**row, "label": float(row["label"])} for row in labelled()]
    pruner = pruner_for("movement", model)
    pruner.prune(rows, rows[:1], QUIET)
    assert pruner.metrics == []


def test_switches_that_training_throws_are_as_before():
    model = tiny("bert", "SequenceClassification")
    environment, named = dict(os.environ), {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = min({"activation_checkpointing", "gradient_checkpointing"} & named)  # the first since transformers 5.24
    asked = {**QUIET, checkpointing: True, "full_determinism": True}
    pruner_for("movement", model, finetune_epochs=1.0).prune(Dataset.from_list(labelled()), training_args=asked)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (False, False)
    assert dict(os.environ) == environment


def test_without_bars_training_prints_nothing_and_the_log_has_what_it_tells(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hf_logging, "_tqdm_active", False)
    with caplog.at_level("DEBUG", "optimum_stat"):
        asked = {**QUIET, "logging_steps": 1}
        pruner_for("movement", tiny("bert", "SequenceClassification")).prune(labelled(), training_args=asked)
    assert capsys.readouterr().out == ""
    told = [record.progress for record in caplog.records if record.message.startswith("training: step 1 of")]
    assert "loss" in told[0]


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering"])
def test_examples_without_a_label_that_counts_are_left_out(head: str):
    """A batch of such alone has no loss; where there are no others, that is said."""
    plain = [{"input_ids": row["input_ids"]} for row in labelled(16)]
    if head == "QuestionAnswering":
        rows, empty = ([{**row, "start_positions": at, "end_positions": at} for row in plain] for at in (2, 99))
    else:
        rows, empty = ([{**row, "labels": [each] * len(row["input_ids"])} for row in plain] for each in (1, -100))
    asked = {**QUIET, "per_device_train_batch_size": 1, "num_train_epochs": 1}
    pruner_for("movement", tiny("bert", head), distill=0.0).prune(rows + empty, training_args=asked)
    with pytest.raises(ValueError, match="None of 16 examples has a label that counts"):
        pruner_for("movement", tiny("bert", head), distill=0.0).prune(empty, training_args=asked)


def test_an_evaluation_in_half_precision_is_refused():
    rows = Dataset.from_list(labelled())
    with pytest.raises(ValueError, match="evaluation in half precision asked"):
        pruner_for("movement", tiny("bert", "SequenceClassification")).prune(
            rows, rows, {"bf16_full_eval": True, "use_cpu": True}
        )


def test_fine_tuning_needs_something_that_trains():
    model = tiny("bert", "SequenceClassification").requires_grad_(False)
    with pytest.raises(ValueError, match=r"finetune_epochs=1\.0 asked, but no parameter"):
        pruner_for("movement", model, finetune_epochs=1.0).prune(Dataset.from_list(labelled()))


def test_what_another_run_left_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Masked weights, from which fine-tuning starts, are those of this run; checkpoints before them are Trainer's own."""
    rows = Dataset.from_list(labelled())
    asked: dict[str, Any] = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1, **QUIET}

    def run(seed: int, folder: str, stop: int = 0) -> Any:
        model = tiny("bert", "SequenceClassification")
        pruner = pruner_for("movement", model, finetune_epochs=1.0, seed=seed, score_learning_rate=0.1 + seed)
        args = {**asked, "output_dir": str(tmp_path / folder)}
        if stop:
            with power_cut(monkeypatch, stop):
                pruner.prune(rows, training_args=args)
            pruner.prune(rows, training_args=args, resume_from_checkpoint=True)
        else:
            pruner.prune(rows, training_args=args)
        return model.state_dict()

    run(0, "shared")
    for checkpoint in (tmp_path / "shared").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    found, alone = run(1, "shared", stop=3), run(1, "alone")
    assert all(torch.equal(found[name], value) for name, value in alone.items())


def test_a_folder_of_the_users_stays(tmp_path: Path):
    (tmp_path / "finetune").mkdir()
    for folder in ("finetune", "stat-finetune"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "mine.safetensors").write_text("precious")
    for save in ("no", "steps"):
        asked = {**QUIET, "output_dir": str(tmp_path), "save_strategy": save}
        pruner_for("movement", tiny("bert", "SequenceClassification"), finetune_epochs=1.0).prune(labelled(), training_args=asked)
        assert (tmp_path / "finetune" / "mine.safetensors").read_text() == "precious"
        assert (tmp_path / "stat-finetune" / "mine.safetensors").read_text() == "precious"


def test_only_the_same_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {**QUIET, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}

    def start(**other: Any) -> TrainedPruner[Any]:
        return pruner_for("movement", tiny("bert", "SequenceClassification"), finetune_epochs=1.0, **other)

    whole = start()
    whole.prune(labelled(), training_args={**asked, "output_dir": str(tmp_path / "whole")})
    with power_cut(monkeypatch, 9):
        start().prune(labelled(), training_args=asked)
    with pytest.raises(ValueError, match=r"holds the checkpoints of another run: its keep was 0\.6, now 0\.7 is asked"):
        start(keep=0.7).prune(labelled(), training_args=asked, resume_from_checkpoint=True)
    for name in ("save_only_model", "ignore_data_skip"):
        with pytest.raises(ValueError, match=f"{name}=True asked of a run that is resumed"):
            start().prune(labelled(), training_args={**asked, name: True}, resume_from_checkpoint=True)
    steps: list[int] = []
    original = PruningTrainer.training_step

    def training_step(self: Any, *arguments: Any, **named: Any) -> Tensor:
        steps.append(self.state.global_step)
        return original(self, *arguments, **named)

    monkeypatch.setattr(PruningTrainer, "training_step", training_step)
    resumed = start()
    resumed.prune(labelled(), training_args=asked, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert steps == [2, 3, 4, 5, *range(6)]  # from there, although later ones are there
    wanted, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_an_error_after_training_leaves_a_live_model_as_it_was(monkeypatch: pytest.MonkeyPatch):
    model = tiny("bert", "SequenceClassification")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = pruner_for("movement", model)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_stat.pruner.write_record", fail)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(Dataset.from_list(labelled()), training_args={"num_train_epochs": 1, "report_to": "none"})
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
