"""Where things stand: who may import whom, and which test file covers which module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
TESTS = REPO / "tests"
ROOMS = ("shards", "pipeline", "kernels", "lmcl")
FORBIDDEN = {
    "shards": {"torch", "nvidia", "pipeline", "kernels", "lmcl"},
    "kernels": {"shards", "pipeline", "lmcl"},
    "pipeline": {"kernels", "lmcl"},
    "lmcl": {"tests", "benchmarks"},
}
LMCL_FLOORS = (
    {"cli"},
    {"bench", "sweep", "demo"},
    {"inference", "training"},
    {"report"},
    {"evaluation"},
    {"config"},
    {"features", "method"},
    {"models"},
    {"utils"},
    {"errors", "distributed"},
)
"""Imports inside `lmcl` go from a folder to one on a later line, never up and never sideways."""
LMCL_MODULES = {"__init__", "__main__", "config", "demo", "distributed", "errors"}

COVERED_BY = {
    "kernels/test_contrastive.py": "kernels: chunked chunked_backend groups types",
    "kernels/test_grouped.py": (
        "kernels: _grouped_triton grouped_chunked grouped_passes grouped_triton pairs"
    ),
    "kernels/test_reference.py": "kernels: reference_backend",
    "kernels/test_triton_backend.py": "kernels: _contrastive_triton triton_launch",
    "lmcl/bench/test_contrastive.py": "lmcl/bench: contrastive_cases contrastive_chart record",
    "lmcl/bench/test_loader.py": "lmcl/bench: loader_cases loader_chart loader_data workers",
    "lmcl/bench/test_build.py": "lmcl/bench: build_sources manifest",
    "lmcl/bench/test_score.py": "lmcl/bench: pyiqa_driver",
    "lmcl/bench/test_step.py": "lmcl/bench: step_cases step_data stopwatch",
    "lmcl/cli/test_main.py": (
        "lmcl: __main__ errors cli/bench cli/lazy_group cli/show_config cli/train"
    ),
    "lmcl/test_demo.py": "lmcl: cli/demo",
    "lmcl/cli/test_eval.py": (
        "lmcl: cli/run/eval evaluation/evaluate_run evaluation/scope evaluation/seen_images"
    ),
    "lmcl/evaluation/test_calibrate.py": "lmcl: cli/calibrate",
    "lmcl/evaluation/metrics/test_evaluate.py": "lmcl/evaluation/metrics: bootstrap",
    "lmcl/training/test_joint.py": ("lmcl: evaluation/data evaluation/sets models/set_scales"),
    "lmcl/training/test_launcher.py": "lmcl/training: torch_launcher",
    "lmcl/training/test_ranks.py": "lmcl: distributed",
    "lmcl/training/test_trainer.py": (
        "lmcl: evaluation/predict evaluation/results "
        "training/seeding training/setup training/signals utils/environment"
    ),
    "lmcl/features/test_cache.py": "lmcl/features: build partial",
    "lmcl/inference/test_calibration.py": "lmcl/inference: describe",
    "lmcl/inference/test_command.py": "lmcl: cli/score cli/run/score",
    "lmcl/inference/test_scorer.py": "lmcl/inference: torch_engine",
    "lmcl/inference/test_engines.py": (
        "lmcl: inference/onnx_engine inference/onnx_file models/folders"
    ),
    "lmcl/inference/test_batch_job.py": "lmcl/inference: filter scores_file sheet",
    "lmcl/inference/test_export.py": "lmcl: cli/export",
    "lmcl/inference/test_push.py": "lmcl: cli/push models/hub",
    "lmcl/inference/test_saliency_overlay.py": "lmcl: cli/saliency",
    "lmcl/models/test_quality_model.py": (
        "lmcl/models: attention conv_vit encoder factory weights"
    ),
    "lmcl/cli/test_probe.py": "lmcl: evaluation/probe training/probe training/student",
    "lmcl/report/test_gmad.py": "lmcl: cli/gmad",
    "lmcl/report/test_discrimination.py": "lmcl: cli/report",
    "lmcl/report/test_compare.py": "lmcl/report: compare_page matrix",
    "lmcl/report/test_intervals.py": "lmcl/report: weakness",
    "lmcl/report/test_threshold.py": "lmcl: cli/threshold",
    "lmcl/report/test_write.py": (
        "lmcl/report: analysis formatting page pictures published run run_page "
        "sections svg templates text"
    ),
    "lmcl/sweep/test_sweep.py": (
        "lmcl: cli/sweep cli/run/sweep sweep/launch sweep/plan sweep/summary"
    ),
    "lmcl/test_config.py": "lmcl: utils/validators",
    "pipeline/test_normalize.py": "pipeline: _preprocess_triton preprocess_launch",
    "pipeline/test_loader.py": "pipeline: backends/dali batch frames request validation",
    "pipeline/test_bad_input.py": "pipeline: errors image_headers",
    "pipeline/test_boxes.py": "pipeline: overlap",
    "shards/build/test_build.py": "shards/build: output pack plan",
    "shards/test_remote.py": "shards: build/retry cache store datasets/remote_paths",
    "shards/datasets/test_official.py": (
        "shards/datasets: agiqa3k biq2021 csiq excel files flive kadid10k koniq10k live livec "
        "matlab spaq tid2013"
    ),
    "shards/datasets/test_demo.py": "shards/datasets: demo_contents demo_distortions",
    "shards/splits/test_draw.py": "shards/datasets: unlabelled",
    "shards/test_cli.py": "shards: command_group datasets/registry errors limits",
    "pipeline/test_decode.py": "pipeline: backends/row_decoder",
    "shards/build/test_update.py": "shards: splits/extend",
    "shards/test_exit_codes.py": "shards: packages",
    "shards/test_read.py": "shards: layout sample",
    "shards/datasets/test_formats_agree.py": "shards/datasets: parquet",
}
"""Modules without a test file of their own name, under the file that covers them."""

ACROSS = {
    "kernels/test_compiles.py": "device code compiles for GPUs that are not here",
    "kernels/test_gpu.py": "what needs a GPU",
    "kernels/test_launches.py": "launches of a step, counted",
    "lmcl/inference/test_command.py": "`lmcl score` and its neighbours as people call them",
    "lmcl/inference/test_hostile_files.py": "files made to do harm",
    "lmcl/inference/test_kill.py": "scoring that is killed anywhere",
    "lmcl/inference/test_memory.py": "memory of scoring, in a process of its own",
    "lmcl/inference/test_unreadable.py": "folders and links that cannot be read",
    "lmcl/report/test_browser.py": "pages in a real browser",
    "lmcl/sweep/test_sweep.py": "plan, launch and summary as one command",
    "lmcl/test_before_move.py": "files of an earlier commit",
    "lmcl/test_configs.py": "the files below configs/",
    "lmcl/training/test_damaged_images.py": "whole runs on damaged sets",
    "lmcl/training/test_joint.py": "runs on several sets, through the main command",
    "lmcl/training/test_recipes.py": "early stopping and optimisers",
    "lmcl/training/test_longer_runs.py": "runs that are made longer",
    "lmcl/training/test_launch_options.py": "what launchers are asked for",
    "lmcl/training/test_fused_loss.py": "the loss in one kernel, in whole runs",
    "lmcl/training/test_ranks.py": "several processes against one",
    "pipeline/test_bad_input.py": "what goes wrong inside a batch",
    "pipeline/test_gpu.py": "what needs a GPU",
    "pipeline/test_memory.py": "memory of the loader",
    "pipeline/test_soak.py": "the loader over hours",
    "scripts/test_gpu_check.py": "the scripts gpu_check*",
    "shards/datasets/test_formats_agree.py": "one table in every format",
    "shards/datasets/test_official.py": "miniatures of the published sets",
    "shards/datasets/test_real_labels.py": "label files of the published sets",
    "shards/datasets/test_others_folders.py": "folders as people have them, through the command",
    "shards/datasets/test_others_tars.py": "tars as others make them, through the command",
    "shards/datasets/test_others_tables.py": "tables as people have them, through the command",
    "shards/test_fuzz.py": "damaged files of every kind",
    "shards/test_hostile_sets.py": "sets made to do harm",
    "shards/test_interop.py": "shards read by other libraries",
}
"""Test files that mirror no module, and what they are about."""


def imported(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def lmcl_folder(dotted: str) -> str | None:
    """`lmcl.models.stem` -> `models`, for whatever lies below `lmcl`."""
    parts = dotted.split(".")
    known = set().union(*LMCL_FLOORS)
    return parts[1] if parts[0] == "lmcl" and len(parts) > 1 and parts[1] in known else None


def lmcl_arrows() -> Iterator[tuple[str, str, Path]]:
    for path in sorted((REPO / "lmcl").rglob("*.py")):
        source = path.relative_to(REPO / "lmcl").with_suffix("").parts[0]
        for target in sorted({lmcl_folder(name) for name in imported(path)} - {None, source}):
            yield source, str(target), path


def modules() -> set[str]:
    found = (path for room in ROOMS for path in (REPO / room).rglob("*.py"))
    return {str(path.relative_to(REPO)) for path in found if path.name != "__init__.py"}


def all_test_files() -> set[str]:
    """Those in folders of their own; tests/safety lies across all rooms and mirrors none."""
    found = {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    return {name for name in found if "/" in name and not name.startswith("safety/")}


def mirror(module: str) -> str:
    path = Path(module)
    return str(path.with_name(f"test_{path.name}"))


def covered() -> dict[str, str]:
    """Module -> the test file of COVERED_BY."""
    table = {}
    for test, line in COVERED_BY.items():
        folder, _, names = line.partition(":")
        table |= {f"{folder}/{name}.py": test for name in names.split()}
    return table


@pytest.mark.parametrize("room", ROOMS)
def test_data_flows_one_way(room: str) -> None:
    for path in (REPO / room).rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported(path)} & FORBIDDEN[room], path


def test_imports_inside_lmcl_only_go_down() -> None:
    floor = {name: number for number, names in enumerate(LMCL_FLOORS) for name in names}
    # Files directly in lmcl that begin or end everything have no floor.
    arrows = [arrow for arrow in lmcl_arrows() if not arrow[0].startswith("__")]
    assert len(arrows) > 50, "imports are not found any more"
    wrong = [
        f"{path.relative_to(REPO)} imports lmcl.{target}"
        for source, target, path in arrows
        if floor[source] >= floor[target]
    ]
    assert not wrong, "; ".join(wrong)


def test_lmcl_keeps_its_modules_in_folders() -> None:
    assert {path.stem for path in (REPO / "lmcl").glob("*.py")} == LMCL_MODULES
    # `starter` holds a model and no module.
    data = {"__pycache__", "starter"}
    folders = {p.name for p in (REPO / "lmcl").iterdir() if p.is_dir() and p.name not in data}
    assert not list((REPO / "lmcl" / "starter").rglob("*.py"))
    assert folders == set().union(*LMCL_FLOORS) - LMCL_MODULES


def test_every_module_has_a_test_file_of_its_name_or_a_line_that_says_which_covers_it() -> None:
    named = {module for module in modules() if mirror(module) in all_test_files()}
    listed = covered()
    missing = modules() - named - listed.keys()
    assert not missing, f"{sorted(missing)}: write tests/<its path> or a line in COVERED_BY"
    twice, gone = listed.keys() & named, listed.keys() - modules()
    assert not twice, f"{sorted(twice)} have a test file by now; take them out of COVERED_BY"
    assert not gone, f"{sorted(gone)} are gone; take them out of COVERED_BY"
    gone = set(COVERED_BY) - all_test_files()
    assert not gone, f"{sorted(gone)}, named in COVERED_BY, are gone"


def test_every_test_file_mirrors_a_module_or_says_what_it_is_about() -> None:
    mirrors = {mirror(module) for module in modules()}
    scripts = {mirror(f"scripts/{path.name}") for path in (REPO / "scripts").glob("*.py")}
    stray = all_test_files() - mirrors - scripts - ACROSS.keys()
    assert not stray, f"{sorted(stray)}: name them after a module, or add a line to ACROSS"
    gone, twice = ACROSS.keys() - all_test_files(), ACROSS.keys() & (mirrors | scripts)
    assert not gone, f"{sorted(gone)} are gone; take them out of ACROSS"
    assert not twice, f"{sorted(twice)} mirror a module and need no line in ACROSS"


def test_no_package_below_tests() -> None:
    assert not list(TESTS.rglob("__init__.py"))


def test_importing_the_rooms_prints_nothing_and_loads_no_heavy_package() -> None:
    code = "import shards, lmcl, lmcl.cli.main, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == done.stderr == ""
