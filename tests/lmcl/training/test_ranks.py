"""Several gloo ranks against one process, by the training step's own parts.

This file is also the program of each rank: `python test_ranks.py FOLDER SHARDS SCENARIO...`, with
the environment that torch's launcher sets.
"""

import dataclasses
import faulthandler
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lmcl.config import Config, load_config
from lmcl.errors import LmclError
from lmcl.training.setup import fit, prepare
from lmcl.training.signals import InterruptedRunError
from lmcl.training.trainer import Trainer
from pipeline.batch import CropBatch
from shards.read import open_set
from shards.splits.split import load_split, split_from_ids, write_split
from tests import warm

REPO = Path(__file__).resolve().parents[3]
SPLIT = "70-10-20-seed123-00"
PRIME = 7
SMALL = [
    *("crops.size=32", "saliency.view=32", "saliency.window=2", "crops.random=3"),
    *("encoder.name=vit_tiny_patch16_224", "encoder.depth=1", "saliency.layers=1"),
]
CASES = {
    "paper": [],
    "sets": ["objective.rank_weight=0.1"],
    "options": ["objective.intra_weight=balanced", "objective.overlap_aware=true"],
    "teacher": ["objective.keys=teacher", "objective.include_positive=true"],
    "together": ["objective.plcc_weight=1.0", "objective.rank_weight=2.0"],
    "distribution": ["decoder.bins=5", "runtime.micro_batch=3"],
    "parts": ["runtime.micro_batch=3"],
}
KINDS = {
    name: [f"encoder.name={name}", "encoder.width=48", "encoder.heads=3", "encoder.patch=8"]
    for name in (
        *("vit_base_patch16_siglip_224", "vit_medium_patch16_reg4_gap_256"),
        *("deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"),
        *("vit_pe_core_tiny_patch16_384", "vit_small_patch16_dinov3", "conv-vit"),
    )
} | {
    stem: [
        *("encoder.name=hybrid", f"encoder.stem={stem}", "encoder.patch=32"),
        *("encoder.width=48", "encoder.heads=3", "saliency.window=1"),
        *more,
    ]
    for stem, more in (
        ("resnet10t", ["encoder.frozen=2"]),
        ("convnext_atto", ["encoder.levels=['stages.0', 'stages.2']"]),
        ("tf_efficientnet_lite0", ["encoder.frozen=5"]),
    )
}
"""One encoder of each kind, and what makes it small."""
FIRST, LAST = 0, 3
"""Of the epoch's steps: 12 images, and the 4 that remain: 2 + 2, or 2 + 1 + 1."""
HANG_S = 60


def start(world: int, folder: Path, shards: Path, *scenarios: str) -> None:
    """Run this file on `world` ranks and wait for all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        names = place | address if world > 1 else {}
        environment = {name: str(value) for name, value in names.items()}
        ranks.append(
            warm.start(
                [sys.executable, __file__, folder, shards, *scenarios],
                env={**os.environ, **environment},
                stderr=subprocess.PIPE,
            )
        )
    errors = [process.communicate(timeout=280)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world, "\n".join(errors)[-4000:]


@pytest.fixture(scope="module")
def gradients(demo_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict]:
    """The gradients of every case at a world size, computed once."""
    found: dict[int, dict] = {}

    def of(world: int) -> dict:
        if world not in found:
            folder = tmp_path_factory.mktemp(f"world-{world}")
            start(world, folder, demo_set, "gradients")
            found[world] = torch.load(folder / "gradients.pt")
        return found[world]

    return of


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
def test_ranks_together_have_the_gradient_of_one_process(
    gradients: Callable[[int], dict], world: int, dtype: str, tolerance: float
) -> None:
    one, many = gradients(1), gradients(world)
    for name in CASES:
        for at in (FIRST, LAST):
            truth, found = (each[f"{dtype}/{name}/{at}"] for each in (one, many))
            largest = max(float(value.abs().max()) for value in truth.values())
            for weight, value in truth.items():
                error = float((value - found[weight]).abs().max()) / largest
                assert error <= tolerance, f"{name}, step {at}, {weight}: {error}"


def test_an_accident_on_one_rank_stops_all_and_is_named(demo_set: Path, tmp_path: Path) -> None:
    start(2, tmp_path, demo_set, "accident", "gradient-accident")
    for rank in range(2):
        message = (tmp_path / f"accident-{rank}.txt").read_text()
        assert "the l1 term is not finite at epoch 1, step 1, rank 1;" in message
        message = (tmp_path / f"gradient-accident-{rank}.txt").read_text()
        assert "the gradient is not finite at epoch 1, step 1, rank 0, 1;" in message
    assert not (tmp_path / "accident" / "nonfinite-rank0.txt").exists()
    assert len((tmp_path / "accident" / "nonfinite-rank1.txt").read_text().split()) == 6


@pytest.mark.parametrize(
    "world", [2, pytest.param(3, marks=pytest.mark.slow)], ids=["two", "three"]
)
def test_no_number_of_samples_makes_ranks_wait_for_each_other(
    demo_set: Path, tmp_path: Path, world: int
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(demo_set, shards)
    counts = sorted({1, world - 1, world, world + 1, PRIME})
    opened = open_set(shards)
    whole = load_split(opened, SPLIT)
    for count in counts:
        parts = [whole.part(part)[:count] for part in ("train", "val", "test")]
        split = split_from_ids(opened, f"count-{count}", 0, parts, note="")
        write_split(shards, split)
    start(world, tmp_path, shards, *(f"count-{count}" for count in counts))
    for count in counts:
        metrics = json.loads((tmp_path / f"count-{count}" / "metrics.json").read_text())
        assert metrics["n"] == count
        log = (tmp_path / f"count-{count}" / "log.jsonl").read_text().splitlines()
        images = [entry["images"] for line in log if "images" in (entry := json.loads(line))]
        assert sum(images) == count


def test_another_number_of_processes_goes_on_with_the_same_samples_in_the_same_order(
    demo_set: Path, tmp_path: Path
) -> None:
    start(1, tmp_path / "one", demo_set, "resume")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for which, stopped_at in (("one", 2), ("two", 2)):
        path = tmp_path / which / "run" / "checkpoints" / f"epoch-0000-step-{stopped_at:06d}.pt"
        assert path.exists()
    start(1, tmp_path / "one", demo_set, "resume")
    start(2, tmp_path / "two", demo_set, "resume")
    alone = np.load(tmp_path / "one" / "seen-0.npy")
    shared = [np.load(tmp_path / "two" / f"seen-{rank}.npy") for rank in range(2)]
    assert len(alone) == 6
    together = np.stack(shared, axis=-1).reshape(len(alone), -1)
    assert np.array_equal(together, alone)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "run/log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for name in ("loss", "l1", "lr"):
        left, right = ([entry[name] for entry in log if name in entry] for log in logs)
        assert left == pytest.approx(right, rel=1e-3)


@pytest.mark.slow
def test_two_ranks_train_one_encoder_of_each_kind(demo_set: Path, tmp_path: Path) -> None:
    start(2, tmp_path, demo_set, *(f"kind-{name}" for name in KINDS))
    for name in KINDS:
        log = (tmp_path / f"kind-{name}" / "log.jsonl").read_text().splitlines()
        assert sum("loss" in json.loads(line) for line in log) == 4


def make_config(shards: Path, *changes: str) -> Config:
    return load_config(REPO / "configs" / "smoke.toml", [f"data.root='{shards}'", *SMALL, *changes])


def make_joint_config(shards: Path, *changes: str) -> Config:
    """Two names for the first splits of one set: different images are not needed here."""
    both = ", ".join(f'{{root="{shards}", split="{SPLIT}", name="{name}"}}' for name in "ab")
    sets = ("data.root=''", "data.split=''", f"data.sets=[{both}]", "data.share_exponent=0.5")
    return make_config(shards, *sets, *changes)


def save_gradients(folder: Path, shards: Path) -> None:
    found = {}
    for dtype in ("float32", "float64"):
        torch.set_default_dtype(getattr(torch, dtype))
        for name, changes in CASES.items():
            maker = make_joint_config if name == "sets" else make_config
            config = maker(shards, *changes)
            run = prepare(config, folder / dtype / name, resume="", progress=False)
            for model in (run.core, run.teacher.model):
                model.encoder.vit.patch_embed.register_forward_pre_hook(
                    lambda _module, inputs: (inputs[0].to(torch.get_default_dtype()),)
                )
            run.run_saliency_pass(0)
            run.student.train()
            for at in (FIRST, LAST):
                found[f"{dtype}/{name}/{at}"] = gradient(run, at)
    torch.set_default_dtype(torch.float32)
    if run.context.is_main:
        torch.save(found, folder / "gradients.pt")


def gradient(run: Trainer, at: int) -> dict[str, torch.Tensor]:
    """What `engine.step` hands the optimiser, without moving the weights."""
    batch = next(iter(run.loader.epoch(0, start=at, saliency=run.progress.saliency)))
    seen = run.grad_cache.forward(batch)
    terms = run.compute_loss(batch, seen)
    run.grad_cache.backward(batch, seen, terms.loss)
    found = {name: value.grad.clone() for name, value in run.core.named_parameters()}
    run.optimizer.zero_grad()
    run.loader.close()
    return found


def meet_accident(folder: Path, shards: Path, name: str) -> None:
    run = prepare(make_config(shards), folder / name, resume="", progress=False)
    run.run_saliency_pass(0)
    run.student.train()
    batch = next(iter(run.loader.epoch(0, saliency=run.progress.saliency)))
    if run.context.rank == 1 and name == "gradient-accident":
        run.core.panel.head.weight.register_hook(lambda gradient: gradient * torch.nan)
    elif run.context.rank == 1:
        batch = dataclasses.replace(batch, mos=torch.full_like(batch.mos, torch.nan))
    with pytest.raises(LmclError) as error:
        run.step(batch)
    (folder / f"{name}-{run.context.rank}.txt").write_text(str(error.value))
    run.loader.close()


def train_on_few(folder: Path, shards: Path, name: str) -> None:
    world = os.environ["WORLD_SIZE"]
    changes = (f"data.split={name}", f"train.batch_size={world}", "train.epochs=1")
    fit(make_config(shards, *changes), folder / name, progress=False)


def train_a_kind(folder: Path, shards: Path, name: str) -> None:
    """One epoch: what has no gradient stops the second step."""
    changes = (*KINDS[name.removeprefix("kind-")], "decoder.heads=3")
    run = prepare(make_config(shards, *changes), folder / name, resume="", progress=False)
    run.run_saliency_pass(0)
    run.train_epoch(0)
    run.close()


def stop_or_go_on(folder: Path, shards: Path) -> None:
    """The first call stops in the first epoch; the second finishes and says what it saw."""
    config = make_config(shards, "evaluation.select=last")
    is_second = (folder / "run").exists()
    seen: list[np.ndarray] = []

    def watched(run: Trainer, batch: CropBatch) -> object:
        seen.append(batch.ids.numpy())
        run.stop.requested = not is_second and len(seen) == 2
        return step(run, batch)

    step = Trainer.step
    Trainer.step = watched
    if not is_second:
        with pytest.raises(InterruptedRunError):
            fit(config, folder / "run", resume="auto", progress=False)
        return
    fit(config, folder / "run", resume="auto", progress=False)
    np.save(folder / f"seen-{os.environ.get('RANK', '0')}.npy", np.stack(seen))


def main(folder: Path, shards: Path, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    for name in scenarios:
        # A rank that waits for another one forever says where, and fails the test.
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        if name == "gradients":
            faulthandler.cancel_dump_traceback_later()
            save_gradients(folder, shards)
        elif name.endswith("accident"):
            meet_accident(folder, shards, name)
        elif name == "resume":
            stop_or_go_on(folder, shards)
        elif name.startswith("kind-"):
            train_a_kind(folder, shards, name)
        else:
            train_on_few(folder, shards, name)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
