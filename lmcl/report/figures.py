"""The report's figures, each from the analysis it shows to one SVG drawing."""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from lmcl.evaluation.metrics import Interval
from lmcl.evaluation.threshold import Curve
from lmcl.report.analysis import Analysis
from lmcl.report.run import Curves
from lmcl.report.svg import (
    Frame,
    axes,
    circle,
    colour,
    dot,
    drawing,
    line,
    number,
    padded,
    polyline,
    rectangle,
    text,
    ticks,
)
from shards import ScoreScale

MOST_POINTS = 4000
"""More points than this slow the page down; a seeded sample is drawn and the caption says so."""


def drawn_rows(a: Analysis) -> NDArray[np.int64]:
    """Rows that get a point: all labelled ones, or a seeded sample of them."""
    rows = np.flatnonzero(a.labelled & np.isfinite(a.run.headline.prediction)).astype(np.int64)
    if len(rows) <= MOST_POINTS:
        return rows
    chosen = np.random.default_rng(0).choice(rows, MOST_POINTS, replace=False)
    return np.sort(chosen).astype(np.int64)


def score_shares(mos: NDArray[np.float64], scale: ScoreScale) -> NDArray[np.float64]:
    """Place of each score in the range of the scores, 0 = worst, 1 = best."""
    kept = mos[np.isfinite(mos)]
    if len(kept) == 0 or float(np.ptp(kept)) == 0.0:
        return np.full(len(mos), 0.5)
    share = (mos - kept.min()) / np.ptp(kept)
    return np.asarray(share if scale.higher_is_better else 1.0 - share, dtype=np.float64)


def scatter(a: Analysis, *, live: bool = True) -> Markup:
    """Scores against predictions, the identity, and the fitted curve; `live` points answer."""
    p, name = a.run.headline, a.run.scale.name
    frame = Frame(x_range=padded(p.prediction), y_range=padded(p.mos), height=460.0)
    share = score_shares(p.mos, a.run.scale)
    body = axes(frame, x_label=f"prediction, {name}", y_label=f"score, {name}")
    body += [
        dot(frame.x(p.prediction[i]), frame.y(p.mos[i]), row=int(i), fill=colour(share[i]))
        for i in drawn_rows(a)
    ]
    low, high = frame.x_range
    grid = np.linspace(low, high, 200)
    body.append(_clipped(frame, grid, grid, "identity", "prediction = score"))
    body.append(_clipped(frame, grid, a.evaluation.fit4(grid), "fit", "fitted 4-parameter curve"))
    kind = "points" if live else ""
    return drawing(frame, body, label="Scatter of scores against predictions", kind=kind)


def residuals(a: Analysis) -> Markup:
    """Prediction minus score against the score, beside how often each error occurs."""
    p = a.run.headline
    frame = Frame(x_range=padded(p.mos), y_range=padded(a.residual), height=300.0, right=92.0)
    share = score_shares(p.mos, a.run.scale)
    body = axes(
        frame, x_label=f"score, {a.run.scale.name}", y_label="prediction \N{MINUS SIGN} score"
    )
    body += [
        dot(frame.x(p.mos[i]), frame.y(a.residual[i]), row=int(i), fill=colour(share[i]))
        for i in drawn_rows(a)
    ]
    body.append(_clipped(frame, np.array(frame.x_range), np.zeros(2), "zero", "no error"))
    body += _histogram(frame, a.residual[np.isfinite(a.residual)])
    return drawing(frame, body, label="Errors against scores", kind="points")


def embedding_map(a: Analysis) -> Markup:
    """The embeddings in a plane, coloured by score."""
    frame = Frame(
        x_range=padded(a.map_xy[:, 0]), y_range=padded(a.map_xy[:, 1]), height=420.0, left=76.0
    )
    share = score_shares(a.run.headline.mos, a.run.scale)
    body = axes(frame, x_label=a.map_axes[0], y_label=a.map_axes[1])
    shown = np.union1d(drawn_rows(a), np.flatnonzero(~a.labelled)[:MOST_POINTS])
    body += [
        dot(frame.x(a.map_xy[i, 0]), frame.y(a.map_xy[i, 1]), row=int(i), fill=colour(share[i]))
        for i in shown
    ]
    return drawing(frame, body, label="Map of the embeddings", kind="points")


def curve(
    x: NDArray[np.float64],
    series: Sequence[tuple[str, NDArray[np.float64]]],
    *,
    x_label: str,
    is_noisy: bool = False,
) -> Markup:
    """One small training chart; the first series is the strong one.

    Args:
        x: Epochs, fractional.
        series: Names and values, one per entry of x.
        x_label: Of the horizontal axis.
        is_noisy: Values of single steps: drawn faintly, with their means over each epoch.
    """
    every = np.concatenate([values for _, values in series])
    known = x[np.isfinite(x)] if np.any(np.isfinite(x)) else np.zeros(1)
    first = float(known.min())
    frame = Frame(
        x_range=(first, max(float(known.max()), first + 1.0)),
        y_range=padded(every, share=0.08),
        width=380.0,
        height=230.0,
    )
    body = axes(frame, x_label=x_label, y_label="")
    for place, (title, values) in enumerate(series):
        means = _epoch_means(x, values) if is_noisy else None
        faint = " faint" if means else ""
        body.append(polyline(frame, x, values, f"curve{faint} c{place}", title=title))
        if means:
            body.append(polyline(frame, *means, f"curve c{place}", title=f"{title}, mean"))
        if len(values) == 1:
            body.append(circle(f"mark c{place}", frame.x(x[0]), frame.y(values[0]), radius=4.0))
    names = ", ".join(title for title, _ in series)
    return drawing(frame, body, label=f"{names} during training")


def _epoch_means(
    x: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Middles of the epochs and the means of their steps; None for too few to be noise."""
    known = np.isfinite(x) & np.isfinite(values)
    epoch = np.ceil(x[known]).astype(np.int64)
    names, place, count = np.unique(epoch, return_inverse=True, return_counts=True)
    if len(names) < 3 or len(epoch) < 2 * len(names):
        return None
    means = np.bincount(place, weights=values[known]) / count
    middles = names.astype(np.float64) - 0.5
    return middles, np.asarray(means, dtype=np.float64)


def threshold_chart(curve: Curve, cuts: Sequence[tuple[str, float]]) -> Markup:
    """Precision, recall and share of the rejected over the cut, and the chosen cuts as lines."""
    edges = np.array([*curve.cut, *(cut for _, cut in cuts)])
    frame = Frame(x_range=padded(edges), y_range=(0.0, 1.0), height=320.0)
    body = axes(frame, x_label="cut, quality as the model says it", y_label="share")
    top, bottom = frame.top, frame.height - frame.bottom
    middle = (frame.left + frame.width - frame.right) / 2
    names = []
    for place, (name, cut) in enumerate(cuts):
        x = frame.x(cut)
        body.append(line("zero", x1=x, x2=x, y1=top, y2=bottom))
        # On the side that has room, a line each: rules lie close together.
        at, anchor = (x + 5, "start") if x < middle else (x - 5, "end")
        names.append(text(at, top + 11 + 15 * place, name, "tick over", anchor=anchor))
    series = (
        ("precision", curve.precision),
        ("recall", curve.recall),
        ("share rejected", curve.rejected / max(curve.n, 1)),
    )
    body += [
        polyline(frame, curve.cut, values, f"curve c{place}", title=title)
        for place, (title, values) in enumerate(series)
    ]
    body += names  # after the curves, which would strike them through
    return drawing(frame, body, label="Precision, recall and share rejected over the cut")


def global_steps(curves: Curves) -> NDArray[np.float64]:
    """Epochs, fractional, at which the logged steps ended."""
    epoch, step = curves.steps["epoch"], curves.steps["step"]
    per_epoch = max(1.0, float(np.nanmax(step)) + 1.0)
    return np.asarray(epoch + (step + 1.0) / per_epoch, dtype=np.float64)


def boxes(groups: Sequence[tuple[str, NDArray[np.float64]]], *, y_label: str) -> Markup:
    """Median, quartiles, range and every value, one box per group."""
    every = np.concatenate([values for _, values in groups])
    frame = Frame(
        x_range=(-0.5, len(groups) - 0.5), y_range=padded(every, share=0.15), height=300.0
    )
    body = axes(frame, x_label="", y_label=y_label, x_ticks=False)
    half = min(36.0, (frame.x(0.3) - frame.x(0.0)))
    for i, (name, values) in enumerate(groups):
        low, q1, median, q3, high = np.percentile(values, [0, 25, 50, 75, 100])
        x, top, bottom = frame.x(float(i)), frame.y(float(q3)), frame.y(float(q1))
        body += [
            line("whisker", x1=x, x2=x, y1=frame.y(low), y2=frame.y(high)),
            rectangle("box", x=x - half, y=top, width=2 * half, height=max(bottom - top, 1.0)),
            line("median", x1=x - half, x2=x + half, y1=frame.y(median), y2=frame.y(median)),
        ]
        body += [circle("mark c0", x, frame.y(v), radius=3.0) for v in values.tolist()]
        body.append(text(x, frame.height - 24, name[:24], "tick", anchor="middle"))
    return drawing(frame, body, label=f"{y_label} per split")


def interval_axis(axis: tuple[float, float]) -> Markup:
    """The axis of a column of interval bars, to stand in the table's head."""
    frame = _bar_frame(axis, height=22.0)
    parts = [line("grid", x1=frame.x(axis[0]), x2=frame.x(axis[1]), y1=20.0, y2=20.0)]
    for value in _bar_ticks(axis):
        x = frame.x(value)
        parts.append(line("grid", x1=x, x2=x, y1=16.0, y2=20.0))
        parts.append(text(x, 12.0, number(value), "tick", anchor="middle"))
    label = f"axis from {number(axis[0])} to {number(axis[1])}"
    return drawing(frame, parts, label=label, kind="inline axis")


def _bar_ticks(axis: tuple[float, float]) -> list[float]:
    """Few round numbers, but two at least: one alone says nothing of the scale."""
    tried = [ticks(*axis, count=count) for count in (2, 3, 4, 5)]
    return next((found for found in tried if len(found) > 1), tried[-1])


def _bar_frame(axis: tuple[float, float], *, height: float) -> Frame:
    return Frame(
        x_range=axis,
        y_range=(0.0, 1.0),
        width=160.0,
        height=height,
        left=12.0,
        right=12.0,
        top=0.0,
        bottom=0.0,
    )


def interval_bar(value: float, interval: Interval | None, axis: tuple[float, float]) -> Markup:
    """A dot with its interval on a shared axis, to stand in a table cell."""
    if not math.isfinite(value):
        return Markup()
    frame = _bar_frame(axis, height=16.0)
    parts = [line("grid", x1=frame.x(axis[0]), x2=frame.x(axis[1]), y1=8.0, y2=8.0)]
    for tick in _bar_ticks(axis):
        parts.append(line("grid", x1=frame.x(tick), x2=frame.x(tick), y1=4.0, y2=12.0))
    if interval is not None and math.isfinite(interval.low + interval.high):
        low, high = max(interval.low, axis[0]), min(interval.high, axis[1])
        parts.append(line("interval", x1=frame.x(low), x2=frame.x(high), y1=8.0, y2=8.0))
    parts.append(circle("mark c0", frame.x(value), 8.0, radius=4.0))
    return drawing(frame, parts, label=f"{value:.3f}", kind="inline")


def _clipped(
    frame: Frame, x: NDArray[np.float64], y: NDArray[np.float64], kind: str, title: str
) -> Markup:
    low, high = frame.y_range
    inside = np.where((y >= low) & (y <= high), y, math.nan)
    return polyline(frame, x, inside, kind, title=title)


def _histogram(frame: Frame, values: NDArray[np.float64]) -> list[Markup]:
    if len(values) == 0:
        return []
    count, edges = np.histogram(values, bins=30, range=frame.y_range)
    start, room = frame.width - frame.right + 8.0, frame.right - 16.0
    return [
        rectangle(
            "bar",
            x=start,
            y=frame.y(edges[i + 1]),
            width=room * c / max(1, count.max()),
            height=frame.y(edges[i]) - frame.y(edges[i + 1]) - 1,
            title=f"{c} images",
        )
        for i, c in enumerate(count.tolist())
        if c
    ]
