"""Many epochs, many loaders: nothing grows, nothing is left, nothing waits for the set's size."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.boxes import CropConfig
from pipeline.decode_config import DecodeConfig
from pipeline.loader import Loader
from pipeline.saliency_table import SaliencyTable
from shards.read import ShardSet, open_set

Pack = Callable[..., ShardSet]

CROPS = CropConfig(size=64, random=3, evaluation=2)
BACKENDS = ["dali", "torch"]


def _census() -> tuple[int, int, int]:
    """Resident bytes, open files, threads of all kinds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return (
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


def _soak(shard_set: ShardSet, backend: str, *, warm: int, epochs: int) -> None:
    table = shard_set.samples
    boxes = np.tile(np.array([0, 0, 64, 64], dtype=np.int32), (len(table), 1))
    salient = SaliencyTable(ids=table.id, boxes=boxes)
    decode = DecodeConfig(backend=backend, threads=2)
    options = {"crops": CROPS, "batch_size": 8, "seed": 0, "decode": decode}
    with (
        Loader(shard_set, shard_set.ids(), mode="train", **options) as train,
        Loader(shard_set, shard_set.ids(), mode="eval", **options) as evaluate,
        Loader(shard_set, shard_set.ids(), mode="global", **options) as look,
    ):
        for epoch in range(warm + epochs):
            if epoch == warm:
                before = _census()
            images = sum(int(batch.valid.sum()) for batch in look.epoch(epoch))
            images += sum(int(batch.valid.sum()) for batch in train.epoch(epoch, saliency=salient))
            images += sum(int(batch.valid.sum()) for batch in evaluate.epoch(epoch))
            assert images == 3 * len(table)
        after = _census()
    assert after[0] - before[0] < 24 << 20, "resident memory grew"
    assert after[1] <= before[1], "open files grew"
    assert after[2] <= before[2], "threads grew"


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_files_and_threads_stay_flat(mixed_set: ShardSet, backend: str) -> None:
    _soak(mixed_set, backend, warm=3, epochs=4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_files_and_threads_stay_flat_over_twenty_epochs(
    pack: Pack, mixed_images: list[tuple[str, bytes]], backend: str
) -> None:
    many = [(f"{turn} {name}", data) for turn in range(8) for name, data in mixed_images]
    _soak(pack(many, samples_per_shard=40), backend, warm=4, epochs=20)


def test_a_process_that_forgets_to_close_still_ends(mixed_set: ShardSet) -> None:
    program = (
        "import itertools, sys\n"
        "from pipeline.boxes import CropConfig\n"
        "from pipeline.decode_config import DecodeConfig\n"
        "from pipeline.loader import Loader\n"
        "from shards.read import open_set\n"
        "shard_set = open_set(sys.argv[1])\n"
        "loaders = [Loader(shard_set, shard_set.ids(), crops=CropConfig(size=64), batch_size=4,\n"
        "                  mode='train', seed=0, decode=DecodeConfig(backend=name))\n"
        "           for name in ('dali', 'torch')]\n"
        "for loader in loaders:\n"
        "    print(len(list(itertools.islice(loader.epoch(0), 2))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, mixed_set.root],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["2", "2"]), done.stderr


def _stretched(shard_set: ShardSet, folder: Path, rows: int) -> ShardSet:
    """The same shards under a table that names their samples again and again."""
    folder.mkdir()
    for shard in shard_set.manifest.shards:
        (folder / shard.name).hardlink_to(Path(shard_set.root) / shard.name)
    table = pq.read_table(shard_set.samples.path_of_file)
    long = table.take(pa.array(np.arange(rows) % len(table)))
    long = long.set_column(
        long.schema.get_field_index("id"), long.schema.field("id"), pa.array(np.arange(rows))
    )
    pq.write_table(long, folder / "samples.parquet")
    manifest = json.loads((Path(shard_set.root) / "manifest.json").read_text(encoding="utf-8"))
    manifest["num_samples"] = manifest["num_rows"] = rows
    for count in ("samples", "rows"):
        manifest["shards"][-1][count] += rows - len(table)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return open_set(folder)


def test_a_million_samples_are_loaded_by_their_ids(mixed_set: ShardSet, tmp_path: Path) -> None:
    long = _stretched(mixed_set, tmp_path / "long", 1_000_000)
    with Loader(
        open_set(long.root),
        np.arange(1_000_000),
        crops=CROPS,
        batch_size=8,
        mode="train",
        seed=0,
        decode=DecodeConfig(backend="torch", threads=1),
    ) as loader:
        batch = next(loader.epoch(0))
        ids = loader.request(0, 0).ids
    assert batch.ids.tolist() == ids.tolist()
    assert int(batch.ids.max()) > 37
