"""A collection's scores at a glance: deciles from the worst to the best, with sample images."""

from collections.abc import Iterable, Iterator

import numpy as np

from lmcl.inference.scores_file import Row
from shards.text import printable

_DECILES = 10
_SAMPLES = 3
_LONGEST_PATH = 200


def describe(rows: Iterable[Row | None]) -> Iterator[str]:
    """Lines about the scored rows: each tenth's range of scores and three images of it.

    Fewer than ten images make as many lines as there are images; rows without a score are counted.
    """
    every = [row for row in rows if row is not None]
    scored = [row for row in every if row.quality is not None]
    scored.sort(key=lambda row: (row.quality or 0.0, row.path))
    if not scored:
        yield "no image has a score"
        return
    parts = [part for part in np.array_split(np.arange(len(scored)), _DECILES) if len(part)]
    noun = "score" if len(scored) == 1 else "scores"
    shares = f" in {len(parts)} parts" if len(parts) < len(scored) else ""
    yield f"{len(scored)} {noun}{shares}, worst first"
    for number, part in enumerate(parts, start=1):
        yield _line(number, [scored[i] for i in part.tolist()])
    if len(scored) < len(every):
        yield f"{len(every) - len(scored)} images have no score"


def _line(number: int, part: list[Row]) -> str:
    places = np.unique(np.linspace(0, len(part) - 1, _SAMPLES + 2)[1:-1].round().astype(int))
    names = ", ".join(printable(part[i].path, _LONGEST_PATH) for i in places.tolist())
    first, last = part[0], part[-1]
    if len(part) == 1:
        return f"{number:>2}  quality {first.quality:.3f}  score {first.score:.4g}  {names}"
    return (
        f"{number:>2}  quality {first.quality:.3f} to {last.quality:.3f}  score "
        f"{first.score:.4g} to {last.score:.4g}  {len(part)} images, e.g. {names}"
    )
