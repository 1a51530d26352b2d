"""Filter images by their scores: move what is below a quality."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from lmcl.inference.inputs import MOVES_NAME, Item, is_moves_file
from lmcl.inference.moves import Move, numbered, read_moves
from lmcl.inference.scores_file import Row

SHEET_MARK = b"<title>Contact sheet</title>"
"""Stands at the beginning of every page of `lmcl.inference.sheet`."""


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
