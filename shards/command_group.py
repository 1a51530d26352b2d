"""Command group that answers a mistyped command with the nearest one."""

import difflib

import click


class CommandGroup(click.Group):
    """A click group whose "No such command" says which one was probably meant."""

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
