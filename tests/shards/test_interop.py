"""Our shards in other people's readers."""

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.read import ShardSet


def tars(packed: ShardSet) -> list[str]:
    return [str(packed.shard_path(k)) for k in range(len(packed.manifest.shards))]


@pytest.mark.filterwarnings("ignore")
def test_the_webdataset_package_reads_every_sample(packed: ShardSet) -> None:
    import webdataset as wds

    seen = list(wds.WebDataset(tars(packed), shardshuffle=False, empty_check=False))
    assert len(seen) == 12
    for id, sample in enumerate(seen):
        row = packed.samples.row(id)
        assert sample["__key__"] == f"mine-{id:08d}"
        assert sample[row.codec] == packed.read_bytes(id)
        described = json.loads(sample["json"])
        assert (described["id"], described["path"], described["mos"]) == (id, row.path, row.mos)
        assert described["sha256"] == row.sha256.hex()


def test_plain_tar_lists_and_extracts(packed: ShardSet, tmp_path: Path) -> None:
    listed = subprocess.run(
        ["tar", "tf", tars(packed)[0]], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split()[:2] == ["mine-00000000.png", "mine-00000000.json"]
    subprocess.run(["tar", "xf", tars(packed)[0], "-C", str(tmp_path)], check=True)
    assert (tmp_path / "mine-00000000.png").read_bytes() == packed.read_bytes(0)


def test_dali_reads_the_shards_with_our_index(packed: ShardSet) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def images() -> object:
        encoded, described = fn.readers.webdataset(
            paths=tars(packed),
            index_paths=[path.replace(".tar", ".idx") for path in tars(packed)],
            ext=["jpg;png;bmp", "json"],
            missing_component_behavior="error",
        )
        return fn.decoders.image(encoded, device="cpu"), described

    pipe = images()
    pipe.build()
    for id in range(12):
        pixels, described = (output.as_array()[0] for output in pipe.run())
        assert json.loads(bytes(described))["id"] == id
        if packed.samples.codec[id] != "jpg":
            expected = np.asarray(Image.open(io.BytesIO(packed.read_bytes(id))).convert("RGB"))
            np.testing.assert_array_equal(pixels, expected)
