import click
import pytest
from click.testing import CliRunner

from shards.number_range import NumberRange


@click.command()
@click.option("--share", type=NumberRange(0, 1, min_open=True))
def _ask(share: float | None) -> None:
    click.echo(f"share {share}")


@pytest.mark.parametrize("given", ["nan", "NaN", "-nan", "inf", "-inf", "0", "1.5", "half"])
def test_what_is_no_number_between_the_ends_is_a_usage_error(given: str) -> None:
    found = CliRunner().invoke(_ask, ["--share", given])
    assert found.exit_code == 2
    assert "--share" in found.output


def test_a_number_between_the_ends_is_taken() -> None:
    assert CliRunner().invoke(_ask, ["--share", ".25"]).output == "share 0.25\n"
