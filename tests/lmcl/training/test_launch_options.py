"""What launchers are asked for is followed or contradicted; how runs started by others go on."""

import json
import logging
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmcl.cli.main import main
from lmcl.config import Config, load_config
from lmcl.distributed import is_lost_peer
from lmcl.errors import ConfigError, LmclError
from lmcl.sweep.launch import _environment
from lmcl.training import launcher
from lmcl.training.launcher import launcher_command, ranks_command, refuse_ignored, start_ranks
from lmcl.training.run_dir import RunDir
from lmcl.training.setup import fit, follow_launcher, plan, prepare
from lmcl.training.signals import InterruptedRunError, StopSignal
from lmcl.training.trainer import Trainer

Tiny = Callable[..., Config]
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("way", [plan, fit])
@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "ACCELERATE_MIXED_PRECISION",
            "bf16",
            r"bf16.*runtime\.precision is 'no'",
        ),
        ("ACCELERATE_MIXED_PRECISION", "fp8", r"can be bf16 or fp16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", r"= 4.*runtime\.micro_batch"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"inductor; .*runtime\.compile = true"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP.*runtime.gradient_checkpointing"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DEEPSPEED"),
    ],
)
def test_what_a_run_would_pass_over_is_contradicted(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[..., object],
    variable: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=said):
        way(tiny("runtime.precision=no"), tmp_path / "run")


def test_a_launchers_precision_is_followed_where_none_is_set(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert "networks bf16 (as asked)" in plan(tiny("runtime.precision=auto"), tmp_path / "run")
    same = tiny("runtime.precision=bf16")
    assert follow_launcher(same, os.environ) == same


def test_gradient_accumulation_on_the_launchers_command_line_is_contradicted() -> None:
    with pytest.raises(ConfigError, match="gradient_accumulation_steps = 8"):
        refuse_ignored(["accelerate", "launch", "--gradient-accumulation-steps=8", "train.py"], {})
    refuse_ignored(["accelerate", "launch", "--gradient_accumulation_steps", "1"], {})
    deepspeed = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}
    refuse_ignored([], deepspeed)
    with pytest.raises(ConfigError, match="DEEPSPEED"):
        refuse_ignored([], {**deepspeed, "ACCELERATE_USE_DEEPSPEED": "true"})


@pytest.mark.parametrize("port", [70000, 65536, -1])
def test_a_number_that_is_no_port_is_refused_by_the_option_that_named_it(port: int) -> None:
    with pytest.raises(ConfigError, match=rf"--main_process_port {port} is no port; leave it out"):
        ranks_command(2, port=port)


def test_processes_of_one_machine_meet_on_a_free_port() -> None:
    words = ["accelerate", "launch", "--num_processes", "2", "train.py"]
    assert "--standalone" in launcher_command(words, ADDRESS)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*leave --main_process_port out"):
            launcher_command([*words, "--main_process_port", str(port)], ADDRESS)
    assert f"--master_port {port}" in " ".join(ranks_command(2, port=port))


def test_an_accelerate_config_file_says_how_many_processes(tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\n"
        "mixed_precision: 'no'\nnum_processes: 3\nnum_machines: 1\nuse_cpu: true\n"
    )
    words = ["accelerate", "launch", "--config_file", str(path), "train.py"]
    command = launcher_command(words, ADDRESS)
    assert command[command.index("--nproc_per_node") + 1] == "3"
    more = [*words[:-1], "--num_processes", "2", "train.py"]
    assert launcher_command(more, ADDRESS)[4] == "2"


@pytest.mark.parametrize("way", ["lmcl", "train.py", "-m lmcl"])
def test_every_front_door_joins_the_launcher(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    for name, value in {**ADDRESS, "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    parent = ["accelerate", "launch", "--num_processes", "2", way]
    monkeypatch.setattr(launcher, "parents_command", lambda: parent)
    monkeypatch.setattr(launcher, "end_with_parent", lambda _: None)
    started: list[list[str]] = []

    def become(_: str, words: list[str]) -> None:
        started.append(words)
        raise SystemExit

    monkeypatch.setattr(os, "execv", become)
    words = ["--config", "smoke"] if way == "train.py" else ["train", "--config", "smoke"]
    monkeypatch.setattr(sys, "argv", [way, *words])
    repo = Path(__file__).parents[3]
    doors: dict[str, Callable[[], object]] = {
        "lmcl": main,
        "train.py": lambda: runpy.run_path(str(repo / "train.py"), run_name="__main__"),
        "-m lmcl": lambda: runpy.run_module("lmcl", run_name="__main__"),
    }
    with pytest.raises(SystemExit):
        doors[way]()
    (command,) = started
    assert "--standalone" in command
    assert command[-len(words) :] == words


def test_processes_are_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: started.append(words))
    monkeypatch.delenv("RANK", raising=False)
    start_ranks(1, ["train"])
    start_ranks(3, ["train", "--config", "x"])
    monkeypatch.setenv("RANK", "0")
    start_ranks(3, ["train", "--config", "x"])
    (command,) = started
    assert command[command.index("--nproc_per_node") + 1] == "3"
    assert command[-4:] == ["lmcl", "train", "--config", "x"]


def test_a_run_that_lost_another_process_says_so_in_a_sentence(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gloo = "[enforce fail at gloo/transport/tcp/pair.cc:144] Connection closed by peer [127.0.0.1]"

    def lose(_: Trainer, __: object) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        raise RuntimeError(gloo)

    monkeypatch.setattr(Trainer, "step", lose)
    with pytest.raises(LmclError, match=r"another process .* memory .*--resume auto goes on"):
        fit(tiny(), tmp_path / "run", progress=False)
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_run_of_a_sweep_advises_the_sweeps_own_command(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _environment().items():
        monkeypatch.setenv(name, value)
    run = prepare(tiny(), tmp_path / "run", resume="", progress=False)
    run.close()
    said = str(run._interrupted())
    with pytest.raises(InterruptedRunError) as stopped:
        StopSignal().request(2, None)
    for text in (said, str(stopped.value)):
        assert "the same `lmcl sweep` command goes on" in text
        assert "--resume" not in text


def test_environment_json_keeps_every_start(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "run" / "environment.json"
    for _ in range(2):
        prepare(tiny(), tmp_path / "run", resume="auto", progress=False).close()
    tree = json.loads(path.read_text())
    assert [start["world_size"] for start in tree["starts"]] == [1, 1]
    assert tree["threads"] == torch.get_num_threads() == tree["starts"][0]["threads"]
    assert {"started", "git_commit", "device_name"} <= set(tree["starts"][0])
    # One of an earlier version, which kept the last start only.
    del tree["starts"], tree["threads"]
    path.write_text(json.dumps(tree))
    RunDir(tmp_path / "run").write_environment({**tree, "threads": 1})
    assert [s["threads"] for s in json.loads(path.read_text())["starts"]] == [None, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], "this run takes 8 steps; set runtime.compile = false"),
        (
            ["encoder.name=vit_tiny_patch16_224", "runtime.micro_batch=5"],
            "does not divide a rank's 12 images",
        ),
    ],
)
def test_compiling_that_cannot_pay_is_refused(
    tiny: Tiny, tmp_path: Path, changes: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(tiny("runtime.compile=true", *changes), tmp_path / "run")


def test_a_run_that_compiles_says_what(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tiny("runtime.compile=true", "train.epochs=30")
    prepare(config, tmp_path / "run", resume="", progress=False).close()
    assert "the student's training step, 12 images x 4 crops of 32 px" in caplog.text


def test_a_loss_without_regression_is_warned_of(tiny: Tiny, tmp_path: Path) -> None:
    assert "no gradient" in plan(tiny("objective.contrastive_weight=1.0"), tmp_path / "run")
    assert "no gradient" not in plan(tiny(), tmp_path / "run")
    assert load_config("smoke").objective.contrastive_weight < 1
