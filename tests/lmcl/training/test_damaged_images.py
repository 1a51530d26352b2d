"""Training on a set with damaged images: stopped by name, or left out of the train part alone."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcl.config import Config
from lmcl.errors import ConfigError
from lmcl.training.setup import fit
from pipeline.errors import PipelineError
from shards.read import open_set
from shards.splits.split import load_split

_SPLIT = "70-10-20-seed123-00"


@pytest.fixture
def damaged(demo_set: Path, tmp_path: Path) -> Callable[[str], tuple[Path, int]]:
    """A copy of the demo set with half an image of a part overwritten, and that image's id."""

    def make(part: str) -> tuple[Path, int]:
        root = tmp_path / "set"
        shutil.copytree(demo_set, root)
        packed = open_set(root)
        one = int(load_split(packed, _SPLIT).part(part)[3])
        table = packed.samples
        with (root / packed.manifest.shards[table.shard[one]].name).open("r+b") as tar:
            size = int(table.size[one])
            tar.seek(int(table.offset[one]) + size // 2)
            tar.write(bytes(size - size // 2))
        return root, one

    return make


def test_a_damaged_training_image_stops_a_run_with_a_setting_that_lets_it_go_on(
    tiny: Callable[..., Config], damaged: Callable[[str], tuple[Path, int]], tmp_path: Path
) -> None:
    root, one = damaged("train")
    config = tiny(f"data.root='{root}'", "train.epochs=1")
    with pytest.raises(PipelineError, match=rf"sample {one} .*runtime\.on_error = \"skip\""):
        fit(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize("batch_size", [12, 40], ids=["small", "larger-than-what-is-left"])
def test_with_skip_a_run_learns_from_the_sound_images_and_says_so(
    tiny: Callable[..., Config],
    damaged: Callable[[str], tuple[Path, int]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    batch_size: int,
) -> None:
    root, one = damaged("train")
    config = tiny(
        f"data.root='{root}'",
        "train.epochs=1",
        "runtime.on_error=skip",
        f"train.batch_size={batch_size}",
    )
    images = len(load_split(open_set(root), _SPLIT).train)
    if batch_size > images - 1:
        with pytest.raises(ConfigError, match=f"set it to at most {images - 1}"):
            fit(config, tmp_path / "run", progress=False)
        return
    with caplog.at_level(logging.WARNING, logger="lmcl"):
        fit(config, tmp_path / "run", progress=False)
    protocol = json.loads((tmp_path / "run" / "protocol.json").read_text())
    assert protocol["counts"]["train"] == images - 1
    assert f"1 of the {images} images of the train part are damaged and left out: ids {one}" in (
        caplog.text
    )


def test_a_damaged_test_image_is_an_error_even_with_skip(
    tiny: Callable[..., Config], damaged: Callable[[str], tuple[Path, int]], tmp_path: Path
) -> None:
    root, one = damaged("test")
    config = tiny(f"data.root='{root}'", "train.epochs=1", "runtime.on_error=skip")
    with pytest.raises(PipelineError, match=f"sample {one} "):
        fit(config, tmp_path / "run", progress=False)
