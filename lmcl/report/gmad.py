"""gMAD competition: the pairs of images on which two models contradict each other most.

Group maximum differentiation: among images the defender finds equally good, the attacker names the
best and the worst. If people see a difference the defender is wrong, if not the attacker is. No
labels are needed, and a handful of pairs tells more than thousands of images both agree on.

Source: Ma et al. [2020], Group Maximum Differentiation Competition; top pairs per level, greedily.
"""

import csv
import dataclasses
import io
import logging
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from lmcl.errors import LmclError
from lmcl.report.formatting import format_figure
from lmcl.report.page import Header, Section, render_page
from lmcl.report.pictures import embedded_jpeg
from lmcl.utils.files import write_atomic
from pipeline.decode import decode_rgb
from shards.datasets.rows import open_rows
from shards.datasets.values import NumberMarks
from shards.errors import ShardError
from shards.files import check_own
from shards.source_files import read_regular
from shards.text import plain_cell, printable, spreadsheet_cell

logger = logging.getLogger(__name__)

_SCORES = ("score", "prediction_unit", "prediction")
"""Columns that hold the scores, the first one found winning."""
_USED = ("path", *_SCORES, "scale", "higher_is_better")

_SIDE = 560
"""Pixels of the longer side in the page; two images fill it, and smaller ones stay as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """One model's scores of a pool of images; higher is better."""

    name: str
    path: tuple[str, ...]
    score: NDArray[np.float64]
    scale: str = ""
    """What the file says of its scale, e.g. `koniq10k mos 0..100`."""
    turned: bool = False
    """Whether the file's own scores are lower = better, so that `score` is minus them."""

    def as_filed(self, row: int) -> float:
        """The score as it stands in the file."""
        return float(-self.score[row] if self.turned else self.score[row])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duel:
    """Two images: equal for the defender, far apart for the attacker."""

    attacker: str
    defender: str
    level: int
    """Level of the defender's scores, 1 = worst."""
    better: int
    """Row of the image the attacker prefers."""
    worse: int
    gap: float
    """Attacker's difference, in standard deviations of its scores."""
    slack: float
    """Defender's absolute difference, in standard deviations of its scores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuelImage:
    """One image of a pair, as the page shows it."""

    path: str
    attacker_score: str
    defender_score: str
    jpeg: Markup
    """In base64."""
    refusal: str
    """Why there is none; else empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuelView:
    """A pair; both differences in standard deviations."""

    gap: str
    slack: str
    images: list[DuelImage]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideView:
    """All pairs by which one model attacks the other, by level."""

    attacker: str
    defender: str
    levels: list[tuple[str, list[DuelView]]]


def compare_models(
    first: Path,
    second: Path,
    *,
    images: Path,
    levels: int,
    top: int,
    tolerance: float,
    output: Path,
) -> Path:
    """Find and write the pairs of two scores files (`find_duels`); the page that was written.

    Args:
        first: Scores or predictions file of one model; `second` that of the other.
        second: See `first`.
        images: Folder the paths in the files are relative to.
        levels: Bins of the defender's scores, equally many images in each.
        top: Pairs per level.
        tolerance: Most the defender may tell a pair apart, in standard deviations.
        output: Folder of gmad.html and gmad.csv, or the page itself, `NAME.html`; NAME.csv stands
            beside it then.

    Raises:
        LmclError: If a file cannot be used (3 or 4), or no pair is found (3).
    """
    a, b = read_scores(first), read_scores(second)
    if a.name == b.name:
        a, b = (dataclasses.replace(s, name=f.as_posix()) for s, f in ((a, first), (b, second)))
    a, b = common_pool(a, b)
    duels = [
        duel
        for attacker, defender in ((a, b), (b, a))
        for duel in find_duels(attacker, defender, levels=levels, top=top, tolerance=tolerance)
    ]
    if not duels:
        raise LmclError(
            f"{a.name} and {b.name}: among {len(a.path)} images in {levels} levels there is no "
            f"pair that one model holds for equal (within {tolerance:g} standard deviations) and "
            "the other does not; raise --tolerance, lower --levels, or score more images",
            exit_code=3,
        )
    shown = {a.path[row] for duel in duels for row in (duel.better, duel.worse)}
    _warn_without_images(sorted(shown), images)
    return write_duels(duels, a, b, levels=levels, images=images, output=output)


def find_duels(
    attacker: Scores, defender: Scores, *, levels: int = 5, top: int = 3, tolerance: float = 0.1
) -> list[Duel]:
    """The `top` pairs of every level of the defender's scores, no image used twice.

    Args:
        attacker: Names best and worst.
        defender: Holds the images for equal.
        levels: Bins with equally many images.
        top: Pairs per level.
        tolerance: Most the defender may tell two images apart, in standard deviations.

    Raises:
        LmclError: If a model gives every image the same score; exit code 3.
    """
    a, d = _standard(attacker), _standard(defender)
    order = np.argsort(d, kind="stable")
    found = []
    for level, rows in enumerate(np.array_split(order, levels), start=1):
        free = rows.astype(np.int64)
        for _ in range(top):
            pair = _widest(a[free], d[free], tolerance)
            if pair is None:
                break
            better, worse = int(free[pair[0]]), int(free[pair[1]])
            found.append(
                Duel(
                    attacker=attacker.name,
                    defender=defender.name,
                    level=level,
                    better=better,
                    worse=worse,
                    gap=float(a[better] - a[worse]),
                    slack=float(abs(d[better] - d[worse])),
                )
            )
            free = free[(free != better) & (free != worse)]
    return found


def read_scores(file: Path) -> Scores:
    """Read a scores file (`path, score, higher_is_better`) or a predictions file.

    Whatever `open_rows` reads: a file may have been saved again by a spreadsheet.

    Raises:
        LmclError: If it is missing (4) or cannot be read or has no usable columns (3).
    """
    if not file.is_file():
        raise LmclError(f"{file}: no such file; `lmcl score` writes scores of images", exit_code=4)
    try:
        rows, names, marks = _read_table(file)
    except (ValueError, OSError, ShardError) as error:
        kind = {".jsonl": "JSON lines", ".parquet": "Parquet"}.get(file.suffix, "CSV")
        raise LmclError(
            f"{printable(file)}: cannot be read as {kind} ({printable(error)}); name a "
            "file that `lmcl score` or `lmcl eval` wrote, with the ending it was written with",
            exit_code=3,
        ) from error
    if not names:
        raise LmclError(
            f"{printable(file)}: is empty; score the images anew by `lmcl score`", exit_code=3
        )
    column = next((c for c in _SCORES if c in names), None)
    if column is None or "path" not in names:
        raise LmclError(
            f"{file}: needs the columns path and score (or prediction), has "
            f"{printable(', '.join(map(str, names)))}",
            exit_code=3,
        )
    kept = [row for row in rows if row.get(column) not in (None, "")]
    turned = _is_turned(file, kept)
    try:
        score = np.array([float(marks.plain(row[column])) for row in kept], dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise LmclError(
            f"{file}: column {column}: {error}; an image without a score is an empty field",
            exit_code=3,
        ) from error
    paths = tuple(str(row["path"]) for row in kept)
    _check_scores(file, paths, score)
    # The first row of each image.
    once = sorted({path: row for row, path in reversed(list(enumerate(paths)))}.values())
    paths, score = tuple(paths[row] for row in once), score[once]
    scale = str(kept[0].get("scale") or "")
    if scale:
        scale += f", {'lower' if turned else 'higher'} is better"
    return Scores(
        name=file.stem,
        path=paths,
        score=-score if turned else score,
        scale=scale,
        turned=turned,
    )


def _is_turned(file: Path, rows: list[Mapping[str, Any]]) -> bool:
    """Whether lower scores are better; of a file that says both nothing can be ranked."""
    said = {str(row.get("higher_is_better", "")).lower() == "false" for row in rows}
    if len(said) > 1:
        raise LmclError(
            f"{printable(file)}: higher_is_better is false in some rows and not in others; name "
            "the scores of one model on one scale",
            exit_code=3,
        )
    return True in said


def _check_scores(file: Path, paths: tuple[str, ...], score: NDArray[np.float64]) -> None:
    """Refuse what has no score, scores that are no numbers, and two scores of one image."""
    if not paths:
        raise LmclError(
            f"{printable(file)}: no image in it has a score; its column error says why, where "
            "`lmcl score` wrote it",
            exit_code=3,
        )
    wrong = np.flatnonzero(~np.isfinite(score))
    if len(wrong):
        raise LmclError(
            f"{printable(file)}: {printable(paths[wrong[0]], 200)} has the score "
            f"{score[wrong[0]]:g} ({len(wrong)} of {len(paths)} images have none that is finite); "
            "an image without a score is an empty field",
            exit_code=3,
        )
    first: dict[str, float] = {}
    for path, value in zip(paths, score.tolist(), strict=True):
        if first.setdefault(path, value) != value:
            raise LmclError(
                f"{printable(file)}: {printable(path, 200)} has two scores, {first[path]:g} and "
                f"{value:g}; leave one row of each image",
                exit_code=3,
            )


def _warn_without_images(paths: list[str], images: Path) -> None:
    """Say that a page will have no picture: the folder is not the one the paths lie in."""
    if not any((images / path).is_file() for path in paths):
        logger.warning(
            "%s: none of the %d images of the pairs is there, not even %s, so the page shows no "
            "picture; name the folder the paths lie in by --images",
            printable(images),
            len(paths),
            printable(images / paths[0], 300),
        )


def _read_table(file: Path) -> tuple[list[Mapping[str, Any]], list[str], NumberMarks]:
    """Rows by column name, the names of all columns, and how numbers are written."""
    table = open_rows(file, wanted=frozenset({"path"}))
    marks = table.number_marks([column for column in _SCORES if column in table.names])
    rows: list[Mapping[str, Any]] = [
        {name: row.get(name) for name in _USED} for _, row in table.rows()
    ]
    if table.encoding:
        rows = [{**row, "path": plain_cell(str(row["path"] or ""))} for row in rows]
    return rows, list(table.names), marks


def common_pool(a: Scores, b: Scores) -> tuple[Scores, Scores]:
    """Both models on the images both have scored, in the order of the first.

    Raises:
        LmclError: If fewer than two images are common, or all their scores are; exit code 3.
    """
    place = {path: i for i, path in enumerate(b.path)}
    rows = [i for i, path in enumerate(a.path) if path in place]
    if len(rows) < 2:
        raise LmclError(
            f"{a.name} and {b.name}: {len(rows)} images stand in both files; score the same "
            "folder with both models, from the same working directory",
            exit_code=3,
        )
    paths = tuple(a.path[i] for i in rows)
    left, right = a.score[rows], b.score[[place[p] for p in paths]]
    if np.array_equal(left, right):
        raise LmclError(
            f"{a.name} and {b.name}: both give each of the {len(rows)} images the same score, so "
            "they contradict each other nowhere; name the scores of two different models",
            exit_code=3,
        )
    return (
        dataclasses.replace(a, path=paths, score=left),
        dataclasses.replace(b, path=paths, score=right),
    )


def _standard(scores: Scores) -> NDArray[np.float64]:
    spread = float(np.std(scores.score))
    if not math.isfinite(spread) or spread == 0.0:
        raise LmclError(
            f"{scores.name}: all {len(scores.score)} scores are equal or not finite; "
            "there is nothing to compare",
            exit_code=3,
        )
    return np.asarray((scores.score - np.mean(scores.score)) / spread, dtype=np.float64)


def _widest(
    a: NDArray[np.float64], d: NDArray[np.float64], tolerance: float
) -> tuple[int, int] | None:
    """Positions of the best and worst `a` whose ascending `d` differ by no more than `tolerance`.

    One pass with the greatest and the least of a sliding window: a pool may hold millions.
    """
    best: tuple[int, int] | None = None
    widest = 0.0
    high: deque[int] = deque()
    low: deque[int] = deque()
    start = 0
    for i in range(len(a)):
        while high and a[high[-1]] <= a[i]:
            high.pop()
        while low and a[low[-1]] >= a[i]:
            low.pop()
        high.append(i)
        low.append(i)
        while d[i] - d[start] > tolerance:
            start += 1
        while high[0] < start:
            high.popleft()
        while low[0] < start:
            low.popleft()
        if a[high[0]] - a[low[0]] > widest:
            widest, best = float(a[high[0]] - a[low[0]]), (high[0], low[0])
    return best


def write_duels(
    duels: list[Duel], a: Scores, b: Scores, *, levels: int, images: Path, output: Path
) -> Path:
    """Write the page and its CSV; an image that cannot be opened is named in its place."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["attacker", "defender", "level", "better", "worse", "attacker_gap_sd", "defender_gap_sd"]
    )
    for duel in duels:
        names = (a.path[duel.better], a.path[duel.worse])
        gaps = (f"{duel.gap:.6f}", f"{duel.slack:.6f}")
        cells = [spreadsheet_cell(text) for text in (duel.attacker, duel.defender, *names)]
        writer.writerow([*cells[:2], duel.level, *cells[2:], *gaps])
    page = output if output.suffix.lower() in (".html", ".htm") else output / "gmad.html"
    check_own(page, b"Group maximum differentiation")
    check_own(page.with_suffix(".csv"), b"attacker,defender,level,")
    write_atomic(page.with_suffix(".csv"), out.getvalue().encode())
    html = render_page(
        Header(
            kicker="Group maximum differentiation",
            heading=f"{a.name} against {b.name}",
            lede="In every pair one model sees two images of equal quality and the other a great "
            f"difference. Look, and judge the models. Pool: {len(a.path)} images.",
            note=_scales(a, b),
        ),
        [_side(x, y, duels, levels, images) for x, y in ((a, b), (b, a))],
        title=f"{a.name} against {b.name}",
        footer=f"Written by lmcl gmad. The same pairs stand in {page.stem}.csv.",
    )
    write_atomic(page, html.encode())
    return page


def _scales(a: Scores, b: Scores) -> str:
    """What a reader of the numbers must know."""
    known = [f"{s.name} answers in {s.scale}" for s in (a, b) if s.scale]
    small = f"Images of more than {_SIDE} pixels a side are shown smaller: open the files to judge "
    return f"{'; '.join(known)}. {small}noise." if known else f"{small}noise."


def _side(
    attacker: Scores, defender: Scores, duels: list[Duel], levels: int, images: Path
) -> Section:
    blocks = []
    for level in range(1, levels + 1):
        mine = [d for d in duels if d.attacker == attacker.name and d.level == level]
        if mine:
            title = f"Level {level} of {levels}{_place(level, levels)}"
            blocks.append((title, [_duel_view(d, attacker, defender, images) for d in mine]))
    strong, weak = attacker.name, defender.name
    return Section(
        key=f"{strong}-attacks".replace(" ", "-"),
        title=f"{strong} attacks {weak}",
        note=f"{weak} calls the images of a pair equal, {strong} prefers the left one. If you see "
        f"the difference, {strong} wins the pair. Levels are equally large parts of the pool by "
        f"the scores of {weak}.",
        template="gmad.html",
        view=SideView(attacker=strong, defender=weak, levels=blocks),
    )


def _place(level: int, levels: int) -> str:
    if levels == 1:
        return ""
    return {1: ", the worst", levels: ", the best"}.get(level, "")


def _duel_view(duel: Duel, attacker: Scores, defender: Scores, images: Path) -> DuelView:
    shown = []
    for row in (duel.better, duel.worse):
        jpeg, refusal = _picture(images / attacker.path[row])
        shown.append(
            DuelImage(
                path=attacker.path[row],
                attacker_score=format_figure(attacker.as_filed(row)),
                defender_score=format_figure(defender.as_filed(row)),
                jpeg=jpeg,
                refusal=refusal,
            )
        )
    return DuelView(
        gap=format_figure(duel.gap, 2), slack=format_figure(duel.slack, 2), images=shown
    )


def _picture(file: Path) -> tuple[Markup, str]:
    """A JPEG in base64, or why there is none."""
    try:
        image = Image.fromarray(decode_rgb(read_regular(file)))
    except Exception as error:  # whatever a decoder says, the pair is still worth listing
        return Markup(), printable(error)
    return embedded_jpeg(image, side=_SIDE, quality=88), ""
