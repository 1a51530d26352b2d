"""A WebDataset made by others: tars whose members share a key up to the first dot.

`open_wds(source, *, score_member="json:mos", group_member=None, image_member=None, ...)`. SOURCE is
what `shards.tar_sources` reads: a folder of tars, one tar, a pattern, a list. The score is in a
member of each sample: `cls` or `txt` (the whole text is a number), or `json:a.b` (a field of it).
Nothing is unpacked to disk. What is wrong with one sample is that sample's `problem`, so that
`--on-error` decides about it as about a file in a folder.
"""

import codecs
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from shards.datasets.files import parse_score
from shards.datasets.values import cell_text
from shards.errors import ShardError
from shards.image_kinds import HEAD_BYTES, kind_of
from shards.sample import DataSet, Facts, Sample
from shards.score_scale import ScoreScale
from shards.side_files import OTHER_ENDINGS, PICTURE_ENDINGS, LeftOut, PathFilter, is_side_path
from shards.source_files import open_regular
from shards.tar import Member, read_members
from shards.tar_sources import TarSource, find_tars
from shards.text import printable

_MOST_TEXT = 16 << 20
_MOST_TAR = 1 << 50


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Which members of a sample are what."""

    score: str | None
    group: str | None
    images: tuple[str, ...]
    """Endings of which one is the image, first come; empty: the only image there is."""
    files: PathFilter


@dataclass(frozen=True, kw_only=True)
class _Found:
    """One sample of a foreign tar."""

    tar: TarSource
    key: str
    members: dict[str, Member]
    """By ending, in lower case."""
    doubled: str
    """An ending that two members have; empty if none."""


class _UnusableError(Exception):
    """A sample that cannot be packed; its text says why."""


def open_wds(
    source: Path | str,
    *,
    score_member: str | None = "json:mos",
    group_member: str | None = None,
    image_member: str | None = None,
    score: ScoreScale | None = None,
    name: str = "wds",
    files: PathFilter | None = None,
    stdin: Iterable[str] = (),
) -> DataSet:
    """Read tars of another program.

    Args:
        source: Folder, tar, pattern with `*` or braces, `A::B`, `@list.txt`, or `-` for stdin.
        score_member: Where the score is; None for tars without scores.
        group_member: Where the group is; default: every image is its own.
        image_member: Which member is the image where a sample has several: an ending with or
            without its last part (`dist.jpg`, `dist`), or several with `;` between, the first
            that is there.
        score: Scale of the scores; default: a MOS from the smallest to the largest found.
        name: Short name of the set.
        files: Which members are looked at.
        stdin: Lines for `-`.

    Raises:
        ShardError: If there is no tar, or one is damaged or compressed.
    """
    tars = find_tars(str(source), stdin=stdin)
    choice = _Choice(
        score=score_member,
        group=group_member,
        images=tuple(e.strip(". ").lower() for e in (image_member or "").split(";") if e.strip()),
        files=files or PathFilter(),
    )
    left_out = LeftOut()
    if score_member is None:
        score = None
    elif score is None:
        score = _observed(s.mos for s in _samples(tars, choice, left_out) if s.mos is not None)
    return DataSet(
        name=name,
        score=score,
        samples=lambda: _samples(tars, choice, left_out),
        facts=Facts(title=f"WebDataset {Path(source).name}", source=f"member {score_member}"),
        left_out=left_out,
    )


def _samples(tars: Sequence[TarSource], choice: _Choice, left_out: LeftOut) -> Iterator[Sample]:
    # Who stops before the end has not seen all that is left out.
    counted = LeftOut()
    for tar in tars:
        with open_regular(tar.path, limit_bytes=_MOST_TAR) as stream:
            all_found = _grouped(stream, tar, choice, counted)
            partners = _partners(all_found)
            for found in all_found:
                sample = _sample(stream, found, choice, partners=partners, left_out=counted)
                if sample is not None:
                    yield sample
    left_out.replace(counted)


def _grouped(stream: BinaryIO, tar: TarSource, choice: _Choice, left_out: LeftOut) -> list[_Found]:
    """Members with the same key are one sample, wherever they stand in the tar.

    The webdataset package wants them one after the other; `tar cf` stores a folder in the order of
    the disk.
    """
    samples, doubled = dict[str, dict[str, Member]](), dict[str, str]()
    size_bytes = os.fstat(stream.fileno()).st_size
    for member in read_members(stream, size_bytes=size_bytes, where=str(tar.path), hand_made=True):
        if is_side_path(member.name.removeprefix("./")):
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        if not stem or not ending:
            left_out.add(base)
            continue
        if not choice.files.takes(member.name):
            left_out.add_by_pattern()
            continue
        key = f"{folder}/{stem}" if folder else stem
        held = samples.setdefault(key, {})
        if ending.lower() in held:
            doubled[key] = ending
        held[ending.lower()] = member
    return [
        _Found(tar=tar, key=key, members=held, doubled=doubled.get(key, ""))
        for key, held in samples.items()
    ]


def _partners(all_found: Sequence[_Found]) -> frozenset[str]:
    """Endings that stand beside images in a tar: with one of them, a sample lacks its image."""
    partners = set[str]()
    for found in all_found:
        if any(_last(name) in PICTURE_ENDINGS for name in found.members):
            partners.update(found.members)
    return frozenset(partners)


def _sample(
    stream: BinaryIO,
    found: _Found,
    choice: _Choice,
    *,
    partners: frozenset[str],
    left_out: LeftOut,
) -> Sample | None:
    """A sample, perhaps with a problem; None for files that are part of none."""
    path = f"{found.tar.name}/{found.key}"
    where = f"{printable(found.tar.name)}.tar: {printable(found.key)}"
    mos, group, problem = None, path, ""
    image = Member(name=found.key, offset=0, size=0)
    try:
        ending = _image_ending(stream, found, choice, partners)
        if ending is None:
            for name in found.members:
                left_out.add(f"x.{name}")
            return None
        image, path = found.members[ending], f"{path}.{ending}"
        group = _group(stream, found, choice, path, where)
        if choice.score is not None:
            value = _value(stream, found, choice.score)
            mos = parse_score(value, where=f"{where}: {choice.score}")
    except _UnusableError as reason:
        problem = f"{where} {reason}"
    except ShardError as error:
        problem = str(error)
    return Sample(
        path=path,
        file=found.tar.path,
        offset=image.offset,
        size=image.size,
        mos=mos,
        mos_std=None,
        group=group,
        problem=problem,
    )


def _image_ending(
    stream: BinaryIO, found: _Found, choice: _Choice, partners: frozenset[str]
) -> str | None:
    """The ending of the member that is the image; None if these files are no sample at all."""
    if found.doubled:
        raise _UnusableError(
            f"has two members ending in .{printable(found.doubled)}; names with dots were cut at "
            "the first one by whoever wrote this tar"
        )
    endings = [name for name in found.members if _last(name) in PICTURE_ENDINGS]
    if not endings:
        endings = [name for name in found.members if _is_picture(stream, name, found.members[name])]
    if choice.images:
        chosen = _chosen(choice.images, list(found.members), endings)
        if chosen is None:
            raise _UnusableError(
                f"has no member {' or '.join(choice.images)} among {_listed(found.members)}; see "
                "`--image-member`"
            )
        return chosen
    if len(endings) == 1:
        return endings[0]
    if endings:
        raise _UnusableError(
            f"has {len(endings)} images among {_listed(found.members)}; say which is meant with "
            f"`--image-member {sorted(endings)[0]}`"
        )
    if partners.isdisjoint(found.members):
        return None
    raise _UnusableError(f"has no image, only {_listed(found.members)}")


def _chosen(wanted: Sequence[str], members: Sequence[str], images: Sequence[str]) -> str | None:
    for ending in wanted:
        if ending in members:
            return ending
        for name in images:
            if name.rpartition(".")[0] == ending:
                return name
    return None


def _is_picture(stream: BinaryIO, ending: str, member: Member) -> bool:
    """Whether a member of an unknown ending is an image, by its content."""
    if _last(ending) in OTHER_ENDINGS:
        return False
    stream.seek(member.offset)
    kind = kind_of(stream.read(min(member.size, HEAD_BYTES)))
    return kind is not None and kind.is_picture


def _group(stream: BinaryIO, found: _Found, choice: _Choice, path: str, where: str) -> str:
    if choice.group is None:
        return path
    value = _value(stream, found, choice.group)
    return cell_text(value, where=f"{where}: {choice.group}") or path


def _value(stream: BinaryIO, found: _Found, place: str) -> object:
    ending, _, path = place.partition(":")
    member = found.members.get(ending.lower())
    if member is None:
        raise _UnusableError(
            f"has no member .{ending} (there are {_listed(found.members)}); say where the score is "
            "with `--score-member`"
        )
    if member.size > _MOST_TEXT:
        raise _UnusableError(f"has {member.size:,} bytes in .{ending}")
    stream.seek(member.offset)
    data = stream.read(member.size)
    if not path:
        return data.decode("utf-8-sig", "replace").strip()
    try:
        value = msgspec.json.decode(data.removeprefix(codecs.BOM_UTF8))
    except (msgspec.DecodeError, RecursionError) as error:
        raise _UnusableError(f"has no JSON in .{ending} ({printable(error)})") from error
    for step in path.split("."):
        if not isinstance(value, dict) or step not in value:
            raise _UnusableError(f"has no field {path!r} in .{ending}")
        value = value[step]
    if value is None:
        raise _UnusableError(f"has null in the field {path!r} of .{ending}")
    return value


def _last(ending: str) -> str:
    return f".{ending.rpartition('.')[2]}"


def _listed(members: Iterable[str]) -> str:
    return printable(", ".join(sorted(members)))


def _observed(scores: Iterable[float]) -> ScoreScale:
    values = list(scores)
    if not values:
        # Nothing can be packed; the plan says why, sample by sample.
        return ScoreScale(kind="mos", low=0.0, high=1.0, higher_is_better=True)
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return ScoreScale(kind="mos", low=low, high=high, higher_is_better=True)
