"""The command that makes several sizes at once, and says what each of them is worth."""

from __future__ import annotations

import argparse
import json
from typing import Any, final

from . import command_data, command_options, command_values
from .command_base import MAIN, Command, Result, WrongArguments, check_model
from .command_prune import check_output, method_and_config, pruner_and_data


@final
class SweepCommand(Command):
    """`sweep`."""

    shared = True

    @staticmethod
    def parse_args(parser: Any) -> None:
        """Declare the options."""
        parser.description = (
            "Prune a model to several sizes from one calibration. Each goes into a folder of its own in OUTPUT, named by the "
            "share that it keeps, beside sweep.json with the table that is printed. Without OUTPUT nothing is cut: the table "
            "says what would be kept, and which error the method expects. (`plan` says, without data, what a run would take.)"
        )
        parser.add_argument(
            "output", metavar="OUTPUT", nargs="?", type=command_values.place, help="folder to write, new or empty"
        )
        parser.add_argument("-m", "--model", required=True, help="a model on the Hub, or a folder")
        parser.add_argument(
            "--keep", dest="shares", type=_shares, metavar="SHARE,...", help="such as 0.8,0.6,0.4 (default: 1, 0.95, ..., 0.1)"
        )
        command_options.add_config_options(parser, without=("keep",))
        command_options.add_data_options(parser, "which part of the dataset (default: train)")
        group = parser.add_argument_group("measuring", "how good and how fast the models in OUTPUT are, beside the dense one")
        group.add_argument(
            "--eval-dataset", metavar="DATASET", help="measure on this (default: the same dataset, if --eval-split is given)"
        )
        group.add_argument(
            "--eval-split", metavar="SPLIT", help="on this part of it (default, of --eval-dataset: validation, test or train)"
        )
        command_options.add_model_options(parser)
        command_options.add_output_options(parser)

    def work(self) -> Result:
        """Measure once; save each, or only say what it would be."""
        args = self.args
        if args.output is not None:
            if args.shares is None:
                raise WrongArguments("OUTPUT asked without --keep: say which sizes to write, such as --keep 0.8,0.6,0.4.")
            check_output(args.output)
        check_model(args.model)
        command_data.check(args.dataset)
        from .trained import TrainedPruner

        eval_data = self._eval_data()
        method, config = method_and_config(args)
        if issubclass(method, TrainedPruner):
            raise WrongArguments(f"--method {args.method} asked, which trains towards one size: `prune` to each by itself.")
        pruner, data = pruner_and_data(args, method, config)
        from .sweep_report import SweepReport

        shares = {} if args.shares is None else {"keep": args.shares}
        if args.output is None:
            found = SweepReport.of_plan(pruner, pruner.plan(**data, **shares))
            return str(found), found.to_dict()
        from . import family

        found = family.write(pruner, pruner.sweep(**data, **shares), args.output, eval_data)
        if MAIN:
            (args.output / "sweep.json").write_text(json.dumps(found.to_dict(), indent=2) + "\n")
        return f"{found}\nsaved in {args.output}", found.to_dict()

    def _eval_data(self) -> Any:
        """What to measure on; None: nothing."""
        args = self.args
        name = args.eval_dataset or args.dataset
        if args.eval_dataset is None and args.eval_split is None:
            return None
        if args.output is None:
            raise WrongArguments("An evaluation asked without OUTPUT: nothing is cut, so there is nothing to measure.")
        if name is None:
            raise WrongArguments("--eval-split asked without --dataset, whose part it would be.")
        command_data.check(name)
        config_name = args.dataset_config if args.eval_dataset is None else None
        from .evaluation import Data, data_config

        dataset = command_data.load(name, config_name, args.eval_split, streaming=args.streaming, for_evaluation=True)
        texts, label, columns = command_data.text_columns(args), args.label_column, dataset.column_names or ()
        # they name those of --dataset, which another one need not have
        own = {"text_columns": texts if {*(texts or ())} <= {*columns} else None}
        return Data(dataset, data_config(), label_column=label if label in columns else None, **own)


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} asked; it must be shares with commas between them, such as 0.8,0.6."
        ) from None
