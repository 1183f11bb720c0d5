"""`plan`: what a run would take, from the config alone."""

from __future__ import annotations

from typing import Any, final

from . import command_options
from .command_base import Command, Result, WrongArguments, check_model, device


@final
class PlanCommand(Command):
    """`plan`."""

    @staticmethod
    def parse_args(parser: Any) -> None:
        """Declare the options."""
        parser.description = (
            "Say what pruning a model with method stat would take, before anything but its config.json is downloaded: parameters "
            "and bytes before and after, memory for statistics, time, what would be offloaded. It reads no weights and no data, "
            "so it cannot say what each layer would keep nor what that does to the model: `sweep` without OUTPUT does, from data."
        )
        parser.add_argument("-m", "--model", required=True, help="a model on the Hub, or a folder")
        command_options.add_planning_options(parser)
        group = parser.add_argument_group("loading")
        group.add_argument(
            "--task", help="what the model is for, if its config does not say: text-classification, fill-mask, ..."
        )
        group.add_argument("--dtype", help="float32, bfloat16, float16 (default: as the weights are stored)")
        group.add_argument("--device", help="whose speed to measure (default: cuda if there is one, else cpu)")
        group.add_argument("--revision", help="branch, tag or commit of the model's repo")
        group.add_argument("--trust-remote-code", action="store_true", help="run the Python code that the model's repo holds")
        command_options.add_placing_options(group)
        command_options.add_output_options(parser)
        parser.set_defaults(device_map=None)

    def work(self) -> Result:
        """Build the model without weights, and count."""
        args = self.args
        check_model(args.model)
        try:
            max_memory = command_options.given_max_memory(args)
        except ValueError as error:
            raise WrongArguments(str(error)) from error
        from .methods.stat import STATConfig
        from .run_plan import plan_run

        try:
            config = STATConfig(**command_options.given(args, (*command_options.PLANNING, "metric")))
        except ValueError as error:
            raise WrongArguments(str(error)) from error
        kwargs = {name: getattr(args, name) for name in ("revision", "trust_remote_code") if getattr(args, name)}
        found = plan_run(
            args.model, config, task=args.task, dtype=args.dtype, max_memory=max_memory, device=device(args), **kwargs
        )
        return str(found), found.to_dict()
