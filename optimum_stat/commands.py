"""optimum-cli stat ..."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class StatCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="stat", help="Structured pruning")
