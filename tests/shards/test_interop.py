"""Our shards in other people's readers."""

import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from shards.build.update import update_set
from shards.cli import cli
from shards.read import ShardSet, open_set


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


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The `datasets` package, with its caches in a folder of the test."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return pytest.importorskip("datasets")


def check_rows(packed: ShardSet, rows: list[dict[str, Any]]) -> None:
    """Every sample once, its picture in the column of its codec, its labels in `json`."""
    codecs = set(packed.samples.codec)
    assert [row["json"]["id"] for row in rows] == packed.ids().tolist()
    for id, row in enumerate(rows):
        known = packed.samples.row(id)
        assert {name for name in codecs if row[name] is not None} == {known.codec}
        assert row[known.codec].size == (known.width, known.height)
        assert (row["json"]["mos"], row["json"]["path"]) == (known.mos, known.path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_hugging_face_opens_the_folder_of_a_set_of_mixed_codecs(
    packed: ShardSet, hugging_face: Any, tmp_path: Path, streaming: bool
) -> None:
    found = hugging_face.load_dataset(
        packed.root, split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    check_rows(packed, list(found))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_the_card_says_of_an_updated_set_leaves_withdrawn_images_out(
    packed: ShardSet, hugging_face: Any, tmp_path: Path
) -> None:
    update_set(packed.root, withdraw=[str(packed.samples.path[3])])
    lines = (Path(packed.root) / "README.md").read_text().split("This set was updated")[1]
    code = "\n".join(line[4:] for line in lines.splitlines() if line.startswith("    "))
    code = code.replace("FOLDER", packed.root)
    scope = {"load_dataset": partial(hugging_face.load_dataset, cache_dir=str(tmp_path / "cache"))}
    exec(code, scope)
    left = [sample["json"]["id"] for sample in scope["images"]]
    assert left == open_set(packed.root).ids().tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_calls_of_the_formats_page_open_a_set(
    packed: ShardSet, hugging_face: Any, tmp_path: Path
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text()
    block = page.split("## In the hands of others")[1].split("```python")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(block.replace("FOLDER", packed.root), scope)
    check_rows(packed, list(scope["rows"]))
    check_rows(packed, list(scope["same_rows"]))
    seen = [json.loads(sample["json"])["id"] for sample in scope["samples"]]
    assert seen == packed.ids().tolist()
    described = [json.loads(bytes(one[1].as_array()[0]))["id"] for one in [scope["pipe"].run()]]
    assert described == [0]


def test_the_layout_of_img2dataset_is_read(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    """Numbered tars of .jpg, .json and .txt; beside each a Parquet file and statistics."""
    source = tmp_path / "laion"
    source.mkdir()
    for shard in range(2):
        with tarfile.open(source / f"{shard:05d}.tar", "w") as tar:
            for k in range(3):
                key = f"{shard:05d}{k:04d}"
                described = {"key": key, "url": "http://x/y.jpg", "status": "success", "mos": k}
                members = {
                    "jpg": picture(10 * shard + k, codec="jpg"),
                    "txt": b"a caption",
                    "json": json.dumps(described).encode(),
                }
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        table = pa.table({"key": [f"{shard:05d}0000"], "status": ["success"]})
        pq.write_table(table, source / f"{shard:05d}.parquet")
        (source / f"{shard:05d}_stats.json").write_text("{}")
    score = ("--score-range", "0", "5", "--output", str(tmp_path / "set"))
    done = CliRunner().invoke(cli, ["build", "wds", str(source), "--name", "laion", *score])
    assert done.exit_code == 0, done.output
    found = open_set(tmp_path / "set")
    assert found.samples.mos.tolist() == [0.0, 1.0, 2.0] * 2
