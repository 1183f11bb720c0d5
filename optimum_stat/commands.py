"""`optimum-cli stat ...`, and the same as `optimum-stat ...`.

`optimum-cli` imports this file at every start, so torch, transformers and datasets are imported where a command runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from . import __version__, command_data, command_options, command_values, folders
from .command_base import LOGGER, Command, Result, WrongArguments, check_model, device, loading
from .command_plan import PlanCommand
from .command_prune import PruneCommand
from .command_push import PushCommand
from .command_sweep import SweepCommand


@final
class EvaluateCommand(Command):
    """`evaluate`."""

    @staticmethod
    def parse_args(parser: Any) -> None:
        """Declare the options."""
        parser.description = (
            "Measure a model on what its head is for, and its dense model beside it: perplexity, accuracy and F1 of texts, "
            "words, images or sounds, correlation, exact match and F1 of answers, word error rate; for models without a head, "
            "the cosine of the two models' embeddings. README says which columns of the dataset each of these reads."
        )
        parser.add_argument("model", metavar="MODEL", help="a model on the Hub, or a folder")
        dense = parser.add_mutually_exclusive_group()
        dense.add_argument("--dense", metavar="BASE", help="the model to compare with (default: the one that was pruned)")
        dense.add_argument("--no-dense", action="store_true", help="compare with none")
        parser.add_argument(
            "--speed",
            type=command_values.numbers,
            metavar="BATCH,...",
            help="time both models, in turn, on batches of so many examples, such as 1,32; both have to fit into memory",
        )
        parser.add_argument("--save", action="store_true", help="write what was measured into MODEL's recipe and model card")
        command_options.add_data_options(parser, "which part of the dataset (default: validation, test or train)")
        command_options.add_reading_options(parser)
        command_options.add_model_options(parser)
        command_options.add_output_options(parser)

    def work(self) -> Result:
        """Measure both, compare, save."""
        args = self.args
        check_model(args.model)
        command_data.check(args.dataset)
        own = Path(args.model, args.subfolder or "")
        if args.save and not (own / folders.RECIPE).is_file():
            raise WrongArguments(f"--save asked, but {own} is no folder with a {folders.RECIPE} to write into.")
        from . import comparison, evaluation, recipe_update

        try:
            config = evaluation.data_config(**command_options.given(args, command_options.READING))
        except ValueError as error:
            raise WrongArguments(str(error)) from error
        data = evaluation.Data(
            command_data.dataset(args, for_evaluation=True), config, command_data.text_columns(args), args.label_column
        )
        kwargs = loading(args)
        dense = None if args.no_dense else args.dense or comparison.base_model(args.model, args.revision, args.subfolder)
        how = {"must": bool(args.dense), "task": args.task, "device": device(args), "speed": args.speed or ()}
        found = comparison.compare(args.model, dense, data, **how, **kwargs)
        if args.save:
            recipe_update.enter(own, found.metrics, speed=[each.to_dict() for each in found.speed])
        return str(found), found.to_dict()


@final
class ProfileCommand(Command):
    """`profile`."""

    @staticmethod
    def parse_args(parser: Any) -> None:
        """Declare the options."""
        parser.description = (
            "Measure how long the blocks of a model take at every size, on this device, and print the table, and the options "
            "with which `prune` finds it remembered. Run it on a machine that does nothing else."
        )
        parser.add_argument("model", metavar="MODEL", help="a model on the Hub, or a folder")
        parser.add_argument(
            "-o", "--output", type=command_values.file, metavar="FILE", help="write it here too, for --latency-table"
        )
        command_options.add_serving_options(parser)
        command_options.add_model_options(parser)
        command_options.add_output_options(parser)

    def work(self) -> Result:
        """Look the table up, or measure it."""
        args = self.args
        check_model(args.model)
        from . import profiling
        from .config import PruningConfig

        try:
            config = PruningConfig(**command_options.given(args, command_options.SERVING))
        except ValueError as error:
            raise WrongArguments(str(error)) from error
        found = profiling.profile(args.model, config, task=args.task, device=device(args), **loading(args))
        values = found.to_dict()
        if args.output is not None:
            args.output.write_text(json.dumps(values) + "\n")
        return str(found), values


@final
class ReportCommand(Command):
    """`report`."""

    @staticmethod
    def parse_args(parser: Any) -> None:
        """Declare the options."""
        parser.description = (
            "Compare pruned models: one column for each, from the recipes in their folders. With --html also as a page with "
            "pictures that stands alone: no scripts, nothing loaded from anywhere."
        )
        parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="a pruned model")
        parser.add_argument("--html", type=command_values.file, metavar="FILE", help="write the page here")
        command_options.add_output_options(parser)

    def work(self) -> Result:
        """Read the recipes; write the page."""
        from . import page, plots

        args, recipes = self.args, page.read(self.args.folders)
        if args.html is not None:
            if not plots.available():
                LOGGER.warning("matplotlib is not installed, so the page has no pictures: pip install 'optimum-stat[report]'")
            args.html.write_text(page.html(recipes), "utf-8")
        values = {"models": list(recipes), "summary": {name: values for name, values in page.summary(recipes)}}
        return page.text(recipes) + (f"\nsaved in {args.html}" if args.html else ""), values


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
        parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code that the model's repo holds")
        command_options.add_output_options(parser)

    def work(self) -> Result:
        """Build both models without weights and compare their sizes."""
        check_model(self.args.model)
        from . import dry_run, inspection

        look = dry_run.dry_run if self.args.dry_run else inspection.sizes
        found: Any = look(self.args.model, self.args.revision, trust_remote_code=self.args.trust_remote_code)
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
        CommandInfo(name="sweep", help="Prune a model to several sizes.", subcommand_class=SweepCommand),
        CommandInfo(name="push", help="Publish a pruned model that is saved.", subcommand_class=PushCommand),
        CommandInfo(name="plan", help="What a run would take: sizes, memory, time.", subcommand_class=PlanCommand),
        CommandInfo(name="evaluate", help="Measure a pruned model beside its dense one.", subcommand_class=EvaluateCommand),
        CommandInfo(name="profile", help="Time a model's blocks at every size.", subcommand_class=ProfileCommand),
        CommandInfo(name="report", help="Compare pruned models side by side.", subcommand_class=ReportCommand),
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
