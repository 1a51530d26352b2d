import importlib

import click
import pytest
from click.testing import CliRunner

from lmcl.cli.main import _BENCHES, _ELSEWHERE, cli


@pytest.mark.parametrize("name", sorted({*_ELSEWHERE, "demo", "train", "show-config", "bench"}))
def test_every_command_explains_itself(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert "Usage" in done.output


@pytest.mark.parametrize("name", sorted(_BENCHES))
def test_every_benchmark_can_be_called(name: str) -> None:
    done = CliRunner().invoke(cli, ["bench", name, "--help"])
    assert done.exit_code == 0, done.output


def test_the_list_of_commands_matches_what_they_say_of_themselves() -> None:
    for module, summary in (*_ELSEWHERE.values(), *_BENCHES.values()):
        command = importlib.import_module(module).command
        assert isinstance(command, click.Command)
        assert summary


def test_help_lists_all_commands() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    for name in (*_ELSEWHERE, "demo", "train", "show-config", "bench"):
        assert name in text
