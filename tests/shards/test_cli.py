import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from shards.cli import cli
from shards.read import open_set
from shards.sample import DataSet

ROOT = Path(__file__).parents[2]


def shard(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from shards.cli import main; main()"]
    return subprocess.run(
        [*command, *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_the_road_from_a_table_to_a_checked_split_set(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    table(20, groups=10)
    out = tmp_path / "out"
    built = shard(
        "build",
        "table",
        tmp_path / "mine.csv",
        "--images",
        tmp_path / "mine",
        "--output",
        out,
        "--name",
        "mine",
        "--workers",
        1,
    )
    assert (built.returncode, built.stderr) == (0, "")
    assert "parts (train 12, val 4, test 4) become a split by `lmcl-shard split" in built.stdout
    assert "official.json: train 12, val 4, test 4" in (
        shard("split", out, "--protocol", "official").stdout
    )
    half = shard("split", out, "--protocol", "official-fraction", "--fraction", 0.5, "--repeats", 1)
    assert "official50-seed123-00.json: train 6, val 4, test 4" in half.stdout
    assert "20 images in 1 shards" in built.stdout
    split = shard("split", out, "--repeats", 2)
    assert "splits/70-10-20-seed123-01.json: train 14, val 2, test 4" in split.stdout
    checked = shard("verify", out, "--deep")
    assert (checked.returncode, "as they should be" in checked.stdout) == (0, True)
    shown = shard("info", out, "--sheet", tmp_path / "new" / "sheet.png")
    assert "20 in 1 shards" in shown.stdout
    assert (tmp_path / "new" / "sheet.png").stat().st_size > 1000
    manifest = out / "manifest.json"
    refused = shard("info", out, "--sheet", manifest)
    assert (refused.returncode, "was not written by this command" in refused.stderr) == (2, True)
    assert json.loads(shard("info", out, "--json").stdout)["name"] == "mine"
    (out / "mine-000000.tar").unlink()
    damaged = shard("verify", out)
    assert damaged.returncode == 3
    assert "error: missing-shard: mine-000000.tar" in damaged.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("build", "koniq", "x", "--output", "o"), 2, "did you mean 'koniq10k'?"),
        (("build", "biq2021", "{tmp}/nothing", "--output", "o"), 4, "there is no such folder"),
        (("build", "table", "{tmp}/no.csv", "--output", "o"), 4, "there is no such file"),
        (("build", "live", "--output", "o"), 2, "live needs a SOURCE"),
        (("verify", "{tmp}/nothing"), 4, "there is no such folder"),
        (("info", "{tmp}"), 4, "holds no packed set"),
        (("split", "{tmp}", "--protocol", "other"), 2, "is not one of"),
        (("datasets", "tid"), 2, "did you mean 'tid2013'?"),
        (("build", "table", "x", "--output", "o", "--score-range", "5", "1"), 2, "LOW < HIGH"),
        (("build", "table", "x", "--output", "o", "--score-range", "0", "inf"), 2, "two finite"),
        (("build", "table", "x", "--output", "o", "--shard-samples", "0"), 2, "x>=1"),
        (("build", "table", "x", "--output", "o", "--shard-mb", "nan"), 2, "above 0, in mega"),
        (("build", "table", "x", "--output", "o", "--shard-mb", "-1"), 2, "got -1"),
        (("build", "table", "x", "--output", "o", "--shard-mb", "inf"), 2, "got inf"),
        (("build", "table", "x", "--output", "o", "--name", ""), 2, "--name is empty"),
        (("build", "table", "x", "--output", "o", "--max-pixels", "0"), 2, "x>=1"),
        (("split", "{tmp}", "--repeats", "0"), 2, "x>=1"),
        (("build", "table", "{tmp}", "--output", "o"), 4, "is a folder without metadata.csv"),
    ],
)
def test_a_mistake_gets_one_sentence_and_an_exit_code(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    run = shard(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert run.returncode == code
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    table()
    run = shard(
        "build",
        "table",
        tmp_path / "mine.csv",
        "--images",
        tmp_path / "mine",
        "--output",
        tmp_path / "out",
        "--dry-run",
        "--shard-samples",
        5,
    )
    assert run.returncode == 0
    assert "images   12, of them 12 labelled" in run.stdout
    assert "shards   3" in run.stdout
    assert not (tmp_path / "out").exists()


def test_every_data_set_says_where_it_is_from() -> None:
    listed = shard("datasets").stdout
    for name in ("live", "csiq", "tid2013", "kadid10k", "livec", "koniq10k", "flive", "spaq"):
        assert name in listed
    shown = shard("datasets", "kadid10k").stdout
    assert "samples    10,125" in shown
    assert "licence" in shown
    assert "citation" in shown


def test_progress_is_off_when_nobody_looks(tmp_path: Path, table: Callable[..., DataSet]) -> None:
    table()
    run = shard("build", "unlabelled", tmp_path / "mine", "--output", tmp_path / "o")
    assert run.stderr == ""


def test_a_mistyped_command_is_answered_with_the_nearest() -> None:
    done = CliRunner().invoke(cli, ["biuld"])
    assert done.exit_code == 2
    assert "No such command 'biuld'. Did you mean 'build'?" in done.output


@pytest.mark.parametrize(
    ("output", "more", "name"),
    [
        ("My Photos", (), "my-photos"),
        ("demo", (), "demo-table"),
        ("koniq10k", (), "koniq10k-table"),
        ("table", (), "table"),
        ("Bäume_2024", (), "b-ume_2024"),
        ("__", (), "table"),
        ("x" * 60, (), "x" * 41),
        ("any", ("--name", "mine"), "mine"),
    ],
)
def test_a_table_is_named_after_its_folder(
    tmp_path: Path, table: Callable[..., DataSet], output: str, more: tuple[str, ...], name: str
) -> None:
    table()
    words = ("build", "table", str(tmp_path / "mine.csv"), "--images", str(tmp_path / "mine"))
    where = ("--score-range", "0", "100", "--output", str(tmp_path / "sets" / output))
    plan = CliRunner().invoke(cli, [*words, *where, *more, "--dry-run"])
    assert f"{name} -> " in plan.output, plan.output
    done = CliRunner().invoke(cli, [*words, *where, *more, "--no-progress"])
    assert done.exit_code == 0, done.output
    assert open_set(tmp_path / "sets" / output).name == name


def test_a_set_that_is_there_keeps_its_name(tmp_path: Path, table: Callable[..., DataSet]) -> None:
    table()
    words = ("build", "table", str(tmp_path / "mine.csv"), "--images", str(tmp_path / "mine"))
    where = ("--score-range", "0", "100", "--output", str(tmp_path / "set"), "--no-progress")
    assert CliRunner().invoke(cli, [*words, *where, "--name", "table"]).exit_code == 0
    again = CliRunner().invoke(cli, [*words, *where])
    assert again.exit_code == 0, again.output
    assert open_set(tmp_path / "set").name == "table"
