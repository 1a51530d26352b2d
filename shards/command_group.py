"""Command group that answers a mistyped command with the nearest one."""

import difflib
import os
import re

import click

_HOME = re.compile(r"(--?[\w-]+=)?~(?=/|$)")


class CommandGroup(click.Group):
    """A click group whose "No such command" says which one was probably meant."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The arguments, with `~` for the user's folder where no shell put that in.

        Shells leave `--output=~/x` and quoted words alone.
        """
        return super().parse_args(ctx, [expand_home(word) for word in args])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names.

        Raises:
            click.UsageError: If there is none; it names those of similar spelling, or all.
        """
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], names, n=2) or names
            asked = "".join(c if c.isprintable() else "?" for c in args[0][:80])
            listed = " or ".join(map(repr, near)) if near != names else ", ".join(names)
            way = f"Did you mean {listed}?" if near != names else f"There are {listed}."
            ctx.fail(f"No such command {asked!r}. {way}")
        return super().resolve_command(ctx, args)


def expand_home(word: str) -> str:
    """A word of a command line whose path begins in the user's folder, with that folder."""
    found = _HOME.match(word)
    if found is None:
        return word
    option = found[1] or ""
    return option + os.path.expanduser(word[len(option) :])
