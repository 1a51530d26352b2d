"""The loop as users run it: whole runs on a tiny set, in one process."""

import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from lmcl.config import Config, load_config
from lmcl.distributed import RankContext
from lmcl.errors import ConfigError, LmclError
from lmcl.evaluation.predict import PixelSource, predict
from lmcl.evaluation.predictions import read_csv
from lmcl.method.teacher import Teacher
from lmcl.models.preprocess import Preprocessing
from lmcl.models.pretrained import load_model
from lmcl.models.quality_model import StudentOutput
from lmcl.training.checkpoint import Position, _write_tensors
from lmcl.training.checks import check_data
from lmcl.training.setup import fit, plan, prepare
from lmcl.training.signals import InterruptedRunError
from lmcl.training.trainer import Trainer
from pipeline.decode_config import DecodeConfig
from pipeline.errors import PipelineError
from pipeline.saliency_table import SaliencyTable
from shards.read import open_set
from shards.splits.split import load_split

Tiny = Callable[..., Config]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    figures = ("epoch", "step", "loss", "l1", "contrastive", "lr", "val_srcc")
    logs = [[{k: e[k] for k in figures if k in e} for e in log(run)] for run in (one, other)]
    return (
        all(torch.equal(left[name], right[name]) for name in left)
        and (one / "predictions/test.csv").read_bytes()
        == (other / "predictions/test.csv").read_bytes()
        and json.dumps(logs[0]) == json.dumps(logs[1])
    )


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    fit(tiny(), folder, progress=False)
    return folder


def test_a_run_leaves_what_the_architecture_page_lists(finished: Path) -> None:
    left = {path.name for path in finished.iterdir()}
    promised = {
        "config.toml",
        "environment.json",
        "log.jsonl",
        "checkpoints",
        "saliency",
        "predictions",
        "metrics.json",
        "protocol.json",
        "report.html",
        "model",
    }
    assert promised <= left
    assert not [path for path in finished.rglob("*.tmp")]


def test_metrics_name_the_fields_figures(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert {"srcc", "plcc_raw", "plcc_fit4", "krcc", "rmse_fit4"} <= set(metrics)
    assert metrics["part"] == "test"
    assert set(metrics["distortions"])


def test_predictions_are_the_test_part_each_once_with_a_salient_box(
    finished: Path, demo_set: Path
) -> None:
    table = read_csv(finished / "predictions" / "test.csv")
    split = load_split(open_set(demo_set), "70-10-20-seed123-00")
    assert np.array_equal(table.id, np.sort(split.part("test")))
    assert (table.h == 32).all()


def test_the_teacher_looked_at_every_training_image_before_each_epoch(
    finished: Path, demo_set: Path
) -> None:
    train = np.sort(load_split(open_set(demo_set), "70-10-20-seed123-00").part("train"))
    tables = sorted((finished / "saliency").glob("epoch-*.parquet"))
    assert [path.name for path in tables] == ["epoch-00.parquet", "epoch-01.parquet"]
    for path in tables:
        assert np.array_equal(SaliencyTable.read(path).ids, train)


def test_the_log_shows_the_mechanism_working(finished: Path) -> None:
    steps = [entry for entry in log(finished) if entry["event"] == "step"]
    for entry in steps:
        assert 0 <= entry["intra_share"] <= 1
        assert -1 <= entry["intra_similarity"] <= 1
        assert math.isfinite(entry["contrastive"])


def test_the_same_seed_gives_the_same_run(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    fit(tiny(), tmp_path / "again", progress=False)
    assert same(finished, tmp_path / "again")


def test_another_seed_gives_another_run(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    fit(tiny("train.seed=1"), tmp_path / "other", progress=False)
    assert not same(finished, tmp_path / "other")


def test_a_run_stopped_in_mid_epoch_goes_on_bit_for_bit(
    finished: Path,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, folder = tiny(), tmp_path / "stopped"
    calls = 0

    def stop_after_five(run: object, batch: object) -> object:
        nonlocal calls
        calls += 1
        run.stop.requested = calls == 5
        return step(run, batch)

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", stop_after_five)
    with pytest.raises(InterruptedRunError) as stopped:
        fit(config, folder, progress=False)
    assert stopped.value.exit_code == 130
    assert not (folder / "metrics.json").exists()
    caplog.set_level(logging.INFO)
    fit(config, folder, resume="auto", progress=False)
    assert same(finished, folder)
    # A person reads both sentences: they must name the place alike.
    (place,) = re.findall(r"stopped as asked at (epoch \d+, step \d+);", str(stopped.value))
    assert f"resuming at {place}" in caplog.text


def test_the_released_model_scores_as_the_run_did(finished: Path, demo_set: Path) -> None:
    released = load_model(finished / "model")
    table = read_csv(finished / "predictions" / "test.csv")
    context = RankContext(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        decode=DecodeConfig(threads=1),
        progress=False,
    )
    judged = predict(
        released.model,
        PixelSource(shard_set=open_set(demo_set), context=context),
        table.id,
        crops=released.card.crops,
        preprocessing=Preprocessing(
            mean=released.card.mean, std=released.card.std, precision=torch.float32
        ),
        context=context,
        batch_size=3,
        title="again",
    )
    np.testing.assert_allclose(judged.score, table.prediction_unit, atol=1e-5)


def test_a_folder_of_another_configuration_is_refused(finished: Path, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size: 8 / 12") as error:
        fit(tiny("train.batch_size=8"), finished, resume="auto", progress=False)
    assert error.value.exit_code == 5


def test_a_run_is_not_overwritten_unasked(finished: Path, tiny: Tiny) -> None:
    with pytest.raises(LmclError, match="--resume auto"):
        fit(tiny(), finished, progress=False)


def test_a_run_refused_before_its_first_step_leaves_the_folder_to_the_corrected_one(
    tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(LmclError, match="no such file"):
        prepare(tiny("encoder.weights=none.npz"), tmp_path / "run", resume="", progress=False)
    run = prepare(tiny(), tmp_path / "run", resume="", progress=False)
    run.loader.close()
    assert load_config(run.run_dir.config) == tiny()


def test_checkpoints_without_a_log_are_a_run_that_is_not_overwritten_unasked(
    finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(finished / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(LmclError, match="already holds a run"):
        prepare(tiny(), tmp_path / "run", resume="", progress=False)
    run = prepare(tiny(), tmp_path / "run", resume="auto", progress=False)
    run.loader.close()
    assert run.progress.position.epoch == 2


@pytest.mark.parametrize(
    ("where", "term"), [("head", "l1"), ("norm", "l1"), ("cls", "contrastive")]
)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(
    tiny: Tiny, tmp_path: Path, where: str, term: str
) -> None:
    run = prepare(tiny(), tmp_path / "nan", resume="", progress=False)
    weights = {"head": run.core.panel.head.weight, "norm": run.core.encoder.norm.weight}
    with torch.no_grad():
        if where in weights:
            weights[where].fill_(math.nan)
    if where == "cls":
        forward = run.core.forward

        def without_directions(pixels: torch.Tensor) -> StudentOutput:
            output = forward(pixels)
            return output._replace(embedding=output.embedding * math.nan)

        run.core.forward = without_directions
    with pytest.raises(
        LmclError, match=f"the {term} term is not finite at epoch 1, step 1, rank 0"
    ) as error:
        run.train()
    run.loader.close()
    assert "nonfinite-rank0.txt" in str(error.value)
    ids = (tmp_path / "nan" / "nonfinite-rank0.txt").read_text().split()
    assert len(ids) == 12


@pytest.mark.parametrize("clip", [5.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_a_weight(
    tiny: Tiny, tmp_path: Path, clip: float
) -> None:
    run = prepare(tiny(f"train.clip={clip}"), tmp_path / "nan", resume="", progress=False)
    run.core.panel.head.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(LmclError, match="the gradient is not finite at epoch 1, step 1, rank 0"):
        run.train()
    run.loader.close()
    assert all(weight.isfinite().all() for weight in run.core.parameters())
    assert not list(run.run_dir.checkpoints.iterdir())
    assert len((tmp_path / "nan" / "nonfinite-rank0.txt").read_text().split()) == 12


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            ["objective.contrastive_weight=0.0", "crops.salient=false"], id="regression-only"
        ),
        pytest.param(["objective.hub=random"], id="random-hub"),
        pytest.param(["objective.keys=teacher"], id="teacher-keys"),
        pytest.param(
            ["objective.intra_weight=balanced", "objective.overlap_aware=true"], id="balanced"
        ),
        pytest.param(
            ["teacher.update=epoch", "saliency.every=2", "train.epochs=2"], id="paper-teacher"
        ),
        pytest.param(["teacher.update=frozen"], id="frozen-teacher"),
        pytest.param(["teacher.update=copy"], id="copied-teacher"),
        pytest.param(["runtime.precision=bf16", "train.flip=true"], id="bf16"),
        pytest.param(["runtime.backend=torch"], id="torch-backend"),
        pytest.param(
            ["encoder.name=vit_tiny_patch16_224", "runtime.micro_batch=5", "train.flip=true"],
            id="parts",
        ),
        pytest.param(["runtime.gradient_checkpointing=true"], id="gradient-checkpointing"),
        pytest.param(["evaluation.model=teacher", "evaluation.select=last"], id="teacher-judged"),
    ],
)
def test_every_option_trains(tiny: Tiny, tmp_path: Path, changes: list[str]) -> None:
    outcome = fit(tiny("train.epochs=1", *changes), tmp_path / "run", progress=False)
    assert outcome.evaluation.n == len(read_csv(tmp_path / "run/predictions/test.csv").id)


@pytest.mark.parametrize("update", ["step", "epoch", "frozen", "copy"])
def test_the_teacher_follows_the_student_of_a_run_as_its_rule_says(
    tiny: Tiny, tmp_path: Path, update: str
) -> None:
    run = prepare(
        tiny(f"teacher.update={update}", "train.epochs=1"),
        tmp_path / "run",
        resume="",
        progress=False,
    )
    first = run.teacher.model.panel.head.weight.detach().clone()
    run.train()
    run.loader.close()
    ours, theirs = run.teacher.model.panel.head.weight, run.core.panel.head.weight.detach()
    moved, whole = float((ours - first).norm()), float((theirs - first).norm())
    assert whole > 0
    if update == "frozen":
        assert moved == 0
    elif update == "copy":
        assert torch.equal(ours, theirs)
    elif update == "epoch":
        torch.testing.assert_close(ours, 0.5 * first + 0.5 * theirs)
    else:
        assert 0 < moved < whole


def test_an_unlabelled_training_image_is_refused_before_training(
    demo_set: Path, tiny: Tiny, tmp_path: Path
) -> None:
    run = prepare(tiny(), tmp_path / "run", resume="", progress=False)
    run.loader.close()
    labels = run.shard_set.samples.mos.copy()
    labels[run.split.part("train")[3]] = math.nan
    run.shard_set.samples._columns["mos"] = labels
    with pytest.raises(LmclError, match="1 images of the train part have no score") as error:
        check_data(run.config, run.shard_set, run.split, 1)
    assert error.value.exit_code == 3


def test_triton_without_a_gpu_is_refused_before_training(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"objective\.backend: asked for 'triton'.*'auto'"):
        prepare(tiny("objective.backend=triton"), tmp_path / "run", resume="", progress=False)


def test_half_precision_without_a_gpu_is_refused_with_a_way_out(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"needs a GPU.*'auto'"):
        prepare(tiny("runtime.precision=fp16"), tmp_path / "run", resume="", progress=False)


def test_an_older_checkpoint_finds_the_best_weights_of_its_own_time(
    finished: Path, tiny: Tiny
) -> None:
    best = list((finished / "checkpoints").glob("best-*.pt"))
    assert 1 <= len(best) <= 2
    for path in best:
        assert path.with_name(path.name + ".sha256").exists()


@pytest.mark.slow
def test_a_compiled_student_learns_what_a_plain_one_does(
    demo_set: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """In a process of its own: the shape checks of the tests cannot be compiled."""
    changes = tiny.overrides(
        "saliency.layers=1", "encoder.name=vit_tiny_patch16_224", "train.epochs=25"
    )
    for name in ("false", "true"):
        words = [word for change in changes for word in ("--set", change)]
        subprocess.run(
            [
                *[sys.executable, "train.py", "--config", "configs/smoke.toml", "--no-progress"],
                *["--output", str(tmp_path / name), *words],
                *["--set", f"runtime.compile={name}"],
            ],
            cwd=Path(__file__).resolve().parents[3],
            check=True,
        )
    plain, compiled = (
        [entry["loss"] for entry in log(tmp_path / name) if entry["event"] == "step"]
        for name in ("false", "true")
    )
    # On a processor a run of fewer than a hundred steps may not compile; later ones drift apart.
    assert plain[:4] == pytest.approx(compiled[:4], rel=1e-3)


def test_a_centre_hub_is_the_middle_crop_and_asks_no_teacher(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(Teacher, "cls_attention", refuse)
    run = prepare(tiny("objective.hub='centre'"), tmp_path / "run", resume="", progress=False)
    run.refresh_salient_boxes(0)
    samples, size = run.shard_set.samples, run.config.crops.size
    batch = next(iter(run.loader.epoch(0, saliency=run.progress.saliency)))
    for id, box in zip(batch.ids.tolist(), batch.boxes[:, -1].tolist(), strict=True):
        height, width = samples.height[id], samples.width[id]
        assert box == [(height - size) // 2, (width - size) // 2, size, size]
    run.train()
    run.loader.close()


def test_a_hub_needs_its_crop(tiny: Tiny) -> None:
    for hub in ("salient", "centre"):
        with pytest.raises(ConfigError, match=f"objective.hub = '{hub}' needs a crop"):
            tiny("crops.salient=false", f"objective.hub='{hub}'")
    assert not tiny("crops.salient=false", "objective.hub='random'").crops.salient


@pytest.mark.parametrize("harm", ["lost", "damaged"])
def test_lost_weights_of_the_best_epoch_are_said_before_training_goes_on(
    finished: Path, tiny: Tiny, tmp_path: Path, harm: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in (folder / "checkpoints").glob("best-*.pt"):
        path.unlink() if harm == "lost" else path.write_bytes(b"x")
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(LmclError, match=r"evaluation\.select=last") as error:
        fit(tiny("evaluation.select=best"), folder, resume="auto", progress=False)
    assert error.value.exit_code == (4 if harm == "lost" else 5)
    assert (folder / "log.jsonl").read_bytes() == before
    fit(tiny("evaluation.select=last"), folder, resume="auto", progress=False)


def test_a_full_disk_is_named_and_not_the_libraries_own_words() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        _write_tensors(Path("/dev/full"), {"w": torch.zeros(100000)})


def test_a_run_says_its_engines_in_one_line_and_writes_them_down(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prepare(tiny(), tmp_path / "run", resume="", progress=False).close()
    line = r"device cpu .*, decode (dali-cpu|torch-pillow)-.*, loss chunked fp32 D=\d+ \(cpu\)"
    assert len(re.findall(line, caplog.text)) == 1
    written = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert written["decode"] in caplog.text
    assert written["loss"] in caplog.text
    assert written["decode_reason"]


@pytest.mark.parametrize("part", ["gpu-decode", "fused-loss"])
def test_a_fall_back_from_what_is_required_is_an_error_before_the_first_step(
    tiny: Tiny, tmp_path: Path, part: str
) -> None:
    config = tiny(f"runtime.require=['{part}']")
    for attempt in (lambda: plan(config, tmp_path / "run"), lambda: fit(config, tmp_path / "run")):
        with pytest.raises(ConfigError, match=f"runtime.require asks for '{part}'") as error:
            attempt()
        assert error.value.exit_code == 2
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("where", [plan, fit])
def test_decoding_on_a_gpu_without_one_is_refused_before_the_first_step(
    tiny: Tiny, tmp_path: Path, where: Callable[..., object]
) -> None:
    with pytest.raises(PipelineError, match=r"no CUDA GPU.*\"cpu\"") as error:
        where(tiny("runtime.decode=gpu"), tmp_path / "run")
    assert error.value.exit_code == 2


def test_a_run_does_not_go_on_with_other_pixels(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    environment = folder / "environment.json"
    tree = json.loads(environment.read_text())
    environment.write_text(json.dumps(tree | {"decode": "dali-gpu-2.4"}))
    with pytest.raises(ConfigError, match=r"decoded by dali-gpu-2\.4 so far") as error:
        fit(tiny(), folder, resume="auto", progress=False)
    assert error.value.exit_code == 5


ROOMS = tuple(str(Path(__file__).parents[3] / room) for room in ("lmcl", "pipeline", "kernels"))


class HostWaits(TorchFunctionMode):
    """Counts what makes the host wait for a device, by the function of the project that asks."""

    _WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        by_mask = name == "__getitem__" and any(
            isinstance(key, torch.Tensor) and key.dtype == torch.bool
            for key in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if name in self._WAITING or by_mask:
            stack = [frame.filename for frame in traceback.extract_stack()]
            ours = [f for f in traceback.extract_stack() if f.filename.startswith(ROOMS)]
            # What the CPU's own roads do with their numbers waits for nobody, and the optimiser's
            # step counters lie on the host whatever the device is.
            on_host = ours[-1].filename.endswith(("normalize.py", "chunked.py"))
            if not on_host and not any(f"torch{os.sep}optim" in name for name in stack):
                self.found.append(f"{ours[-1].name}: {name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes", [(), ("objective.keys=teacher",), ("objective.overlap_aware=true",)]
)
def test_a_step_waits_for_the_device_once_in_its_statistics(
    tiny: Tiny, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    trainer = prepare(
        tiny("train.flip=true", *changes), tmp_path / "run", resume="", progress=False
    )
    trainer.refresh_salient_boxes(0)
    trainer.student.train()
    batches = trainer.loader.epoch(0, saliency=trainer.progress.saliency)
    with HostWaits() as first:
        trainer.step(next(batches))
    # Values are checked in the first step, which waits for them, and in no other.
    assert any(wait.startswith("check_") for wait in first.found)
    trainer.progress.position = Position(epoch=0, step=1)
    batch = next(batches)
    with HostWaits() as waits:
        trainer.step(batch)
    trainer.close()
    assert waits.found == ["reduce_step_stats: tolist"]
