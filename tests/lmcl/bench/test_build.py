"""`lmcl bench build` and `lmcl bench manifest`, small: all cases there, nothing left behind."""

import json
from pathlib import Path

from click.testing import CliRunner

from lmcl.cli.bench import build as build_command
from lmcl.cli.bench import manifest as manifest_command


def lines(path: Path) -> dict[str, dict[str, object]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["case"]: line for line in found}


def test_packing_is_measured_beside_reading_alone_and_cleans_up(tmp_path: Path) -> None:
    output, work = tmp_path / "build.jsonl", tmp_path / "work"
    work.mkdir()
    asked = ["--codec", "png", "--images", "12", "--side", "64", "--rounds", "1", "--workers", "1"]
    done = CliRunner().invoke(
        build_command, [*asked, "--work", str(work), "--output", str(output), "--no-progress"]
    )
    assert done.exit_code == 0, done.output
    found = lines(output)
    packed = {"build", "build_from_tars", "build_from_parquet"}
    assert {"read_hash_decode", "parquet_share_by_processor_time", *packed} < set(found)
    assert {found[case]["params"]["images"] for case in packed} == {12}
    assert list(work.iterdir()) == []


def test_a_synthetic_manifest_is_opened_and_split_and_removed(tmp_path: Path) -> None:
    output, work = tmp_path / "manifest.jsonl", tmp_path / "work"
    work.mkdir()
    done = CliRunner().invoke(
        manifest_command, ["--samples", "20000", "--work", str(work), "--output", str(output)]
    )
    assert done.exit_code == 0, done.output
    found = lines(output)
    assert len(found) >= 2
    assert all(line["params"]["samples"] == 20000 for line in found.values())
    assert list(work.iterdir()) == []
