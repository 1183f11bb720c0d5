"""From the options for methods that train to the arguments of their `prune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import command_data, command_options
from .command_base import WrongArguments


def arguments(args: Any, method: Any) -> dict[str, Any]:
    """What `prune` of methods that train takes besides the data; nothing for others. Imports torch."""
    from .trained import TrainedPruner

    given = command_options.given_training(args)
    if not issubclass(method, TrainedPruner):
        if given:
            raise WrongArguments(f"{given[0]} is no option of method {method.method}, which does not train.")
        return {}
    training_args = _parsed(args.training_args or [])
    if args.resume and "output_dir" not in training_args:
        raise WrongArguments("--resume asked, but there is nowhere to resume from: --training-args output_dir=FOLDER.")
    where = Path(training_args["output_dir"]).resolve() if "output_dir" in training_args else None
    if where is not None and args.output.resolve() in (where, *where.parents):
        raise WrongArguments(f"output_dir={where} asked, which is in OUTPUT or is OUTPUT itself: name another for checkpoints.")
    found = {"training_args": training_args, "teacher": args.teacher, "resume_from_checkpoint": args.resume or None}
    if args.eval_split:
        if args.dataset is None:
            raise WrongArguments("--eval-split asked without --dataset, whose part it would be.")
        split = {"streaming": args.streaming, "for_evaluation": True}
        found["eval_dataset"] = command_data.load(args.dataset, args.dataset_config, args.eval_split, **split)
    return found


def _parsed(pairs: list[str]) -> dict[str, Any]:
    """`name=value` as `transformers.TrainingArguments` has them: only the names given, with values of the right type."""
    from transformers import HfArgumentParser, TrainingArguments

    wrong = next((pair for pair in pairs if "=" not in pair or pair == "output_dir="), None)
    if wrong is not None:
        raise WrongArguments(f"--training-args {wrong} asked; it takes NAME=VALUE, such as learning_rate=5e-5.")
    given = dict(pair.split("=", 1) for pair in pairs)
    parser = HfArgumentParser(TrainingArguments, exit_on_error=False)
    known = {action.dest for action in parser._actions} - {"help"}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise WrongArguments(f"--training-args {unknown[0]}=... asked, but transformers.TrainingArguments has no {unknown[0]}.")
    try:
        parsed = parser.parse_args([part for name, value in given.items() for part in (f"--{name}", value)])
    except argparse.ArgumentError as error:
        raise WrongArguments(f"--training-args: {error}") from error
    return {name: getattr(parsed, name) for name in given}
