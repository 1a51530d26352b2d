"""The loader steps of scripts/gpu_check.sh: images per second by decoder, and what decoders change.

The GPU has two ways to decode a JPEG: a decoder of its own and CUDA cores. The loader leaves the
choice to DALI; here it is forced either way, to see what each is worth. `--rehearse` runs all that
a CPU can, tiny.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gpu_check_book import Book, Figures, Task

from lmcl.bench.loader_cases import Setup, take, worker_batches
from lmcl.bench.loader_data import KINDS, make_set
from lmcl.bench.score import make_scorer
from lmcl.bench.step_data import make_step_data
from lmcl.evaluation.metrics.correlation import srcc
from lmcl.inference.scorer import open_scorer
from pipeline.boxes import CropConfig
from pipeline.decode_config import DecodeConfig
from pipeline.loader import Loader
from shards.read import open_set


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the steps run and how large they are."""

    device: str
    images: int
    batch: int
    size: int
    threads: int
    workers: int
    rounds: int
    encoder: str
    model: Path | None = None
    """A released model to judge decoders by; None: random weights."""


GPU = Place(
    device="cuda", images=2048, batch=64, size=224, threads=16, workers=16, rounds=5,
    encoder="deit3_small_patch16_224",
)  # fmt: skip
REHEARSAL = Place(
    device="cpu", images=8, batch=4, size=64, threads=1, workers=1, rounds=1, encoder="conv-vit",
)  # fmt: skip

_JUDGED = 96
"""Pictures, all different, on which decoders are compared."""

DECODERS: dict[str, DecodeConfig] = {
    "decode_hardware": DecodeConfig(backend="dali", decode="gpu", hw_decoder_load=1.0),
    "decode_cuda_cores": DecodeConfig(backend="dali", decode="gpu", hw_decoder_load=0.0),
    "decode_mixed": DecodeConfig(backend="dali", decode="gpu", hw_decoder_load=0.65),
    "decode_cpu": DecodeConfig(backend="dali", decode="cpu"),
}
"""What the loader decodes with; `decode_cuda_cores` is its default on a GPU."""


def rates(place: Place, setup: Setup) -> Iterator[Task]:
    """Images per second of every way to get 11 crops of an image onto the device."""
    for name, decode in DECODERS.items():
        yield name, functools.partial(_decoder_rate, place, setup, decode)
    for kind in ("float", "uint8"):
        yield f"webdataset_{kind}", functools.partial(_webdataset_rate, place, setup, kind)
    yield "dali_reader_op_per_crop", functools.partial(_op_per_crop_rate, place, setup)


def _decoder_rate(place: Place, setup: Setup, decode: DecodeConfig) -> Figures:
    if decode.decode == "gpu" and place.device != "cuda":
        return {"left_out": "decoding on a GPU is not rehearsed"}
    with ExitStack() as stack:
        loader = stack.enter_context(_loader(place, setup, decode))
        epochs = iter(range(1 << 30))

        def run() -> None:
            for batch in loader.epoch(next(epochs)):
                last = batch.crops
            assert last.device.type == place.device
            _wait(place)

        return _rate(run, place, setup.count) | {"recipe": loader.recipe}


def _loader(place: Place, setup: Setup, decode: DecodeConfig) -> Loader:
    """The loader of a training run."""
    return Loader(
        setup.shard_set,
        setup.ids,
        crops=CropConfig(size=setup.size, random=setup.crops, salient=False),
        batch_size=setup.batch,
        mode="train",
        seed=0,
        device=place.device,
        decode=dataclasses.replace(decode, threads=setup.threads),
    )


def _webdataset_rate(place: Place, setup: Setup, kind: str) -> Figures:
    """Worker processes with Pillow and torchvision transforms, as the field has it."""
    batches = iter(worker_batches(setup, uint8=kind == "uint8"))
    steps = setup.count // setup.batch
    take(batches, 2 * setup.workers)

    def run() -> None:
        for _ in range(steps):
            next(batches).to(place.device, non_blocking=True)
        _wait(place)

    try:
        return _rate(run, place, setup.count) | {"workers": setup.workers}
    finally:
        batches._shutdown_workers()


def _op_per_crop_rate(place: Place, setup: Setup) -> Figures:
    """DALI's own webdataset reader, decoding on the device, an operator per crop, and a stack."""
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.plugin.pytorch import feed_ndarray

    on_gpu = place.device == "cuda"
    root, shards = Path(setup.shard_set.root), setup.shard_set.manifest.shards
    pipe = Pipeline(
        batch_size=setup.batch, num_threads=setup.threads, device_id=0 if on_gpu else None, seed=1,
    )  # fmt: skip
    with pipe:
        encoded = fn.readers.webdataset(
            paths=[str(root / shard.name) for shard in shards],
            index_paths=[str((root / shard.name).with_suffix(".idx")) for shard in shards],
            ext=[setup.codec], random_shuffle=True, initial_fill=setup.batch, name="reader",
        )  # fmt: skip
        image = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu")
        crops = [
            fn.crop(
                image, crop=(setup.size, setup.size),
                crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
                crop_pos_y=fn.random.uniform(range=(0.0, 1.0)), dtype=types.UINT8,
            )
            for _ in range(setup.crops)
        ]  # fmt: skip
        pipe.set_outputs(fn.stack(*crops))
    shape = (setup.batch, setup.crops, setup.size, setup.size, 3)
    target = torch.empty(shape, dtype=torch.uint8, device=place.device)

    def run() -> None:
        for _ in range(setup.count // setup.batch):
            (out,) = pipe.run()
            feed_ndarray(out.as_tensor(), target)
        _wait(place)

    return _rate(run, place, setup.count)


def _rate(run: Callable[[], None], place: Place, count: int) -> Figures:
    run()
    rates, cpu = [], []
    for _ in range(place.rounds):
        began, spent = time.perf_counter(), time.process_time()
        run()
        rates.append(count / (time.perf_counter() - began))
        cpu.append((time.process_time() - spent) / count * 1e3)
    return {
        "images_per_s": statistics.median(rates), "lowest": min(rates), "highest": max(rates),
        "cpu_ms_per_image": statistics.median(cpu), "rehearsal": place.device != "cuda",
    }  # fmt: skip


def parity(place: Place, setup: Setup) -> Iterator[Task]:
    """The same crops by each decoder: how far apart the pixels are, and the scores of a model."""
    for name in DECODERS:
        if name != "decode_cpu":
            yield name, functools.partial(_parity, place, setup, name)


def _parity(place: Place, setup: Setup, name: str) -> Figures:
    """Against DALI on the CPU; without a trained model the scores are those of random weights."""
    # Where there is no GPU: the same comparison, with Pillow's decoder in the other role.
    decode = DECODERS[name] if place.device == "cuda" else DecodeConfig(backend="torch")
    other = _crops_of(place, setup, decode)
    exact = _crops_of(place, setup, DECODERS["decode_cpu"])
    off = (other.int() - exact.int()).abs()
    here, there = (_scores(place, crops) for crops in (exact, other))
    spread = float(here.std()) or 1.0
    return {
        "mean_abs_difference": float(off.float().mean()), "largest_difference": int(off.max()),
        "share_of_equal_pixels": float((off == 0).float().mean()),
        "scores_mean_abs_difference": float(np.abs(here - there).mean()),
        "scores_largest_difference": float(np.abs(here - there).max()),
        "scores_difference_over_spread": float(np.abs(here - there).mean()) / spread,
        "scores_srcc": float(srcc(here, there)), "images": len(here),
        "model": str(place.model or "random weights"), "rehearsal": place.device != "cuda",
    }  # fmt: skip


def _crops_of(place: Place, setup: Setup, decode: DecodeConfig) -> torch.Tensor:
    # The model's own size, whatever the rates are taken at; boxes that depend on the image alone.
    crops = CropConfig(size=224, random=4, evaluation=4)
    with Loader(
        setup.shard_set, setup.ids, crops=crops, batch_size=min(16, setup.count), mode="eval",
        seed=0, device=place.device if decode.backend == "dali" else "cpu",
        decode=dataclasses.replace(decode, threads=setup.threads),
    ) as loader:  # fmt: skip
        batches = [batch.crops[batch.valid].cpu() for batch in loader.epoch(0)]
    return torch.cat(batches)


def _scores(place: Place, crops: torch.Tensor) -> np.ndarray:
    if place.model is None:
        scorer = make_scorer(place.encoder, place.device)
    else:
        scorer = open_scorer(place.model, device=place.device)
    found = [
        scorer.engine.forward(list(part), batch_images=scorer.batch_images).quality
        for part in crops.split(scorer.batch_images)
    ]
    return np.concatenate(found).mean(axis=1)


def _wait(place: Place) -> None:
    if place.device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--book", type=Path, required=True, help="File of results.")
    parser.add_argument("--work", type=Path, required=True, help="Folder for the images; kept.")
    parser.add_argument("--model", type=Path, help="Released model [random weights].")
    parser.add_argument("--rehearse", action="store_true")
    steps = {"rates": rates, "parity": parity}
    parser.add_argument("step", choices=list(steps))
    asked = parser.parse_args()
    place = dataclasses.replace(REHEARSAL if asked.rehearse else GPU, model=asked.model)
    if asked.step == "rates":
        # A dozen pictures, many times: what is decoded matters, not what is seen.
        count = place.images
        shard_set = open_set(make_step_data(asked.work / "many", "jpg", count).root)
    else:
        count = min(place.images, _JUDGED)
        shard_set = make_set(asked.work, KINDS["jpg"], count)
    setup = Setup(
        shard_set=shard_set, codec="jpg", count=count, batch=place.batch, crops=11, size=place.size,
        threads=place.threads, workers=place.workers,
    )  # fmt: skip
    good = Book(asked.book).fill(asked.step, steps[asked.step](place, setup))
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
