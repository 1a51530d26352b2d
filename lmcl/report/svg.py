"""The few SVG shapes the report is drawn with; colours come from the page's style sheet.

Only marks that carry a value have a colour of their own; it is chosen to be read on light and dark.
"""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

import numpy as np
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
        return self.left + (value - low) / (high - low) * inner

    def y(self, value: float) -> float:
        """Vertical place of a value; larger values stand higher."""
        low, high = self.y_range
        inner = self.height - self.top - self.bottom
        return self.height - self.bottom - (value - low) / (high - low) * inner


def drawing(frame: Frame, body: Sequence[str], *, label: str, kind: str = "") -> str:
    """An SVG element of a frame with its parts, readable by screen readers as `label`."""
    box = f"0 0 {frame.width:g} {frame.height:g}"
    return (
        f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}" class="chart {kind}">'
        + "".join(body)
        + "</svg>"
    )


def axes(frame: Frame, *, x_label: str, y_label: str, x_ticks: bool = True) -> list[str]:
    """Quiet grid lines with numbers, and what the axes mean."""
    parts = []
    bottom, right = frame.height - frame.bottom, frame.width - frame.right
    for value in ticks(*frame.y_range):
        y = frame.y(value)
        parts.append(
            f'<line class="grid" x1="{frame.left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(text(frame.left - 8, y + 4, number(value), "tick", anchor="end"))
    for value in ticks(*frame.x_range) if x_ticks else []:
        x = frame.x(value)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top:g}" y2="{bottom:g}"/>'
        )
        parts.append(text(x, bottom + 18, number(value), "tick", anchor="middle"))
    middle = (frame.left + right) / 2
    parts.append(text(middle, frame.height - 6, x_label, "axis", anchor="middle"))
    y_middle = (frame.top + bottom) / 2
    parts.append(
        '<text class="axis" text-anchor="middle" '
        f'transform="translate(13 {y_middle:g}) rotate(-90)">{escape(y_label)}</text>'
    )
    return parts


def text(x: float, y: float, content: str, kind: str, *, anchor: str = "start") -> str:
    """A piece of text."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(content)}</text>'


def polyline(
    frame: Frame, x: NDArray[np.float64], y: NDArray[np.float64], kind: str, *, title: str = ""
) -> str:
    """A line through points; it breaks where a value is not finite."""
    runs: list[list[str]] = [[]]
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(a) and math.isfinite(b):
            runs[-1].append(f"{frame.x(a):.1f},{frame.y(b):.1f}")
        elif runs[-1]:
            runs.append([])
    lines = "".join(
        f'<polyline class="{kind}" points="{" ".join(run)}"/>' for run in runs if len(run) > 1
    )
    return f"<g><title>{escape(title)}</title>{lines}</g>" if title else lines


def dot(x: float, y: float, *, row: int, fill: str, radius: float = 3.2) -> str:
    """One image as a point; the page's script finds it by its row."""
    return (
        f'<circle class="p" data-i="{row}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}"/>'
    )


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
