"""scripts/write_benchmarks.py: the page's tables are the results' newest lines and nothing else."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(
    str(Path(__file__).resolve().parents[2] / "scripts" / "write_benchmarks.py")
)


def line(case: str, median: float, engines: str = "", **params: object) -> str:
    fields: dict[str, object] = {
        "case": case, "params": {"rows": 8, **params}, "median": median, "p10": 1.0, "p90": 9.0,
        "unit": "ms", "cpu_ms_per_image": 0.5, "peak_bytes": 2**21, "commit": "0123456789abcdef",
        "dirty": True, "device": "a processor", "versions": {"torch": "2", "python": "3"},
    }  # fmt: skip
    if engines:
        fields["engines"] = engines
    return json.dumps(fields) + "\n"


def test_the_newest_line_of_a_case_counts_and_words_around_stay(tmp_path: Path) -> None:
    (tmp_path / "loss.jsonl").write_text(
        line("slow", 7.25, phase="both") + line("slow", 3.5, phase="both", mfu=0.1)
        + line("fast", 2.0, phase="both", target=3.0, met=False)
    )  # fmt: skip
    (tmp_path / "loss-cpu.svg").write_text("<svg/>")
    old = f"Words.\n{SCRIPT['BEGIN']}\nstale\n{SCRIPT['END']}\nMore words.\n"
    new = SCRIPT["page"](old, tmp_path)
    assert new.startswith("Words.\n")
    assert new.endswith("\nMore words.\n")
    assert "stale" not in new
    assert "7.25" not in new
    assert "| slow |  | 3.5 [1 .. 9] ms | 0.5 | 2 |  |" in new
    assert "| fast |  | 2 [1 .. 9] ms | 0.5 | 2 | >= 3.0: **missed** |" in new
    assert "All rows: rows 8, phase both." in new
    assert "Commit: 012345678 with changes." in new
    assert "results/loss-cpu.svg" in new
    assert SCRIPT["page"](new, tmp_path) == new


def test_lines_of_earlier_versions_stand_beside_those_that_name_their_engines(
    tmp_path: Path,
) -> None:
    ours = "device cpu, decode dali-cpu-2.4, loss chunked fp32 D=48"
    (tmp_path / "step.jsonl").write_text(line("old", 1.0) + line("new", 2.0, engines=ours))
    new = SCRIPT["page"](f"{SCRIPT['BEGIN']}\n{SCRIPT['END']}\n", tmp_path)
    assert f"Engines: {ours}." in " ".join(new.split())
    assert "| old |" in new
    (tmp_path / "step.jsonl").write_text(line("old", 1.0))
    assert "Engines" not in SCRIPT["page"](new, tmp_path)


def test_a_page_without_its_marks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"benchmarks.md: lost its marks.*put them back"):
        SCRIPT["page"]("Words.\n", tmp_path)
