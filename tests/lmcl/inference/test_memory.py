"""What scoring needs of memory: measured on a process of its own, as a user would run it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).resolve().parents[3]
CAP_BYTES = 8 * 2**30
# The job runs in a child; when it has scored a tenth, and at the end, the child says what it holds.
CHILD = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lmcl.inference import batch_job as jobs
from lmcl.inference.inputs import list_items
from lmcl.inference.scorer import open_scorer
def held():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
items = list_items([sys.argv[2]])
seen, marks = 0, {}
append = jobs.RowJournal.append
def count(self, row):
    global seen
    append(self, row)
    seen += 1
    if seen in (len(items) // 10, len(items)):
        marks[seen] = held()
jobs.RowJournal.append = count
settings = jobs.ScoringOptions(output=Path(sys.argv[3]), threads=4, box=True, progress=False)
found = jobs.score_items(open_scorer(Path(sys.argv[1]), device="cpu"), items, settings)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"failed": found.failed, "rows": found.rows, "peak": peak,
                  "held": list(marks.values())}))
"""


def score_in_child(model: Path, images: Path, output: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, model, images, output],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_images_of_12000_by_9000_fit_under_eight_gigabytes(model_folder, tmp_path) -> None:
    folder = tmp_path / "huge"
    folder.mkdir()
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    huge = small.resize((12_000, 9_000), Image.Resampling.BICUBIC)
    huge.save(folder / "a.jpg", quality=90)
    for name in ("b.jpg", "c.jpg", "d.jpg"):
        os.link(folder / "a.jpg", folder / name)
    huge.save(folder / "e.png", compress_level=1)
    small.resize((32, 32)).save(folder / "small.png")
    found = score_in_child(model_folder, folder, tmp_path / "s.csv")
    print(f"peak {found['peak'] / 2**30:.2f} GiB for four JPEGs, a PNG of 12,000 x 9,000")
    assert (found["rows"], found["failed"]) == (6, 0)
    assert found["peak"] < CAP_BYTES


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_images_need_no_more_memory_than_ten_thousand(
    model_folder, tmp_path
) -> None:
    count = int(os.environ.get("LMCL_MANY_IMAGES", "100000"))
    folder = tmp_path / "many"
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"{i // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        if i < 100:
            out = io.BytesIO()
            pixels = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out, "JPEG")
            (place / f"{i:06d}.jpg").write_bytes(out.getvalue())
        else:  # a file of its own for the job, without filling the disk
            os.link(folder / "000" / f"{i % 100:06d}.jpg", place / f"{i:06d}.jpg")
    found = score_in_child(model_folder, folder, tmp_path / "s.parquet")
    early, late = found["held"]
    print(f"{count} images: {early / 2**20:.0f} MiB after a tenth, {late / 2**20:.0f} at the end")
    assert (found["rows"], found["failed"]) == (count, 0)
    assert late - early < 64 * 2**20
