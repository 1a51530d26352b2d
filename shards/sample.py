"""What a data set yields: labelled images, the scale of their score, and facts about the set.

A newcomer's trap: `mos` is always the raw score in the set's own scale and direction
(`shards.ScoreScale`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.score_scale import ScoreScale
from shards.side_files import LeftOut


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Where a picture lies in a file of columns."""

    column: str
    """Its column, as the file spells it in lower case."""
    row: int
    """Its row, from 0."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of a data set, before it is packed."""

    path: str
    """Name inside the set, posix, relative to the set's root; unique."""
    file: Path
    """Where the bytes lie on this machine."""
    mos: float | None
    """Raw score in the set's own scale; None if unlabelled."""
    mos_std: float | None
    """Spread of the opinions in raw units; None if unknown."""
    group: str
    """Images that must stay together in a split: the reference, or the image itself."""
    distortion: str = ""
    """Family of the distortion, or empty."""
    level: int | None = None
    """Level within the family."""
    subset: str = ""
    """A named portion of the set, e.g. where its images come from."""
    part: str = ""
    """The set's own split: train, val, test or empty."""
    offset: int = 0
    """Where the image starts in the file, for images inside another archive."""
    size: int | None = None
    """How many bytes it has there; None for the whole file."""
    embedded: Embedded | None = None
    """Where the image lies in a file of columns; `size` is an estimate then."""
    row: int | None = field(default=None, compare=False)
    """Row of the label table, for messages."""
    problem: str = ""
    """Why it cannot be packed, where that is known before its bytes are read."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the complete official set holds; a deviation is reported, a part of a set is usable."""

    samples: int | None = None
    """Labelled images."""
    groups: int | None = None
    """Distinct groups, where they are references."""
    low: float | None = None
    """Smallest raw score observed in the official labels (tolerance 1e-4)."""
    high: float | None = None
    """Largest raw score observed in the official labels (tolerance 1e-4)."""
    parts: tuple[tuple[str, int], ...] = ()
    """Sizes of the official parts."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a person wants to know about a set before using it."""

    title: str
    """Full name."""
    page: str = ""
    """Where the set is obtained; nothing is ever downloaded from there by this project."""
    licence: str = ""
    """Terms, as far as they are known."""
    citation: str = ""
    """How to cite it."""
    source: str = ""
    """Which label file was used, where there are several versions."""
    expected: Expected = field(default_factory=Expected)
    """Counts and ranges of the complete set."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A set that was merged into this one; its raw scores are recoverable by its own scale."""

    name: str
    """Name of the original set."""
    score: ScoreScale | None
    """Its own scale, before it was brought to 0..1."""
    first_id: int
    """First id of its samples here."""
    rows: int
    """How many rows it has here."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A set ready to be packed: its scale, its facts, and a function that lists its samples."""

    name: str
    """Short name, used in keys and file names: a-z, 0-9, - and _."""
    score: ScoreScale | None
    """Scale of the labels; None for a set without labels."""
    samples: Callable[[], Iterator[Sample]]
    """Lists the samples, in the same order every time; files are looked at, not opened."""
    facts: Facts
    """Page, licence, citation, expected counts."""
    members: tuple[Member, ...] = ()
    """Where sets were merged: the originals, in order."""
    notes: tuple[str, ...] = ()
    """What the user is told about how the source was read, a line each."""
    is_checked: bool = False
    """Whether scores outside the scale are refused: it is the user's word, not the set's own."""
    left_out: LeftOut | None = None
    """What the source holds besides; counted anew whenever the samples are listed."""
