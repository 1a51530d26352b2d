import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from lmcl.cli.bench import loader as command


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, object]], Path]:
    folder = tmp_path_factory.mktemp("bench")
    arguments = (
        "--codec jpg --images 8 --batch 4 --crops 2 --size 64 --rounds 1 --threads 1 --workers 0 "
        f"--no-progress --json --output {folder / 'results.jsonl'} --chart {folder / 'chart.svg'}"
    )
    done = CliRunner().invoke(command, arguments.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    assert [line for line in done.stdout.splitlines() if line.startswith("{")] == text.splitlines()
    return [json.loads(line) for line in text.splitlines()], folder


def test_every_case_has_a_rate_and_its_processor_time(
    outcome: tuple[list[dict[str, object]], Path],
) -> None:
    records, _ = outcome
    cases = {record["case"]: record for record in records if record["unit"] == "images/s"}
    assert {
        "dali", "torch", "decode_alone", "decode_rows_alone", "tvio_slices_uint8",
        "pil_slices_uint8", "pil_tv2_float", "files_pil_decode_per_crop", "dali_reader_op_per_crop",
    } <= set(cases)  # fmt: skip
    assert all(case["median"] > 0 and case["cpu_ms_per_image"] > 0 for case in cases.values())


def test_stages_and_targets_are_reported(
    outcome: tuple[list[dict[str, object]], Path],
) -> None:
    records, _ = outcome
    names = {record["case"] for record in records}
    assert {
        f"stage_{one}" for one in ("read", "decode", "cut", "entropy", "normalise", "copy")
    } <= names
    ratios = [record for record in records if record["unit"] == "x"]
    assert len(ratios) == 7
    assert all(
        record["params"]["met"] == (record["median"] >= record["params"]["target"])
        for record in ratios
    )


def test_the_chart_is_an_image_that_names_every_case(
    outcome: tuple[list[dict[str, object]], Path],
) -> None:
    records, folder = outcome
    drawing = ElementTree.parse(folder / "chart.svg")
    labels = " ".join(drawing.getroot().itertext())
    assert all(record["case"] in labels for record in records if record["unit"] == "images/s")


def test_every_case_says_which_limit_it_is_near(
    outcome: tuple[list[dict[str, object]], Path],
) -> None:
    records, _ = outcome
    limits = [record["params"]["limit"] for record in records if record["unit"] == "images/s"]
    assert limits
    assert all(re.match(r"\d+% \w", limit) for limit in limits), limits
