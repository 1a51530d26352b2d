"""The main road as a new user walks it: commands only, from images to a scored folder."""

import csv
import html
import json
import sys
from pathlib import Path

import pytest

from tests import warm

REPO = Path(__file__).resolve().parents[1]


def call(module: str, *arguments: object) -> str:
    code = f"from {module} import main; main()"
    done = warm.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(600)
def test_from_a_folder_and_a_table_to_a_report_and_scores(tmp_path: Path) -> None:
    made = tmp_path / "made"
    call("shards.cli", "build", "demo", "--contents", 6, "--output", made, "--no-progress")
    images, labels = tmp_path / "photos", tmp_path / "labels.csv"
    images.mkdir()
    unpack(made, images, labels)
    mine = tmp_path / "mine"
    table = ("build", "table", labels, "--images", images, "--score-range", 1, 5)
    call("shards.cli", *table, "--output", mine, "--no-progress")
    call("shards.cli", "verify", mine, "--deep", "--no-progress")
    call("shards.cli", "split", mine, "--no-progress")
    config, run = REPO / "configs" / "smoke.toml", tmp_path / "run"
    changes = ("--set", f"data.root='{mine}'", "--set", "train.epochs=1")
    said = call("lmcl.cli.main", "train", "--config", config, "--output", run, *changes)
    assert "test: SRCC" in said
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "default-src 'none'" in html.unescape(page)
    assert json.loads((run / "metrics.json").read_text())["n"] > 0
    assert "val: SRCC" in call("lmcl.cli.main", "eval", run, "--split", "val")
    scores = tmp_path / "scores.csv"
    call("lmcl.cli.main", "score", images, "--model", run / "model", "--output", scores)
    with scores.open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 60
    assert all(row["score"] and not row["error"] for row in rows)


def unpack(shards: Path, images: Path, labels: Path) -> None:
    """A user's folder and table, from packed images."""
    code = (
        "import sys, csv; from pathlib import Path; from shards.read import open_set\n"
        "packed = open_set(sys.argv[1]); out = csv.writer(open(sys.argv[3], 'w'))\n"
        "out.writerow(['path', 'score', 'group'])\n"
        "for i in packed.ids():\n"
        "    s = packed.samples; name = Path(s.path[i]).name\n"
        "    (Path(sys.argv[2]) / name).write_bytes(packed.read_bytes(int(i)))\n"
        "    out.writerow([name, s.mos[i], s.group[i]])\n"
    )
    warm.run([sys.executable, "-c", code, shards, images, labels], check=True, timeout=120)
