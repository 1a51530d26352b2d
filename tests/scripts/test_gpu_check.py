"""scripts/gpu_check.sh on a CPU: every step runs, nothing is done twice, what lacks is said."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import is_running

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
STEPS = {
    "warm", "correctness-first", "correctness-bf16", "correctness-fp16", "correctness-fp32",
    "sanitized", "targets", "share", "stages", "cases", "sweep", "ladder", "graph", "counters",
}  # fmt: skip


def check(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call the script as its user does."""
    return subprocess.run(
        [str(SCRIPTS / "gpu_check.sh"), str(folder), *arguments],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return runpy.run_path(str(SCRIPTS / f"{name}.py"))


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_on_photographs_is_rehearsed(tmp_path: Path) -> None:
    folder, runs = tmp_path / "out", tmp_path / "runs"
    done = check(folder, "photos", "--rehearse", GPU_CHECK_RUNS=str(runs), GPU_CHECK_STEM="")
    assert done.returncode == 0, done.stdout + (folder / "log.txt").read_text()[-3000:]
    results = lines(folder / "photos.jsonl")
    assert {line["finished"] for line in results if "finished" in line} == {
        "squeezenet-vit", "vit-s", "ladder",
    }  # fmt: skip
    found = {(line["step"], line["key"]): line for line in results if "step" in line}
    assert {key: line["encoder"] for key, line in found.items()} == {
        ("squeezenet-vit", "run"): "squeezenet-vit",
        ("vit-s", "run"): "deit3_small_patch16_224",
        ("ladder", "0-baseline/seed-0"): "squeezenet-vit",
        ("ladder", "4-intra-class/seed-0"): "squeezenet-vit",
    }
    for line in found.values():
        assert line["weights"] == "random"
        for name in ("seconds", "images_per_s"):
            assert isinstance(line[name], int | float)
        subsets = line["subsets"].values()
        for figures in (line, *subsets):
            assert -1 <= figures["srcc"] <= 1
            assert -1 <= figures["plcc"] <= 1
        assert sum(one["n"] for one in subsets) == line["n"] == 10
    # The runs themselves stay where the next call finds them, not in the folder that travels.
    assert len(list(runs.glob("*/ladder/*/seed-0/report.html"))) == 2
    assert {path.name for path in folder.iterdir()} == {
        "about.txt", "log.txt", "photos.jsonl", "summary.txt",
    }  # fmt: skip
    summary = (folder / "summary.txt").read_text()
    assert "photos, ladder 4-intra-class: SRCC" in summary
    assert "the figures above mean nothing" in summary


def test_without_a_packed_set_it_says_how_to_make_one(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    done = check(tmp_path / "out", "photos", GPU_CHECK_PHOTOS=str(photos))
    assert done.returncode == 2
    assert f"{photos} holds no packed set with a split" in done.stdout
    assert f"`lmcl-shard build biq2021 FOLDER --output {photos}`" in done.stdout
    # It can be carried there later: the folder does not yet belong to a version of this part.
    assert "photos" not in (tmp_path / "out" / "about.txt").read_text()


def test_a_stem_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "splits").mkdir()
    for name in ("manifest.json", "splits/official.json"):
        (tmp_path / name).write_text("{}")
    needs = module("gpu_check_needs", monkeypatch)
    sentence = needs["missing_files"](tmp_path, str(tmp_path / "stem.npz"))
    assert f"GPU_CHECK_STEM names {tmp_path / 'stem.npz'}, which is not there" in sentence
    assert not needs["missing_files"](tmp_path, "")


def test_the_ladder_is_the_whole_one_with_five_seeds_and_the_same_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = module("gpu_check_photos", monkeypatch)["command"]
    (tmp_path / "splits").mkdir()
    for name in ("70-10-20-seed123-00", "official"):
        (tmp_path / "splits" / f"{name}.json").write_text("{}")
    settings = {"photos": tmp_path, "runs": tmp_path, "stem": tmp_path / "a.npz"}
    one, ladder = (
        command(run, **settings, rehearsed=False) for run in ("squeezenet-vit", "ladder")
    )
    assert "data.split=official" in one
    assert not [word for word in one if word.startswith("train.epochs")]
    assert str(ROOT / "configs" / "ablations" / "ladder") in ladder
    assert ladder[ladder.index("--over") :][:4] == ["--over", "seeds", "--count", "5"]
    assert one[one.index("--set") :] == ladder[ladder.index("--set") :]


def test_finished_runs_are_written_down_once_and_unfinished_ones_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = module("gpu_check_photos", monkeypatch)
    book = photos["Book"](tmp_path / "photos.jsonl")
    figures = {"n": 6, "srcc": 0.8, "plcc_raw": 0.81}
    for seed in (0, 1):
        folder = tmp_path / "runs" / "ladder" / "0-baseline" / f"seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(
            '[encoder]\nname = "squeezenet-vit"\nweights = "a/b.npz"\n[train]\nepochs = 2\n'
        )
        metrics = {**figures, "subsets": {"ss02": {**figures, "srcc": 0.4}}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        protocol = {"set": "s", "split": "official", "split_hash": "0", "train_seconds": 4.0}
        (folder / "protocol.json").write_text(json.dumps({**protocol, "counts": {"train": 9}}))
        steps = [
            {"event": "step", "epoch": epoch, "images": 4, "data_wait": 0.2 * epoch, "time_s": t}
            for epoch, t in ((0, 1.0), (0, 2.0), (1, 3.0), (1, 4.0))
        ]
        log = "".join(json.dumps(one) + "\n" for one in [*steps, {"event": "epoch", "epoch": 1}])
        (folder / "log.jsonl").write_text(log)
    (folder.parent / "seed-0" / "report.html").touch()
    for _ in range(2):
        photos["write_lines"](book, tmp_path / "runs")
        (line,) = book.lines()
    assert (line["step"], line["key"], line["weights"]) == ("ladder", "0-baseline/seed-0", "b.npz")
    assert line["subsets"] == {"ss02": {"n": 6, "srcc": 0.4, "plcc": 0.81}}
    assert (line["images_per_s"], line["data_wait"]) == (4.0, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("weights", "srcc", "verdicts"),
    [
        ("a.npz", 0.8, ["0.8 (target >= 0.79): met", "0.4 (target >= 0.45): MISSED"]),
        ("a.npz", 0.78, ["0.78 (target >= 0.79): MISSED", "0.4 (target >= 0.45): MISSED"]),
        # The targets are those of a pretrained stem.
        ("random", 0.8, ["not measured (target >= 0.79): MISSED", "not measured (target >= 0.45)"]),
    ],
)
def test_photographs_are_judged_by_the_targets(
    weights: str, srcc: float, verdicts: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    summary = module("gpu_check_summary", monkeypatch)
    line = {
        "step": "squeezenet-vit", "key": "run", "weights": weights, "epochs": 12, "set": "biq2021",
        "trained_on": 2400, "n": 600, "srcc": srcc, "plcc": 0.81, "seconds": 90.0,
        "images_per_s": 320.0, "subsets": {"ss02": {"n": 200, "srcc": 0.4, "plcc": 0.4}},
    }  # fmt: skip
    rungs = [
        {**line, "step": "ladder", "key": f"0-baseline/seed-{seed}", "srcc": 0.7 + 0.02 * seed}
        for seed in range(2)
    ]
    assert not summary["report"]("photos", [line, *rungs], rehearsed=False)
    printed = capsys.readouterr().out
    assert f"SRCC {srcc:.4f}, PLCC 0.8100 on 600 of biq2021; 90 s, 320 images/s" in printed
    assert "ladder 0-baseline: SRCC 0.7100 in the mean of 2 seeds [0.7000 .. 0.7200]" in printed
    for name, verdict in zip(("on the test part", "within ss02"), verdicts, strict=True):
        assert f"squeezenet-vit, SRCC {name}: {verdict}" in printed


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = check(tmp_path, "kernels")
    assert done.returncode == 2
    assert "sees no CUDA GPU here; run this on a machine that has one, or give --rehearse" in (
        done.stdout
    )


def test_when_time_is_up_it_says_how_to_go_on(tmp_path: Path) -> None:
    done = check(tmp_path, "score", "--rehearse", GPU_CHECK_SECONDS="0")
    assert done.returncode == 3
    assert "time was up in: score/engines; call again with the same folder" in done.stdout


# As torch's profiler writes them, from the libraries themselves and Triton.
NVJPEG = (
    "void nvjpeg::ycbcr_to_format_kernel_roi<(nvjpegChromaSubsampling_t)2, false, "
    "(nvjpegOutputFormat_t)5, nvjpeg::ConvertToFormatDispatchROI, LaunchParams<32, 8> >(int)"
)
PASTE = (
    "void dali::kernels::paste::PasteKernel<unsigned char, unsigned char, 2>("
    "dali::kernels::paste::SampleDescriptorGPU<unsigned char, unsigned char, 2> const*, "
    "dali::kernels::paste::PatchDesc<unsigned char, 2> const*, dali::kernels::BlockDesc<2> const*)"
)
LOSS = ("log_sums", "finish_rows", "pair_gradient", "finish_gradient", "hub_gradient")
OTHERS = (
    "Memcpy HtoD (Pinned -> Device)",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >(int)",
    "nvjet_tst_128x64_64x8_1x2_h_bz_coopA_TNT",
    "void nvjpeg2k::dwt_kernel(int)",
)


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ((), []),
        ((NVJPEG,), ["nvJPEG"]),
        ((PASTE,), ["DALI's paste operator"]),
        (("preprocess",), ["the preprocessing kernel (pipeline/_preprocess_triton.py)"]),
        (("log_sums", "hub_gradient"), [
            "the fused loss, forward: log_sums", "the fused loss, backward: hub_gradient",
        ]),
    ],
)  # fmt: skip
def test_an_engine_without_a_kernel_is_missed(
    gone: tuple[str, ...], missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = module("gpu_check_engines", monkeypatch)
    names = [one for one in (*OTHERS, NVJPEG, PASTE, "preprocess", *LOSS) if one not in gone]
    assert engines["missing_engines"](names) == missing


def test_every_engine_has_a_kernel_of_that_name_in_its_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines = module("gpu_check_engines", monkeypatch)
    sources = "".join(
        (ROOT / path).read_text()
        for path in ("kernels/_contrastive_triton.py", "pipeline/_preprocess_triton.py")
    )
    kernels = re.findall(r"^def (\w+)\(", sources, re.MULTILINE)
    assert engines["missing_engines"]([NVJPEG, PASTE, *kernels]) == []


def test_without_any_kernel_every_engine_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = module("gpu_check_engines", monkeypatch)
    assert engines["missing_engines"](OTHERS) == list(engines["STEP"])
    assert engines["missing_engines"](OTHERS, engines["SCORING"]) == list(engines["SCORING"])


@pytest.mark.parametrize(
    "name",
    [
        "ampere_sgemm_128x64_tn",
        "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x16_stage4_kernel",
        "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64_8x5_nn_align1>(int)",
        "void gemv2T_kernel_val<int, int, float, float, float, 128, 16, 4, 4, false>(int)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>(int)",
        "nvjet_sss_128x64_32x4_h_bz_TNN",
        "aten::mm",
        "aten::bmm",
    ],
)
def test_a_matrix_product_of_a_library_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = module("gpu_check_engines", monkeypatch)
    harmless = [*LOSS, NVJPEG, PASTE, "preprocess", "aten::sum", "aten::mul", "objective"]
    assert engines["matrix_products"](harmless) == []
    assert engines["matrix_products"]([*harmless, name]) == [name]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_engines_are_rehearsed_first_and_a_loss_of_plain_products_stops_everything(
    tmp_path: Path,
) -> None:
    def rehearse(script: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", str(script), "--rehearse"],
            capture_output=True, text=True, check=False,
            env=dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=str(ROOT)),
        )  # fmt: skip

    script = SCRIPTS / "gpu_check_engines.py"
    done = rehearse(script)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert "loss triton" in found[0]["engines"]
    assert {"check": "scoring batch", "engine": "nvJPEG", "ran": "needs a GPU"} in found
    # The same script of a run whose loss is not the fused one.
    other = tmp_path / script.name
    text = script.read_text().replace("objective.backend=triton", "objective.backend=chunked")
    other.write_text(text.replace("Path(__file__).resolve()", f"Path({str(script)!r})"))
    done = rehearse(other)
    assert done.returncode == 1
    assert "the loss ran aten::mm" in done.stderr.splitlines()[-1]


STAND_IN = """#!/bin/bash
case "$*" in
    *gpu_check_engines*) {engines} ;;
    {wrong}) exit 1 ;;
    *scripts/gpu_check_kernels*)
        echo "${{!#}}" >>{folder}/steps; touch {folder}/timed; exit 0 ;;
esac
"""


def stand_in(folder: Path, engines: str, wrong: str = "no step") -> str:
    """An interpreter that has everything, and whose check of the engines is `engines`."""
    path = folder / "python"
    path.write_text(STAND_IN.format(engines=engines, folder=folder, wrong=f'*"{wrong}"'))
    path.chmod(0o755)
    return str(path)


def test_no_timing_is_taken_while_an_engine_does_not_run(tmp_path: Path) -> None:
    python = stand_in(tmp_path, "echo 'engines: nvJPEG did not run' >&2; exit 1")
    done = check(tmp_path / "out", "kernels", PYTHON=python)
    assert done.returncode == 1
    assert "engines: nvJPEG did not run" in done.stdout
    assert "wrong: kernels/engines" in done.stdout
    assert not (tmp_path / "timed").exists()


TIMED = ["targets", "stages", "sweep", "cases", "ladder", "share", "graph", "counters"]
LATER = ["correctness-bf16", "correctness-fp16", "correctness-fp32"]


@pytest.mark.parametrize(
    ("wrong", "steps"),
    [
        ("no step", ["warm", "correctness-first", *TIMED, *LATER]),
        ("correctness-first", ["warm", *LATER]),
        ("correctness-fp16", ["warm", "correctness-first", *TIMED, LATER[0], LATER[2]]),
    ],
)
def test_bf16_is_measured_first_and_a_failed_type_stops_its_own_timings_only(
    wrong: str, steps: list[str], tmp_path: Path
) -> None:
    python = stand_in(tmp_path, "exit 0", wrong)
    check(tmp_path / "out", "kernels", PYTHON=python)
    assert [s for s in (tmp_path / "steps").read_text().split() if s != "sanitized"] == steps


def test_the_engines_are_checked_once_per_folder(tmp_path: Path) -> None:
    python = stand_in(tmp_path, f"echo >> {tmp_path}/checks")
    for _ in range(2):
        check(tmp_path / "out", "kernels", PYTHON=python)
    assert (tmp_path / "checks").read_text() == "\n"
    assert (tmp_path / "timed").exists()


@pytest.mark.skipif(not shutil.which("setpriv"), reason="this machine has no setpriv")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_what_the_script_started_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    python = stand_in(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 300")
    script = subprocess.Popen(
        [str(SCRIPTS / "gpu_check.sh"), str(tmp_path / "out"), "kernels"],
        stdout=subprocess.DEVNULL,
        env=dict(os.environ, PYTHON=python),
    )
    pid = tmp_path / "pid"
    assert wait_until(lambda: pid.exists() and pid.read_text().endswith("\n"))
    child = int(pid.read_text())
    assert is_running(child)
    script.send_signal(number)
    script.wait(30)
    assert wait_until(lambda: not is_running(child))


def wait_until(holds: Callable[[], bool]) -> bool:
    for _ in range(300):
        if holds():
            return True
        time.sleep(0.1)
    return False


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
        "step": "targets", "key": "fused-20480x256", "forward_tflops": 410.0,
        "backward_tflops": 440.0, "both_ms": milliseconds, "peak_bytes": 1e8,
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
