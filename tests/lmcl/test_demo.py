from pathlib import Path

import pytest

from lmcl import demo
from lmcl.errors import LmclError

TINY = (
    "crops.size=32",
    "crops.random=3",
    "crops.evaluation=2",
    "saliency.view=32",
    "saliency.window=2",
    "train.epochs=1",
    "encoder.width=24",
)


def test_the_demo_leaves_a_report_and_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "CONTENTS", 6)
    folder = tmp_path / "demo"
    said = demo.run_demo(folder, overrides=TINY, progress=False)
    assert "test: SRCC" in said
    assert "lmcl-shard build table" in said
    page = (folder / "report.html").read_text()
    assert "synthetic" in page
    again = demo.run_demo(folder, overrides=TINY, progress=False)
    assert "finished before" in again


def test_starting_over_never_deletes_a_folder_that_is_no_demo(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(LmclError, match="not the folder of a demo run"):
        demo.run_demo(tmp_path, again=True, progress=False)
    assert (tmp_path / "precious.txt").exists()
