"""Training as processes: killed and resumed, several ranks, wrong input on the command line."""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from lmcl.cli.main import cli
from lmcl.errors import ConfigError
from lmcl.training.checkpoint import list_checkpoints, read_newest
from lmcl.training.launcher import LAUNCHER_ENVIRONMENT, asked, launcher_command
from shards.exit_codes import report_errors
from tests import warm

REPO = Path(__file__).resolve().parents[3]
LAUNCH = "accelerate.commands.launch"
"""Looks for itself among the processes' command lines, and starts Pythons: never a warm one."""


def command(
    overrides: list[str], output: Path, *more: str, processes: int = 1, port: int = 0
) -> list[str]:
    launch = [sys.executable, "train.py"]
    if processes > 1:
        launch = [
            *[sys.executable, "-m", LAUNCH],
            *["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"],
            *["--main_process_port", str(port), "--dynamo_backend", "no", "train.py"],
        ]
    changes = [word for change in overrides for word in ("--set", change)]
    return [
        *[*launch, "--config", str(REPO / "configs" / "smoke.toml"), "--output", str(output)],
        *[*changes, "--no-progress", *more],
    ]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    if LAUNCH in arguments:
        return subprocess.run(arguments, cwd=REPO, capture_output=True, text=True, timeout=240)
    return warm.run(arguments, cwd=REPO, capture_output=True, timeout=240)


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


def start(arguments: list[str]) -> "subprocess.Popen[str] | warm.Warm":
    start_one = subprocess.Popen if LAUNCH in arguments else warm.start
    return start_one(
        arguments,
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_steps(process: subprocess.Popen[str] | warm.Warm, folder: Path, count: int) -> None:
    log = folder / "log.jsonl"
    while process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)


def kill_and_resume(changes: list[str], folder: Path, *, seed: int) -> None:
    chance = random.Random(seed)
    victim = start(command(changes, folder))
    wait_for_steps(victim, folder, chance.randint(1, 6))
    time.sleep(chance.random() * 0.1)
    victim.send_signal(signal.SIGKILL)
    _, errors = victim.communicate()
    # Otherwise it had ended by itself, and nothing was tried.
    assert victim.returncode == -signal.SIGKILL, errors
    finish(command(changes, folder, "--resume", "auto"))


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert all(torch.equal(left[name], right[name]) for name in left)


def assert_same(one: Path, other: Path) -> None:
    assert_same_weights(one, other)
    table = Path("predictions") / "test.csv"
    assert (one / table).read_bytes() == (other / table).read_bytes()
    states = [read_newest(run / "checkpoints") for run in (one, other)]
    assert states[0].position == states[1].position
    for name in ("student", "teacher", "optimizer", "saliency_boxes", "best_epoch", "best_srcc"):
        left, right = (getattr(state, name) for state in states)
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    for name in ("loss", "l1", "contrastive", "lr", "grad_norm", "intra_similarity"):
        assert [entry[name] for entry in steps(one)] == [entry[name] for entry in steps(other)]


@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 23))]
)
def test_a_killed_run_resumes_to_the_same_bits(
    changes: list[str], untouched: Path, tmp_path: Path, seed: int
) -> None:
    kill_and_resume(changes, tmp_path / "killed", seed=seed)
    assert_same(untouched, tmp_path / "killed")


@pytest.mark.parametrize(
    "signum",
    [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP],
    ids=lambda signum: signum.name,
)
def test_a_polite_stop_writes_a_checkpoint_and_exits_130(
    changes: list[str], untouched: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    folder = tmp_path / "stopped"
    asked = start(command(changes, folder))
    wait_for_steps(asked, folder, 1)
    asked.send_signal(signum)
    _, errors = asked.communicate(timeout=120)
    assert asked.returncode == 130, errors
    assert "--resume auto" in errors
    assert "Traceback" not in errors
    assert (folder / "stopped").exists()
    finish(command(changes, folder, "--resume", "auto"))
    assert not (folder / "stopped").exists()
    assert_same(untouched, folder)


def test_a_closed_terminal_stops_a_run_after_a_checkpoint(
    changes: list[str], untouched: Path, tmp_path: Path
) -> None:
    """As when a window is closed: the terminal is gone while bars are written to it."""
    folder = tmp_path / "stopped"
    words = [word for word in command(changes, folder) if word != "--no-progress"]
    code = (
        "import fcntl, runpy, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    window, terminal = os.openpty()
    process = warm.start(
        [sys.executable, "-c", code, *words[1:]],
        cwd=REPO,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    log = folder / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        if select.select([window], [], [], 0.01)[0]:
            os.read(window, 65536)
    os.close(window)
    assert process.wait(120) == 130
    assert (folder / "stopped").exists()
    finish(command(changes, folder, "--resume", "auto"))
    assert_same(untouched, folder)


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_is_not_disturbed(
    changes: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = start(command([*changes, "train.epochs=200"], folder))
    wait_for_steps(first, folder, 1)
    second = run(command(changes, folder, "--resume", "auto"))
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=240)
    assert second.returncode == 2, second.stderr
    assert f"process {first.pid}" in second.stderr
    assert first.returncode == 130, errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_scheduler_that_signals_launcher_and_ranks_leaves_a_checkpoint(
    changes: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    few = [*changes, "runtime.checkpoint_steps=0", "train.epochs=200"]
    asked = start(command(few, folder, processes=2, port=29673))
    wait_for_steps(asked, folder, 2)
    # As SLURM does: every process of the job step, launchers included, gets the signal.
    os.killpg(asked.pid, signal.SIGUSR1)
    _, errors = asked.communicate(timeout=120)
    assert asked.returncode != 0
    assert "stopped as asked" in errors
    # Its exit code is the launcher's: what started it looks for this.
    assert (folder / "stopped").exists()
    state = read_newest(folder / "checkpoints")
    assert state is not None
    taken = steps(folder)
    assert (taken[-1]["epoch"], taken[-1]["step"] + 1) == (
        state.position.epoch,
        state.position.step,
    )


def test_a_damaged_newest_checkpoint_costs_steps_and_not_the_run(
    changes: list[str], untouched: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(untouched, folder)
    newest, before = list_checkpoints(folder / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-100])
    done = run(command(changes, folder, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    assert f"{newest.name}: does not match the digest" in done.stderr
    assert "falling back to the checkpoint before it" in done.stderr
    assert "resuming at epoch 2, step 3" in done.stderr, before
    assert_same(untouched, folder)


def test_a_checkpoint_of_another_configuration_is_refused_and_the_machines_may_change(
    changes: list[str], untouched: Path, tmp_path: Path
) -> None:
    newest = str(list_checkpoints(untouched / "checkpoints")[0])
    other = [*changes, "schedule.lr=0.5"]
    done = run(command(other, tmp_path / "other", "--resume", newest))
    assert done.returncode == 5
    assert "schedule.lr: 0.5 / 0.001" in done.stderr
    machine = [*changes, "runtime.threads=1", "runtime.keep_last=1"]
    finish(command(machine, tmp_path / "moved", "--resume", newest))
    assert_same_weights(untouched, tmp_path / "moved")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "port"),
    [(2, 29671), (3, 29672)],
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


@pytest.mark.slow
def test_two_machines_are_one_world(changes: list[str], tmp_path: Path) -> None:
    few = [*changes, "train.epochs=1"]
    machines = []
    for rank in range(2):
        words = command(few, tmp_path / "run", processes=2, port=29674)
        at = words.index("--num_machines")
        words[at : at + 2] = [
            *["--num_machines", "2", "--machine_rank", str(rank)],
            *["--main_process_ip", "127.0.0.1"],
        ]
        machines.append(start(words))
    said = [machine.communicate(timeout=240)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2


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
    assert asked(words, "num_processes") == count


ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_machines_share_the_processes_and_one_world() -> None:
    words = "accelerate launch --num_processes 6 --num_machines=2 --machine-rank 1 train.py"
    text = " ".join(launcher_command(words.split(), ADDRESS))
    assert "--nproc_per_node 3 --nnodes 2 --node_rank 1" in text
    assert "--master_addr 10.0.0.1 --master_port 29500" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "name --num_processes"),
        ("--num_processes 4 --num_machines 2", "name --machine_rank"),
        ("--num_processes 3 --num_machines 2 --machine_rank 0", "3 processes on 2 machines"),
    ],
)
def test_a_launch_that_would_start_several_worlds_is_refused(options: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        launcher_command(["accelerate", "launch", *options.split(), "train.py"], ADDRESS)


@pytest.mark.parametrize("way", ["options", "environment"])
def test_torchs_launcher_waits_for_a_checkpoint_longer_than_its_own_half_minute(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    words = ["train.py"]
    if way == "options":
        launcher = launcher_command(["--num_processes", "2"], ADDRESS)
        words = [*launcher[launcher.index("lmcl.training.torch_launcher") + 1 :], *words]
    else:
        for name, value in LAUNCHER_ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
    read = get_args_parser().parse_args(words)
    assert read.shutdown_timeout >= 1800
    assert "SIGUSR1" in read.signals_to_handle.split(",")


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
    tmp_path: Path,
    changes: list[str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    # In this process: a new one would spend seconds on importing torch before it refuses.
    said = [*command(changes, tmp_path / "run")[2:], *arguments]
    with pytest.raises(SystemExit) as done, report_errors():
        cli.main(["train", *said], standalone_mode=False)
    assert done.value.code == code
    errors = capsys.readouterr().err
    assert words in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_the_front_door_passes_an_exit_code_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [*command([], tmp_path / "run"), "--config", "none.toml"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 4
    assert "none.toml" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    tmp_path: Path, changes: list[str]
) -> None:
    words = [*command(changes, tmp_path / "run")[2:], "--dry-run"]
    done = CliRunner().invoke(cli, ["train", *words], catch_exceptions=False)
    assert done.exit_code == 0
    assert "2 epochs x" in done.output
    assert not (tmp_path / "run").exists()
