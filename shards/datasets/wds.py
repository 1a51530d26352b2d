"""A WebDataset made by others: tars whose members share a key up to the first dot.

`open_wds(source, *, score_member="json:mos", group_member=None, ...)`. SOURCE is a folder of tars,
one tar, or a pattern with braces or `*`. The score is in a member of each sample: `cls` or `txt`
(the whole text is a number), or `json:a.b` (a field of it). Nothing is unpacked to disk.
"""

import codecs
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from shards.datasets.files import IMAGE_ENDINGS, parse_score
from shards.datasets.values import cell_text
from shards.errors import ShardError
from shards.sample import DataSet, Facts, Sample
from shards.score_scale import ScoreScale
from shards.source_files import need_regular, open_regular
from shards.tar import Member, read_members
from shards.text import printable

_BRACES = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*)")
_MOST_TEXT = 16 << 20
_MOST_TARS = 1_000_000
_MOST_TAR = 1 << 50


@dataclass(frozen=True, kw_only=True)
class _Found:
    """One sample of a foreign tar."""

    tar: Path
    key: str
    image: Member
    ending: str
    texts: dict[str, Member] = field(default_factory=dict)


def open_wds(
    source: Path,
    *,
    score_member: str | None = "json:mos",
    group_member: str | None = None,
    score: ScoreScale | None = None,
    name: str = "wds",
) -> DataSet:
    """Read tars of another program.

    Args:
        source: Folder, tar, or pattern.
        score_member: Where the score is; None for tars without scores.
        group_member: Where the group is; default: every image is its own.
        score: Scale of the scores; default: a MOS from the smallest to the largest found.
        name: Short name of the set.

    Raises:
        ShardError: If there is no tar, one is damaged, or a sample lacks what it should have.
    """
    tars = _tars(source)
    if score_member is None:
        score = None
    elif score is None:
        values = [s.mos for s in _samples(tars, score_member, group_member) if s.mos is not None]
        score = _observed(values, source)
    return DataSet(
        name=name,
        score=score,
        samples=lambda: _samples(tars, score_member, group_member),
        facts=Facts(title=f"WebDataset {source.name}", source=f"member {score_member}"),
    )


def _tars(source: Path) -> list[Path]:
    text = str(source)
    braces = _BRACES.fullmatch(text)
    if source.is_dir():
        found = sorted(source.glob("*.tar"))
    elif braces is not None:
        numbers, digits = _numbers(braces[2], braces[3], source), len(braces[2])
        found = [Path(f"{braces[1]}{number:0{digits}d}{braces[4]}") for number in numbers]
    elif "*" in text:
        found = [Path(path) for path in sorted(glob.glob(text))]
    else:
        found = [source]
    for path in found:
        need_regular(path, what="give a folder of tars, a tar, or a pattern")
    if not found:
        raise ShardError(f"{source}: no .tar file is here", exit_code=4)
    return found


def _numbers(first: str, last: str, source: Path) -> range:
    if max(len(first), len(last)) > 9 or int(last) - int(first) > _MOST_TARS:
        raise ShardError(
            f"{printable(source)}: more than {_MOST_TARS:,} tars; name them by a folder or by `*`",
            exit_code=2,
        )
    return range(int(first), int(last) + 1)


def _samples(
    tars: list[Path], score_member: str | None, group_member: str | None
) -> Iterator[Sample]:
    for tar in tars:
        with open_regular(tar, limit_bytes=_MOST_TAR) as stream:
            for found in _grouped(tar):
                where = f"{printable(tar)}: {printable(found.key)}"
                mos = None
                if score_member is not None:
                    value = _value(stream, found, score_member, where)
                    mos = parse_score(value, where=f"{where}: {score_member}")
                path = f"{tar.stem}/{found.key}.{found.ending}"
                group = path
                if group_member is not None:
                    value = _value(stream, found, group_member, where)
                    group = cell_text(value, where=f"{where}: {group_member}")
                    group = path if group == "" else group
                yield Sample(
                    path=path,
                    file=tar,
                    offset=found.image.offset,
                    size=found.image.size,
                    mos=mos,
                    mos_std=None,
                    group=group,
                )


def _grouped(tar: Path) -> Iterator[_Found]:
    """Consecutive members with the same key are one sample, as in the webdataset package."""
    key, held = "", dict[str, Member]()
    with open_regular(tar, limit_bytes=_MOST_TAR) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        for member in read_members(stream, size_bytes=size_bytes, where=str(tar)):
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            if not stem or not ending:
                continue
            this = f"{folder}/{stem}" if folder else stem
            if this != key:
                yield from _complete(tar, key, held)
                key, held = this, {}
            if ending.lower() in held:
                raise ShardError(
                    f"{tar}: sample {key!r} has two members ending in .{ending}; names with dots "
                    "were cut at the first one by whoever wrote this tar",
                    exit_code=3,
                )
            held[ending.lower()] = member
    yield from _complete(tar, key, held)


def _complete(tar: Path, key: str, held: dict[str, Member]) -> Iterator[_Found]:
    if not held:
        return
    endings = [ending for ending in held if f".{ending.rpartition('.')[2]}" in IMAGE_ENDINGS]
    if len(endings) != 1:
        raise ShardError(
            f"{tar}: sample {key!r} has {len(endings)} images among {', '.join(sorted(held))}; one "
            "is needed",
            exit_code=3,
        )
    ending = endings[0]
    texts = {name: member for name, member in held.items() if name != ending}
    yield _Found(tar=tar, key=key, image=held[ending], ending=ending, texts=texts)


def _value(stream: Any, found: _Found, place: str, where: str) -> Any:
    ending, _, path = place.partition(":")
    member = found.texts.get(ending.lower())
    if member is None:
        raise ShardError(
            f"{where}: no member .{ending} (there are {', '.join(sorted(found.texts)) or 'none'}); "
            "say where the score is with `--score-member`",
            exit_code=3,
        )
    if member.size > _MOST_TEXT:
        raise ShardError(f"{where}: .{ending} has {member.size:,} bytes", exit_code=3)
    stream.seek(member.offset)
    data = stream.read(member.size)
    if not path:
        return data.decode("utf-8-sig", "replace").strip()
    try:
        value = msgspec.json.decode(data.removeprefix(codecs.BOM_UTF8))
    except (msgspec.DecodeError, RecursionError) as error:
        raise ShardError(f"{where}: .{ending} is not JSON ({error})", exit_code=3) from error
    for step in path.split("."):
        if not isinstance(value, dict) or step not in value:
            raise ShardError(f"{where}: .{ending} has no field {path!r}", exit_code=3)
        value = value[step]
    return value


def _observed(values: list[float], source: Path) -> ScoreScale:
    if not values:
        raise ShardError(f"{source}: holds no sample", exit_code=3)
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return ScoreScale(kind="mos", low=low, high=high, higher_is_better=True)
