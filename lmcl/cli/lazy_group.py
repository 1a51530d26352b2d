"""Lazy click group: commands are imported when they are called."""

import importlib
from typing import Any

import click

from shards.command_group import CommandGroup


class LazyGroup(CommandGroup):
    """A group whose commands are imported when they are called: `lmcl --help` stays quick.

    `elsewhere` has the place of each, `module` (its `command`) or `module:name`, and its summary.
    The modules of commands declare options only; their work is imported when it is done.
    """

    def __init__(
        self, *args: Any, elsewhere: dict[str, tuple[str, str]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.elsewhere = elsewhere or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, sorted."""
        return sorted({*super().list_commands(ctx), *self.elsewhere})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now if it lives elsewhere."""
        if cmd_name in self.elsewhere:
            module, _, name = self.elsewhere[cmd_name][0].partition(":")
            found: click.Command = getattr(importlib.import_module(module), name or "command")
            return found
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `--help`, without importing what it lists."""
        rows = []
        for name in self.list_commands(ctx):
            if name in self.elsewhere:
                rows.append((name, self.elsewhere[name][1]))
            elif (command := super().get_command(ctx, name)) is not None:
                rows.append((name, command.get_short_help_str(limit=80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)
