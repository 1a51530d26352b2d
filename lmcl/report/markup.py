"""Small pieces of HTML that several parts of the page are made of."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

from lmcl.evaluation.metrics import Evaluation

_NAMES = {
    "srcc": "SRCC",
    "krcc": "KRCC",
    "plcc_raw": "PLCC, raw",
    "plcc_fit4": "PLCC, fitted",
    "plcc_fit5": "PLCC, 5-parameter fit",
    "rmse_raw": "RMSE, raw",
    "rmse_fit4": "RMSE, fitted",
    "mae_raw": "MAE, raw",
    "mae_fit4": "MAE, fitted",
    "outlier_ratio": "Outlier ratio",
}
UNKNOWN = "\N{EN DASH}"


def figure_name(name: str) -> str:
    """How a figure is called for readers."""
    return _NAMES[name]


def shown(value: float, digits: int = 3) -> str:
    """A figure with a real minus sign; a dash if it is NaN."""
    if not math.isfinite(value):
        return UNKNOWN
    text = f"{value:.{digits}f}"
    return (text[1:] if float(text) == 0.0 and text[0] == "-" else text).replace(
        "-", "\N{MINUS SIGN}"
    )


def span(evaluation: Evaluation, name: str, digits: int = 3) -> str:
    """The interval of a figure as `low to high`; empty if there is none."""
    interval = evaluation.intervals.get(name)
    return f"{shown(interval.low, digits)} to {shown(interval.high, digits)}" if interval else ""


def section(key: str, title: str, note: str, body: str) -> str:
    """A section with its heading and a sentence about what is seen; `note` and `body` are HTML."""
    text = f'<p class="note">{note}</p>' if note else ""
    return f'<section id="{key}"><h2>{escape(title)}</h2>{text}{body}</section>'


def table(head: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """A table that scrolls sideways by itself on narrow screens; cells are HTML."""
    titles = "".join(
        f'<th class="text">{h[1:]}</th>' if h.startswith("<") else f"<th>{h}</th>" for h in head
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(cells: Sequence[str], kind: str = "") -> str:
    """A table row of HTML cells."""
    mark = f' class="{kind}"' if kind else ""
    return f"<tr{mark}>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"


def filter_button(label: str, conditions: Sequence[tuple[str, str]]) -> str:
    """A button that leaves only the images that meet all conditions, e.g. ("subset", "night")."""
    # The script compares the attribute with its own JSON.stringify: no spaces, no escapes.
    value = json.dumps([list(c) for c in conditions], separators=(",", ":"), ensure_ascii=False)
    return (
        f'<button type="button" aria-pressed="false" data-filter="{escape(value)}">'
        f"{escape(label)}</button>"
    )


def facts(values: Mapping[str, str]) -> str:
    """A list of names and values; empty values are left out."""
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in values.items()
        if value
    )
    return f'<dl class="list">{items}</dl>'


def figure(drawing: str, caption: str) -> str:
    """A drawing with its caption; both are HTML."""
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"
