"""Readers by name: how a name on the command line becomes a `DataSet`."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from shards.datasets import (
    agiqa3k,
    biq2021,
    csiq,
    demo,
    flive,
    kadid10k,
    koniq10k,
    live,
    livec,
    spaq,
    tid2013,
)
from shards.datasets.pyiqa import open_pyiqa
from shards.datasets.roles import ColumnNames
from shards.datasets.table import BadRows, ExtraFiles, MissingFiles, open_table, table_paths
from shards.datasets.unlabelled import open_unlabelled
from shards.datasets.wds import open_wds
from shards.errors import ShardError
from shards.manifest import MANIFEST, decode
from shards.remote import local_copy, local_folder, shown_url, split_url, url_suffix
from shards.sample import DataSet, Facts
from shards.score_scale import ScoreScale
from shards.side_files import PathFilter
from shards.store import Store
from shards.text import is_url

_NAMED_BY_FOLDER = ("table", "unlabelled", "wds")
_MOST_NAME = 41
"""Characters (`shards.manifest.SetName`)."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a reader may be told besides its source."""

    images: Path | None = None
    """Folder of the images, where it is not the source's own."""
    name: str | None = None
    """Short name of the packed set, for `table`, `unlabelled`, `pyiqa` and `wds`."""
    score: ScoreScale | None = None
    """Scale of the scores, for sets that do not bring one."""
    extra_files: ExtraFiles = "error"
    """What to do about images that a table does not name."""
    columns: ColumnNames | None = None
    """table: columns, where they have other than the usual names."""
    missing: MissingFiles = "later"
    """table: whether images that are labelled and not there stop the reading."""
    bad_rows: BadRows = "error"
    """table: whether rows without a usable score or path stop the reading."""
    patches: bool = False
    """flive: read the patches too."""
    score_member: str | None = "json:mos"
    """wds: where the score of a sample is; None for none."""
    group_member: str | None = None
    """wds: where the group of a sample is."""
    image_member: str | None = None
    """wds: which member is the image, where a sample has several."""
    files: PathFilter = field(default_factory=PathFilter)
    """Which files `table`, `unlabelled` and `wds` look at."""
    stdin: Iterable[str] = ()
    """Lines of standard input, for a source `-`."""
    contents: int = 60
    """Size of the demo set."""
    seed: int = 123
    """Seed of the demo set."""
    workers: int = 1
    """Processes that draw the demo set."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One entry of `lmcl-shard datasets`."""

    name: str
    """What is typed."""
    facts: Facts
    """What is printed about it."""
    source: str
    """What SOURCE has to be."""
    open: Callable[[Path, SourceOptions], DataSet]
    """Opens it."""


def readers() -> dict[str, Reader]:
    """Every reader, by name, in the order they are listed."""
    return {reader.name: reader for reader in _READERS}


def default_name(reader: str, output: str) -> str | None:
    """What a set is called whose name nobody gave: as its folder, so that two are told apart.

    A set that is there already keeps its name. Names of published sets, by which scales, numbers of
    ratings and published figures are found, are not given to others' images.

    Args:
        reader: Name of the reader.
        output: Folder or URL of the packed set.

    Returns:
        None if the reader names the set itself.
    """
    if reader not in _NAMED_BY_FOLDER:
        return None
    store = Store(output)
    try:
        return (
            decode(store.read(MANIFEST), where=output).name
            if store.exists(MANIFEST)
            else (_name_of_folder(reader, output))
        )
    except ShardError:
        return _name_of_folder(reader, output)  # said by whoever opens it


def _name_of_folder(reader: str, output: str) -> str:
    place = urlsplit(output).path if is_url(output) else str(Path(output).resolve())
    last = place.rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^a-z0-9_-]+", "-", last.lower()).strip("-_")
    if name in readers() or not name:
        name = f"{name}-{reader}" if name and name != reader else reader
    return name[:_MOST_NAME].rstrip("-_")


def open_source(name: str, source: Path, options: SourceOptions) -> DataSet:
    """Open a source with the reader of that name.

    Raises:
        ShardError: If there is no such reader (exit code 2), or the source is not as it should be.
    """
    known = readers()
    if name not in known:
        raise ShardError(f"no data set {name!r}; {suggestion(name, list(known))}", exit_code=2)
    dataset = known[name].open(source, options)
    # A scale that the user gave is checked; what a published set has is as it is (LIVE has
    # negative scores).
    is_given = options.score is not None and dataset.score == options.score
    return dataclasses.replace(dataset, is_checked=dataset.is_checked or is_given)


def fetch_source(
    name: str,
    source: str,
    options: SourceOptions,
    *,
    images: str | None,
    tell: Callable[[str], None],
) -> tuple[Path, SourceOptions]:
    """A source that may lie behind a URL, as files of this machine.

    Args:
        name: The reader.
        source: Path or URL.
        options: Of the reader.
        images: Path or URL of the images, where they are named.
        tell: Called with a line before something is fetched.

    Raises:
        ShardError: If it cannot be had.
    """
    if not is_url(source):
        here = Path(source)
    elif name == "wds" and any(mark in source for mark in ("{", "*", "::")):
        raise ShardError(
            f"{shown_url(source)}: a list of tars behind URLs is not fetched; name one tar, or the "
            "folder of them",
            exit_code=2,
        )
    elif url_suffix(source):
        here = local_copy(source)
        # Without `--images` the paths of a table are relative to where it lies.
        images = images or (split_url(source)[0] if name == "table" else None)
    else:
        here = local_folder(source, endings=None, tell=tell)
    if images is None or not is_url(images):
        return here, options
    names = table_paths(here, options.columns) if name == "table" else None
    if names is not None and not names:
        return here, options
    folder = local_folder(images, names=names, tell=tell)
    return here, dataclasses.replace(options, images=folder)


def suggestion(name: str, known: list[str]) -> str:
    """The nearest known name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


def _open_demo(source: Path, options: SourceOptions) -> DataSet:
    demo.write_demo(source, contents=options.contents, seed=options.seed, workers=options.workers)
    return demo.open_demo(source)


def _open_table(source: Path, options: SourceOptions) -> DataSet:
    dataset = open_table(
        source,
        images=options.images,
        name=options.name or "table",
        score=options.score,
        extra_files=options.extra_files,
        columns=options.columns,
        missing=options.missing,
        bad_rows=options.bad_rows,
        files=options.files,
    )
    takes = options.files.takes
    return dataclasses.replace(
        dataset, samples=lambda: (s for s in dataset.samples() if takes(s.path))
    )


_READERS = (
    Reader(
        name="demo",
        facts=demo.FACTS,
        source="not needed: the pictures are drawn into OUTPUT/source (or into SOURCE, if given)",
        open=_open_demo,
    ),
    Reader(
        name="live",
        facts=live.FACTS,
        source="the databaserelease2 folder: five distortion folders, "
        "dmos_realigned.mat, refnames_all.mat",
        open=lambda source, options: live.open_live(source, images=options.images),
    ),
    Reader(
        name="csiq",
        facts=csiq.FACTS,
        source="the folder with csiq.DMOS.xlsx (or csiq_label.txt) and the images",
        open=lambda source, options: csiq.open_csiq(source, images=options.images),
    ),
    Reader(
        name="tid2013",
        facts=tid2013.FACTS,
        source="the folder with mos_with_names.txt and distorted_images/",
        open=lambda source, options: tid2013.open_tid2013(source, images=options.images),
    ),
    Reader(
        name="kadid10k",
        facts=kadid10k.FACTS,
        source="the folder with dmos.csv and images/",
        open=lambda source, options: kadid10k.open_kadid10k(source, images=options.images),
    ),
    Reader(
        name="livec",
        facts=livec.FACTS,
        source="the ChallengeDB_release folder: Data/*.mat and Images/",
        open=lambda source, options: livec.open_livec(source, images=options.images),
    ),
    Reader(
        name="koniq10k",
        facts=koniq10k.FACTS,
        source="the folder with a koniq10k_*.csv and 1024x768/ (or a smaller copy)",
        open=lambda source, options: koniq10k.open_koniq10k(source, images=options.images),
    ),
    Reader(
        name="flive",
        facts=flive.FACTS,
        source="the folder with labels_image.csv, labels640.csv, labels=640_padded.csv and the "
        "images; --patches reads labels_patch.csv too",
        open=lambda source, options: flive.open_flive(
            source, images=options.images, patches=options.patches
        ),
    ),
    Reader(
        name="spaq",
        facts=spaq.FACTS,
        source="the folder with TestImage/ and Annotations/",
        open=lambda source, options: spaq.open_spaq(source, images=options.images),
    ),
    Reader(
        name="biq2021",
        facts=biq2021.FACTS,
        source="the folder with Images/ and the two lists",
        open=lambda source, options: biq2021.open_biq2021(source, images=options.images),
    ),
    Reader(
        name="agiqa3k",
        facts=agiqa3k.FACTS,
        source="the folder with data.csv and the images",
        open=lambda source, options: agiqa3k.open_agiqa3k(source, images=options.images),
    ),
    Reader(
        name="table",
        facts=Facts(title="Your own images, scored in a CSV, TSV, JSONL, Parquet or xlsx file"),
        source="the table; columns path, score, optional std, group, split, distortion, level, "
        "subset; --images names the folder the paths are relative to",
        open=_open_table,
    ),
    Reader(
        name="unlabelled",
        facts=Facts(title="A folder of images without scores, to be scored"),
        source="the folder",
        open=lambda source, options: open_unlabelled(
            source, name=options.name or "unlabelled", files=options.files
        ),
    ),
    Reader(
        name="pyiqa",
        facts=Facts(title="A set as pyiqa's meta_info_*.csv describes it"),
        source="the meta_info_*.csv; --images names the folder its paths are relative to",
        open=lambda source, options: open_pyiqa(source, images=options.images, name=options.name),
    ),
    Reader(
        name="wds",
        facts=Facts(title="A WebDataset made by others"),
        source="a folder of tars, one tar, a pattern such as set-{000000..000012}.tar, several "
        "with :: between, @list.txt or - (names on stdin); --score-member says where the score is: "
        "cls, txt or json:field; --image-member which image, where a sample has several",
        open=lambda source, options: open_wds(
            source,
            score_member=options.score_member,
            group_member=options.group_member,
            image_member=options.image_member,
            score=options.score,
            name=options.name or "wds",
            files=options.files,
            stdin=options.stdin,
        ),
    ),
)
