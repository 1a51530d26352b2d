"""Training as processes: killed and resumed, several ranks, wrong input on the command line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmcl.launch import asked_processes

REPO = Path(__file__).resolve().parents[2]


def command(
    overrides: list[str], output: Path, *more: str, processes: int = 1, port: int = 0
) -> list[str]:
    launch = [sys.executable, "train.py"]
    if processes > 1:
        launch = [
            *[sys.executable, "-m", "accelerate.commands.launch"],
            *["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"],
            *["--main_process_port", str(port), "--dynamo_backend", "no", "train.py"],
        ]
    changes = [word for change in overrides for word in ("--set", change)]
    return [
        *[*launch, "--config", str(REPO / "configs" / "smoke.toml"), "--output", str(output)],
        *[*changes, "--no-progress", *more],
    ]


def run(arguments: list[str], *, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        arguments, cwd=REPO, env=environment, capture_output=True, text=True, timeout=timeout
    )


def finish(arguments: list[str]) -> str:
    done = run(arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def steps(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["event"] == "step"]


@pytest.fixture(scope="module")
def changes(tiny: Callable[..., object]) -> list[str]:
    return tiny.overrides("saliency.layers=1", "runtime.checkpoint_steps=1")


@pytest.fixture(scope="module")
def untouched(changes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run nobody disturbed."""
    folder = tmp_path_factory.mktemp("launch") / "untouched"
    text = finish(command(changes, folder))
    assert "SRCC" in text
    assert "report.html" in text
    return folder


def kill_and_resume(changes: list[str], folder: Path, *, seed: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(
        command(changes, folder),
        cwd=REPO,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wanted = random.Random(seed).randint(1, 6)
    delay = random.Random(seed).random() * 0.1
    log = folder / "log.jsonl"
    while victim.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= wanted:
            time.sleep(delay)
            break
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    finish(command(changes, folder, "--resume", "auto"))


def assert_same(one: Path, other: Path) -> None:
    left, right = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert all(torch.equal(left[name], right[name]) for name in left)
    table = Path("predictions") / "test.csv"
    assert (one / table).read_bytes() == (other / table).read_bytes()
    for name in ("loss", "l1", "contrastive", "lr"):
        assert [entry[name] for entry in steps(one)] == [entry[name] for entry in steps(other)]


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_resumes_to_the_same_bits(
    changes: list[str], untouched: Path, tmp_path: Path, seed: int
) -> None:
    kill_and_resume(changes, tmp_path / "killed", seed=seed)
    assert_same(untouched, tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_killed_runs_resume_to_the_same_bits(
    changes: list[str], untouched: Path, tmp_path: Path
) -> None:
    for seed in range(3, 23):
        kill_and_resume(changes, tmp_path / f"killed-{seed}", seed=seed)
        assert_same(untouched, tmp_path / f"killed-{seed}")


def test_a_polite_stop_writes_a_checkpoint_and_exits_130(
    changes: list[str], untouched: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    asked = subprocess.Popen(
        command(changes, folder),
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while asked.poll() is None and not (folder / "log.jsonl").exists():
        time.sleep(0.01)
    asked.send_signal(signal.SIGTERM)
    _, errors = asked.communicate(timeout=60)
    assert asked.returncode == 130, errors
    assert "--resume auto" in errors
    finish(command(changes, folder, "--resume", "auto"))
    assert_same(untouched, folder)


@pytest.mark.parametrize(
    ("processes", "port"),
    [(2, 29671), pytest.param(3, 29672, marks=pytest.mark.slow)],
    ids=["two", "three"],
)
def test_several_processes_learn_what_one_does(
    changes: list[str], untouched: Path, tmp_path: Path, processes: int, port: int
) -> None:
    """Same global order, same objective: the losses agree to rounding while weights do."""
    plain = [*changes, "encoder.name=vit_tiny_patch16_224"]  # no batch statistics
    finish(command(plain, tmp_path / "one"))
    finish(command(plain, tmp_path / "many", processes=processes, port=port))
    one, many = steps(tmp_path / "one"), steps(tmp_path / "many")
    assert [entry["images"] for entry in one] == [entry["images"] for entry in many]
    assert [entry["contrastive"] for entry in one[:4]] == pytest.approx(
        [entry["contrastive"] for entry in many[:4]], rel=1e-3
    )
    left, right = (
        (tmp_path / name / "predictions" / "test.csv").read_text().splitlines()
        for name in ("one", "many")
    )
    assert [line.split(",")[0] for line in left] == [line.split(",")[0] for line in right]


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["accelerate", "launch", "--num_processes", "2", "train.py"], 2),
        (["accelerate", "launch", "--num-processes=3", "train.py"], 3),
        (["accelerate", "launch", "train.py"], None),
        (["accelerate", "launch", "--num_processes"], None),
    ],
)
def test_the_number_of_processes_is_read_from_the_launchers_command_line(
    words: list[str], count: int | None
) -> None:
    assert asked_processes(words) == count


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        pytest.param(["--config", "none.toml"], 4, "none.toml", id="no-config"),
        pytest.param(["--set", "train.epoch=3"], 2, "did you mean 'epochs'", id="unknown-key"),
        pytest.param(["--set", "data.root=none"], 4, "lmcl-shard build", id="no-set"),
        pytest.param(["--resume", "none.pt"], 4, "none.pt", id="no-checkpoint"),
        pytest.param(["--nonsense"], 2, "--nonsense", id="unknown-option"),
    ],
)
def test_wrong_input_is_one_sentence_and_an_exit_code(
    tmp_path: Path, changes: list[str], arguments: list[str], code: int, words: str
) -> None:
    done = run([*command(changes, tmp_path / "run"), *arguments])
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    tmp_path: Path, changes: list[str]
) -> None:
    text = finish([*command(changes, tmp_path / "run"), "--dry-run"])
    assert "2 epochs x" in text
    assert not (tmp_path / "run").exists()
