"""Damage that libjpeg decodes over is noticed; whole files of every kind are left in peace."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageFile, JpegImagePlugin

import shards.jpeg
from shards.build.decode_budget import PixelBudget
from shards.cli import cli
from shards.jpeg import LEFT_OVER, NO_END, TOO_SHORT, JpegFeed, Scan, find_scan

KINDS = {
    "4:2:0": {},
    "4:4:4": {"subsampling": 0},
    "low": {"quality": 10},
    "high": {"quality": 98},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "progressive": {"progressive": True},
}


def jpeg(seed: int, *, width: int = 120, height: int = 90, mode: str = "RGB", **how) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height)).convert(mode)
    out = io.BytesIO()
    image.save(out, "JPEG", **how)
    return out.getvalue()


def note_of(data: bytes, *, has_trailer: bool = False) -> str:
    feed = JpegFeed(data)
    with JpegImagePlugin.jpeg_factory(feed, "") as image:
        assert isinstance(image, ImageFile.ImageFile)
        arm(feed, data, has_trailer=has_trailer)
        image.load()
    return feed.find_note()


def arm(feed: JpegFeed, data: bytes, *, has_trailer: bool = False) -> None:
    scan = find_scan(data)
    if scan is not None and scan.is_only:
        feed.arm(scan, has_trailer=has_trailer)


def start_of(data: bytes) -> int:
    scan = find_scan(data)
    assert scan is not None
    return scan.start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_whole_files_have_no_note_and_their_own_pixels(kind: str, mode: str) -> None:
    for seed in range(12):
        data = jpeg(seed, width=9 + 17 * seed, height=8 + 11 * seed, mode=mode, **KINDS[kind])
        assert note_of(data) == ""
        assert note_of(data + b"a trailer of a phone" * 9) == ""
        feed = JpegFeed(data)
        with JpegImagePlugin.jpeg_factory(feed, "") as image:
            arm(feed, data)
            with Image.open(io.BytesIO(data)) as plain:
                assert np.array_equal(np.asarray(image), np.asarray(plain))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "progressive"])
def test_ends_in_the_middle_and_missing_ends_are_noticed(kind: str) -> None:
    for seed in range(8):
        data = jpeg(seed, **KINDS[kind])
        start = start_of(data)
        at = start + 20 + (len(data) - start - 120) * seed // 8
        assert note_of(data[:at] + b"\xff\xd9" + data[at + 2 :]) == TOO_SHORT
        assert note_of(data[:-2]) == NO_END
        with pytest.raises(OSError, match="truncated"):
            note_of(data[:at])


def test_overwritten_bytes_are_mostly_noticed() -> None:
    found = []
    for seed in range(40):
        data = bytearray(jpeg(seed, quality=90))
        start = start_of(bytes(data))
        at = start + 200 + 20 * seed
        data[at : at + 40] = np.random.default_rng(seed).bytes(40).replace(b"\xff", b"\xfe")
        found.append(note_of(bytes(data)))
    assert set(found) <= {LEFT_OVER, TOO_SHORT, ""}
    # Forty bytes may happen to hold as many blocks as those they replace.
    assert sum(bool(note) for note in found) >= 30


@pytest.mark.parametrize("data", [b"\xff\xd8", b"\xff\xd8\xff\xda\0\2", b"\xff\xd8" + b"\xff" * 50])
def test_what_has_no_scan_has_none(data: bytes) -> None:
    assert find_scan(data) is None


@pytest.mark.parametrize("has_trailer", [False, True])
def test_a_second_picture_behind_the_first_is_no_damage(has_trailer: bool) -> None:
    for seed in range(4):
        data, other = jpeg(seed), jpeg(seed + 9)
        start = start_of(data)
        assert note_of(data + other, has_trailer=has_trailer) == ""
        cut = data[: start + 400] + b"\xff\xd9" + data[start + 402 :]
        assert note_of(cut, has_trailer=has_trailer) == TOO_SHORT
        assert note_of(cut + other, has_trailer=has_trailer) == TOO_SHORT
        longer = data[: start + 400] + data[start + 300 :]
        assert note_of(longer + other, has_trailer=has_trailer) == LEFT_OVER
        assert note_of(longer, has_trailer=has_trailer) == LEFT_OVER


def test_the_second_decode_counts_in_the_budget_of_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, other, held, again = jpeg(1), jpeg(10), [], []
    start = start_of(data)
    longer = data[: start + 400] + data[start + 300 :]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(longer + other)
    decode_again, hold = shards.jpeg._decode_again, PixelBudget.hold

    @contextlib.contextmanager
    def watched(budget: PixelBudget, pixels: int) -> Iterator[None]:
        with hold(budget, pixels):
            held.append(pixels)
            yield
            held.pop()

    def counted(data: bytes, scan: Scan) -> str:
        again.append(list(held))
        return decode_again(data, scan)

    monkeypatch.setattr(PixelBudget, "hold", watched)
    monkeypatch.setattr(shards.jpeg, "_decode_again", counted)
    out = str(tmp_path / "out")
    line = ["build", "unlabelled", str(tmp_path / "photos"), "--output", out, "--workers", "1"]
    done = CliRunner().invoke(cli, [*line, "--no-progress"])
    assert done.exit_code == 0, done.output
    assert f"note: a.jpg: {LEFT_OVER}" in done.output
    with Image.open(tmp_path / "photos/a.jpg") as image:
        assert again == [[image.width * image.height]]
