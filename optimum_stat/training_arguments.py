"""Which of Trainer's arguments a method that trains cannot honour."""

from __future__ import annotations

from torch import nn
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from .data import Batches
from .processes import Processes
from .training_data import metrics_of


def check(args: TrainingArguments, model: nn.Module, evaluation: Batches | None) -> None:
    """Refuse, before any work, what Trainer would find out at the end, or nobody would."""
    if Processes.launched().count > 1 and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError(
            "training_args for one process, where several run: each would train alone. On CPUs, ask for use_cpu=True."
        )
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end asked, but while pruning the best checkpoint is one that is hardly pruned yet. "
            "Leave it out: the last state is the one that has the size asked for."
        )
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor={args.label_smoothing_factor} asked; the loss here has none. Leave it out.")
    if evaluation is not None and (args.bf16_full_eval or args.fp16_full_eval):
        raise ValueError("An evaluation in half precision asked, which would leave the weights in it. Leave it out.")
    if evaluation is not None and not args.eval_do_concat_batches:
        raise ValueError("eval_do_concat_batches=False asked, but metrics are those of all examples. Leave it out.")
    for name in ("prediction_loss_only", "batch_eval_metrics", "label_names"):
        if evaluation is not None and getattr(args, name):
            raise ValueError(
                f"{name}={getattr(args, name)!r} asked, but the metrics are those of the model's task. Leave it out."
            )
    wanted, known = args.metric_for_best_model, ("loss", *metrics_of(model))
    if evaluation is None and (args.eval_strategy != "no" or wanted):
        raise ValueError("training_args ask for an evaluation, and there is nothing to evaluate on: pass eval_dataset=.")
    if wanted and wanted.removeprefix("eval_") not in known:
        raise ValueError(f"metric_for_best_model={wanted!r} asked; for {type(model).__name__} there are {', '.join(known)}.")
