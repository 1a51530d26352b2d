"""The readers on the real label files, with empty files in place of the images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.datasets import csiq, flive, kadid10k, koniq10k, livec, spaq, tid2013
from shards.datasets.matlab import load_strings
from shards.datasets.rows import read_rows
from shards.sample import DataSet


def touch(root: Path, names: list[str]) -> None:
    for folder in {(root / name).parent for name in names}:
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).touch()


def copy(labels: Path, root: Path, **names: str) -> None:
    for source, target in names.items():
        file = next(path for path in labels.iterdir() if path.name.startswith(source))
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / target).write_bytes(file.read_bytes())


def csiq_copy(labels: Path, root: Path) -> DataSet:
    copy(labels / "csiq", root, csiq_label="csiq_label.txt")
    lines = (root / "csiq_label.txt").read_text().splitlines()
    touch(root / "dst_imgs", [line.split()[0] for line in lines])
    return csiq.open_csiq(root)


def tid_copy(labels: Path, root: Path) -> DataSet:
    file = labels / "tid2013/mos_with_names.RECONSTRUCTED.txt"
    (root / "mos_with_names.txt").write_bytes(file.read_bytes())
    names = [line.split()[1] for line in file.read_text().splitlines()]
    touch(root / "distorted_images", [name.swapcase() for name in names])
    return tid2013.open_tid2013(root)


def kadid_copy(labels: Path, root: Path) -> DataSet:
    copy(labels / "kadid10k", root, **{"dmos": "kadid10k/dmos.csv"})
    rows = list(read_rows(root / "kadid10k/dmos.csv"))
    names = {str(row[key]) for row in rows for key in ("dist_img", "ref_img")}
    touch(root / "kadid10k/images", sorted(names))
    return kadid10k.open_kadid10k(root)


def livec_copy(labels: Path, root: Path) -> DataSet:
    names = ("AllImages_release.mat", "AllMOS_release.mat", "AllStdDev_release.mat")
    copy(labels / "livec", root, **{name: f"Data/{name}" for name in names})
    found = load_strings(root / "Data/AllImages_release.mat", "AllImages_release")
    touch(root / "Images", found[7:])
    touch(root / "Images/trainingImages", found[:7])
    return livec.open_livec(root)


def koniq_copy(labels: Path, root: Path) -> DataSet:
    file = "koniq10k_distributions_sets.csv"
    copy(labels / "koniq10k", root, **{file: file})
    touch(root / "1024x768", [str(row["image_name"]) for row in read_rows(root / file)])
    return koniq10k.open_koniq10k(root)


def flive_copy(labels: Path, root: Path) -> DataSet:
    names = ("labels_image.csv", "labels640.csv")
    copy(labels / "flive", root, **{name: name for name in names})
    touch(root / "database", [str(row["name"]) for row in read_rows(root / names[0])])
    return flive.open_flive(root)


def spaq_copy(labels: Path, root: Path) -> DataSet:
    names = ("MOS and Image attribute scores.xlsx", "Scene category labels.xlsx")
    copy(labels / "spaq", root, **{name: f"Annotations/{name}" for name in names})
    touch(root / "TestImage", [f"{k:05d}.jpg" for k in range(1, 11126)])
    return spaq.open_spaq(root)


@pytest.mark.parametrize(
    ("make", "count", "groups", "low", "high"),
    [
        (csiq_copy, 866, 30, 0.0, 1.0),
        (tid_copy, 3000, 25, 0.24242, 7.21429),
        (kadid_copy, 10125, 81, 1.0, 4.93),
        (livec_copy, 1162, 1162, 3.42, 92.43195),
        (koniq_copy, 10073, 10073, 3.91176, 88.38889),
        (flive_copy, 39810, 39810, 0.0, 94.3332),
        (spaq_copy, 11125, 11125, 2.0, 96.0),
    ],
    ids=["csiq", "tid2013", "kadid10k", "livec", "koniq10k", "flive", "spaq"],
)
def test_real_labels_have_the_documented_counts_and_ranges(
    tmp_path: Path,
    shared_data: Path,
    make: Callable[[Path, Path], DataSet],
    count: int,
    groups: int,
    low: float,
    high: float,
) -> None:
    dataset = make(shared_data / "labels", tmp_path)
    samples = list(dataset.samples())
    scores = [sample.mos for sample in samples if sample.mos is not None]
    assert len({sample.path for sample in samples}) == len(scores) == count
    assert len({sample.group for sample in samples}) == groups
    assert (min(scores), max(scores)) == pytest.approx((low, high), abs=1e-4)
    assert all(sample.file.is_file() for sample in samples[:: max(1, count // 50)])
    expected: Any = dataset.facts.expected
    assert expected.samples == count
    assert (expected.low, expected.high) == pytest.approx((low, high), abs=1e-4)


def test_koniq_official_parts_are_complete(tmp_path: Path, shared_data: Path) -> None:
    parts = [sample.part for sample in koniq_copy(shared_data / "labels", tmp_path).samples()]
    assert [parts.count(part) for part in ("train", "val", "test")] == [7058, 1000, 2015]


def test_flive_official_test_part_is_images_only(tmp_path: Path, shared_data: Path) -> None:
    parts = [sample.part for sample in flive_copy(shared_data / "labels", tmp_path).samples()]
    assert parts.count("test") == 1827


def test_tid_official_excerpt_has_the_spellings_of_the_reconstruction(shared_data: Path) -> None:
    folder = shared_data / "labels/tid2013"
    excerpt = (folder / "mos_with_names.I01.official_excerpt.txt").read_text().splitlines()
    whole = (folder / "mos_with_names.RECONSTRUCTED.txt").read_text().splitlines()
    assert [line.split()[1] for line in excerpt] == [line.split()[1] for line in whole][
        : len(excerpt)
    ]
