"""The contact sheet of a scoring: thumbnails from the worst to the best."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from markupsafe import Markup
from PIL import Image

from lmcl.inference.inputs import Item
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
