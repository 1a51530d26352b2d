"""Cells of a frozen stem in place of pixels: the same run, with the pixels read once."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcl.config import Config
from lmcl.errors import ConfigError, LmclError
from lmcl.evaluation.predictions import read_csv
from lmcl.features.build import FeatureCacheBuilder, possible_salient_boxes
from lmcl.features.cache import FeatureCache
from lmcl.models.preprocess import preprocess
from lmcl.models.saliency import SaliencyConfig, window_to_box
from lmcl.training.setup import fit, prepare
from pipeline.batch import CropBatch
from pipeline.loader import Loader
from tests.lmcl.conftest import ConfigMaker

FROZEN = (
    "encoder.name='squeezenet-vit'",
    "encoder.frozen=13",
    "encoder.width=48",
    "encoder.patch=16",
    "encoder.heads=3",
    "decoder.heads=3",
    "crops.size=64",
    "saliency.view=64",
    "crops.pool=5",
    "crops.evaluation=2",
    "train.epochs=2",
    "train.flip=false",
    "runtime.precision='no'",
)


def _frozen(tiny: ConfigMaker, *changes: str) -> Config:
    return tiny(*FROZEN, *changes)


def _scores(run: Path) -> np.ndarray:
    return read_csv(run / "predictions" / "test.csv").prediction_unit


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("encoder.patch=32", "saliency.window=1"),
        ("objective.hub='centre'",),
    ],
    ids=["16", "32", "centre"],
)
def test_a_run_on_kept_cells_is_the_run_on_pixels(
    tiny: ConfigMaker, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    fit(_frozen(tiny, *changes), tmp_path / "pixels", progress=False)
    kept = _frozen(tiny, *changes, f"runtime.cells='{tmp_path / 'cells'}'")
    fit(kept, tmp_path / "cells-run", progress=False)

    # Convolutions round otherwise in batches of another size; nothing else may differ.
    np.testing.assert_allclose(
        _scores(tmp_path / "cells-run"), _scores(tmp_path / "pixels"), atol=2e-4
    )
    tables = [
        [path.read_bytes() for path in sorted((tmp_path / name / "saliency").iterdir())]
        for name in ("pixels", "cells-run")
    ]
    assert tables[0] == tables[1]
    assert len(tables[0]) == (0 if "objective.hub='centre'" in changes else 2)


def test_a_second_run_decodes_nothing_and_gives_the_same_bits(
    tiny: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _frozen(tiny, f"runtime.cells='{tmp_path / 'cells'}'")
    fit(config, tmp_path / "first", progress=False)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pixel was asked for")

    monkeypatch.setattr(Loader, "_ready_backend", refuse)
    fit(config, tmp_path / "second", progress=False)

    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == made
    assert len(made) == 3
    assert np.array_equal(_scores(tmp_path / "first"), _scores(tmp_path / "second"))


def test_other_stem_weights_are_other_cells(tiny: ConfigMaker, tmp_path: Path) -> None:
    for seed in (0, 1):  # random weights follow from the seed
        config = _frozen(
            tiny, f"runtime.cells='{tmp_path / 'cells'}'", f"train.seed={seed}", "train.epochs=1"
        )
        fit(config, tmp_path / f"run-{seed}", progress=False)
    assert len(list((tmp_path / "cells").iterdir())) == 6


@pytest.mark.parametrize(
    "stopped",
    [KeyboardInterrupt, LmclError],
    ids=["ctrl-c", "signal"],
)
def test_features_that_were_stopped_go_on_and_are_the_same_bits(
    tiny: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: type
) -> None:
    monkeypatch.setattr("lmcl.features.partial._SETTLE", 1)
    whole, again = (_frozen(tiny, f"runtime.cells='{tmp_path / name}'") for name in "ab")
    fit(whole, tmp_path / "whole", progress=False)
    compute, seen = FeatureCacheBuilder._features, []

    def stop_at_the_third(self: FeatureCacheBuilder, batch: CropBatch) -> torch.Tensor:
        seen.append(batch.ids.tolist())
        if len(seen) == 3:
            raise stopped("enough")
        return compute(self, batch)

    monkeypatch.setattr(FeatureCacheBuilder, "_features", stop_at_the_third)
    with pytest.raises(stopped):
        fit(again, tmp_path / "again", progress=False)
    left = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert len(left) == 2
    assert all(name.startswith(".eval") and ".partial" in name for name in left)

    fit(again, tmp_path / "again", resume="auto", progress=False)
    assert seen[3] == seen[2]  # what was finished is not computed again
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"
    )
    assert first == second


def test_the_cost_is_said_before_anything_is_made_and_must_fit(
    tiny: ConfigMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "cells"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(LmclError, match=r"would take 0\.\d\d GB, and 0\.00 GB are free"):
        fit(_frozen(tiny, f"runtime.cells='{folder}'"), tmp_path / "run", progress=False)
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    with caplog.at_level("INFO", logger="lmcl"):
        fit(_frozen(tiny, f"runtime.cells='{folder}'"), tmp_path / "run", progress=False)
    said = next(line for line in caplog.messages if "will take" in line)
    made = sum(path.stat().st_size for path in folder.iterdir())
    assert float(said.split("will take ")[1].split()[0]) == pytest.approx(made / 1e9, abs=0.006)


def test_a_frozen_timm_stem_is_kept_too(tiny: ConfigMaker, tmp_path: Path) -> None:
    stem = ("encoder.name='hybrid'", "encoder.stem='resnet10t'", "encoder.frozen=2")
    levels = ("encoder.levels=['layer1', 'layer2']", "encoder.patch=8", "saliency.window=4")
    changes = [*stem, *levels, "crops.size=32", "saliency.view=32", "train.epochs=1"]
    fit(_frozen(tiny, *changes), tmp_path / "pixels", progress=False)
    kept = _frozen(tiny, *changes, f"runtime.cells='{tmp_path / 'cells'}'")
    fit(kept, tmp_path / "kept", progress=False)
    np.testing.assert_allclose(_scores(tmp_path / "kept"), _scores(tmp_path / "pixels"), atol=2e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("encoder.frozen=5", "the stem learns"),
        ("encoder.name='conv-vit'", "the stem learns"),
        ("train.flip=true", "mirrored"),
    ],
)
def test_what_can_change_during_a_run_cannot_be_kept(
    tiny: ConfigMaker, tmp_path: Path, change: str, words: str
) -> None:
    changes = [change, "encoder.frozen=0"] if "conv-vit" in change else [change]
    config = _frozen(tiny, f"runtime.cells='{tmp_path}'", *changes)
    with pytest.raises(ConfigError, match=words):
        fit(config, tmp_path / "run", progress=False)


def test_crops_from_anywhere_cannot_be_kept(tiny: ConfigMaker, tmp_path: Path) -> None:
    changes = [change for change in FROZEN if "pool" not in change]
    with pytest.raises(ConfigError, match=r"set crops\.pool"):
        fit(tiny(*changes, f"runtime.cells='{tmp_path}'"), tmp_path / "run", progress=False)


@given(
    extent=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    grid=st.integers(2, 14),
    size=st.sampled_from([32, 224]),
    data=st.data(),
)
def test_every_salient_box_is_among_the_possible_salient_boxes(
    extent: tuple[int, int], grid: int, size: int, data: st.DataObject
) -> None:
    window = data.draw(st.integers(1, grid))
    at = data.draw(st.tuples(*[st.integers(0, grid - window)] * 2))
    sides = np.array([extent, (size, size)])
    saliency = SaliencyConfig(window=window)
    places = possible_salient_boxes(sides, grid=grid, saliency=saliency, size=size)
    box = window_to_box(np.array([at]), sides[:1], grid=grid, window=window, size=size)[0]
    assert (places[0] == box).all(axis=1).any()


def test_a_place_that_was_not_kept_is_named() -> None:
    bank = FeatureCache(
        ids=np.array([3, 5]),
        boxes=np.tile(np.array([0, 0, 8, 8], np.int32), (2, 1, 1)),
        values=np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1),
    )
    box = np.array([[[0, 0, 8, 8]]], np.int32)
    assert torch.equal(bank.find(np.array([5]), box), torch.tensor([[[[1.0]]]]))
    for ids, asked in (([4], box), ([9], box), ([5], box + 1)):
        with pytest.raises(LmclError, match=rf"sample {ids[0]}"):
            bank.find(np.array(ids), asked)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    tiny: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    config = _frozen(tiny, f"runtime.cells='{tmp_path / 'cells'}'")
    with pytest.raises(LmclError, match=r"no room for them .*No space left"):
        fit(config, tmp_path / "run", progress=False)
    assert list((tmp_path / "cells").iterdir()) == []


def test_a_resumed_run_on_kept_cells_ends_in_the_same_bits(
    tiny: ConfigMaker, tmp_path: Path
) -> None:
    config = _frozen(tiny, f"runtime.cells='{tmp_path / 'cells'}'", "runtime.checkpoint_steps=1")
    fit(config, tmp_path / "whole", progress=False)
    before_the_last = sorted((tmp_path / "whole" / "checkpoints").glob("epoch-*.pt"))[0]
    assert "epoch-0001" in before_the_last.name
    fit(config, tmp_path / "again", resume=str(before_the_last), progress=False)
    assert np.array_equal(_scores(tmp_path / "whole"), _scores(tmp_path / "again"))


STEMS = {
    "resnet10t": ["encoder.patch=32"],
    "convnext_atto": ["encoder.patch=32"],
    "tf_efficientnet_lite0": ["encoder.patch=32"],
    "swin_tiny_patch4_window7_224": ["encoder.levels=['layers.0', 'layers.1']", "encoder.patch=32"],
    "vit_tiny_patch16_224": ["encoder.levels=['blocks.0']", "encoder.patch=32"],
}


@pytest.mark.parametrize(
    "stem",
    [
        pytest.param(name, marks=() if name == "convnext_atto" else pytest.mark.slow)
        for name in STEMS
    ],
)
def test_any_frozen_stem_can_be_kept_at_a_cost_that_is_said(
    tiny: ConfigMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture, stem: str
) -> None:
    caplog.set_level("INFO")
    levels = {"resnet10t": 5, "convnext_atto": 4, "tf_efficientnet_lite0": 5}.get(stem)
    frozen = levels or len(STEMS[stem][0].split(","))
    changes = [
        *("encoder.name=hybrid", f"encoder.stem={stem}", f"encoder.frozen={frozen}"),
        *("crops.pool=2", "crops.random=2", "saliency.window=1", "objective.hub='centre'"),
        *STEMS[stem],
    ]
    config = _frozen(tiny, *changes)
    on_pixels = prepare(config, tmp_path / "pixels", resume="", progress=False)
    cells = tmp_path / "cells"
    kept = _frozen(tiny, *changes, f"runtime.cells='{cells}'")
    on_cells = prepare(kept, tmp_path / "kept", resume="", progress=False)
    with torch.no_grad():
        seen = []
        for run in (on_pixels, on_cells):
            run.refresh_salient_boxes(0)
            run.student.eval()
            batch = next(iter(run.loader.epoch(0, saliency=run.progress.saliency)))
            seen.append(run.core(preprocess(batch.crops, run.preprocessing)).score)
            run.close()
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=0)
    said = re.search(r"will take (\d+\.\d\d) GB", caplog.text)
    size = sum(path.stat().st_size for path in cells.glob("*.npy"))
    assert float(said[1]) == pytest.approx(size / 1e9, abs=0.006)
