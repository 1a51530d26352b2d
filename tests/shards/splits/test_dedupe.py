import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from shards.build.build import build
from shards.datasets.demo_contents import render
from shards.datasets.table import open_table
from shards.read import ShardSet, open_set
from shards.splits.dedupe import drop_twins, find_twins, perceptual_hash, signatures
from shards.splits.draw import make_splits
from shards.splits.split import load_split, write_split


def content(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray((render(seed, height=96, width=96, rng=rng) * 255).astype(np.uint8))


@pytest.fixture(scope="module")
def with_twins(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Sixteen contents; image 16 is a brighter, recompressed copy of image 2, in test."""
    root = tmp_path_factory.mktemp("twins")
    lines = ["path,score,split"]
    for k in range(16):
        content(k).save(root / f"{k:02d}.png")
        lines.append(f"{k:02d}.png,{k},{'test' if k > 12 else 'train'}")
    brighter = ImageEnhance.Brightness(content(2)).enhance(1.25)
    brighter.save(root / "16.jpg", quality=40)
    lines.append("16.jpg,16,test")
    (root / "labels.csv").write_text("\n".join(lines))
    build(open_table(root / "labels.csv"), root / "out", workers=1)
    return open_set(root / "out")


def test_a_recompressed_copy_across_parts_is_found_and_nothing_else(with_twins: ShardSet) -> None:
    (split,) = make_splits(with_twins, protocol="official", val_fraction=0.0)
    twins = find_twins(signatures(with_twins, with_twins.ids()), split)
    assert [(twin.first, twin.second, twin.parts) for twin in twins] == [(2, 16, ("train", "test"))]


def test_dropping_takes_the_twin_out_of_train_only(with_twins: ShardSet) -> None:
    (split,) = make_splits(with_twins, protocol="official", val_fraction=0.0)
    twins = find_twins(signatures(with_twins, with_twins.ids()), split)
    clean = drop_twins(with_twins, split, twins)
    assert set(split.train.tolist()) - set(clean.train.tolist()) == {2}
    assert clean.test.tolist() == split.test.tolist()
    assert "1 near twins of held-out images dropped" in clean.note
    write_split(with_twins.root, clean)
    assert load_split(with_twins, "official-deduped").hash == clean.hash


def test_workers_do_not_change_signatures(with_twins: ShardSet) -> None:
    one = signatures(with_twins, with_twins.ids())
    two = signatures(with_twins, with_twins.ids(), workers=2)
    np.testing.assert_array_equal(one.hashes, two.hashes)
    np.testing.assert_array_equal(one.thumbs, two.thumbs)


def test_the_hash_ignores_size_and_compression_but_not_content() -> None:
    image = content(2).convert("L")
    stream = io.BytesIO()
    image.resize((200, 150)).save(stream, "JPEG", quality=30)
    near = perceptual_hash(Image.open(stream).convert("L"))
    far = perceptual_hash(content(3).convert("L"))
    here = perceptual_hash(image)
    assert np.bitwise_count(here ^ near) <= 6
    assert np.bitwise_count(here ^ far) > 12


def test_biq2021_official_parts_share_photographs(shared_data: Path, tmp_path: Path) -> None:
    from shards.datasets.biq2021 import open_biq2021
    from shards.sample import DataSet

    whole = open_biq2021(shared_data / "biq2021")
    # The two lists name these in train and in test; the eye says they are one car park each.
    wanted = {"ss01 (1037).jpg", "ss01 (1035).jpg", "ss03 (1608).jpg", "ss03 (7732).jpg"}
    some = [sample for sample in whole.samples() if sample.path in wanted]
    other = [sample for sample in whole.samples() if sample.part == "test"][:20]
    part = DataSet(
        name="some",
        score=whole.score,
        samples=lambda: iter([*some, *(s for s in other if s.path not in wanted)]),
        facts=whole.facts,
    )
    build(part, tmp_path / "o", workers=1)
    shard_set = open_set(tmp_path / "o")
    seen = signatures(shard_set, shard_set.ids())
    paths = {str(path): k for k, path in enumerate(shard_set.samples.path)}
    for one, two in (
        ("ss01 (1037).jpg", "ss01 (1035).jpg"),
        ("ss03 (1608).jpg", "ss03 (7732).jpg"),
    ):
        a, b = paths[one], paths[two]
        assert np.bitwise_count(seen.hashes[a] ^ seen.hashes[b]) <= 12
        assert float(seen.thumbs[a] @ seen.thumbs[b]) >= 0.92
