import json
import re
import subprocess
import sys
from collections.abc import Collection

import click
import pytest
from click.testing import CliRunner

from lmcl.bench.build import _FORMATS
from lmcl.bench.contrastive import _DTYPES
from lmcl.bench.contrastive_cases import CASES
from lmcl.bench.loader_data import KINDS
from lmcl.cli import bench
from lmcl.cli.eval import command as eval_command
from lmcl.cli.main import _BENCHES, _ELSEWHERE, cli
from lmcl.evaluation import evaluate_run
from shards.cli import cli as shard_cli


@pytest.mark.parametrize("name", sorted({*_ELSEWHERE, "demo", "train", "show-config", "bench"}))
def test_every_command_explains_itself(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert "Usage" in done.output


@pytest.mark.parametrize("name", sorted(_BENCHES))
def test_every_benchmark_can_be_called(name: str) -> None:
    done = CliRunner().invoke(cli, ["bench", name, "--help"])
    assert done.exit_code == 0, done.output


COMMANDS = {
    "lmcl.cli.main": ["", "bench", *_ELSEWHERE, *(f"bench {name}" for name in _BENCHES)],
    "shards.cli": ["", *shard_cli.commands],
}
HEAVY = {
    *("torch", "torchvision", "timm", "accelerate", "scipy", "pyarrow", "numpy", "PIL", "nvidia"),
    *(
        "triton",
        "ray",
        "webdataset",
        "openpyxl",
        "onnx",
        "onnxruntime",
        "jinja2",
        "tqdm",
        "msgspec",
    ),
}


@pytest.mark.parametrize(
    ("module", "arguments"),
    [(m, a) for m, listed in COMMANDS.items() for a in listed],
    ids=lambda text: text.replace(" ", "-") or "group",
)
def test_help_imports_nothing_of_the_work(module: str, arguments: str) -> None:
    code = (
        "import sys\n"
        f"from {module} import cli\n"
        f"cli.main({[*arguments.split(), '--help']}, standalone_mode=False)\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage:")
    assert not HEAVY & set(done.stderr.split())


COMMANDS_OF_TRAINING = [
    *("score photo.jpg", "train --config smoke", "demo", "eval runs/x", "calibrate runs/x"),
    *("export runs/x --format onnx", "saliency photo.jpg --output looks", "push runs/x hf://me/x"),
]
HIDDEN = sorted(
    (HEAVY | {"tomli_w", "fsspec"}) - {"numpy", "PIL", "onnxruntime", "tqdm", "msgspec"}
)
"""What is not there where only exported files can be scored (docs/scoring.md)."""


@pytest.fixture(scope="module")
def without_packages() -> dict[str, tuple[int, str]]:
    """Exit code and words of each command where nothing but scoring's own packages is there."""
    code = (
        "import contextlib, io, json, sys\n"
        f"sys.modules |= dict.fromkeys({HIDDEN})\n"
        "from lmcl.cli.main import main\n"
        "found = {}\n"
        f"for line in {COMMANDS_OF_TRAINING}:\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        try:\n"
        "            main(line.split())\n"
        "        except SystemExit as end:\n"
        "            found[line] = (end.code, said.getvalue())\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("line", COMMANDS_OF_TRAINING)
def test_a_command_without_its_packages_says_which_and_how_to_get_them(
    without_packages: dict[str, tuple[int, str]], line: str
) -> None:
    code, said = without_packages[line]
    found = re.match(r"error: this needs the package (\S+), which is not installed; ", said)
    assert code == 4
    assert found is not None, said
    assert found[1].replace("-", "_") in HIDDEN
    assert f"`pip install '{found[1]}>=" in said
    assert said.count("\n") == 1


def test_importing_lmcl_imports_no_other_package() -> None:
    code = "import lmcl, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not (HEAVY | {"click"}) & set(done.stdout.split())


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        (eval_command, "part", evaluate_run.PARTS),
        (eval_command, "protocol", evaluate_run.PROTOCOLS),
        (bench.contrastive, "cases", CASES),
        (bench.contrastive, "dtype", _DTYPES),
        (bench.loader, "codec", (*KINDS, "all")),
        (bench.step, "codec", KINDS),
        (bench.build, "codecs", _FORMATS),
    ],
    ids=lambda value: getattr(value, "name", "") or str(value)[:12],
)
def test_choices_are_those_of_the_work(
    command: click.Command, option: str, values: Collection[str]
) -> None:
    found = next(parameter for parameter in command.params if parameter.name == option)
    assert isinstance(found.type, click.Choice)
    assert set(found.type.choices) == set(values)


def test_every_command_has_a_summary() -> None:
    assert all(summary for _, summary in (*_ELSEWHERE.values(), *_BENCHES.values()))


def test_help_lists_all_commands() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    for name in (*_ELSEWHERE, "demo", "train", "show-config", "bench"):
        assert name in text


@pytest.mark.parametrize(("group", "typed", "meant"), [
    ("lmcl", "scor", "'score'"),
    ("lmcl", "exprot", "'export'"),
    ("lmcl bench", "laoder", "'loader'"),
    ("lmcl", "zzzz", "There are bench, calibrate"),
])  # fmt: skip
def test_a_mistyped_command_is_answered_with_the_nearest(group, typed, meant) -> None:
    asked = [*group.split()[1:], typed]
    done = CliRunner().invoke(cli, asked)
    assert done.exit_code == 2
    assert f"No such command '{typed}'." in done.output
    assert meant in done.output
