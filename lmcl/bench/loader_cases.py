"""What `lmcl bench loader` compares: this project's loader, and what people use today.

Each case is a function that loads `count` images once and returns when nothing of it is under way
any more, so that its processor time is its own.
"""

import functools
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.boxes import CropConfig, frame_sizes, random_boxes
from pipeline.decode_config import DecodeConfig
from pipeline.loader import Loader
from pipeline.shard_reader import ShardReader
from shards.read import ShardSet


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all cases share."""

    shard_set: ShardSet
    codec: str
    count: int
    """Images per round, a multiple of `batch`."""
    batch: int
    crops: int
    size: int
    threads: int
    workers: int

    @property
    def ids(self) -> NDArray[np.int64]:
        """The images of a round."""
        return self.shard_set.ids()[: self.count]

    def boxes(self) -> NDArray[np.int32]:
        """Random boxes for the cases that do not make their own."""
        table, ids = self.shard_set.samples, self.ids
        crops = CropConfig(size=self.size)
        frames = frame_sizes(table.height[ids], table.width[ids], crops)
        return random_boxes(ids, frames, size=self.size, count=self.crops, seed=0, epoch=0)


Case = Callable[[], None]


def paired_cases(setup: Setup, stack: ExitStack) -> dict[str, tuple[Case, int]]:
    """Cases of one process by name, each with how many images a call loads."""
    encoded = [setup.shard_set.read_bytes(id) for id in setup.ids.tolist()]
    count, few = setup.count, max(setup.count // 8, 1)
    cases: dict[str, tuple[Case, int]] = {
        "dali": (_our_loader(setup, stack, "dali"), count),
        "decode_alone": (_decode_alone(setup, stack), count),
        "decode_rows_alone": (_decode_alone(setup, stack, rows_only=True), count),
        "torch": (_our_loader(setup, stack, "torch"), count),
        "pil_slices_uint8": (_slices(setup, encoded, _decode_pil), count),
        "dali_reader_op_per_crop": (_op_per_crop(setup), count),
        "pil_tv2_float": (_tv2_float(setup, encoded[: 2 * few]), 2 * few),
        "files_pil_decode_per_crop": (_decode_per_crop(setup, encoded[:few]), few),
    }
    if setup.codec != "bmp":
        cases["tvio_slices_uint8"] = (_planar_slices(setup, encoded), count)
        cases["tvio_slices_by_hand"] = (_slices(setup, encoded, _decode_tvio), count)
    return cases


def _our_loader(setup: Setup, stack: ExitStack, backend: Any) -> Case:
    loader = stack.enter_context(
        Loader(
            setup.shard_set,
            setup.ids,
            crops=CropConfig(size=setup.size, random=setup.crops, salient=False),
            batch_size=setup.batch,
            mode="train",
            seed=0,
            decode=DecodeConfig(backend=backend, threads=setup.threads),
        )
    )
    epochs = iter(range(1 << 30))

    def run() -> None:
        for _ in loader.epoch(next(epochs)):
            pass

    return run


def _decode_alone(setup: Setup, stack: ExitStack, *, rows_only: bool = False) -> Case:
    """DALI reads the same bytes in the same way and decodes them; nothing is cut.

    With `rows_only` it decodes the rows that some random boxes lie in, as the loader does.
    """
    from nvidia.dali import Pipeline, fn, types

    reader = stack.enter_context(ShardReader(setup.shard_set))
    first, extents = _rows_of_boxes(setup)
    starts: list[int] = []
    keep: list[Any] = []

    def feed() -> Any:
        if not starts:
            raise StopIteration
        start = starts.pop(0)
        buffer = keep.pop(0) if len(keep) > 4 else None
        part = slice(start, start + setup.batch)
        if buffer is None or buffer.size < reader.buffer_bytes(setup.ids[part]):
            buffer = np.empty(reader.buffer_bytes(setup.ids[part]) * 5 // 4, dtype=np.uint8)
        keep.append(buffer)
        encoded = reader.read(setup.ids[part], into=buffer)
        return (encoded, first[part], extents[part]) if rows_only else (encoded,)

    count = 3 if rows_only else 1
    pipe = Pipeline(batch_size=setup.batch, num_threads=setup.threads, device_id=None)
    with pipe:
        encoded, *part = fn.external_source(
            source=feed,
            num_outputs=count,
            batch=True,
            no_copy=True,
            dtype=[types.UINT8, types.INT32, types.INT32][:count],
            ndim=1,
        )
        if rows_only:
            pixels = fn.decoders.image_slice(
                encoded, *part, axis_names="HW", normalized_anchor=False, normalized_shape=False
            )
        else:
            pixels = fn.decoders.image(encoded)
        pipe.set_outputs(pixels)

    def run() -> None:
        starts.extend(range(0, setup.count, setup.batch))
        try:
            while True:
                pipe.run()
        except StopIteration:
            pipe.reset()

    return run


def _rows_of_boxes(setup: Setup) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Corner and extent of the part of each image that all its boxes' rows make up."""
    boxes, ids = setup.boxes(), setup.ids
    first, extents = np.zeros((2, setup.count, 2), dtype=np.int32)
    first[:, 0] = boxes[..., 0].min(axis=1)
    extents[:, 0] = (boxes[..., 0] + boxes[..., 2]).max(axis=1) - first[:, 0]
    extents[:, 1] = setup.shard_set.samples.width[ids]
    return first, extents


def hand_over(setup: Setup) -> Case:
    """A finished batch of DALI's becomes a tensor; without a GPU nothing is copied."""
    from nvidia.dali import Pipeline, fn, types

    pipe = Pipeline(batch_size=setup.batch, num_threads=1, device_id=None)
    with pipe:
        shape = (setup.crops, setup.size, setup.size, 3)
        nothing = fn.constant(idata=0, shape=shape, dtype=types.UINT8)  # type: ignore[attr-defined]
        pipe.set_outputs(nothing)
    (outputs,) = pipe.run()

    def run() -> None:
        torch.utils.dlpack.from_dlpack(outputs.as_tensor())

    return run


def _op_per_crop(setup: Setup) -> Case:
    """DALI's webdataset reader, a crop operator per crop, and a stack."""
    from nvidia.dali import Pipeline, fn, types

    root, shards = Path(setup.shard_set.root), setup.shard_set.manifest.shards
    # Without a queue nothing is left under way between two rounds.
    pipe = Pipeline(
        batch_size=setup.batch,
        num_threads=setup.threads,
        device_id=None,
        prefetch_queue_depth=1,
        seed=1,
    )
    with pipe:
        encoded = fn.readers.webdataset(
            paths=[str(root / shard.name) for shard in shards],
            index_paths=[str((root / shard.name).with_suffix(".idx")) for shard in shards],
            ext=[setup.codec],
            random_shuffle=True,
            initial_fill=setup.batch,
            name="reader",
        )
        image = fn.decoders.image(encoded)
        crops = [
            fn.crop(
                image,
                crop=(setup.size, setup.size),
                crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
                crop_pos_y=fn.random.uniform(range=(0.0, 1.0)),
                dtype=types.UINT8,
            )
            for _ in range(setup.crops)
        ]
        pipe.set_outputs(fn.stack(*crops))

    def run() -> None:
        for _ in range(setup.count // setup.batch):
            pipe.run()

    return run


def _decode_pil(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _decode_tvio(data: bytes) -> NDArray[np.uint8]:
    from torchvision.io import ImageReadMode, decode_image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        planes = decode_image(buffer, mode=ImageReadMode.RGB)
    return np.asarray(planes.permute(1, 2, 0).numpy())


def _slices(
    setup: Setup, encoded: list[bytes], decode: Callable[[bytes], NDArray[np.uint8]]
) -> Case:
    """One decode per image in one thread, and numpy slices into the batch; no copy in between."""
    corners = setup.boxes()[:, :, :2].tolist()
    batch = np.empty((setup.batch, setup.crops, setup.size, setup.size, 3), dtype=np.uint8)

    def run() -> None:
        for index, data in enumerate(encoded):
            image = decode(data)
            for view, (y, x) in enumerate(corners[index]):
                batch[index % setup.batch, view] = image[y : y + setup.size, x : x + setup.size]

    return run


def _planar_slices(setup: Setup, encoded: list[bytes]) -> Case:
    """torchvision.io and slices of its [3, h, w] tensor, stacked: as it is usually written."""
    corners = setup.boxes()[:, :, :2].tolist()
    size = setup.size

    def run() -> None:
        for index, data in enumerate(encoded):
            image = torch.from_numpy(_decode_tvio(data)).permute(2, 0, 1)
            torch.stack([image[:, y : y + size, x : x + size] for y, x in corners[index]])

    return run


@functools.cache
def _tv2(size: int) -> Any:
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomCrop(size),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


def float_crops(data: bytes, *, crops: int, size: int) -> torch.Tensor:
    """What people write: Pillow, then the usual chain of transforms for every crop."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return torch.stack([_tv2(size)(image) for _ in range(crops)])


def _tv2_float(setup: Setup, encoded: list[bytes]) -> Case:
    def run() -> None:
        for data in encoded:
            float_crops(data, crops=setup.crops, size=setup.size)

    return run


def _decode_per_crop(setup: Setup, encoded: list[bytes]) -> Case:
    """As DEIQT's loader does: the data set is as many times longer, every crop decodes anew."""

    def run() -> None:
        for data in encoded:
            for _ in range(setup.crops):
                _tv2(setup.size)(Image.open(io.BytesIO(data)).convert("RGB"))

    return run


@dataclass(frozen=True, kw_only=True)
class ImageToCrops:
    """A webdataset sample's bytes to its crops; an object that worker processes can be sent."""

    crops: int
    size: int
    uint8: bool

    def __call__(self, sample: dict[str, Any]) -> torch.Tensor:
        """All crops of one image."""
        data = next(sample[suffix] for suffix in ("jpg", "png", "bmp") if suffix in sample)
        if not self.uint8:
            return float_crops(data, crops=self.crops, size=self.size)
        image = torch.from_numpy(_decode_tvio(data))
        rng = np.random.default_rng()
        corners = rng.integers(0, np.array(image.shape[:2]) - self.size + 1, (self.crops, 2))
        return torch.stack(
            [image[y : y + self.size, x : x + self.size] for y, x in corners.tolist()]
        )


def worker_batches(setup: Setup, *, uint8: bool) -> Any:
    """Webdataset in a DataLoader with worker processes, endless, in the usual arrangement."""
    import webdataset

    root = Path(setup.shard_set.root)
    urls = [str(root / shard.name) for shard in setup.shard_set.manifest.shards]
    stream = (
        webdataset.WebDataset(
            urls, resampled=True, shardshuffle=False, nodesplitter=None, empty_check=False
        )
        .shuffle(setup.batch)
        .map(ImageToCrops(crops=setup.crops, size=setup.size, uint8=uint8))
    )
    return torch.utils.data.DataLoader(
        stream,
        batch_size=setup.batch,
        num_workers=setup.workers,
        multiprocessing_context="forkserver",
        persistent_workers=True,
    )


def take(batches: Iterator[Any], count: int) -> None:
    """Wait for `count` batches."""
    for _ in range(count):
        next(batches)
