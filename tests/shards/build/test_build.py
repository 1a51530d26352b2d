import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.build.build import build
from shards.build.pack import PackOptions, read_record, read_rows, write_record
from shards.build.plan import ShardSize
from shards.datasets.table import open_table
from shards.datasets.unlabelled import open_unlabelled
from shards.errors import ShardError
from shards.manifest import MANIFEST
from shards.read import open_set
from shards.sample import DataSet
from shards.store import Store

FIVE = ShardSize(samples=5)
FOUR = ShardSize(samples=4)


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


@pytest.fixture
def reference(tmp_path: Path, table: Callable[..., DataSet]) -> tuple[DataSet, dict[str, str]]:
    dataset = table()
    build(dataset, tmp_path / "reference", workers=1, size=FIVE)
    return dataset, hashes(tmp_path / "reference")


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, reference: tuple[DataSet, dict[str, str]], workers: int
) -> None:
    dataset, expected = reference
    build(dataset, tmp_path / "out", workers=workers, size=FIVE)
    assert hashes(tmp_path / "out") == expected


def test_a_shard_holds_the_images_as_they_were(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    dataset = table()
    build(dataset, tmp_path / "out", workers=1, size=FIVE)
    shard_set = open_set(tmp_path / "out")
    for sample, (_, data, row) in zip(dataset.samples(), shard_set, strict=True):
        assert data == sample.file.read_bytes()
        assert row.path == sample.path
        assert row.sha256 == hashlib.sha256(data).digest()


def test_shards_are_cut_by_bytes_too(tmp_path: Path, table: Callable[..., DataSet]) -> None:
    largest = max(sample.file.stat().st_size for sample in table().samples())
    dataset = open_table(tmp_path / "mine.csv", images=tmp_path / "mine")
    manifest = build(dataset, tmp_path / "out", workers=1, size=ShardSize(size_bytes=largest))
    assert len(manifest.shards) > 6
    assert all(shard.samples > 0 for shard in manifest.shards)


def test_building_again_changes_nothing(
    tmp_path: Path, reference: tuple[DataSet, dict[str, str]]
) -> None:
    dataset, expected = reference
    before = (tmp_path / "reference/mine-000000.tar").stat().st_mtime_ns
    build(dataset, tmp_path / "reference", workers=1, size=FIVE)
    assert hashes(tmp_path / "reference") == expected
    assert (tmp_path / "reference/mine-000000.tar").stat().st_mtime_ns == before


def test_a_finished_set_of_another_source_is_not_replaced_unasked(
    tmp_path: Path, reference: tuple[DataSet, dict[str, str]], table: Callable[..., DataSet]
) -> None:
    other = table(6, name="other")
    with pytest.raises(ShardError, match="holds a finished set 'mine' of 12 images"):
        build(other, tmp_path / "reference", workers=1)
    build(other, tmp_path / "reference", workers=1, overwrite=True)
    assert open_set(tmp_path / "reference").name == "other"


class StopNowError(Exception):
    pass


def stop_after(images: int) -> Callable[[int, int], None]:
    done = 0

    def count(new: int, total: int) -> None:
        nonlocal done
        done += new
        if done >= images:
            raise StopNowError

    return count


@pytest.mark.parametrize("images", [1, 5, 7, 11])
def test_a_build_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, reference: tuple[DataSet, dict[str, str]], images: int
) -> None:
    dataset, expected = reference
    out = tmp_path / "out"
    with pytest.raises(StopNowError):
        build(dataset, out, workers=1, size=FIVE, progress=stop_after(images))
    with pytest.raises(ShardError, match="unfinished build"):
        open_set(out)
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(finished) == (images - 1) // 5
    build(dataset, out, workers=1, size=FIVE)
    assert hashes(out) == expected
    assert all((out / name).stat().st_mtime_ns == then for name, then in finished.items())


def test_a_changed_file_is_packed_again_when_a_build_goes_on(
    tmp_path: Path, reference: tuple[DataSet, dict[str, str]], picture: Callable[..., bytes]
) -> None:
    dataset, expected = reference
    out = tmp_path / "out"
    with pytest.raises(StopNowError):
        build(dataset, out, workers=1, size=FIVE, progress=stop_after(7))
    first = next(dataset.samples()).file
    first.write_bytes(picture(99, height=10, width=14))
    build(dataset, out, workers=1, size=FIVE)
    assert hashes(out)["mine-000000.tar"] != expected["mine-000000.tar"]
    assert open_set(out).read_bytes(0) == first.read_bytes()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Forty images, and what an undisturbed build makes of them."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for k in range(40):
        pixels = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{k:03d}.png")
    build(open_unlabelled(folder / "images"), folder / "whole", workers=1, size=FOUR)
    return folder / "images", hashes(folder / "whole")


def start(images: Path, out: Path, *, workers: int = 2) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", "from shards.cli import main; main()", "build", "unlabelled"]
    command += [str(images), "--name", "unlabelled", "--output", str(out), "--shard-samples", "4"]
    command += ["--workers", str(workers), "--no-progress"]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def end_of(running: "subprocess.Popen[bytes]") -> int:
    running.communicate()
    return running.returncode


def wait_for(done: Callable[[], bool], running: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while not done() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_build_killed_at_any_moments_ends_in_the_same_set(
    tmp_path: Path, pictures: tuple[Path, dict[str, str]], kills: int
) -> None:
    images, expected = pictures
    out = tmp_path / "out"
    random = np.random.default_rng(kills)
    # From before the first shard to after the manifest.
    for number in random.integers(0, 12, kills).tolist():
        running = start(images, out)
        wait_for(lambda number=number: len(list(out.glob("*.tar"))) >= number, running)
        time.sleep(float(random.uniform(0, 0.05)))
        running.kill()
        running.communicate()
        if number % 3 == 0 and (out / "manifest.json").exists():
            shutil.rmtree(out)
    assert end_of(start(images, out)) == 0
    assert hashes(out) == expected
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGTERM, 1), (signal.SIGHUP, 2), (signal.SIGINT, 2)],
)
def test_a_build_that_is_asked_to_stop_keeps_what_is_done_and_says_how_to_go_on(
    tmp_path: Path, pictures: tuple[Path, dict[str, str]], number: int, workers: int
) -> None:
    images, expected = pictures
    out = tmp_path / "out"
    running = start(images, out, workers=workers)
    wait_for(lambda: len(list(out.glob("*.tar"))) >= 2, running)
    running.send_signal(number)
    _, said = running.communicate()
    assert running.returncode == 128 + number, said
    assert b"the same command goes on where it stopped" in said
    assert said.strip().count(b"\n") == 0  # click ends the line of a ^C
    assert not list(out.glob(".*.part"))
    assert not (out / ".lmcl.lock").exists()
    records = [path.stem for path in (out / ".build").glob("*-*.parquet")]
    kept = {f"{stem}.tar": (out / f"{stem}.tar").stat().st_mtime_ns for stem in records}
    assert len(kept) >= 1
    assert end_of(start(images, out)) == 0
    assert hashes(out) == expected
    assert all((out / name).stat().st_mtime_ns == then for name, then in kept.items())


def test_of_two_builds_into_one_folder_the_second_is_told_about_the_first(
    tmp_path: Path, pictures: tuple[Path, dict[str, str]]
) -> None:
    images, expected = pictures
    out = tmp_path / "out"
    first = start(images, out)
    wait_for(lambda: bool(list(out.glob("*.tar"))), first)
    first.send_signal(signal.SIGSTOP)  # as long as the second looks
    second = start(images, out)
    _, said = second.communicate()
    first.send_signal(signal.SIGCONT)
    assert end_of(first) == 0
    assert second.returncode == 2
    assert f"(process {first.pid}, building since" in said.decode()
    assert hashes(out) == expected


@pytest.mark.parametrize("name", ["mine-000000.tar", "mine-000007.idx", "samples.parquet"])
def test_files_that_no_build_wrote_are_not_replaced(
    tmp_path: Path, table: Callable[..., DataSet], name: str
) -> None:
    dataset = table(2)
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"theirs")
    with pytest.raises(ShardError, match=f"holds {name}, which no build wrote") as caught:
        build(dataset, out, workers=1)
    assert caught.value.exit_code == 2
    assert os.listdir(out) == [name]


def test_files_of_others_in_the_folders_of_a_build_stay(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    out = tmp_path / "out"
    (out / ".build").mkdir(parents=True)
    for name in ("notes.txt", ".build/main.swift", "other-000000.tar"):
        (out / name).write_bytes(b"theirs")
    build(table(2), out, workers=1)
    for name in ("notes.txt", ".build/main.swift", "other-000000.tar"):
        assert (out / name).read_bytes() == b"theirs"


def test_a_build_that_cannot_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for k in range(40):
        with (images / f"{k}.png").open("wb") as sparse:
            sparse.truncate(1 << 40)
    with pytest.raises(ShardError, match=r"43,98\d\.\d GB are to be written, .* GB are free there"):
        build(open_unlabelled(images), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_finished_is_named(
    tmp_path: Path, pictures: tuple[Path, dict[str, str]]
) -> None:
    images, _ = pictures
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
    command = [sys.executable, "-c", limit + "from shards.cli import main; main()", "build"]
    command += ["unlabelled", str(images), "--output", str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{tmp_path}/out/out-000000.tar: File too large" in done.stderr
    assert not list((tmp_path / "out").glob(".*.part"))


def damage(dataset: DataSet, *ids: int) -> None:
    for id, sample in enumerate(dataset.samples()):
        if id in ids:
            sample.file.write_bytes(sample.file.read_bytes()[:40])


def test_an_unreadable_image_stops_the_build_by_name(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    dataset = table()
    damage(dataset, 4)
    with pytest.raises(ShardError, match=r"Photo 4\.v1\.jpg"):
        build(dataset, tmp_path / "out", workers=1)
    assert not (tmp_path / "out/manifest.json").exists()


def test_skipped_images_are_listed_and_keep_their_row(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    dataset = table()
    damage(dataset, 0, 4)
    options = PackOptions(on_error="skip")
    manifest = build(dataset, tmp_path / "out", workers=1, size=FIVE, options=options)
    lines = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [0, 4]
    assert (manifest.num_samples, manifest.num_rejected) == (10, 2)
    shard_set = open_set(tmp_path / "out")
    assert shard_set.ids().tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert shard_set.samples.path[4] == "Photo 4.v1.jpg"
    with pytest.raises(ShardError, match=r"sample 4 .* was rejected"):
        shard_set.read_bytes(4)


@pytest.mark.parametrize("bad", [(4,), (0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (10, 11), (2, 10, 11)])
def test_retry_failed_gives_the_set_as_if_nothing_had_failed(
    tmp_path: Path, table: Callable[..., DataSet], bad: tuple[int, ...]
) -> None:
    dataset = table()
    build(dataset, tmp_path / "whole", workers=1, size=FIVE)
    good = {id: sample.file.read_bytes() for id, sample in enumerate(dataset.samples())}
    damage(dataset, *bad)
    options = PackOptions(on_error="skip")
    out = tmp_path / "out"
    build(dataset, out, workers=1, size=FIVE, options=options)
    for id, sample in enumerate(dataset.samples()):
        sample.file.write_bytes(good[id])
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    manifest = build(dataset, out, workers=1, size=FIVE, options=options, retry_failed=True)
    assert (manifest.num_samples, manifest.num_rejected) == (12, 0)
    tars = {name: value for name, value in hashes(out).items() if name.endswith((".tar", ".idx"))}
    assert tars == {n: v for n, v in hashes(tmp_path / "whole").items() if n in tars}
    assert not (out / "rejected.jsonl").exists()
    kept = [
        path.name for path in out.glob("*.tar") if before.get(path.name) == path.stat().st_mtime_ns
    ]
    assert len(kept) == 3 - len({id // 5 for id in bad})


def test_a_label_without_a_file_stops_before_any_work(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    dataset = table()
    next(dataset.samples()).file.unlink()
    with pytest.raises(
        ShardError, match=r"1 of 12 labelled images are not there.*Photo 0"
    ) as caught:
        build(dataset, tmp_path / "out", workers=1)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_bmp_to_png_changes_bytes_but_no_pixel(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    dataset = table()
    build(dataset, tmp_path / "out", workers=1, options=PackOptions(bmp_to_png=True))
    shard_set = open_set(tmp_path / "out")
    assert set(shard_set.samples.codec) == {"png", "jpg"}
    for sample, (_, data, _) in zip(dataset.samples(), shard_set, strict=True):
        stored = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(stored, np.asarray(Image.open(sample.file)))


def test_a_set_without_one_good_image_is_no_set(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    dataset = table(3)
    damage(dataset, 0, 1, 2)
    with pytest.raises(ShardError, match="none of the 3 images could be packed"):
        build(dataset, tmp_path / "out", workers=1, options=PackOptions(on_error="skip"))
    assert not (tmp_path / "out/manifest.json").exists()


def test_leftovers_of_an_earlier_larger_set_are_removed(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    out = tmp_path / "out"
    build(table(), out, workers=1, size=ShardSize(samples=2))
    dataset = open_table(tmp_path / "mine.csv", images=tmp_path / "mine", name="mine")
    build(
        dataset,
        out,
        workers=1,
        size=ShardSize(samples=6),
        overwrite=True,
        options=PackOptions(bmp_to_png=True),
    )
    assert len(list(out.glob("*.tar"))) == len(list(out.glob("*.idx"))) == 2


@pytest.mark.parametrize("name", ["", "Upper", "with space", "a/b", "..", "x" * 60])
def test_a_set_needs_a_plain_name(tmp_path: Path, table: Callable[..., DataSet], name: str) -> None:
    import dataclasses

    with pytest.raises(ShardError, match="cannot be the name of a set"):
        build(dataclasses.replace(table(3), name=name), tmp_path / "out")


def test_unlabelled_images_have_no_score(tmp_path: Path, table: Callable[..., DataSet]) -> None:
    table()
    build(open_unlabelled(tmp_path / "mine"), tmp_path / "out", workers=1)
    shard_set = open_set(tmp_path / "out")
    assert shard_set.score is None
    assert np.isnan(shard_set.samples.mos).all()
    assert np.isnan(shard_set.unit_mos()).all()


@pytest.mark.parametrize(
    ("rows", "most"), [(1, 100), (600, 100), (3000, 188), (10_073, 630), (40_000, 2000)]
)
def test_a_set_is_cut_into_sixteen_shards_within_bounds(rows: int, most: int) -> None:
    assert ShardSize().samples_of(rows) == most
    assert ShardSize(samples=7).samples_of(rows) == 7


def test_a_record_cut_short_by_a_power_failure_is_not_believed(
    tmp_path: Path, reference: tuple[DataSet, dict[str, str]]
) -> None:
    dataset, expected = reference

    def stop(images: int, total: int) -> None:
        if list((tmp_path / "out" / ".build").glob("*.parquet")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(dataset, tmp_path / "out", workers=1, size=FIVE, progress=stop)
    record = next((tmp_path / "out" / ".build").glob("*.parquet"))
    record.write_bytes(record.read_bytes()[:-20])
    build(dataset, tmp_path / "out", workers=1, size=FIVE)
    assert hashes(tmp_path / "out") == expected


def test_a_set_whose_manifest_cannot_be_read_is_replaced_if_asked_to(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    dataset = table(4)
    before = build(dataset, tmp_path / "out", workers=1)
    (tmp_path / "out" / MANIFEST).write_bytes(b"{}")
    with pytest.raises(ShardError, match="`--overwrite` replaces the set"):
        build(dataset, tmp_path / "out", workers=1)
    build(dataset, tmp_path / "out", workers=1, overwrite=True)
    assert open_set(tmp_path / "out").manifest.shards == before.shards


@pytest.mark.parametrize("contents", [b"", b"[]", b"[1]", b"[0,0]", b"[0,-1]", b"[[[["])
def test_a_damaged_plan_of_an_earlier_build_is_one_sentence(
    tmp_path: Path, table: Callable[..., DataSet], contents: bytes
) -> None:
    out = tmp_path / "out"
    (out / ".build").mkdir(parents=True)
    (out / ".build" / "plan.json").write_bytes(contents)
    with pytest.raises(ShardError, match=r"plan\.json: is (damaged|no list)"):
        build(table(2), out, workers=1)


def test_a_record_that_names_another_shard_is_not_believed(
    tmp_path: Path, reference: tuple[DataSet, dict[str, str]]
) -> None:
    dataset, expected = reference
    out = tmp_path / "out"
    with pytest.raises(StopNowError):
        build(dataset, out, workers=1, size=FIVE, progress=stop_after(7))
    store = Store(out)
    record = read_record(store, "mine-000000")
    assert record is not None
    assert record.shard is not None
    (out / "theirs.tar").write_bytes((out / record.shard.name).read_bytes())
    shard = dataclasses.replace(record.shard, name="theirs.tar")
    forged = dataclasses.replace(record, fingerprint=None, shard=shard)
    write_record(store, "mine-000000", forged, read_rows(store, "mine-000000"))
    build(dataset, out, workers=1, size=FIVE)
    (out / "theirs.tar").unlink()
    assert hashes(out) == expected
