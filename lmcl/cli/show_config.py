"""`lmcl show-config`: the effective configuration of a file."""

from pathlib import Path

import click

from lmcl.config import dump_config, load_config


@click.command("show-config")
@click.argument("config_file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one field.")
def command(config_file: Path, overrides: tuple[str, ...]) -> None:
    """Print the whole effective configuration of a file, defaults included."""
    click.echo(dump_config(load_config(config_file, overrides)), nl=False)
