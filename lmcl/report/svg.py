"""The few SVG shapes the report is drawn with; colours come from the page's style sheet.

Only marks that carry a value have a colour of their own; it is chosen to be read on light and dark.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

# Four stops from low to high, of middling lightness so that they stand on paper and on black.
_STOPS = np.array(
    [[108, 98, 184], [52, 142, 164], [108, 168, 96], [222, 164, 58]], dtype=np.float64
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """A plotting area in a drawing of `width` x `height` units."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: float = 560.0
    height: float = 420.0
    left: float = 60.0
    right: float = 12.0
    top: float = 12.0
    bottom: float = 46.0

    def x(self, value: float) -> float:
        """Horizontal place of a value."""
        low, high = self.x_range
        inner = self.width - self.left - self.right
        return self.left + (value - low) / ((high - low) or 1.0) * inner

    def y(self, value: float) -> float:
        """Vertical place of a value; larger values stand higher."""
        low, high = self.y_range
        inner = self.height - self.top - self.bottom
        return self.height - self.bottom - (value - low) / ((high - low) or 1.0) * inner


def drawing(frame: Frame, body: Sequence[Markup], *, label: str, kind: str = "") -> Markup:
    """An SVG element of a frame with its parts, readable by screen readers as `label`."""
    return Markup(
        '<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}" class="chart {}">{}</svg>'
    ).format(frame.width, frame.height, label, kind, Markup().join(body))


def axes(frame: Frame, *, x_label: str, y_label: str, x_ticks: bool = True) -> list[Markup]:
    """Quiet grid lines with numbers, and what the axes mean."""
    parts = []
    bottom, right = frame.height - frame.bottom, frame.width - frame.right
    for value in ticks(*frame.y_range):
        y = frame.y(value)
        parts.append(line("grid", x1=frame.left, x2=right, y1=y, y2=y))
        parts.append(text(frame.left - 8, y + 4, number(value), "tick", anchor="end"))
    for value in ticks(*frame.x_range) if x_ticks else []:
        x = frame.x(value)
        parts.append(line("grid", x1=x, x2=x, y1=frame.top, y2=bottom))
        parts.append(text(x, bottom + 18, number(value), "tick", anchor="middle"))
    middle = (frame.left + right) / 2
    parts.append(text(middle, frame.height - 6, x_label, "axis", anchor="middle"))
    y_middle = (frame.top + bottom) / 2
    parts.append(
        Markup(
            '<text class="axis" text-anchor="middle" '
            'transform="translate(13 {:g}) rotate(-90)">{}</text>'
        ).format(y_middle, y_label)
    )
    return parts


def text(x: float, y: float, content: str, kind: str, *, anchor: str = "start") -> Markup:
    """A piece of text."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, content
    )


def line(kind: str, *, x1: float, x2: float, y1: float, y2: float) -> Markup:
    """A straight line."""
    return Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
        kind, x1, x2, y1, y2
    )


def rectangle(
    kind: str, *, x: float, y: float, width: float, height: float, title: str = ""
) -> Markup:
    """A rectangle; whoever points at it reads the title."""
    told = Markup("<title>{}</title>").format(title) if title else ""
    return Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>'
    ).format(kind, x, y, width, height, told)


def circle(kind: str, x: float, y: float, *, radius: float) -> Markup:
    """A mark whose colour the style sheet gives."""
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:g}"/>').format(
        kind, x, y, radius
    )


def polyline(
    frame: Frame, x: NDArray[np.float64], y: NDArray[np.float64], kind: str, *, title: str = ""
) -> Markup:
    """A line through points; it breaks where a value is not finite."""
    runs: list[list[str]] = [[]]
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(a) and math.isfinite(b):
            runs[-1].append(f"{frame.x(a):.1f},{frame.y(b):.1f}")
        elif runs[-1]:
            runs.append([])
    lines = Markup().join(
        Markup('<polyline class="{}" points="{}"/>').format(kind, " ".join(run))
        for run in runs
        if len(run) > 1
    )
    return Markup("<g><title>{}</title>{}</g>").format(title, lines) if title else lines


def dot(x: float, y: float, *, row: int, fill: str, radius: float = 3.2) -> Markup:
    """One image as a point; the page's script finds it by its row."""
    return Markup(
        '<circle class="p" data-i="{}" cx="{:.1f}" cy="{:.1f}" r="{:g}" fill="{}"/>'
    ).format(row, x, y, radius, fill)


def colour(share: float) -> str:
    """Colour of a value's place in its range, 0 = lowest; grey if it is not finite."""
    if not math.isfinite(share):
        return "#8a8a8a"
    place = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    mixed = _STOPS[low] + (place - low) * (_STOPS[low + 1] - _STOPS[low])
    return "#" + "".join(f"{round(c):02x}" for c in mixed)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside a range, about `count` of them."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return []
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1.0, 2.0, 2.5, 5.0, 10.0) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def padded(values: NDArray[np.float64], *, share: float = 0.04) -> tuple[float, float]:
    """Range of the finite values with some air; (0, 1) if there are none."""
    kept = values[np.isfinite(values)]
    if len(kept) == 0:
        return 0.0, 1.0
    low, high = float(kept.min()), float(kept.max())
    air = (high - low) * share or max(abs(low) * share, 0.5)
    return low - air, high + air


def number(value: float) -> str:
    """A tick's number: short, with a real minus sign."""
    shown = f"{value:.4g}" if abs(value) < 1e5 else f"{value:.1e}"
    return "0" if shown in ("0", "-0") else shown.replace("-", "\N{MINUS SIGN}")
