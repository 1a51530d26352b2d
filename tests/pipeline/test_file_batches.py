import io
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.backends import dali
from pipeline.boxes import CropConfig, evaluation_boxes, frame_sizes
from pipeline.decode import decode_rgb, reflect_pad, resize_rgb
from pipeline.decode_config import DecodeConfig
from pipeline.errors import PipelineError
from pipeline.file_batches import FileDecoder, plain_size

Photograph = Callable[..., Image.Image]
Encode = Callable[..., bytes]
CROPS = CropConfig(size=64, evaluation=4)


@pytest.fixture(scope="module")
def decoder() -> Iterator[FileDecoder]:
    with FileDecoder(crops=CROPS, batch_size=64, decode=DecodeConfig(threads=2)) as made:
        yield made


def _by_pillow(data: bytes, key: int, crops: CropConfig = CROPS) -> tuple[np.ndarray, np.ndarray]:
    """What `lmcl score` does with one image on a CPU."""
    pixels = decode_rgb(data)
    heights, widths = np.array(pixels.shape[:1]), np.array(pixels.shape[1:2])
    boxes = evaluation_boxes(np.array([key]), frame_sizes(heights, widths, crops), crops)[0]
    frame = reflect_pad(pixels, crops.size)
    return np.stack([frame[y : y + h, x : x + w] for y, x, h, w in boxes.tolist()]), boxes


def _turned(picture: Image.Image, orientation: int, **options: object) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(buffer, exif=exif, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sound(
    photograph: Photograph, encode: Encode, mixed_images: list[tuple[str, bytes]]
) -> list[bytes]:
    picture = photograph(97, 131)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    return [
        *(data for _, data in mixed_images[:12]),
        *(_turned(picture, one, format="JPEG") for one in range(1, 9)),
        _turned(picture, 6, format="PNG"),
        _turned(picture, 6, format="WEBP"),
        encode(picture, "JPEG", xmp=xmp),
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture.convert("P"), "GIF"),
        encode(picture, "TIFF"),
        encode(picture, "PPM"),
        encode(photograph(9, 5), "PNG"),
    ]


@pytest.mark.parametrize("layout", ["grid", "seeded"])
def test_files_have_the_crops_that_pillow_cuts_of_them(sound: list[bytes], layout: str) -> None:
    crops = replace(CROPS, evaluation_layout=layout)
    keys = np.arange(len(sound)) * 7
    with FileDecoder(crops=crops, batch_size=64, decode=DecodeConfig(threads=2)) as decoder:
        assert decoder.choice.recipe == "dali-cpu-2.4"
        batch = decoder.decode(sound, keys)
    assert batch.errors == ("",) * len(sound)
    assert not batch.gpu_decoded.any()
    for row, data in enumerate(sound):
        pixels, boxes = _by_pillow(data, int(keys[row]), crops)
        assert np.array_equal(batch.boxes[row], boxes), row
        assert np.array_equal(batch.crops[row].numpy(), pixels), row
        assert tuple(batch.sizes[row]) == decode_rgb(data).shape[:2]


def test_most_files_go_through_dali_and_not_through_pillow(
    sound: list[bytes], decoder: FileDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_pillow = []
    road = decoder._by_pillow
    monkeypatch.setattr(
        decoder, "_by_pillow", lambda data, *rest: (by_pillow.append(data), road(data, *rest))
    )
    decoder.decode(sound, np.arange(len(sound)))
    # Two of the twelve are smaller than a crop; then two that PNG and WebP turn, XMP, three
    # formats that DALI is not given, and the tiny one.
    assert len(by_pillow) == 2 + 2 + 1 + 3 + 1


def test_without_dali_the_same_crops_come_from_pillow(
    sound: list[bytes], decoder: FileDecoder
) -> None:
    keys = np.arange(len(sound))
    with FileDecoder(crops=CROPS, batch_size=64, decode=DecodeConfig(backend="torch")) as plain:
        assert plain.choice.backend == "torch"
        one, other = plain.decode(sound, keys), decoder.decode(sound, keys)
    assert torch.equal(one.crops, other.crops)
    assert np.array_equal(one.boxes, other.boxes)
    assert np.array_equal(one.sizes, other.sizes)


def _damaged(photograph: Photograph, encode: Encode) -> list[bytes]:
    jpeg, png, bmp, webp = (
        encode(photograph(120, 160), kind) for kind in ("JPEG", "PNG", "BMP", "WEBP")
    )
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    return [
        b"", b"\0" * 900, b"<html>no image</html>", jpeg[: len(jpeg) // 2], jpeg[:-2], jpeg[:30],
        png[: len(png) // 2], bytes(flipped), bmp[:-50], webp[: len(webp) // 2], webp[:30],
        jpeg[: len(jpeg) // 2] + b"\xff\xd9",
    ]  # fmt: skip


def _or_why(data: bytes, key: int) -> tuple[np.ndarray, np.ndarray, str]:
    try:
        return *_by_pillow(data, key), ""
    except PipelineError as error:
        return np.zeros((4, 64, 64, 3)), np.zeros((4, 4)), str(error)


def test_a_damaged_file_is_a_sentence_and_its_neighbours_are_as_they_were(
    photograph: Photograph, encode: Encode, sound: list[bytes], decoder: FileDecoder
) -> None:
    damaged = _damaged(photograph, encode)
    files = [data for pair in zip(damaged, sound, strict=False) for data in pair]
    keys = np.arange(len(files))
    for _ in range(2):
        batch = decoder.decode(files, keys)
        for row, data in enumerate(files):
            pixels, boxes, reason = _or_why(data, row)
            assert batch.errors[row] == reason
            assert np.array_equal(batch.boxes[row], boxes)
            assert np.array_equal(batch.crops[row].numpy(), pixels), row
        assert sum(bool(reason) for reason in batch.errors) >= len(damaged) - 2


def test_one_that_dali_refuses_does_not_change_who_decodes_the_others(
    sound: list[bytes], decoder: FileDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [data for data in sound if plain_size(data) and min(plain_size(data)) >= 64]
    marked = plain[3]

    def refuse(backend: FileDecoder, *arguments: object) -> None:
        _, group, files, _ = arguments
        if any(files[row] is marked for row in group):
            raise PipelineError("DALI failed")
        served.extend(group)
        run(*arguments)

    run, served = decoder._run, []
    monkeypatch.setattr(decoder, "_run", lambda *arguments: refuse(decoder, *arguments))
    batch = decoder.decode(plain, np.arange(len(plain)))
    assert sorted(served) == [row for row in range(len(plain)) if row != 3]
    for row, data in enumerate(plain):
        assert np.array_equal(batch.crops[row].numpy(), _by_pillow(data, row)[0])


def test_max_side_scales_as_the_loader_does(photograph: Photograph, encode: Encode) -> None:
    files = [encode(photograph(301, 200, seed=one), "JPEG") for one in range(3)]
    crops = replace(CROPS, max_side=150)
    with FileDecoder(crops=crops, batch_size=8, decode=DecodeConfig(threads=1)) as decoder:
        batch = decoder.decode(files, np.arange(3))
    assert batch.sizes.tolist() == [[150, 100]] * 3
    for row, data in enumerate(files):
        small = resize_rgb(decode_rgb(data), 150, 100)
        for view, (y, x, h, w) in enumerate(batch.boxes[row].tolist()):
            off = batch.crops[row, view].int().numpy() - small[y : y + h, x : x + w].astype(int)
            assert np.abs(off).max() <= 5


def test_many_pixels_are_not_decoded_at_once(
    sound: list[bytes], decoder: FileDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = np.arange(len(sound))
    expected = decoder.decode(sound, keys)
    monkeypatch.setattr("pipeline.file_batches._MOST_PIXELS", 30_000)
    sizes = []
    run = decoder._run
    monkeypatch.setattr(
        decoder, "_run", lambda *a: (sizes.append(int(a[3].sizes[a[1]].prod(1).sum())), run(*a))
    )
    batch = decoder.decode(sound, keys)
    assert torch.equal(batch.crops, expected.crops)
    assert len(sizes) > 5
    assert sorted(sizes)[-3] <= 30_000


def test_too_little_gpu_memory_halves_a_batch_of_files_too(
    sound: list[bytes], decoder: FileDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = np.arange(len(sound))
    expected = decoder.decode(sound, keys)
    build = dali.build_graph

    def build_limited(spec: object, **options: object) -> object:
        if spec.batch_size > 8:
            raise RuntimeError("CUDA allocation failed")
        return build(spec, **options)

    monkeypatch.setattr(dali, "build_graph", build_limited)
    with FileDecoder(crops=CROPS, batch_size=64, decode=DecodeConfig(threads=1)) as small:
        batch = small.decode(sound, keys)
        assert small._backend.decode_batch == 8
    assert torch.equal(batch.crops, expected.crops)


def test_no_file_is_no_batch(decoder: FileDecoder) -> None:
    assert decoder.decode([], np.zeros(0, dtype=np.int64)).crops.shape == (0, 4, 64, 64, 3)
