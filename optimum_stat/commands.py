"""`optimum-cli stat ...`, and the same as `optimum-stat ...`.

`optimum-cli` imports this file at every start, so torch, transformers and datasets are imported where a command runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from . import __version__, command_data, command_options
from .command_base import LOGGER, Command, Result, WrongArguments


@final
class PruneCommand(Command):
    """`prune`."""

    @staticmethod
    def parse_args(parser: Any) -> None:
        """Declare the options."""
        parser.description = "Prune a model and write it, ready for from_pretrained, into a new folder."
        parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write, new or empty")
        parser.add_argument("-m", "--model", required=True, help="a model on the Hub, or a folder")
        command_options.add_config_options(parser)
        command_options.add_data_options(parser, "which part of the dataset (default: train)")
        command_options.add_model_options(parser)
        group = parser.add_argument_group("publishing")
        group.add_argument(
            "--push-to-hub", nargs="?", const="", metavar="REPO_ID", help="push too; without a name, under that of the folder"
        )
        group.add_argument("--private", action="store_true", help="make the repo private if it is new")
        command_options.add_output_options(parser)

    def work(self) -> Result:
        """Prune, save, push."""
        args = self.args
        _check_output(args.output)
        _check_model(args.model)
        command_data.check(args.dataset)
        repo_id = _repo_id(args)
        method, config = _method_and_config(args)
        if args.dataset is None:
            LOGGER.info("no --dataset: the calibration data is %s. Your own data is better.", command_data.BUNDLED)
        dataset = _dataset(args, for_evaluation=False)
        device = _device(args)
        pruner = method.from_pretrained(args.model, config, task=args.task, **_loading(args))
        if device is not None:
            pruner.model.to(device)
        pruner.prune(dataset, text_columns=_text_columns(args), label_column=args.label_column)
        pruner.save_pretrained(args.output)
        url = pruner.push_to_hub(repo_id, private=args.private or None) if repo_id else None
        name = type(pruner.model).__name__
        load = f'import optimum_stat; from transformers import {name}; model = {name}.from_pretrained("{args.output}")'
        lines = [str(pruner.report), f"saved in {args.output}", *([f"pushed: {url}"] if url else []), "", load]
        return "\n".join(lines), {"output": str(args.output), "url": url, "load": load, "report": pruner.report.to_dict()}


@final
class EvaluateCommand(Command):
    """`evaluate`."""

    @staticmethod
    def parse_args(parser: Any) -> None:
        """Declare the options."""
        parser.description = (
            "Measure a model on what its head is for, and its dense model beside it: perplexity, accuracy and F1, correlation, "
            "exact match and F1 of answers; for models without a head, the cosine of the two models' embeddings."
        )
        parser.add_argument("model", metavar="MODEL", help="a model on the Hub, or a folder")
        dense = parser.add_mutually_exclusive_group()
        dense.add_argument("--dense", metavar="BASE", help="the model to compare with (default: the one that was pruned)")
        dense.add_argument("--no-dense", action="store_true", help="compare with none")
        parser.add_argument("--save", action="store_true", help="write the metrics into MODEL's recipe and model card")
        command_options.add_data_options(parser, "which part of the dataset (default: validation, test or train)")
        command_options.add_reading_options(parser)
        command_options.add_model_options(parser)
        command_options.add_output_options(parser)

    def work(self) -> Result:
        """Measure both, compare, save."""
        args = self.args
        _check_model(args.model)
        command_data.check(args.dataset)
        if args.save and not (Path(args.model) / "stat_recipe.json").is_file():
            raise WrongArguments(f"--save asked, but {args.model} is no folder with a stat_recipe.json to write into.")
        from . import comparison, evaluation

        try:
            config = evaluation.data_config(**command_options.given_reading(args))
        except ValueError as error:
            raise WrongArguments(str(error)) from error
        data = evaluation.Data(_dataset(args, for_evaluation=True), config, _text_columns(args), args.label_column)
        kwargs = _loading(args)
        dense = None if args.no_dense else args.dense or comparison.base_model(args.model, args.revision)
        found = comparison.compare(args.model, dense, data, must=bool(args.dense), task=args.task, device=_device(args), **kwargs)
        if args.save:
            comparison.save(Path(args.model), found)
        return str(found), found.to_dict()


@final
class InspectCommand(Command):
    """`inspect`."""

    @staticmethod
    def parse_args(parser: Any) -> None:
        """Declare the options."""
        parser.description = (
            "Show what is left of each block of a pruned model or, with --dry-run, what could be pruned in any model. Reads "
            "config.json, no weights."
        )
        parser.add_argument("model", metavar="MODEL", help="a model on the Hub, or a folder")
        parser.add_argument(
            "--dry-run", action="store_true", help="the groups, what a unit of each costs, and how small the model can get"
        )
        parser.add_argument("--revision", help="branch, tag or commit of the model's repo")
        command_options.add_output_options(parser)

    def work(self) -> Result:
        """Build both models without weights and compare their sizes."""
        _check_model(self.args.model)
        from . import comparison, dry_run

        look = dry_run.dry_run if self.args.dry_run else comparison.sizes
        found: Any = look(self.args.model, self.args.revision)
        return str(found), found.to_dict()


@final
class AutoloadCommand(Command):
    """`autoload`."""

    @staticmethod
    def parse_args(parser: Any) -> None:
        """Declare the options."""
        parser.description = (
            "Let every program of this Python environment load pruned models, without importing optimum_stat: `on` writes a "
            "file optimum_stat.pth beside the package, which Python reads when it starts. Uninstalling the package removes "
            "it; so does upgrading: turn it on again afterwards."
        )
        parser.add_argument("state", choices=("on", "off", "status"), help="switch it on, off, or say which it is")
        command_options.add_output_options(parser)

    def work(self) -> Result:
        """Write, remove or look for the file."""
        from . import autoload

        does = {"on": autoload.turn_on, "off": autoload.turn_off, "status": autoload.status}
        status = does[self.args.state]()
        return status, {"on": status.startswith("on"), "status": status}


class StatCommand(BaseOptimumCLICommand):
    """`optimum-cli stat`."""

    COMMAND = CommandInfo(name="stat", help="Structured pruning: smaller, faster, ordinary models without retraining.")
    SUBCOMMANDS: ClassVar[Any] = (
        CommandInfo(name="prune", help="Prune a model.", subcommand_class=PruneCommand),
        CommandInfo(name="evaluate", help="Measure a pruned model beside its dense one.", subcommand_class=EvaluateCommand),
        CommandInfo(name="inspect", help="Show what is left of each block, or could be.", subcommand_class=InspectCommand),
        CommandInfo(name="autoload", help="Load pruned models in every program.", subcommand_class=AutoloadCommand),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The stand-alone script `optimum-stat`; raises SystemExit unless all went well."""
    parser = argparse.ArgumentParser("optimum-stat", description=StatCommand.COMMAND.help)
    parser.add_argument("--version", action="version", version=f"optimum-stat {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for info in StatCommand.SUBCOMMANDS:
        info.subcommand_class(subparsers, command=info)
    args = parser.parse_args(argv)
    args.func(args).run()


def _check_output(folder: Path) -> None:
    """Before hours of work: a folder that exists must be empty, and one that does not must be possible."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; nothing was done. Choose another place.")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PermissionError(f"{folder} cannot be made: {above} is not a folder that can be written to.")


def _check_model(model: str) -> None:
    model = model.rpartition("/")[0] if model.endswith(".gguf") else model
    looks_like_path = model != os.path.normpath(model) or model.count("/") > 1 or model.startswith(("/", ".", "~"))
    if looks_like_path and not Path(model).exists():
        raise FileNotFoundError(f"model {model} asked, but there is no such folder.")


def _repo_id(args: Any) -> str | None:
    """Where to push, checked before any work; None: nowhere."""
    if args.push_to_hub is None:
        if args.private:
            raise WrongArguments("--private asked without --push-to-hub.")
        return None
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError("--push-to-hub needs a token: run `hf auth login` or set HF_TOKEN. Nothing was done.")
    return args.push_to_hub or args.output.absolute().name


def _method_and_config(args: Any) -> tuple[Any, Any]:
    """The method's class and its configuration; imports torch."""
    try:
        given = command_options.given_config(args)
    except KeyError as error:
        raise WrongArguments(f"{error.args[0]} is no option of method {args.method}.") from None
    from .methods import METHODS

    method: Any = next(method for method in METHODS if method.method == args.method)
    start = method.config_class.paper() if args.paper else method.config_class()
    try:
        return method, dataclasses.replace(start, **given)
    except ValueError as error:
        raise WrongArguments(str(error)) from error


def _dataset(args: Any, *, for_evaluation: bool) -> Any:
    return command_data.load(
        args.dataset, args.dataset_config, args.split, streaming=args.streaming, for_evaluation=for_evaluation
    )


def _text_columns(args: Any) -> list[str] | None:
    return [name for part in args.text_columns for name in part.split(",")] if args.text_columns else None


def _loading(args: Any) -> dict[str, Any]:
    """What goes to from_pretrained."""
    names = ("dtype", "device_map", "revision", "gguf_file", "trust_remote_code")
    return {name: getattr(args, name) for name in names if getattr(args, name)}


def _device(args: Any) -> Any:
    """Where to move the model; None: where `--device-map` puts it."""
    import torch

    if args.device_map:
        return None
    asked = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {asked} asked, but it cannot be used: {error}") from error
    return device
