import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.backends import dali
from pipeline.backends.dali import DaliBackend
from pipeline.decode import decode_rgb
from pipeline.decode_config import DecodeConfig
from pipeline.request import Request, ViewSpec
from pipeline.shard_reader import ShardReader
from shards.read import ShardSet

SIZE = 64


def _png16(height: int, width: int) -> bytes:
    grey = np.arange(height * width, dtype=np.uint32).reshape(height, width) * 13 % 65536
    buffer = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def kinds(
    pack: Callable[..., ShardSet], photograph: Callable[..., Image.Image],
    encode: Callable[..., bytes],
) -> ShardSet:  # fmt: skip
    picture = photograph(97, 131)
    return pack([
        ("0-plain.jpg", encode(picture, "JPEG")),
        ("1-cmyk.jpg", encode(picture.convert("CMYK"), "JPEG")),
        ("2-plain.png", encode(picture, "PNG")),
        ("3-deep.png", _png16(97, 131)),
        ("4-plain.bmp", encode(picture, "BMP")),
        ("5-small.jpg", encode(photograph(40, 90), "JPEG")),
        ("6-lossy.webp", encode(picture, "WEBP")),
        ("7-grey.jpg", encode(picture.convert("L"), "JPEG", progressive=True)),
    ])  # fmt: skip


def test_what_the_gpu_decoder_lacks_takes_the_cpus_road_and_the_batch_says_which(
    kinds: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The inputs of a GPU's graph, into the same graph with the CPU's decoder.
    build = dali.build_graph
    monkeypatch.setattr(
        dali, "build_graph", lambda spec, **options: build(spec, **options | {"decoder": "cpu"})
    )
    ids = kinds.ids()
    table = kinds.samples
    sizes = np.stack([table.height, table.width], axis=1).astype(np.int64)
    request = Request(
        step=0, ids=ids, valid=np.ones(len(ids), dtype=bool), sizes=sizes, targets=sizes,
        boxes=np.tile(np.int32([0, 3, SIZE, SIZE]), (len(ids), 1, 1)),
    )  # fmt: skip
    spec = ViewSpec(batch_size=len(ids), views=1, size=SIZE, whole=False, scales=True)
    backend = DaliBackend(
        ShardReader(kinds), spec, device=torch.device("cpu"), decoder="gpu",
        config=DecodeConfig(threads=1),
    )  # fmt: skip
    (decoded,) = backend.run(iter([request]))
    backend.close()
    names = [table.path[id] for id, gpu in zip(ids, decoded.gpu_decoded, strict=True) if gpu]
    assert names == ["0-plain.jpg", "7-grey.jpg"]
    for row, id in enumerate(ids.tolist()):
        if table.path[id] != "5-small.jpg":
            pixels = decode_rgb(kinds.read_bytes(id))[:SIZE, 3 : 3 + SIZE]
            assert np.array_equal(decoded.crops[row, 0].numpy(), pixels), table.path[id]
