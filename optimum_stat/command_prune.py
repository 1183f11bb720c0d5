"""The command that makes a model small: `prune`, and what `sweep` shares with it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any, final

from . import command_data, command_options, command_training, command_values, folders
from .command_base import LOGGER, MAIN, Command, Result, WrongArguments, check_model, device, loading
from .command_resume import Unfinished


@final
class PruneCommand(Command):
    """`prune`."""

    shared = True

    @staticmethod
    def parse_args(parser: Any) -> None:
        """Declare the options."""
        parser.description = "Prune a model and write it, ready for from_pretrained, into a new folder."
        parser.add_argument("output", metavar="OUTPUT", type=command_values.place, help="folder to write, new or empty")
        parser.add_argument("-m", "--model", required=True, help="a model on the Hub, or a folder")
        command_options.add_config_options(parser)
        command_options.add_data_options(parser, "which part of the dataset (default: train)")
        command_options.add_resume_option(parser)
        command_options.add_training_options(parser)
        command_options.add_model_options(parser)
        group = parser.add_argument_group("publishing")
        group.add_argument(
            "--push-to-hub",
            nargs="?",
            const="",
            metavar="REPO_ID",
            help="push too; without a name, under that of the folder (OUTPUT comes first, or is taken for the name)",
        )
        group.add_argument("--private", action="store_true", help="make the repo private if it is new")
        command_options.add_output_options(parser)

    def work(self) -> Result:
        """Prune, save, push."""
        args = self.args
        left = Unfinished.of(args.output, resume=args.resume)
        if not left.written:
            check_output(args.output, left.half_written())
        check_model(args.model)
        command_data.check(args.dataset)
        repo_id = _repo_id(args)
        method, config = method_and_config(args)
        training = command_training.arguments(args, method)
        pruner, data = pruner_and_data(args, method, config)
        with left.at_work():
            pruner.prune(**data, **(training or left.arguments(pruner)))
            if not left.written:
                left.clear_half_written()
                pruner.save_pretrained(args.output)
            url = _pushed(repo_id, args) if repo_id else None
        from .remote_code import own_auto_class

        own = own_auto_class(pruner.model)
        name, trust = own or type(pruner.model).__name__, ", trust_remote_code=True" if own else ""
        load = f'import optimum_stat; from transformers import {name}; model = {name}.from_pretrained("{args.output}"{trust})'
        lines = [str(pruner.report), f"saved in {args.output}", *([f"pushed: {url}"] if url else []), "", load]
        return "\n".join(lines), {"output": str(args.output), "url": url, "load": load, "report": pruner.report.to_dict()}


def pruner_and_data(args: Any, method: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """The pruner, and what its `prune` takes."""
    if args.dataset is None:
        LOGGER.info("no --dataset: the calibration data is %s. Your own data is better.", command_data.BUNDLED)
    dataset = command_data.dataset(args, for_evaluation=False)
    where = device(args)
    pruner = method.from_pretrained(args.model, config, task=args.task, **loading(args))
    if where is not None:
        pruner.model.to(where)
    return pruner, {"dataset": dataset, "text_columns": command_data.text_columns(args), "label_column": args.label_column}


def check_output(folder: Path, besides: Collection[Path] = ()) -> None:
    """Before hours of work: a folder that exists must be empty, `besides` apart, and one that does not must be possible."""
    folders.refuse_full(folder, "done", besides)
    place = folders.nearest(folder)
    if not folders.is_writable(place):
        raise PermissionError(f"{folder} cannot be made: {place} is not a folder that can be written to.")


def _repo_id(args: Any) -> str | None:
    """Where to push, checked before any work; None: nowhere."""
    if args.push_to_hub is None:
        if args.private:
            raise WrongArguments("--private asked without --push-to-hub.")
        return None
    from .hub import Destination

    name: str = args.push_to_hub or args.output.absolute().name
    if MAIN:
        try:
            Destination.checked(name, private=args.private)
        except (ValueError, ConnectionError) as error:
            own = "" if args.push_to_hub else f" {name!r} is OUTPUT's name; --push-to-hub takes another."
            raise type(error)(f"{error}{own} Nothing was done.") from error
    return name


def _pushed(repo_id: str, args: Any) -> str:
    """The commit's address. Whatever goes wrong, hours of work are saved and can be pushed later."""
    from .command_push import push
    from .processes import Processes

    try:
        return Processes.launched().as_main(lambda: push(args.output, repo_id, args.private))
    except Exception as error:
        command = ["optimum-cli", "stat", "push", str(args.output), repo_id, *(["--private"] if args.private else [])]
        raise RuntimeError(f"{error} The model is saved: `{shlex.join(command)}` pushes it.") from error


def method_and_config(args: Any) -> tuple[Any, Any]:
    """The method's class and its configuration; imports torch."""
    try:
        given = command_options.given_config(args)
    except KeyError as error:
        raise WrongArguments(error.args[0]) from None
    from .methods import METHODS

    method: Any = next(method for method in METHODS if method.method == args.method)
    start = method.config_class.paper() if args.paper else method.config_class()
    try:
        return method, dataclasses.replace(start, **given)
    except ValueError as error:
        raise WrongArguments(str(error)) from error
