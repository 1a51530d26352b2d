"""`lmcl demo`: from nothing to a report, on a set made on the spot."""

import contextlib
import csv
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lmcl.config import CONFIGS, load_config
from lmcl.errors import LmclError
from lmcl.training.setup import fit_held, hold_run_folder
from lmcl.training.signals import stop_on_signals
from lmcl.utils.files import write_atomic
from shards.build.build import build
from shards.build.plan import ShardSize
from shards.datasets.demo import open_demo, write_demo
from shards.errors import ShardError
from shards.lock import LOCK_NAME
from shards.processes import usable_cores
from shards.progress import progress_bar
from shards.read import open_set
from shards.source_files import is_regular, read_regular, text_lines
from shards.splits.draw import make_splits
from shards.splits.split import write_split
from shards.text import printable

logger = logging.getLogger(__name__)

CONFIG = CONFIGS / "demo.toml"
CONTENTS = 180
"""Scenes of the set, ten images each: more scenes teach more than more epochs (experiments.md)."""
_SEED = 123
MARKER = ".lmcl-demo.json"
"""Lists the files a demo has made: `--again` removes these and nothing else."""
_TOP = {
    *("images", "shards", "config.toml", "environment.json", "protocol.json", "log.jsonl"),
    *("checkpoints", "model", "predictions", "predictions.csv", "metrics.json", "results.csv"),
    *("results.json", "report.html", "report.json", "report.md", "attention", "saliency", "thumbs"),
    "embeddings.npz",
}
"""What a demo makes in its folder."""


class _Marker(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of the marker: names relative to the folder."""

    files: list[str]
    """Made by a demo."""
    foreign: list[str]
    """There before the first one."""


def run_demo(
    output: Path, *, again: bool = False, overrides: Sequence[str] = (), progress: bool = True
) -> str:
    """Make the set, shard it, train, evaluate and report; what to tell the user.

    An interrupted demo goes on where it stopped; a finished one is only shown again.

    Raises:
        LmclError: If the folder holds something that is not a demo run.
        LockedError: If another run is in it (exit code 2).
    """
    shards = output / "shards"
    config = load_config(CONFIG, [f"data.root={json.dumps(str(shards))}", *overrides])
    # Looked at before the lock: the folder of a finished demo may be read-only.
    if (output / "report.html").exists() and not again:
        return _shown_again(output)
    # Two demos at once would share what they draw and pack, and --again empties the folder.
    with hold_run_folder(output, "lmcl demo"):
        if again:
            _clear(output)
        elif (output / "report.html").exists():
            return _shown_again(output)
        _record(output)
        try:
            make_demo_set(output, progress=progress)
            _record(output)
            with stop_on_signals() as stop:
                outcome = fit_held(config, output, resume="auto", progress=progress, stop=stop)
        finally:
            _record(output)
    return f"{outcome.summary()}\n{_next(output)}"


def _shown_again(output: Path) -> str:
    note = "(this run was finished before; lmcl demo --again repeats it)"
    return f"{_figures(output)}\n{note}\n{_next(output)}"


def make_demo_set(output: Path, *, progress: bool) -> Path:
    """Images, shards and the first of ten splits by content; finished parts are kept."""
    shards = output / "shards"
    if (shards / "splits").is_dir():
        return shards
    cores = usable_cores()
    logger.info("making %d synthetic contents in %s", CONTENTS, output / "images")
    labels = write_demo(output / "images", contents=CONTENTS, seed=_SEED, workers=cores)
    dataset = open_demo(labels.parent)
    with progress_bar(desc="packing shards", unit="img", off=not progress) as bar:

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
  lmcl train --config mine --set data.root=data/mine
Score a folder with the demo's model:
  lmcl score PHOTOS --model {output / "model"} --output scores.csv"""


def _record(output: Path) -> None:
    """Write down which files of the folder the demo has made."""
    now = _files(output)
    marker = _read_marker(output) or _Marker(files=[], foreign=sorted(now))
    labelled = _labelled(output)
    foreign = set(marker.foreign)
    made = {
        name
        for name in now - foreign
        if name.partition("/")[0] in _TOP and (not name.startswith("images/") or name in labelled)
    }
    files = sorted(made | (set(marker.files) & now))
    write_atomic(output / MARKER, msgspec.json.encode(msgspec.structs.replace(marker, files=files)))


def _labelled(output: Path) -> set[str]:
    """The images that the demo's own labels name, and the labels."""
    labels = output / "images" / "labels.csv"
    if not is_regular(labels):
        return set()
    rows = csv.DictReader(text_lines(labels))
    names = (f"images/images/{row.get('path')}" for row in rows)
    return {"images/labels.csv", "images/demo.txt", *names}


def _files(output: Path) -> set[str]:
    """Every file and link below the folder; links are not followed."""
    found = set()
    for folder, folders, names in os.walk(output):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*names, *links):
            found.add(Path(folder, name).relative_to(output).as_posix())
    return found - {MARKER, LOCK_NAME}


def _read_marker(output: Path) -> _Marker | None:
    path = output / MARKER
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(read_regular(path, follow_links=False), type=_Marker)
    except (msgspec.DecodeError, RecursionError, ShardError) as error:
        raise LmclError(
            f"{printable(path)}: is damaged ({printable(error)}), so it is not known what the demo "
            "made; remove the folder yourself, or choose another --output"
        ) from error


def _clear(output: Path) -> None:
    """Remove an earlier demo: the files its marker lists, and the folders that are empty then.

    Raises:
        LmclError: If there is no marker, or a new demo would meet files that it does not list;
            then nothing is removed.
    """
    if not output.exists() or not set(os.listdir(output)) - {LOCK_NAME}:
        return
    marker = _read_marker(output)
    if marker is None:
        raise LmclError(
            f"{printable(output)}: is not the folder of a demo run (no {MARKER} in it lists "
            "what a demo has made), so nothing in it is deleted; remove it yourself, or choose "
            "another --output"
        )
    listed = [name for name in marker.files if _is_inside(output, name)]
    others = _files(output) - set(listed)
    in_the_way = sorted(name for name in others if name.partition("/")[0] in _TOP)
    if in_the_way:
        raise LmclError(
            f"{printable(output)}: {len(in_the_way)} files are not among those the demo has "
            f"noted, e.g. {printable(in_the_way[0])}, so nothing is deleted; move them away, or "
            f"let `lmcl demo --output {printable(output)}` finish a killed run first, or choose "
            "another --output"
        )
    folders = set()
    for name in listed:
        (output / name).unlink(missing_ok=True)
        folders |= set(Path(name).parents) - {Path()}
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        with contextlib.suppress(OSError):  # somebody's files lie in it: it stays
            (output / folder).rmdir()
    (output / MARKER).unlink()


def _is_inside(output: Path, name: str) -> bool:
    """Whether a listed name is a file below the folder, reached through no link."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or parts[0] not in _TOP:
        return False
    above = [output.joinpath(*parts[:i]) for i in range(1, len(parts))]
    path = output / name
    return (path.is_symlink() or path.is_file()) and not any(map(os.path.islink, above))
