"""`lmcl demo`: from nothing to a report, on a set made on the spot."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
from tqdm import tqdm

from lmcl.config import load_config
from lmcl.errors import LmclError
from lmcl.training.setup import fit
from shards.build.build import build
from shards.build.plan import ShardSize
from shards.datasets.demo import open_demo, write_demo
from shards.read import open_set
from shards.splits.draw import make_splits
from shards.splits.split import write_split

logger = logging.getLogger(__name__)

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.toml"
CONTENTS = 60
_SEED = 123
_OURS = ("images", "shards", "config.toml")


def run_demo(
    output: Path, *, again: bool = False, overrides: Sequence[str] = (), progress: bool = True
) -> str:
    """Make the set, shard it, train, evaluate and report; what to tell the user.

    An interrupted demo goes on where it stopped; a finished one is only shown again.

    Raises:
        LmclError: If the folder holds something that is not a demo run.
    """
    if again:
        _clear(output)
    shards = output / "shards"
    config = load_config(CONFIG, [f"data.root='{shards}'", *overrides])
    if (output / "report.html").exists():
        note = "(this run was finished before; lmcl demo --again repeats it)"
        return f"{_figures(output)}\n{note}\n{_next(output)}"
    make_demo_set(output, progress=progress)
    outcome = fit(config, output, resume="auto", progress=progress)
    return f"{outcome.summary()}\n{_next(output)}"


def make_demo_set(output: Path, *, progress: bool) -> Path:
    """Images, shards and the first of ten splits by content; finished parts are kept."""
    shards = output / "shards"
    if (shards / "splits").is_dir():
        return shards
    cores = os.cpu_count() or 1
    logger.info("making %d synthetic contents in %s", CONTENTS, output / "images")
    labels = write_demo(output / "images", contents=CONTENTS, seed=_SEED, workers=cores)
    dataset = open_demo(labels.parent)
    with tqdm(desc="packing shards", unit="img", disable=None if progress else True) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        # Small shards, so that a reader of the folder sees that there are several.
        build(dataset, shards, workers=cores, size=ShardSize(samples=200), progress=tell)
    opened = open_set(shards)
    for split in make_splits(opened, protocol="70-10-20", seed=_SEED, repeats=10):
        write_split(shards, split)
    return shards


def _figures(output: Path) -> str:
    try:
        found = msgspec.json.decode((output / "metrics.json").read_bytes())
        return (
            f"{found['part']}: SRCC {found['srcc']:.4f}  PLCC {found['plcc_raw']:.4f}  "
            f"({found['n']} images)\nreport: {output / 'report.html'}"
        )
    except (OSError, msgspec.DecodeError, KeyError) as error:
        raise LmclError(
            f"{output}: has a report but no readable metrics.json ({error}); lmcl demo --again "
            "starts over"
        ) from error


def _next(output: Path) -> str:
    return f"""
The set is synthetic; the figures say that the machinery works, not how well it judges photographs.
Your own images next (labels.csv: columns path, score):
  lmcl-shard build table labels.csv --images PHOTOS --score-range 1 5 --output data/mine
  lmcl-shard split data/mine --protocol 70-10-20
  lmcl train --config configs/mine.toml --set data.root=data/mine
Score a folder with the demo's model:
  lmcl score PHOTOS --model {output / "model"} --output scores.csv"""


def _clear(output: Path) -> None:
    """Remove an earlier demo, and nothing that is not one."""
    if not output.exists():
        return
    names = {path.name for path in output.iterdir()}
    if names and not names & set(_OURS):
        raise LmclError(
            f"{output}: is not the folder of a demo run (no {' or '.join(_OURS)} in it), so it is "
            "not deleted; choose another --output"
        )
    shutil.rmtree(output)
