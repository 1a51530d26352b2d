"""scripts/gpu_check.sh on a CPU: every step runs, nothing is done twice, what lacks is said."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
STEPS = {
    "correctness-bf16", "correctness-fp16", "correctness-fp32", "sanitized", "targets", "share",
    "stages", "cases", "sweep", "graph", "counters",
}  # fmt: skip


def check(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call the script as its user does."""
    return subprocess.run(
        [str(SCRIPTS / "gpu_check.sh"), str(folder), *arguments],
        capture_output=True, text=True, check=False,
        env=dict(os.environ, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="", **environment),
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return runpy.run_path(str(SCRIPTS / f"{name}.py"))


@pytest.mark.timeout(900)
def test_every_kernel_step_is_rehearsed_and_none_twice(tmp_path: Path) -> None:
    first = check(tmp_path, "kernels", "--rehearse")
    assert first.returncode == 0, first.stdout + (tmp_path / "log.txt").read_text()[-3000:]
    results = lines(tmp_path / "kernels.jsonl")
    assert {line["finished"] for line in results if "finished" in line} == STEPS
    assert not [line for line in results if line.get("wrong")]
    assert "the figures above mean nothing" in (tmp_path / "summary.txt").read_text()
    again = check(tmp_path, "kernels", "--rehearse")
    assert again.returncode == 0
    assert "at most" not in again.stdout
    assert lines(tmp_path / "kernels.jsonl") == results


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_other_parts_are_rehearsed(tmp_path: Path) -> None:
    for part in ("loader", "step", "score"):
        done = check(tmp_path, part, "--rehearse")
        assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-3000:]
        assert lines(tmp_path / f"{part}.jsonl")
    # No more than eight files come back from the machine this is for.
    assert len(list(tmp_path.iterdir())) <= 8


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = check(tmp_path, "kernels")
    assert done.returncode == 2
    assert "sees no CUDA GPU here; run this on a machine that has one, or give --rehearse" in (
        done.stdout
    )


def test_when_time_is_up_it_says_how_to_go_on(tmp_path: Path) -> None:
    done = check(tmp_path, "score", "--rehearse", GPU_CHECK_SECONDS="0")
    assert done.returncode == 3
    assert "time was up in: score/score; call again with the same folder" in done.stdout


def test_results_of_another_version_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "about.txt").write_text("kernels 0123456789abcdef gpu\n")
    done = check(tmp_path, "kernels", "--rehearse")
    assert done.returncode == 2
    assert "holds results of another version or mode of kernels" in done.stderr
    assert len(list(tmp_path.iterdir())) == 1


def test_wrong_arguments_print_the_usage(tmp_path: Path) -> None:
    for arguments in (["--rehearsal"], ["everything"]):
        done = check(tmp_path / "out", *arguments)
        assert done.returncode == 2
        assert "usage: scripts/gpu_check.sh FOLDER" in done.stderr


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = module("gpu_check_needs", monkeypatch)
    needs["NEEDS"]["kernels"] = ("json", "no_such_package", "nvidia.no_such_package")
    assert needs["missing"]("kernels") == ["no_such_package", "nvidia.no_such_package"]


def test_a_stopped_step_goes_on_behind_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = module("gpu_check_book", monkeypatch)["Book"](tmp_path / "book.jsonl")
    book.add({"step": "a", "key": "1", "value": 1})
    with book.path.open("a") as out:
        out.write('{"step": "a", "key": "2", "val')
    done = []
    tasks = [(key, lambda key=key: done.append(key) or {"value": 2}) for key in "123"]
    assert book.fill("a", tasks)
    assert done == ["2", "3"]
    assert [line["key"] for line in book.of("a")] == ["1", "2", "3"]
    assert {"finished": "a"} in book.lines()


def test_a_step_with_something_wrong_is_never_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = module("gpu_check_book", monkeypatch)["Book"](tmp_path / "book.jsonl")

    def fails() -> dict[str, object]:
        raise ValueError("the sum is off")

    tasks = [("bad", fails), ("good", lambda: {"value": 1})]
    assert not book.fill("a", tasks)
    assert not book.fill("a", tasks)
    assert [line["key"] for line in book.lines()] == ["bad", "good"]
    assert book.of("a")[0]["wrong"] == ["ValueError: the sum is off"]


def test_a_lost_gpu_stops_the_step_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = module("gpu_check_book", monkeypatch)["Book"](tmp_path / "book.jsonl")

    def crashes() -> dict[str, object]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    tasks = [("crash", crashes), ("after", lambda: {"value": 1})]
    with pytest.raises(SystemExit):
        book.fill("a", tasks)
    assert not book.fill("a", tasks)
    assert [line["key"] for line in book.lines()] == ["crash", "after"]


@pytest.mark.parametrize(("milliseconds", "verdict"), [(1.5, ": met"), (1.7, ": MISSED")])
def test_the_summary_judges_by_the_targets(
    milliseconds: float, verdict: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    summary = module("gpu_check_summary", monkeypatch)
    line = {
        "step": "targets", "key": "fused-20480", "forward_tflops": 410.0, "backward_tflops": 440.0,
        "both_ms": milliseconds, "peak_bytes": 1e8,
    }  # fmt: skip
    assert not summary["report"]("kernels", [line], rehearsed=False)
    printed = capsys.readouterr().out
    wanted = f"forward and backward at M = 20,480, ms: {milliseconds:g} (target <= 1.6){verdict}"
    assert wanted in printed
    assert "M = 81,920, ms: not measured (target <= 25): MISSED" in printed


def test_the_summary_finds_the_steps_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = module("gpu_check_summary", monkeypatch)
    made = [
        {"case": "ours_compiled", "params": {"batch": b, "mfu": b / 100}, "median": float(b)}
        for b in (16, 64, 32)
    ]
    made += [
        {"case": f"ours_compiled_part_{part}", "params": {"batch": 64, "share": 0.01 * i}}
        for i, part in enumerate(("data_wait", "objective", "saliency"), 1)
    ]
    made.append(
        {"case": "ratio_ours_compiled_to_plain_loop", "params": {"batch": 64}, "median": 9.0}
    )
    assert summary["step"](made, rehearsed=False) == {
        "share of the measured matmul peak, compiled, best batch": 0.64,
        "data wait": 0.01, "loss": 0.02, "saliency pass": 0.03,
        "times the usual loop, crops/s": 9.0,
    }  # fmt: skip
