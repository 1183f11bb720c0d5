"""What `optimum-cli` finds and imports at every start: the wheel puts this file into optimum/commands/register."""

from optimum_stat.commands import StatCommand

REGISTER_COMMANDS = [StatCommand]
