"""Filter images by their scores: move what is below a quality, show all on a contact sheet."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from markupsafe import Markup
from PIL import Image

from lmcl.inference.inputs import MOVES_NAME, Item, is_moves_file
from lmcl.inference.moves import Move, numbered, read_moves
from lmcl.inference.scorer import decode_image
from lmcl.inference.scores_file import Row
from lmcl.report.formatting import format_figure
from lmcl.report.page import Header, Section, render_page
from lmcl.report.pictures import embedded_jpeg
from lmcl.utils.files import write_atomic
from shards.text import printable

_SIDE = 180
_MOST_SHOWN = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class SheetShot:
    """One image of the contact sheet, as its template shows it."""

    path: str
    name: str
    score: str
    quality: str
    """In brackets behind the score; empty where the two are the same."""
    jpeg: Markup
    """Its thumbnail in base64."""
    refusal: str
    """Why there is none; else empty."""


def plan_moves(
    rows: Sequence[Row | None], items: Sequence[Item], *, below: float, folder: Path
) -> list[Move]:
    """Images below a quality, each with a free name in `folder`.

    Args:
        rows: The row of each item; None if there is none of the file as it is now.
        items: What was named on the command line.
        below: Quality in [0, 1], higher = better, whatever the scale of the training set.
        folder: Where they go; the part of the path that all share is left out. What was moved there
            before counts, so that a job that goes on chooses the names it would have chosen.
    """
    bad = [
        (Path(item.file), row)
        for item, row in zip(items, rows, strict=True)
        if _is_movable(item) and row is not None and is_below(row, below)
    ]
    # A link is filed under its own name: what it leads to may lie anywhere.
    parents = {Path(item.file).parent.resolve() for item in items if _is_movable(item)}
    record = folder / MOVES_NAME
    if is_moves_file(record):
        parents |= {Path(moved.old).parent for moved in read_moves(record)}
    root = _common(sorted(parents))
    taken: set[Path] = set()
    moves = []
    for source, row in bad:
        place = source.parent.resolve().relative_to(root) / source.name
        target = _free(folder / place, taken)
        taken.add(target)
        quality = row.quality if row.quality is not None else math.nan
        moves.append(Move(source=source, target=target, quality=quality, score=row.score))
    return moves


def _is_movable(item: Item) -> bool:
    """A file; or a link that leads nowhere, since what it led to may have been moved before it."""
    return item.is_file or (item.offset < 0 and os.path.islink(item.file))


def is_below(row: Row, below: float) -> bool:
    """Whether a row is of an image whose quality is below a limit."""
    return row.quality is not None and row.quality < below


SHEET_MARK = b"<title>Contact sheet</title>"
"""Stands at the beginning of every page that `write_sheet` writes."""


def write_sheet(
    rows: Sequence[Row | None], items: Sequence[Item], output: Path, *, scale: str
) -> int:
    """A page of thumbnails from the worst to the best; returns how many it shows.

    More than a few hundred images are thinned out evenly over the order.
    """
    pairs = zip(rows, items, strict=True)
    scored = [(r, i) for r, i in pairs if r is not None and r.quality is not None]
    scored.sort(key=lambda pair: (pair[0].quality or 0.0, pair[0].path))
    kept = np.unique(np.linspace(0, max(len(scored) - 1, 0), _MOST_SHOWN).round().astype(int))
    shown_pairs = [scored[k] for k in kept.tolist() if k < len(scored)]
    plain = _is_quality(shown_pairs)
    shots = [_shot(row, item, plain=plain) for row, item in shown_pairs]
    thinned = "" if len(shown_pairs) == len(scored) else f", {len(shown_pairs)} of them shown"
    failed = len(rows) - len(scored)
    note = (
        f"{len(scored)} images from the worst to the best{thinned}. Scale: {scale}; the "
        "order is that of quality, 0 to 1, higher = better"
        f"{'' if plain else ', which stands in brackets'}."
        f"{f' {failed} images could not be scored; their rows say why.' if failed else ''}"
    )
    html = render_page(
        Header(kicker="lmcl score", heading="Contact sheet"),
        [
            Section(
                key="sheet",
                title="Worst to best",
                note=note,
                template="contact_sheet.html",
                view=shots,
            )
        ],
        title="Contact sheet",
        footer="Written by lmcl score. The same scores stand in the scores file.",
    )
    write_atomic(output, html.encode())
    return len(shown_pairs)


def _is_quality(pairs: Sequence[tuple[Row, Item]]) -> bool:
    """Whether scores are qualities, as they are for a set from 0 to 1: no need to show both."""
    return all(row.score == row.quality for row, _ in pairs)


def _thumbnail(item: Item) -> tuple[Markup, str]:
    """A JPEG in base64, or why there is none."""
    try:
        image = Image.fromarray(decode_image(item.read()))
    except Exception as error:  # it was there when it was scored; its score is worth showing
        return Markup(), printable(error)
    return embedded_jpeg(image, side=_SIDE, quality=80), ""


def _shot(row: Row, item: Item, *, plain: bool) -> SheetShot:
    score = row.score if row.score is not None else math.nan
    quality = row.quality if row.quality is not None else math.nan
    jpeg, refusal = _thumbnail(item)
    return SheetShot(
        path=row.path,
        name=PurePosixPath(row.path).name,
        score=format_figure(score, 2),
        quality="" if plain else format_figure(quality, 2),
        jpeg=jpeg,
        refusal=refusal,
    )


def _common(folders: Sequence[Path]) -> Path:
    """The deepest folder that holds all of them."""
    if not folders:
        return Path("/")
    shared = folders[0]
    while not all(f.is_relative_to(shared) for f in folders):
        shared = shared.parent
    return shared


def _free(target: Path, taken: set[Path]) -> Path:
    candidate, number = target, 1
    while candidate in taken or os.path.lexists(candidate):
        number += 1
        candidate = numbered(target, number)
    return candidate
