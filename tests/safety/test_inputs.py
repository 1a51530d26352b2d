"""Every hostile input of `conftest.py` against the functions that read it; commands come on top."""

import io
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.decode import decode_rgb
from pipeline.errors import PipelineError
from shards.build.build import build
from shards.datasets.table import open_table
from shards.datasets.wds import open_wds
from shards.errors import ShardError
from shards.image_formats import open_image
from shards.read import ShardSet, open_set
from shards.source_files import read_regular
from shards.splits.import_splits import import_splits
from shards.tar import iterate_members
from shards.text import MAX_MESSAGE_BYTES
from tests.conftest import SafetyTally
from tests.safety.conftest import Kinds

Sentence = Callable[..., str]


@pytest.fixture
def sentence(tally: SafetyTally) -> Sentence:
    """`_sentence`, counted."""

    def count(kind: str, read: Callable[[], object], *errors: type[Exception]) -> str:
        tally.inputs += 1
        try:
            return _sentence(kind, read, errors or (ShardError,))
        except AssertionError:
            raise
        except Exception:
            tally.tracebacks += 1
            raise

    return count


def _sentence(kind: str, read: Callable[[], object], errors: tuple[type[Exception], ...]) -> str:
    """The message of the error that `read` raises, empty if it raises none; anything else fails."""
    try:
        read()
    except errors as error:
        message = str(error)
        assert len(message.encode()) <= MAX_MESSAGE_BYTES, kind
        assert not set(message) & set("\n\r\x1b\0\u202e"), kind
        return message
    return ""


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"started {args[:1]}")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("os.system", start)


SOUND = {"escape in name", "newline in name", "direction in name", "formula in name",
         "option as name", "html in name", "markdown in name", "long name",
         "name that is no UTF-8", "png of one pixel and 6 GB",
         "png of one pixel of 8 bits and 6 GB"}  # fmt: skip


@pytest.mark.timeout(120)
def test_hostile_images_are_a_sentence_or_sound(
    hostile_images: Kinds, quiet: None, sentence: Sentence
) -> None:
    for kind, path in hostile_images.items():
        message = sentence(kind, lambda path=path: open_image(path).load())
        if message == "":
            data = read_regular(path)
            message = sentence(kind, lambda data=data: decode_rgb(data), PipelineError)
        assert (message == "") == (kind in SOUND), (kind, message)
    assert not Path("ghostscript-was-here").exists()


@pytest.mark.timeout(300)
def test_hostile_tables_are_a_sentence(hostile_tables: Kinds, sentence: Sentence) -> None:
    folder = hostile_tables["two scores"].parent
    for kind, path in hostile_tables.items():

        def read(path: Path = path) -> None:
            for sample in open_table(path, images=folder, extra_files="ignore").samples():
                open_image(sample.file).load()

        assert sentence(kind, read) != "", kind


@pytest.mark.timeout(120)
def test_hostile_tars_are_a_sentence_or_listed(hostile_tars: Kinds, sentence: Sentence) -> None:
    listed = {"sparse", "climbing", "absolute", "link", "device", "escape in name"}
    for kind, path in hostile_tars.items():

        def read(path: Path = path) -> None:
            data = read_regular(path)
            members = iterate_members(io.BytesIO(data), size_bytes=len(data), where=str(path))
            assert {member.name for member in members} >= {"good.png"}

        assert (sentence(kind, read) == "") == (kind in listed), kind

        def pack(path: Path = path) -> None:
            list(open_wds(path, score_member=None).samples())

        samples = sentence(kind, pack)
        assert (samples == "") == (kind in ("escape in name", "file: sparse")), kind


@pytest.fixture
def three(tmp_path: Path, hostile_images: Kinds) -> ShardSet:
    """A set of 0.png, 1.png, 2.png."""
    folder = tmp_path / "three"
    folder.mkdir()
    picture = hostile_images["option as name"].read_bytes()
    for k in range(3):
        (folder / f"{k}.png").write_bytes(picture)
    (tmp_path / "three.csv").write_text("path,score\n0.png,1\n1.png,2\n2.png,3\n")
    build(open_table(tmp_path / "three.csv", images=folder), tmp_path / "set", workers=1)
    return open_set(tmp_path / "set")


@pytest.mark.timeout(180)
def test_hostile_splits_are_a_sentence(
    hostile_splits: Kinds,
    three: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sentence: Sentence,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("0.png\n1.png\n2.png\n")
    for kind, path in hostile_splits.items():
        message = sentence(kind, lambda path=path: import_splits(three, path, names=names))
        assert message != "", kind
    assert not (tmp_path / "pickle-was-here").exists()
    assert not os.path.exists("pickle-was-here")
