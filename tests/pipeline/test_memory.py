"""What a rank holds of a set in its own memory, whatever the set's size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmcl.bench.manifest import write_synthetic
from shards.read import open_set
from shards.splits.draw import make_splits
from shards.splits.split import write_split

# Opens a set, loads a split of it and goes through the order and the boxes of an epoch, as a rank
# does, without decoding. Private_Dirty is what no other process shares and no page cache holds.
RANK = """
import json, sys
from pathlib import Path
import numpy as np
from pipeline.boxes import CropConfig
from pipeline.decode_config import DecodeConfig
from pipeline.loader import Loader
from shards.read import open_set
from shards.splits.split import load_split

def private_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":") for line in lines[1:])
    return int(fields["Private_Dirty"].split()[0]) << 10

before = private_bytes()
shard_set = open_set(sys.argv[1])
split = load_split(shard_set, sys.argv[2])
crops = CropConfig(size=224, random=1, salient=False)
options = {"crops": crops, "batch_size": 8192, "mode": "train", "seed": 0,
           "decode": DecodeConfig(backend="torch", threads=1)}
seen = 0
with Loader(shard_set, split.train, **options) as loader:
    for step in range(loader.steps):
        request = loader.request(0, step)
        assert shard_set.samples.mos[request.ids].size == len(request.ids)
        assert loader._reader.buffer_bytes(request.ids) > 0
        assert (shard_set.samples.shard[request.ids] >= 0).all()
        seen += int(request.valid.sum())
assert shard_set.ids().size == len(shard_set)
print(json.dumps({"private": private_bytes() - before, "seen": seen}))
"""


def _rank(root: Path, split: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", RANK, str(root), split], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _private_bytes(folder: Path, samples: int) -> int:
    folder.mkdir()
    write_synthetic(folder, samples=samples)
    (split,) = make_splits(open_set(folder), repeats=1)
    write_split(folder, split)
    # The first of all ranks makes the shared files, which costs it a little more.
    _rank(folder, split.name)
    found = _rank(folder, split.name)
    assert found["seen"] == split.train.size
    return found["private"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps")
def test_private_memory_of_a_rank_does_not_grow_with_the_set(tmp_path: Path) -> None:
    # Both beyond TABLE_LIMIT for the order, so that the sizes of everything bounded are the same.
    few = _private_bytes(tmp_path / "few", 1_600_000)
    many = _private_bytes(tmp_path / "many", 3_200_000)
    # Columns, ids and split in private memory would be 40 to 60 bytes a sample; what is left is the
    # manifest, 0.35.
    assert (many - few) / 1_600_000 < 1
