"""What goes wrong inside a batch: named, survived, and nothing left running."""

import logging
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.boxes import CropConfig
from pipeline.decode_config import DecodeConfig
from pipeline.errors import PipelineError
from pipeline.image_headers import header_size
from pipeline.loader import Loader
from pipeline.saliency_table import SaliencyTable
from shards.build.image import ImageInfo
from shards.errors import ShardError
from shards.read import ShardSet
from shards.verify import verify
from tests import warm

Pack = Callable[..., ShardSet]

CROPS = CropConfig(size=64, random=2, evaluation=2)
BACKENDS = ["dali", "torch"]


@pytest.fixture
def packed(pack: Pack, mixed_images: list[tuple[str, bytes]]) -> ShardSet:
    return pack(mixed_images, samples_per_shard=10)


def _loader(shard_set: ShardSet, backend: str, **changes: object) -> Loader:
    options = {
        "crops": CROPS, "batch_size": 4, "mode": "eval", "seed": 1, "threads": 2,
    } | changes  # fmt: skip
    names = {field.name for field in fields(DecodeConfig)} & set(options)
    decode = DecodeConfig(backend=backend, **{name: options.pop(name) for name in names})
    ids = options.pop("ids", shard_set.ids())
    return Loader(shard_set, ids, decode=decode, **options)


def _damage(shard_set: ShardSet, id: int, how: str) -> None:
    """Spoil a packed image in place; the tar around it stays sound."""
    table = shard_set.samples
    path = Path(shard_set.root) / shard_set.manifest.shards[table.shard[id]].name
    start, size = int(table.offset[id]), int(table.size[id])
    keep = {"garbage": 0, "truncated": size // 2, "header": 60}[how]
    filler = os.urandom(size) if how == "garbage" else bytes(size)
    with path.open("r+b") as tar:
        tar.seek(start + keep)
        tar.write(filler[keep:])


def _flip(shard_set: ShardSet, shard: int, at: int) -> None:
    """Change one bit of a shard."""
    path = Path(shard_set.root) / shard_set.manifest.shards[shard].name
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["garbage", "truncated", "header"])
@pytest.mark.parametrize("id", [4, 5], ids=["jpeg", "png"])
def test_a_damaged_image_is_named(packed: ShardSet, backend: str, how: str, id: int) -> None:
    _damage(packed, id, how)
    place = rf"toy: sample {id} \(image {id}\.\w+\), member toy-0000000{id}\.\w+ of toy-000000\.tar"
    with (
        _loader(packed, backend) as loader,
        pytest.raises(PipelineError, match=place + ".*verify --deep") as caught,
    ):
        list(loader.epoch(0))
    assert caught.value.exit_code == 3
    assert caught.value.ids == (id,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_png_whose_checksum_does_not_fit_is_named_by_both_backends(
    packed: ShardSet, backend: str
) -> None:
    table = packed.samples
    end = int(table.offset[5]) + int(table.size[5])
    _flip(packed, 0, end - 13)
    place = r"toy: sample 5 \(image 5\.png\), member toy-00000005\.png of toy-000000\.tar"
    with (
        _loader(packed, backend) as loader,
        pytest.raises(PipelineError, match=place + ".*checksum of the IDAT chunk") as caught,
    ):
        list(loader.epoch(0))
    assert caught.value.ids == (5,)
    assert "runtime.on_error" in str(caught.value)


def test_an_image_that_dali_alone_refuses_is_found_by_trying_one_after_the_other(
    pack: Pack, photograph: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    images = [(f"{one}.png", encode(photograph(97, 131, seed=one), "PNG")) for one in range(6)]
    # Image data without the checksum that zlib ends with, in a chunk whose own checksum fits.
    data = images[2][1]
    at = data.index(b"IDAT") - 4
    body = data[at + 8 : at + 8 + int.from_bytes(data[at : at + 4], "big") - 4]
    chunk = len(body).to_bytes(4, "big") + b"IDAT" + body
    images[2] = ("2.png", data[:at] + chunk + zlib.crc32(chunk[4:]).to_bytes(4, "big") + data[-12:])
    shard_set = pack(images)
    with (
        _loader(shard_set, "dali") as loader,
        pytest.raises(PipelineError, match="DALI cannot decode it, though Pillow can") as caught,
    ):
        list(loader.epoch(0))
    assert caught.value.ids == (2,)
    assert r"toy: sample 2 (2.png), member toy-00000002.png of toy-000000.tar" in str(caught.value)
    assert 'runtime.backend = "torch"' in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_jpeg_cut_off_below_its_boxes_is_named(
    pack: Pack, photograph: Callable[..., Image.Image], encode: Callable[..., bytes], backend: str
) -> None:
    # The boxes need the upper half alone, which is there.
    images = [(f"{one}.jpg", encode(photograph(200, 64, seed=one), "JPEG")) for one in range(4)]
    shard_set = pack(images)
    _damage(shard_set, 2, "truncated")
    crops = CropConfig(size=64, random=1, salient=False)
    with _loader(shard_set, backend, crops=crops, mode="train") as loader:
        epoch = next(
            epoch
            for epoch in range(1000)
            if loader.request(epoch, 0).boxes[loader.request(epoch, 0).ids == 2, 0, 0] < 4
        )
        with pytest.raises(PipelineError, match="sample 2"):
            list(loader.epoch(epoch))


_ONE_BATCH_CRASHES = """
import sys
from pipeline.boxes import CropConfig
from pipeline.decode_config import DecodeConfig
from pipeline.errors import PipelineError
from pipeline.loader import Loader
from shards.read import open_set

packed = open_set(sys.argv[1])
crops = CropConfig(size=32, random=2, evaluation=2)
with Loader(packed, packed.ids(), crops=crops, batch_size=64, mode=sys.argv[2], seed=0,
            decode=DecodeConfig(backend="dali", threads=2)) as loader:
    try:
        list(loader.epoch(0))
    except PipelineError as error:
        print(error.ids)
"""


@pytest.mark.parametrize("mode", ["eval", "global"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_an_image_without_a_header_in_a_large_batch_is_named_and_does_not_end_the_process(
    pack: Pack,
    photograph: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    kind: str,
    mode: str,
) -> None:
    # DALI reads the headers of so many images in several threads, and dies of an exception there.
    images = [(f"{n}.img", encode(photograph(97, 131, seed=n), kind)) for n in range(64)]
    packed = pack(images, samples_per_shard=64)
    _damage(packed, 3, "garbage")
    told = warm.run(
        [sys.executable, "-c", _ONE_BATCH_CRASHES, packed.root, mode], capture_output=True
    )
    assert (told.returncode, told.stdout) == (0, "(3,)\n"), told.stderr[-300:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_only_a_plain_header_goes_to_dali(
    photograph: Callable[..., Image.Image], encode: Callable[..., bytes], kind: str
) -> None:
    data = encode(photograph(97, 131), kind)
    assert header_size(memoryview(data)) == (97, 131)
    for damaged in (b"", data[:1], data[:20], bytes(len(data)), data[:10] + bytes(len(data) - 10)):
        assert header_size(memoryview(damaged)) is None


@pytest.fixture
def jpegs(
    photograph: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> list[tuple[str, bytes]]:
    """Four JPEGs of 200 x 64; the third ends in its middle."""
    whole = [encode(photograph(200, 64, seed=one), "JPEG") for one in range(4)]
    whole[2] = whole[2][: len(whole[2]) // 2]
    return [(f"{one}.jpg", data) for one, data in enumerate(whole)]


def test_a_jpeg_that_ends_in_its_middle_is_not_packed(
    pack: Pack, jpegs: list[tuple[str, bytes]]
) -> None:
    with pytest.raises(ShardError, match=r"2\.jpg: cannot be decoded to the end") as caught:
        pack(jpegs)
    assert caught.value.exit_code == 3


@pytest.fixture
def unchecked(
    pack: Pack, jpegs: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> ShardSet:
    """The four by a writer that reads headers alone: every size and checksum fits the cut JPEG."""

    def header(data: bytes, **options: object) -> ImageInfo:
        return ImageInfo(codec="jpg", height=200, width=64)

    with monkeypatch.context() as patch:
        patch.setattr("shards.build.pack.inspect", header)
        return pack(jpegs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_jpeg_packed_with_its_lower_half_missing_is_named_though_all_sizes_fit(
    unchecked: ShardSet, backend: str
) -> None:
    assert verify(unchecked.root).ok
    # The boxes need rows alone that are there.
    crops = CropConfig(size=64, random=1, salient=False)
    with _loader(unchecked, backend, crops=crops, mode="train") as loader:
        requests = ((epoch, loader.request(epoch, 0)) for epoch in range(1000))
        epoch = next(e for e, one in requests if one.boxes[one.ids == 2, 0, 0] < 4)
        with pytest.raises(PipelineError, match=r"toy: sample 2 \(2\.jpg\)") as caught:
            list(loader.epoch(epoch))
    assert caught.value.ids == (2,)


def test_verify_names_a_jpeg_packed_with_its_lower_half_missing(unchecked: ShardSet) -> None:
    findings = verify(unchecked.root, deep=True).findings
    assert [(one.kind, one.is_error) for one in findings] == [("image", True)]
    assert "sample 2 (2.jpg)" in findings[0].where
    assert "cannot be decoded to the end" in findings[0].text


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_jpeg_that_lost_its_middle_but_not_its_end_is_left_out_and_named(
    packed: ShardSet, backend: str
) -> None:
    # Decoders say nothing: the end marker is there, and what is missing becomes grey.
    table = packed.samples
    path = Path(packed.root) / packed.manifest.shards[0].name
    start, size = int(table.offset[4]), int(table.size[4])
    with path.open("r+b") as tar:
        tar.seek(start + size // 2)
        tar.write(bytes(size - size // 2 - 2))
    assert path.read_bytes()[start + size - 2 : start + size] == b"\xff\xd9"
    assert verify(packed.root).ok
    with _loader(packed, backend, on_error="skip") as loader:
        assert loader.skipped.tolist() == [4]
        assert 4 not in [id for batch in loader.epoch(0) for id in batch.ids.tolist()]
    found = [one for one in verify(packed.root, deep=True).findings if one.kind == "image"]
    assert len(found) == 1
    assert "sample 4 " in found[0].where


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loader_goes_on_after_an_error(packed: ShardSet, backend: str) -> None:
    with _loader(packed, backend) as loader:
        expected = [batch.crops.clone() for batch in loader.epoch(0)]
        path = Path(packed.root) / packed.manifest.shards[0].name
        sound = path.read_bytes()
        _damage(packed, 6, "garbage")
        for _ in range(2):
            with pytest.raises(PipelineError, match=r"sample 6|replaced while in use"):
                list(loader.epoch(0))
        path.write_bytes(sound)
        again = [batch.crops for batch in loader.epoch(0)]
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipping_leaves_damaged_images_out_on_every_rank_and_says_so(
    packed: ShardSet, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    for id, how in [(3, "garbage"), (12, "truncated"), (36, "header")]:
        _damage(packed, id, how)
    seen, steps = [], set()
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            with _loader(
                packed, backend, on_error="skip", rank=rank, world_size=2, mode="train"
            ) as loader:
                assert loader.skipped.tolist() == [3, 12, 36]
                batches = list(loader.epoch(0))
                steps.add(len(batches))
                seen += [id for batch in batches for id in batch.ids[batch.valid].tolist()]
    assert sorted(seen) == [id for id in range(37) if id not in (3, 12, 36)]
    assert len(steps) == 1
    assert "3 damaged images were left out of epoch 0: ids 3, 12, 36" in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
def test_silent_corruption_is_skipped_by_its_checksum(packed: ShardSet, backend: str) -> None:
    # One changed byte in the middle of a JPEG decodes without complaint.
    table = packed.samples
    path = Path(packed.root) / packed.manifest.shards[0].name
    data = bytearray(path.read_bytes())
    data[int(table.offset[4]) + int(table.size[4]) * 2 // 3] ^= 0x15
    path.write_bytes(data)
    with _loader(packed, backend, on_error="skip") as loader:
        assert loader.skipped.tolist() == [4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shard_cut_off_in_mid_epoch_is_an_error_and_no_crash(
    packed: ShardSet, backend: str
) -> None:
    with _loader(packed, backend, prefetch=1) as loader:
        batches = loader.epoch(0)
        next(batches)
        for shard in packed.manifest.shards:
            os.truncate(Path(packed.root) / shard.name, 700)
        with pytest.raises(PipelineError, match="cut off") as caught:
            list(batches)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shard_that_vanishes_is_missed(packed: ShardSet, backend: str) -> None:
    with _loader(packed, backend, prefetch=1) as loader:
        batches = loader.epoch(0)
        next(batches)
        (Path(packed.root) / packed.manifest.shards[3].name).unlink()
        with pytest.raises(PipelineError, match=r"toy-000003\.tar.*not there") as caught:
            list(batches)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(50, 40), (80, 300)], ids=["smaller", "larger"])
def test_an_image_of_another_size_than_the_table_says_is_never_passed_off(
    packed: ShardSet,
    backend: str,
    size: tuple[int, int],
    photograph: Callable[..., Image.Image],
    encode: Callable[..., bytes],
) -> None:
    # Sample 4 is a JPEG of 64 x 200; a sound image of another size takes its place in the shard.
    table = packed.samples
    path = Path(packed.root) / packed.manifest.shards[0].name
    other = encode(photograph(*size), "JPEG", quality=5)
    assert len(other) <= int(table.size[4])
    with path.open("r+b") as tar:
        tar.seek(int(table.offset[4]))
        tar.write(other.ljust(int(table.size[4]), b"\0"))
    with (
        _loader(packed, backend) as loader,
        pytest.raises(
            PipelineError, match=f"sample 4 .*decodes to {size[0]} x {size[1]}.*64 x 200"
        ),
    ):
        list(loader.epoch(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_salient_box_outside_its_image_is_named(packed: ShardSet, backend: str) -> None:
    boxes = np.tile(np.array([0, 0, 64, 64], dtype=np.int32), (37, 1))
    boxes[11] = [5000, 0, 64, 64]
    table = SaliencyTable(ids=np.arange(37), boxes=boxes)
    with (
        _loader(packed, backend, mode="train") as loader,
        pytest.raises(PipelineError, match=r"box \(5000, 0, 64, 64\).* of sample 11 "),
    ):
        list(loader.epoch(0, saliency=table))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([], dtype=np.int64), "no sample at all"),
        (np.array([3, 37]), "sample 37 was asked for, the set has 37"),
        (np.array([-1]), "sample -1 was asked for"),
        (np.array([3, 4, 3]), "listed twice"),
    ],
    ids=["empty", "beyond", "negative", "twice"],
)
def test_a_senseless_split_is_refused(mixed_set: ShardSet, ids: np.ndarray, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        _loader(mixed_set, "torch", ids=ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size of an order is 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 was asked of a world of 2"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"hw_decoder_load": 1.1}, "hw_decoder_load is 1.1"),
        ({"device_memory_padding": -1}, "device_memory_padding is -1"),
    ],
    ids=["batch", "rank", "prefetch", "threads", "load", "padding"],
)
def test_a_senseless_argument_is_refused(
    mixed_set: ShardSet, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _loader(mixed_set, "torch", **change)


def test_a_step_beyond_the_epoch_is_refused(mixed_set: ShardSet) -> None:
    with (
        _loader(mixed_set, "torch") as loader,
        pytest.raises(ValueError, match="step 11, but an epoch has 10"),
    ):
        loader.epoch(0, start=11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("end", ["finished", "left", "failed"])
def test_closing_leaves_no_thread_and_no_file_behind(
    packed: ShardSet, backend: str, end: str
) -> None:
    with _loader(packed, backend) as warm:
        list(warm.epoch(0))
    python_threads, tasks, files = _census()
    if end == "failed":
        _damage(packed, 20, "garbage")
    loader = _loader(packed, backend)
    batches = loader.epoch(0)
    if end == "left":
        next(batches)
    elif end == "finished":
        list(batches)
    else:
        with pytest.raises(PipelineError):
            list(batches)
    loader.close()
    loader.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _census()[1] > tasks:
        time.sleep(0.05)
    assert _census()[0] <= python_threads
    assert _census()[1] <= tasks
    assert _census()[2] <= files


def _census() -> tuple[int, int, int]:
    """Python threads, threads of all kinds, open files of this process."""
    return (
        threading.active_count(),
        len(os.listdir("/proc/self/task")),
        len(os.listdir("/proc/self/fd")),
    )
