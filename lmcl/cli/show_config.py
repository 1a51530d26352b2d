"""`lmcl show-config`: the effective configuration of a file."""

from pathlib import Path

import click


@click.command(
    "show-config",
    epilog="EXAMPLES: lmcl show-config --list · lmcl show-config demo · "
    "lmcl show-config mine.toml --set train.epochs=3",
)
@click.argument("config_file", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one field.")
@click.option("--list", "lists", is_flag=True, help="Name the configurations that come along.")
def command(config_file: Path | None, overrides: tuple[str, ...], lists: bool) -> None:
    """Print the whole effective configuration of a file, defaults included.

    FILE is a TOML file, or the name of a configuration that comes with the project.
    """
    from lmcl.config import config_names, dump_config, load_config

    if lists:
        click.echo("\n".join(config_names()))
    elif config_file is None:
        raise click.UsageError("name a FILE, or --list those that come with the project")
    else:
        click.echo(dump_config(load_config(config_file, overrides)), nl=False)
