import json
import sys
from pathlib import Path

from click.testing import CliRunner

from lmcl.cli.bench import score as command
from lmcl.errors import LmclError

QUICK = ["--images", "2", "--rounds", "1", "--crops", "2", "--encoder", "conv-vit"]


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


def test_an_environment_without_pyiqa_is_named_with_the_way_to_make_one() -> None:
    found = CliRunner().invoke(command, [*QUICK, "--pyiqa", sys.executable])
    assert isinstance(found.exception, LmclError)
    assert "pip install pyiqa" in str(found.exception)
