import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lmcl.bench.score import make_photos
from lmcl.cli.bench import score as command
from lmcl.errors import LmclError

QUICK = [
    "--images",
    "2",
    "--rounds",
    "1",
    "--crops",
    "2",
    "--encoder",
    "conv-vit",
    "--engine",
    "torch",
]


def test_both_cases_are_measured_and_set_against_each_other(tmp_path: Path) -> None:
    file = tmp_path / "score.jsonl"
    found = CliRunner().invoke(command, [*QUICK, "--json", str(file)], catch_exceptions=False)
    assert found.exit_code == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["case"] for r in records] == ["bare_model", "lmcl_score"]
    assert all(r["median"] > 0 and r["cpu_ms_per_image"] > 0 for r in records)
    assert "lmcl_score / bare_model:" in found.output
    bare, whole = (r["engines"] for r in records)
    assert bare.startswith("device cpu")
    assert "decode" not in bare
    assert whole.startswith(f"{bare}, decode torch-pillow-")


def test_a_calibrated_model_is_measured_with_adaptive_crops_too(tmp_path: Path) -> None:
    file = tmp_path / "score.jsonl"
    make_photos(tmp_path / "photos", 5)
    asked = ["--model", "starter", "--images", "4", "--rounds", "1", "--engine", "torch"]
    asked += ["--photos", str(tmp_path / "photos")]
    found = CliRunner().invoke(command, [*asked, "--json", str(file)], catch_exceptions=False)
    assert found.exit_code == 0
    records = {r["case"]: r for r in map(json.loads, file.read_text().splitlines())}
    assert list(records) == ["bare_model", "lmcl_score", "lmcl_score_adaptive"]
    every, some = records["lmcl_score"], records["lmcl_score_adaptive"]
    assert (every["crop_share"], every["agreement"]) == (1.0, pytest.approx(1.0))
    assert 0 < some["crop_share"] <= 1
    assert (some["params"]["crops"], some["params"]["images"]) == (4, 4)
    assert f"SRCC with lmcl_score {some['agreement']:.4f}, {some['crop_share']:.0%}" in found.output


@pytest.mark.slow
def test_the_engines_are_measured_in_one_run(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    file = tmp_path / "score.jsonl"
    asked = [*QUICK, "--engine", "onnx", "--engine", "int8", "--json", str(file)]
    found = CliRunner().invoke(command, asked, catch_exceptions=False)
    assert found.exit_code == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    ours = ["lmcl_score", "lmcl_score_onnx", "lmcl_score_int8"]
    assert [r["case"] for r in records] == ["bare_model", *ours]
    assert "lmcl_score / lmcl_score_int8:" in found.output
    assert all("onnxruntime" in r["engines"] for r in records[2:])


def test_an_environment_without_pyiqa_is_named_with_the_way_to_make_one() -> None:
    found = CliRunner().invoke(command, [*QUICK, "--pyiqa", sys.executable])
    assert isinstance(found.exception, LmclError)
    assert "pip install pyiqa" in str(found.exception)
