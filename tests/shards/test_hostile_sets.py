"""Sets as somebody might send them: never a traceback, a hang or a byte outside their folder."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shards.build.build import build
from shards.build.plan import ShardSize
from shards.datasets.table import open_table
from shards.errors import ShardError
from shards.info import contact_sheet, describe_set
from shards.read import open_set
from shards.splits.draw import make_splits
from shards.splits.split import load_split, write_split
from shards.verify import verify


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, picture: Any) -> Path:
    """Twelve images in three shards, with one split."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "images").mkdir()
    lines = ["path,score,std,group,distortion,level,split"]
    for k in range(12):
        codec = ("png", "jpg", "bmp")[k % 3]
        (folder / "images" / f"{k}.{codec}").write_bytes(picture(k, codec=codec))
        lines.append(f"{k}.{codec},{k * 0.5},{0.1 + k},ref{k % 4},{'ab'[k % 2]},{k % 5},train")
    (folder / "l.csv").write_text("\n".join(lines) + "\n")
    dataset = open_table(folder / "l.csv", images=folder / "images", name="mine")
    build(dataset, folder / "set", workers=1, size=ShardSize(samples=5))
    write_split(folder / "set", make_splits(open_set(folder / "set"), repeats=1)[0])
    assert verify(folder / "set", deep=True).findings == ()
    return folder / "set"


def _snapshot(folder: Path) -> dict[str, str]:
    """Every name below a folder with what it is, without following links."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if path.is_symlink():
                kind = f"link {os.readlink(path)}"
            elif path.is_file():
                kind = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                kind = "folder or pipe"
            found[str(path.relative_to(folder))] = kind
    return found


def _uses(root: Path, *, quick: bool) -> Iterator[Any]:
    """What people do with a set, each on its own."""
    yield lambda: describe_set(open_set(root))
    yield lambda: list(open_set(root))
    if quick:
        return
    yield lambda: contact_sheet(open_set(root))
    yield lambda: make_splits(open_set(root), repeats=1)
    yield lambda: load_split(open_set(root), "70-10-20-seed123-00")
    yield lambda: write_split(root, make_splits(open_set(root), repeats=1)[0])
    yield lambda: open_set(root).samples.row(0)


def _is_sentence(error: ShardError) -> bool:
    text = str(error)
    return text.isprintable() and len(text.encode()) <= 2048 and error.exit_code in (1, 2, 3, 4)


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_hostile_set_is_told_and_harms_nothing(
    good: Path,
    tmp_path: Path,
    hostile_sets: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    quick: bool,
) -> None:
    monkeypatch.setattr("shards.sample_table.SHARED_FROM_ROWS", 1)
    monkeypatch.setenv("LMCL_CACHE", str(tmp_path / "cache"))
    failures = []
    for number, case in enumerate(hostile_sets):
        home = tmp_path / f"home{number}"
        outside, root = home / "Documents", home / "data" / "set"
        outside.mkdir(parents=True)
        (outside / "secret.txt").write_text("secret")
        root.parent.mkdir()
        (root.parent / "victim.tar").write_text("mine")
        shutil.copytree(good, root)
        case.spoil(root, outside)
        before = _snapshot(home)
        failures += [f"{case.name}: {said}" for said in _tried(case, root, quick=quick)]
        after = _snapshot(home)
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        if any(not name.startswith("data/set/splits/70") for name in changed):
            failures.append(f"{case.name}: changed {changed}")
        shutil.rmtree(home)
    assert not failures, "\n".join(failures)


def _tried(case: Any, root: Path, *, quick: bool) -> Iterator[str]:
    for use in _uses(root, quick=quick):
        try:
            use()
        except ShardError as error:
            if not _is_sentence(error):
                yield f"no sentence: {error!r}"
        except Exception as error:
            yield f"{type(error).__name__}: {error}"
    try:
        found = verify(root, deep=True)
    except ShardError as error:
        if error.exit_code != 4 or not case.is_told:
            yield f"verify: {error}"
        return
    if case.is_told and found.ok:
        yield "verify finds nothing"
    for finding in found.findings:
        if not (finding.text.isprintable() and len(finding.text.encode()) <= 2048):
            yield f"finding is no sentence: {finding}"
