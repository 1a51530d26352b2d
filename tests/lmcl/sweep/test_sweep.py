"""`lmcl sweep` as users call it, and what it makes of finished runs."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from lmcl.cli.sweep import command
from lmcl.config import load_config
from lmcl.errors import ConfigError, LmclError
from lmcl.sweep.launch import Job, make_jobs, run_here, write_slurm_scripts
from lmcl.sweep.plan import Task, config_files, plan_tasks
from lmcl.sweep.summary import summarise, table
from lmcl.training.setup import fit
from lmcl.training.signals import InterruptedRunError
from tests import warm

REPO = Path(__file__).resolve().parents[3]
SMOKE = load_config(REPO / "configs" / "smoke.toml")
LINES = """base = '{base}'
data.root = '{root}'
crops = {{size = 32, random = 2}}
saliency = {{view = 32, window = 2, layers = 1}}
encoder.depth = 1
train.epochs = 1
"""


def config(folder: Path, name: str, root: Path, extra: str = "") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(LINES.format(base=REPO / "configs" / "smoke.toml", root=root) + extra)
    return path


def call(*arguments: object) -> tuple[int, str]:
    done = warm.run(
        [sys.executable, "-m", "lmcl", "sweep", *arguments, "--no-progress"],
        capture_output=True,
        cwd=REPO,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def swept(demo_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int, str]:
    """Folder of configurations, folder of the sweep, exit code and output: the second one fails."""
    folder = tmp_path_factory.mktemp("sweep")
    configs = folder / "configs"
    configs.mkdir()
    config(configs, "good", demo_set)
    config(configs, "wrong", demo_set, "encoder.weights = 'nowhere.npz'\n")
    code, said = call(configs, "--over", "splits", "--count", 2, "--output", folder / "out")
    return configs, folder / "out", code, said


@pytest.mark.slow
def test_a_failing_run_is_named_and_hides_no_other(
    swept: tuple[Path, Path, int, str],
) -> None:
    _, output, code, said = swept
    assert code == 1
    assert "wrong/70-10-20-seed123-00" in said.splitlines()[-1]
    summary = json.loads((output / "summary.json").read_text())
    good, wrong = summary["models"]
    assert [run["label"] for run in good["runs"]] == [
        "70-10-20-seed123-00",
        "70-10-20-seed123-01",
    ]
    assert wrong["runs"] == []
    assert {failure["exit_code"] for failure in summary["failures"]} == {4}


@pytest.mark.slow
def test_the_summary_is_of_the_runs_own_figures(swept: tuple[Path, Path, int, str]) -> None:
    _, output, _, _ = swept
    summary = json.loads((output / "summary.json").read_text())
    own = [
        json.loads((output / "good" / f"70-10-20-seed123-0{i}" / "metrics.json").read_text())
        for i in range(2)
    ]
    spread = summary["models"][0]["spreads"]["srcc"]
    assert spread["median"] == pytest.approx(np.median([run["srcc"] for run in own]))
    assert spread["interval"]["low"] < spread["mean"] < spread["interval"]["high"]


@pytest.mark.slow
def test_finished_runs_are_left_alone_and_stopped_ones_go_on(
    swept: tuple[Path, Path, int, str],
) -> None:
    configs, output, _, _ = swept
    done, stopped = (output / "good" / f"70-10-20-seed123-0{i}" for i in range(2))
    before = (done / "metrics.json").stat().st_mtime_ns
    log = (stopped / "log.jsonl").read_bytes()
    (stopped / "report.html").unlink()
    code, said = call(configs / "good.toml", "--over", "splits", "--count", 2, "--output", output)
    assert code == 0, said
    assert (done / "metrics.json").stat().st_mtime_ns == before
    assert (stopped / "report.html").is_file()
    assert "run 1 of 1: good/70-10-20-seed123-01" in said
    # Its steps were taken up, not taken again.
    assert (stopped / "log.jsonl").read_bytes() == log


@pytest.mark.slow
def test_report_reads_a_sweep_as_one_model(swept: tuple[Path, Path, int, str]) -> None:
    from lmcl.report import write_report

    _, output, _, _ = swept
    runs = sorted((output / "good").iterdir())
    write_report(runs, output / "pages")
    results = json.loads((output / "pages" / "results.json").read_text())
    assert len(results["comparison"]["models"]) == 1


def test_seeds_follow_the_configurations_own(demo_set: Path, tmp_path: Path) -> None:
    file = config(tmp_path, "one", demo_set)
    tasks = plan_tasks(
        [file], "seeds", count=3, overrides=["train.seed=7"], output=tmp_path / "out"
    )
    assert [task.config.train.seed for task in tasks] == [7, 8, 9]
    assert [task.label for task in tasks] == ["seed-7", "seed-8", "seed-9"]


def test_configurations_take_turns_so_that_a_stopped_sweep_is_paired(
    demo_set: Path, tmp_path: Path
) -> None:
    files = [config(tmp_path, name, demo_set) for name in ("a", "b")]
    tasks = plan_tasks(files, "seeds", count=2, overrides=[], output=tmp_path / "out")
    assert [task.name for task in tasks] == ["a/seed-0", "b/seed-0", "a/seed-1", "b/seed-1"]


def test_a_folder_is_its_files_without_the_base(tmp_path: Path) -> None:
    for name in ("2-b", "base", "1-a"):
        (tmp_path / f"{name}.toml").write_text("")
    assert [file.stem for file in config_files([tmp_path])] == ["1-a", "2-b"]


@pytest.mark.parametrize(
    "name", ["a\ntouch made", "a b", "a;b", "$(b)", "..", "-a", "a%j", "modèle"], ids=ascii
)
def test_a_name_that_a_batch_script_could_misread_is_refused_when_the_sweep_is_planned(
    demo_set: Path, tmp_path: Path, name: str
) -> None:
    file = config(tmp_path, name, demo_set)
    with pytest.raises(ConfigError, match=r"name .* becomes a folder and a job") as error:
        plan_tasks([file], "seeds", count=1, overrides=[], output=tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["a b-00", "$(b)-00", "..-00", "a-\N{ARABIC-INDIC DIGIT ONE}"])
def test_splits_of_such_names_are_refused_too(demo_set: Path, tmp_path: Path, split: str) -> None:
    file = config(tmp_path, "a", demo_set)
    change = f"data.split={json.dumps(split, ensure_ascii=False)}"
    with pytest.raises(ConfigError, match=r"split's name .* `lmcl-shard split`"):
        plan_tasks([file], "splits", count=1, overrides=[change], output=tmp_path / "out")


@pytest.mark.parametrize(
    ("folder", "option", "words"),
    [
        pytest.param("a b", "--time=1:00", r"a b.*choose an --output", id="space"),
        pytest.param("a\nb", "--time=1:00", r"a\\nb.*choose an --output", id="newline"),
        pytest.param("a%j", "--time=1:00", r"a%j.*choose an --output", id="pattern"),
        pytest.param("a", "--time=1:00\ntouch b", r"--sbatch.*\\ntouch b", id="option"),
    ],
)
def test_what_an_sbatch_line_cannot_hold_is_refused_before_a_script_is_written(
    tmp_path: Path, folder: str, option: str, words: str
) -> None:
    with pytest.raises(LmclError, match=words):
        write_slurm_scripts([job(tmp_path, "l", "true")], tmp_path / folder, [option])
    assert not list(tmp_path.rglob("*.sbatch"))


def test_an_option_with_a_space_stays_one_option(tmp_path: Path) -> None:
    (script,) = write_slurm_scripts([job(tmp_path, "l", "true")], tmp_path, ["--comment=a b"])
    assert "#SBATCH '--comment=a b'\n" in script.read_text()


def test_a_trainer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LmclError, match=r"no-such-trainer.*name another --with"):
        list(run_here([job(tmp_path, "l", "no-such-trainer")]))


@pytest.mark.parametrize(
    ("changes", "count", "words"),
    [
        pytest.param(["data.split='official'"], None, "--over seeds", id="single-split"),
        pytest.param([], 9, "there are 2; draw them", id="too-few-splits"),
    ],
)
def test_splits_that_are_not_there_are_said(
    demo_set: Path, tmp_path: Path, changes: list[str], count: int | None, words: str
) -> None:
    file = config(tmp_path, "one", demo_set)
    with pytest.raises(LmclError, match=words):
        plan_tasks([file], "splits", count=count, overrides=changes, output=tmp_path)


def test_a_folder_of_another_configuration_is_refused_before_anything_runs(
    demo_set: Path, tmp_path: Path
) -> None:
    file, output = config(tmp_path, "good", demo_set), tmp_path / "out"
    (task,) = plan_tasks([file], "seeds", count=1, overrides=[], output=output)
    fit(task.config, task.folder, progress=False)
    with pytest.raises(ConfigError, match=r"train\.epochs: 2 / 1") as error:
        plan_tasks([file], "seeds", count=1, overrides=["train.epochs=2"], output=output)
    assert error.value.exit_code == 5


def finished(folder: Path, model: str, seed: int, srcc: float | None) -> Task:
    """A run's figures as `lmcl train` writes them."""
    run = folder / model / f"seed-{seed}"
    run.mkdir(parents=True)
    figures = {"srcc": srcc, "plcc_raw": 0.5, "plcc_fit4": 0.5, "krcc": 0.5, "rmse_fit4": 0.5}
    (run / "metrics.json").write_text(json.dumps({"n": 50, **figures}))
    (run / "protocol.json").write_text(json.dumps({"counts": {"train": 100}, "train_seconds": 1.0}))
    (run / "report.html").write_text("")
    return Task(
        model=model, label=f"seed-{seed}", file=folder / f"{model}.toml",
        config=SMOKE, folder=run,
    )  # fmt: skip


@pytest.fixture
def ladder(tmp_path: Path) -> list[Task]:
    """Three rungs of five seeds."""
    rng = np.random.default_rng(0)
    return [
        finished(tmp_path, model, seed, 0.8 + gain + 0.01 * float(rng.normal()))
        for model, gain in (("a", 0.0), ("b", 0.03), ("c", 0.031))
        for seed in range(5)
    ]


def values(tasks: list[Task], model: str) -> list[float]:
    return [
        json.loads((task.folder / "metrics.json").read_text())["srcc"]
        for task in tasks
        if task.model == model
    ]


def test_rungs_are_tested_against_the_one_before_and_the_first(ladder: list[Task]) -> None:
    found = summarise(ladder, "seeds", [])
    assert [(s.model, s.than) for s in found.steps] == [("b", "a"), ("c", "b"), ("c", "a")]


def test_over_seeds_the_test_is_the_paired_t_test(ladder: list[Task]) -> None:
    step = summarise(ladder, "seeds", []).steps[0]
    truth = stats.ttest_rel(values(ladder, "b"), values(ladder, "a"))
    assert step.p_t == pytest.approx(truth.pvalue)
    assert step.interval is not None
    interval = truth.confidence_interval(0.95)
    assert (step.interval.low, step.interval.high) == pytest.approx((interval.low, interval.high))
    assert step.p_t <= step.p_t_holm


def test_over_splits_intervals_are_wider_as_images_overlap(ladder: list[Task]) -> None:
    seeds = summarise(ladder, "seeds", []).models[0].spreads["srcc"].interval
    splits = summarise(ladder, "splits", []).models[0].spreads["srcc"].interval
    assert seeds is not None
    assert splits is not None
    ratio = (splits.high - splits.low) / (seeds.high - seeds.low)
    assert ratio == pytest.approx(np.sqrt((1 / 5 + 50 / 100) / (1 / 5)))


def test_a_run_without_a_correlation_is_left_out_and_counted(
    ladder: list[Task], tmp_path: Path
) -> None:
    tasks = [*ladder, finished(tmp_path, "a", 5, None)]
    found = summarise(tasks, "seeds", [])
    assert (len(found.models[0].runs), found.models[0].spreads["srcc"].n) == (6, 5)
    assert json.loads(found.to_json())["models"][0]["runs"][5]["figures"]["srcc"] is None


def test_the_table_names_every_configuration_and_step(ladder: list[Task]) -> None:
    text = table(summarise(ladder, "seeds", []))
    for line in ("a ", "b ", "c ", "b - a:", "c - b:", "c - a:"):
        assert any(row.startswith(line) for row in text.splitlines()), text


def stand_in(folder: Path, name: str, body: str) -> None:
    """A program of a cluster's that does on this machine what it would do there."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`sbatch` runs the script at once, `srun` the command, `scontrol` leaves a note."""
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_in(programs, "sbatch", f'bash "$1" || true; echo "Submitted $1" | tee -a {tmp_path}/sent')
    stand_in(programs, "srun", '"$@"')
    stand_in(programs, "scontrol", f'echo "$@" > {tmp_path}/scontrol')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return tmp_path


def slurm(output: Path, *options: str) -> str:
    done = CliRunner().invoke(command, [*options, "--output", str(output), "--launcher", "slurm"])
    assert done.exit_code == 0, done.output
    return done.output


def test_slurm_prints_one_job_per_split(demo_set: Path, tmp_path: Path) -> None:
    file = config(tmp_path, "one", demo_set)
    said = slurm(tmp_path / "out", str(file), "--sbatch", "--gres=gpu:1 --time=1:00:00")
    lines = [line for line in said.splitlines() if line.startswith("sbatch ")]
    assert len(lines) == 2
    script = Path(lines[0].removeprefix("sbatch ")).read_text()
    assert "#SBATCH --gres=gpu:1\n#SBATCH --time=1:00:00\n" in script
    written = tmp_path / "out" / "jobs" / "one-70-10-20-seed123-00.toml"
    assert f"--config {written}" in script
    assert load_config(written).data.split == "70-10-20-seed123-00"


def test_a_file_changed_later_does_not_change_the_runs_to_come(
    demo_set: Path, tmp_path: Path
) -> None:
    file = config(tmp_path, "one", demo_set)
    (task,) = plan_tasks([file], "seeds", count=1, overrides=[], output=tmp_path / "out")
    (made,) = make_jobs([task], tmp_path / "jobs", "", progress=False)
    file.write_text(file.read_text() + "train.batch_size = 2\n")
    written = Path(made.command[made.command.index("--config") + 1])
    assert load_config(written) == task.config


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_an_output_that_is_a_file_is_refused_before_anything_runs(
    demo_set: Path, tmp_path: Path, launcher: str
) -> None:
    file = config(tmp_path, "one", demo_set)
    (tmp_path / "taken").touch()
    words = [str(file), "--output", str(tmp_path / "taken"), "--launcher", launcher]
    with pytest.raises(LmclError, match=r"--output .*taken: cannot be made a folder"):
        CliRunner().invoke(command, words, catch_exceptions=False)


@pytest.mark.slow
def test_slurm_jobs_train_and_are_summed_up_later(demo_set: Path, cluster: Path) -> None:
    file, output = config(cluster, "one", demo_set), cluster / "out"
    said = slurm(output, str(file), "--count", "1", "--submit", "--no-progress")
    assert "Submitted" in said
    done = CliRunner().invoke(
        command, [str(file), "--count", "1", "--output", str(output), "--collect"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads((output / "summary.json").read_text())["models"][0]["spreads"]["srcc"]["n"]


def test_a_job_that_was_warned_goes_back_into_the_queue(cluster: Path) -> None:
    warned = job(cluster, "l", "bash", "-c", "exit 130")
    (script,) = write_slurm_scripts([warned], cluster / "slurm", [])
    done = subprocess.run(["bash", str(script)], check=False)
    assert done.returncode == 130
    assert (cluster / "scontrol").read_text() == "requeue 77\n"


@pytest.mark.parametrize(
    ("leaves_mark", "requeued"), [(True, True), (False, False)], ids=["stopped", "failed"]
)
def test_a_launchers_own_exit_code_requeues_a_job_only_beside_a_mark_of_this_start(
    cluster: Path, leaves_mark: bool, requeued: bool
) -> None:
    folder = cluster / "a run"
    folder.mkdir()
    (folder / "stopped").touch()
    body = f"touch '{folder}/stopped'; exit 1" if leaves_mark else "exit 1"
    launched = job(folder, "l", "bash", "-c", body)
    (script,) = write_slurm_scripts([launched], cluster / "slurm", [])
    done = subprocess.run(["bash", str(script)], check=False)
    assert done.returncode == 1
    assert (cluster / "scontrol").exists() == requeued


def test_a_sweep_here_takes_a_marked_run_for_stopped_whatever_its_launcher_says(
    tmp_path: Path,
) -> None:
    stopped = job(tmp_path, "l", "bash", "-c", f"touch {tmp_path}/stopped; exit 1")
    with pytest.raises(InterruptedRunError, match="m/l: stopped as asked"):
        list(run_here([stopped]))
    (failure,) = run_here([job(tmp_path, "l", "bash", "-c", "exit 1")])
    assert failure.exit_code == 1


def test_without_sbatch_submitting_is_refused(
    demo_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(tmp_path, "one", demo_set)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LmclError, match="no `sbatch`") as error:
        CliRunner().invoke(
            command,
            [str(file), "--launcher", "slurm", "--submit", "--output", str(tmp_path / "out")],
            catch_exceptions=False,
        )
    assert error.value.exit_code == 4


def job(folder: Path, label: str, *command: str) -> Job:
    task = Task(model="m", label=label, file=folder, config=SMOKE, folder=folder)
    return Job(task=task, command=command)


def wait_for(path: Path) -> bool:
    for _ in range(600):
        if path.exists():
            return True
        time.sleep(0.1)
    return False


def sweep_of_long_runs(folder: Path, said: int) -> warm.Warm:
    """A sweep in whose first run one is; the run writes a checkpoint when it is asked to stop."""
    run = (
        "import pathlib, signal, sys, time\n"
        "def leave(*_):\n    pathlib.Path('checkpoint').touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "pathlib.Path('started').touch()\n"
        "time.sleep(60)\n"
    )
    (folder / "run.py").write_text(run)
    config(folder, "one", folder)
    sweep = warm.start(
        [
            *(sys.executable, "-m", "lmcl", "sweep", "one.toml", "--over", "seeds"),
            *("--with", f"{sys.executable} run.py", "--output", "out"),
        ],
        cwd=folder,
        stderr=said,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )
    assert wait_for(folder / "started")
    return sweep


def test_the_runs_of_a_sweep_end_when_it_is_killed(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    sweep = sweep_of_long_runs(tmp_path, theirs)
    os.close(theirs)
    sweep.kill()
    # The run holds the other end of this pipe: it has ended when the pipe has.
    with open(ours) as said:
        said.read()
    assert sweep.wait(30) == -signal.SIGKILL
    # It was asked, not killed: nothing of it is lost.
    assert (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_sweep_asked_to_stop_waits_for_the_runs_checkpoint(
    tmp_path: Path, number: signal.Signals
) -> None:
    sweep = sweep_of_long_runs(tmp_path, subprocess.PIPE)
    sweep.send_signal(number)
    _, said = sweep.communicate(timeout=60)
    assert (tmp_path / "checkpoint").exists(), said
    assert sweep.returncode == 130
    assert f"stopped at once by {number.name}" in said
    assert "the same command goes on from here" in said
    # What is unfinished is known even so.
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["unfinished"]) == 5


@pytest.mark.slow
def test_ray_runs_every_job_and_names_the_one_that_fails(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    good = f"import pathlib; pathlib.Path({str(tmp_path / 'done')!r}).touch()"
    bad = "import sys; print('no such weights', file=sys.stderr); sys.exit(4)"
    script = tmp_path / "jobs.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from lmcl.config import load_config\n"
        "from lmcl.sweep.launch import Job, run_on_ray\n"
        "from lmcl.sweep.plan import Task\n"
        f"config = load_config({str(REPO / 'configs' / 'smoke.toml')!r})\n"
        "def job(label, code):\n"
        "    task = Task(model='m', label=label, file=Path('f'), config=config,\n"
        "                folder=Path('f'))\n"
        "    return Job(task=task, command=(sys.executable, '-c', code))\n"
        f"jobs = [job('bad', {bad!r}), job('good', {good!r})]\n"
        "for failure in run_on_ray(jobs, cpus=1, gpus=0):\n"
        "    print(failure.name, failure.exit_code, failure.last_words)\n"
    )
    # In a process of its own: Ray leaves threads and warnings behind.
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )
    assert done.stdout.splitlines()[-1:] == ["m/bad 4 no such weights"], done.stdout + done.stderr
    assert (tmp_path / "done").exists()
