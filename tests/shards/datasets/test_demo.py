import io
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.build.build import build
from shards.datasets import demo
from shards.datasets.demo import _schedule, make_content, open_demo, write_demo
from shards.datasets.demo_contents import KIND_NAMES, render
from shards.datasets.demo_distortions import FAMILIES, distort
from shards.errors import ShardError
from shards.lock import LockedError, lock_folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "set"
    write_demo(folder, contents=6)
    return folder


def test_every_family_occurs_at_every_level_in_sixty_contents() -> None:
    seen = Counter(pair for content in range(60) for pair in _schedule(content))
    assert set(seen) == {(f, level) for f in FAMILIES for level in range(1, 6)} | {("pristine", 0)}
    assert min(seen.values()) >= 9
    assert len(FAMILIES) >= 8


def test_the_set_has_every_codec_many_sizes_and_contents_as_groups(small: Path) -> None:
    samples = list(open_demo(small).samples())
    assert len(samples) == 60
    assert {sample.file.suffix for sample in samples} == {".jpg", ".png", ".bmp"}
    assert {sample.group for sample in samples} == {f"content-{k:04d}" for k in range(6)}
    assert len({Image.open(io.BytesIO(sample.file.read_bytes())).size for sample in samples}) >= 4


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_workers(
    small: Path, tmp_path: Path
) -> None:
    write_demo(tmp_path / "again", contents=6, workers=2)
    names = sorted(path.relative_to(small) for path in small.rglob("*") if path.is_file())
    assert all((small / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_another_seed_gives_other_pictures() -> None:
    assert make_content(0, 1)[0].data != make_content(0, 2)[0].data


def test_a_demo_set_that_is_there_is_not_drawn_again(small: Path) -> None:
    before = (small / "labels.csv").stat().st_mtime_ns
    write_demo(small, contents=6)
    assert (small / "labels.csv").stat().st_mtime_ns == before
    with pytest.raises(ShardError, match="holds another demo set"):
        write_demo(small, contents=7)


def test_scores_fall_with_the_level_alike_in_every_family() -> None:
    by_level: dict[int, list[float]] = {level: [] for level in range(6)}
    for content in range(20):
        for version in make_content(content, 123):
            by_level[version.level].append(version.score)
    means = [np.mean(by_level[level]) for level in range(6)]
    assert all(high - low > 0.5 for high, low in itertools.pairwise(means))
    assert max(np.std(scores) for scores in by_level.values()) < 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_damage_grows_with_the_level(family: str) -> None:
    errors = []
    for level in range(1, 6):
        worst = []
        for kind in range(len(KIND_NAMES)):
            pixels = render(kind, height=96, width=96, rng=np.random.default_rng(kind))
            damaged = distort(pixels, family=family, level=level, rng=np.random.default_rng(9))
            worst.append(np.abs(damaged / 255 - pixels).mean())
        errors.append(np.mean(worst))
    assert errors == sorted(errors)
    assert errors[0] < errors[-1] / 2


def test_the_demo_set_packs(small: Path, tmp_path: Path) -> None:
    manifest = build(open_demo(small), tmp_path / "out", workers=1)
    assert manifest.name == "demo"
    assert manifest.score is not None
    assert (manifest.score.low, manifest.score.high) == (1.0, 5.0)


def test_two_draw_into_one_folder_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with lock_folder(folder, "drawing"), pytest.raises(LockedError, match="set") as caught:
        write_demo(folder, contents=2)
    assert caught.value.exit_code == 2
    assert list(folder.iterdir()) == []
    write_demo(folder, contents=2)
    assert sorted(path.name for path in folder.iterdir()) == ["demo.txt", "images", "labels.csv"]


@pytest.mark.parametrize("name", ["labels.csv", "images/mine.png", "demo.txt/mine.txt"])
def test_what_no_demo_wrote_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(ShardError, match="nothing is replaced; choose another folder") as caught:
        write_demo(tmp_path, contents=2)
    assert caught.value.exit_code == 3
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / name]
    assert (tmp_path / name).read_text() == "precious"


def test_a_demo_set_that_was_not_finished_is_drawn_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "set"
    write_demo(whole, contents=2)

    def fail(path: Path, rows: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_write_csv", fail)
        with pytest.raises(KeyboardInterrupt):
            write_demo(folder, contents=2)
    with pytest.raises(ShardError, match="holds another demo set"):
        write_demo(folder, contents=3)
    write_demo(folder, contents=2)
    for path in whole.rglob("*"):
        same = folder / path.relative_to(whole)
        assert same.is_dir() if path.is_dir() else same.read_bytes() == path.read_bytes()
