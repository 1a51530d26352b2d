"""Every kind of damage is injected, and has to be named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.build.build import build
from shards.build.plan import ShardSize
from shards.datasets.table import open_table
from shards.errors import ShardError
from shards.read import ShardSet, open_set
from shards.sample import DataSet
from shards.splits.draw import make_splits
from shards.splits.split import write_split
from shards.verify import Verification, verify


@pytest.fixture
def root(packed: ShardSet) -> Path:
    write_split(packed.root, make_splits(packed, repeats=1)[0])
    packed.close()
    return Path(packed.root)


def kinds(found: Verification) -> set[str]:
    return {finding.kind for finding in found.findings if finding.is_error}


def said(found: Verification) -> str:
    return "\n".join(f"{finding.where}: {finding.text}" for finding in found.findings)


@pytest.mark.parametrize("deep", [False, True], ids=["quick", "deep"])
def test_a_good_set_has_no_findings(root: Path, deep: bool) -> None:
    found = verify(root, deep=deep)
    assert (found.ok, found.findings, found.samples) == (True, (), 12)


def flip_image_byte(root: Path) -> None:
    tar = root / "mine-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 0xFF
    tar.write_bytes(data)


def flip_json_byte(root: Path) -> None:
    tar = root / "mine-000000.tar"
    data = bytearray(tar.read_bytes())
    place = data.index(b'"mos": 0.0')
    data[place + 7] = ord("9")
    tar.write_bytes(data)


def truncate_tar(root: Path) -> None:
    tar = root / "mine-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-2000])


def pad_truncated_tar(root: Path) -> None:
    """The length is right again, the contents are not."""
    tar = root / "mine-000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2] + b"\0" * (len(data) - len(data) // 2))


def remove_shard(root: Path) -> None:
    (root / "mine-000002.tar").unlink()


def swap_shards(root: Path) -> None:
    one, other = root / "mine-000000.tar", root / "mine-000001.tar"
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)


def edit_manifest_count(root: Path) -> None:
    edit_manifest(root, lambda fields: fields.update(num_samples=11))


def edit_manifest_hash(root: Path) -> None:
    edit_manifest(root, lambda fields: fields["shards"][0].update(sha256="0" * 64))


def edit_manifest_ids(root: Path) -> None:
    edit_manifest(root, lambda fields: fields.update(ids_sha256="0" * 64))


def edit_manifest_labels(root: Path) -> None:
    edit_manifest(root, lambda fields: fields["labels"].update(high=99.0))


def edit_manifest(root: Path, change: Callable[[dict[str, object]], None]) -> None:
    fields = msgspec.json.decode((root / "manifest.json").read_bytes())
    change(fields)
    (root / "manifest.json").write_bytes(msgspec.json.encode(fields))


def edit_table(root: Path, column: str, row: int, value: object) -> None:
    table = pq.read_table(root / "samples.parquet")
    values = table.column(column).to_pylist()
    values[row] = value
    place = table.schema.get_field_index(column)
    field = table.schema.field(column)
    pq.write_table(
        table.set_column(place, field, pa.array(values, field.type)), root / "samples.parquet"
    )


def move_index(root: Path) -> None:
    edit_table(root, "offset", 3, 512)


def change_score(root: Path) -> None:
    edit_table(root, "mos", 3, 0.7)


def move_dali_index(root: Path) -> None:
    index = root / "mine-000000.idx"
    index.write_text(index.read_text().replace("png 512 ", "png 1024 "))


def leave_tar(root: Path) -> None:
    shutil.copy(root / "mine-000000.tar", root / "mine-000009.tar")


def leave_state(root: Path) -> None:
    (root / ".build").mkdir()
    (root / ".build/mine-000000.json").write_text("{}")


def edit_split(root: Path) -> None:
    path = root / "splits/70-10-20-seed123-00.json"
    path.write_text(path.read_text().replace('"seed":123', '"seed":124'))


def damage_parquet(root: Path) -> None:
    (root / "samples.parquet").write_bytes(b"no parquet")


def remove_parquet(root: Path) -> None:
    (root / "samples.parquet").unlink()


def damage_manifest(root: Path) -> None:
    (root / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "kind", "place", "deep"),
    [
        (flip_image_byte, "shard-hash", "mine-000000.tar", True),
        (flip_image_byte, "image", "sample 0", True),
        (flip_json_byte, "member", "sample 0", True),
        (truncate_tar, "shard-size", "mine-000001.tar", False),
        (truncate_tar, "tar", "mine-000001.tar", False),
        (pad_truncated_tar, "member", "mine-000001.tar", False),
        (pad_truncated_tar, "shard-hash", "mine-000001.tar", True),
        (remove_shard, "missing-shard", "mine-000002.tar", False),
        (swap_shards, "shard-hash", "mine-000000.tar", True),
        (edit_manifest_count, "manifest", "says 11 samples, its shards hold 12", False),
        (edit_manifest_hash, "shard-hash", "mine-000000.tar", True),
        (edit_manifest_ids, "manifest", "ids_sha256", False),
        (edit_manifest_labels, "label", "label statistics", False),
        (move_index, "index", "sample 3", False),
        (move_index, "sample-table", "sha256", False),
        (change_score, "member", "sample 3", True),
        (move_dali_index, "index", "mine-000000.idx", False),
        (leave_tar, "leftover", "mine-000009.tar", False),
        (leave_state, "leftover", ".build", False),
        (edit_split, "split", "its ids do not match its hash", False),
        (damage_parquet, "sample-table", "not readable", False),
        (remove_parquet, "sample-table", "is missing", False),
        (damage_manifest, "manifest", "manifest.json", False),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_damage_is_named(
    root: Path, damage: Callable[[Path], None], kind: str, place: str, deep: bool
) -> None:
    damage(root)
    found = verify(root, deep=deep)
    assert kind in kinds(found)
    assert place in said(found)


def test_swapped_shards_of_equal_length_are_named_without_deep(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    (tmp_path / "i").mkdir()
    for k in range(4):
        (tmp_path / f"i/{k}.bmp").write_bytes(picture(k, codec="bmp"))
    (tmp_path / "l.csv").write_text("path,score\n" + "".join(f"{k}.bmp,1.{k}\n" for k in range(4)))
    dataset = open_table(tmp_path / "l.csv", images=tmp_path / "i", name="mine")
    build(dataset, tmp_path / "o", workers=1, size=ShardSize(samples=2))
    swap_shards(tmp_path / "o")
    found = verify(tmp_path / "o")
    assert "member" in kinds(found)
    assert "swapped" in said(found)


def test_equal_images_are_named(
    tmp_path: Path, table: Callable[..., DataSet], picture: Callable[..., bytes]
) -> None:
    dataset = table()
    files = [sample.file for sample in dataset.samples()]
    files[4].write_bytes(files[1].read_bytes())
    build(dataset, tmp_path / "o", workers=1)
    found = verify(tmp_path / "o", deep=True)
    assert found.ok
    assert "2 samples hold the same bytes ('Photo 1.v1.jpg', 'Photo 4.v1.jpg')" in said(found)


def test_scores_outside_the_range_are_a_note(tmp_path: Path, table: Callable[..., DataSet]) -> None:
    build(table(), tmp_path / "o", workers=1)
    # A build refuses them now; sets of earlier versions hold some.
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    manifest["score"] |= {"low": 0.0, "high": 1.0}
    (tmp_path / "o" / "manifest.json").write_text(json.dumps(manifest))
    assert "9 scores leave the set's range 0 .. 1" in said(verify(tmp_path / "o"))


def test_a_part_of_an_official_set_is_a_note(tmp_path: Path, table: Callable[..., DataSet]) -> None:
    import dataclasses

    from shards.sample import Expected, Facts

    facts = Facts(title="x", expected=Expected(samples=99))
    build(dataclasses.replace(table(), facts=facts), tmp_path / "o", workers=1)
    found = verify(tmp_path / "o")
    assert found.ok
    assert "12 samples; the complete mine has 99" in said(found)


def test_no_set_at_all_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such folder"):
        verify(tmp_path / "nothing")


def test_a_split_of_another_set_is_named(
    root: Path, tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    build(table(8, name="other"), tmp_path / "other", workers=1)
    split = make_splits(open_set(tmp_path / "other"), repeats=1)[0]
    write_split(root, split)
    found = verify(root)
    assert kinds(found) == {"split"}


def test_findings_of_a_kind_are_bounded(tmp_path: Path, table: Callable[..., DataSet]) -> None:
    build(table(60), tmp_path / "o", workers=1)
    parquet = tmp_path / "o/samples.parquet"
    content = pq.read_table(parquet)
    place = content.schema.get_field_index("offset")
    moved = pa.array(np.asarray(content.column("offset")) + 512)
    pq.write_table(content.set_column(place, content.schema.field("offset"), moved), parquet)
    found = verify(tmp_path / "o")
    assert sum(finding.kind == "index" for finding in found.findings) <= 20


def test_a_set_that_cannot_be_reached_is_not_called_damaged() -> None:
    with pytest.raises(ShardError, match="check the address, the network") as caught:
        verify("http://127.0.0.1:9/set")
    assert caught.value.exit_code == 1
