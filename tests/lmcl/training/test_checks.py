"""What a start refuses, `--dry-run` refuses in the same words; neither leaves a trace."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lmcl.cli.main import cli
from lmcl.config import Config, load_config
from lmcl.training.setup import fit, plan, prepare
from shards.lock import lock_folder

Tiny = Callable[..., Config]
REPO = Path(__file__).resolve().parents[3]
VIT = "encoder.name=vit_tiny_patch16_224"

REFUSED = [
    pytest.param(["data.root=/nowhere"], "no such folder", 4, id="no-set"),
    pytest.param(["data.split=nothing"], "nothing", 4, id="no-split"),
    pytest.param(["train.batch_size=1000"], "at most 40", 2, id="batch-larger-than-the-split"),
    pytest.param([VIT, "crops.size=36"], "multiples of 8", 2, id="crop-no-multiple-of-the-patch"),
    pytest.param([VIT, "saliency.view=36"], "multiples of 8", 2, id="view-no-multiple"),
    pytest.param(["saliency.window=9"], "at most 4", 2, id="window-larger-than-the-map"),
    pytest.param(["saliency.layers=9"], "has 1 layers", 2, id="more-layers-than-there-are"),
    pytest.param(["encoder.name=vit_tinny"], "no such model", 2, id="no-such-encoder"),
    pytest.param([VIT, "encoder.weights=none.pth"], "no such file", 4, id="no-weights-file"),
    pytest.param(["train.start_from=none"], "none", 4, id="no-model-to-start-from"),
    pytest.param(["train.optimizer=fusedadam"], "cannot be made", 2, id="optimiser-without-gpu"),
    pytest.param([VIT, "train.stem_lr_scale=0.1"], "convolutional stem", 2, id="rate-of-no-stem"),
    pytest.param(
        ["encoder.name=hybrid", "encoder.stem=crossvit_tiny_240"], "branches", 2, id="two-branches"
    ),
    pytest.param(["runtime.micro_batch=4"], "BatchNorm2d", 2, id="parts-and-batch-norms"),
    pytest.param(["runtime.cells=kept"], "stem learns", 2, id="features-that-change"),
    pytest.param(["runtime.require=['gpu-decode']"], "runtime.require", 2, id="fall-back"),
    pytest.param(["runtime.decode=gpu"], "no CUDA GPU", 2, id="decoder-without-gpu"),
    pytest.param(["runtime.precision=fp16"], "needs a GPU", 2, id="precision-without-gpu"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="some are allowed on a GPU")
@pytest.mark.parametrize("way", [plan, fit])
@pytest.mark.parametrize(("changes", "word", "code"), REFUSED)
def test_what_does_not_fit_is_refused_by_a_start_and_by_a_dry_run(
    tiny: Tiny, tmp_path: Path, way: Callable[..., object], changes: list[str], word: str, code: int
) -> None:
    config = tiny(*changes)
    with pytest.raises(Exception, match=word) as error:
        way(config, tmp_path / "runs" / "refused")
    assert error.value.exit_code == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", [plan, fit])
def test_a_folder_that_is_taken_is_refused(
    tiny: Tiny, tmp_path: Path, way: Callable[..., object]
) -> None:
    folder = tmp_path / "run"
    with lock_folder(folder, "lmcl train"), pytest.raises(Exception, match="this very process"):
        way(tiny(), folder)
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("{}\n")
    with pytest.raises(Exception, match="already holds a run"):
        way(tiny(), folder)


def test_a_dry_run_reads_weights_and_says_where_it_would_go_on(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "half.pth").write_bytes(b"PK half")
    with pytest.raises(Exception, match="cannot be read as weights"):
        plan(tiny(VIT, f"encoder.weights={tmp_path}/half.pth"), tmp_path / "run")
    run = prepare(tiny(), tmp_path / "run", resume="", progress=False)
    run.train()
    run.close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "going on at epoch 3, step 0" in plan(tiny(), tmp_path / "run", resume="auto")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.epochs=30", "set schedule.decay_epochs to 10 or more"),
        ("schedule.warmup_epochs=2.5", "set schedule.warmup_epochs to at most 1"),
    ],
)
def test_an_odd_schedule_is_shown_and_warned_of_by_a_dry_run_and_by_a_start(
    tiny: Tiny,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: str,
    said: str,
) -> None:
    words = [w for c in [*tiny.overrides("saliency.layers=1"), change] for w in ("--set", c)]
    args = ["train", "--config", "smoke", *words, "--output", str(tmp_path / "run"), "--dry-run"]
    shown = CliRunner().invoke(cli, args, catch_exceptions=False).output
    caplog.set_level(logging.INFO)
    prepare(tiny(change), tmp_path / "run", resume="", progress=False).close()
    for text in (shown, caplog.text):
        assert "learning rate step: first " in text
        assert "█" in text
        assert said in text


@pytest.mark.parametrize("way", ["--output=~/run", "--output", "data.root", "runtime.cells"])
def test_a_tilde_is_the_users_folder_wherever_a_path_stands(
    demo_set: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").symlink_to(demo_set)
    (tmp_path / "my.toml").write_text(
        f'base = "{REPO}/configs/smoke.toml"\n[data]\nroot = "~/set"\n'
    )
    changes = {
        "data.root": ["--set", "data.root=~/none"],
        "runtime.cells": ["--set", "runtime.cells=~/kept"],
        "--output": ["--output", "~/run"],
    }.get(way, [way])
    words = ["train", "--config", "~/my.toml", "--dry-run", *changes]
    done = CliRunner().invoke(cli, words)
    if way == "data.root":
        assert f"{tmp_path}/none: there is no such folder" in str(done.exception)
    elif way == "runtime.cells":
        assert load_config("~/my.toml", changes[1:]).runtime.cells == f"{tmp_path}/kept"
    else:
        assert f"run folder {tmp_path}/run" in done.output


@pytest.mark.parametrize(
    ("changes", "resume"),
    [
        (["data.root=some/set"], ""),
        (["data.split=some/split.json"], ""),
        ([VIT, "encoder.weights=some/file.pth"], ""),
        (["train.start_from=some/model"], ""),
        ([], "some/checkpoint.pt"),
    ],
)
def test_a_missing_path_says_where_it_was_looked_for(
    tiny: Tiny, tmp_path: Path, changes: list[str], resume: str
) -> None:
    with pytest.raises(Exception, match=f"looked (at|in) {os.getcwd()}/some"):
        plan(tiny(*changes), tmp_path / "run", resume=resume)


@pytest.mark.parametrize(
    ("field", "name", "meant"),
    [
        ("name", "vit_tiny_patch17", "vit_tiny_patch16_224"),
        ("name", "deit3_smal_patch16_224", "deit3_small_patch16_224"),
        ("name", "eva02_base_patch16_clp", "eva02_base_patch16_clip_224"),
        ("stem", "resnet51", "resnet50"),
        ("stem", "convnext_ato", "convnext_atto"),
    ],
)
def test_a_wrong_models_name_is_answered_by_its_family(
    tiny: Tiny, tmp_path: Path, field: str, name: str, meant: str
) -> None:
    hybrid = ["encoder.name=hybrid"] if field == "stem" else []
    with pytest.raises(Exception, match="no such model") as error:
        plan(tiny(*hybrid, f"encoder.{field}={name}"), tmp_path / "run")
    listed = str(error.value).partition("try one of ")[2].split(", or ")[0].split(", ")
    assert meant in listed
    assert {one.partition("_")[0] for one in listed if "_" in one} <= {name.partition("_")[0]}
