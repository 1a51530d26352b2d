"""What a start refuses, `--dry-run` refuses in the same words; neither leaves a trace."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lmcl.cli.main import cli
from lmcl.config import Config
from lmcl.training.setup import fit, plan, prepare
from shards.lock import lock_folder

Tiny = Callable[..., Config]
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
