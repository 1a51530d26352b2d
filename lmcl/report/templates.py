"""The jinja2 environments of the page and of report.md: what a template prints is escaped.

A newcomer's trap: a `Markup` passes as it is. Only `svg.py`, `pictures.py` and `page.py` make one,
of numbers, of base64 and of the package's own files.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from lmcl.evaluation.metrics import Evaluation
from lmcl.report.figures import interval_axis, interval_bar
from lmcl.report.formatting import (
    UNKNOWN,
    figure_name,
    format_figure,
    format_interval,
    format_p,
    reason_of_no_interval,
)
from shards.text import markdown, printable

_MOST_CHARACTERS = 2000
"""Of one piece of foreign text."""


@cache
def html_environment() -> jinja2.Environment:
    """For HTML: everything is escaped, and foreign text is one line of visible characters."""
    return _environment(lambda text: printable(text, _MOST_CHARACTERS))


@cache
def markdown_environment() -> jinja2.Environment:
    """For Markdown: foreign text holds no HTML, no links, no emphasis and no bars of a table."""
    environment = _environment(lambda text: Markup(markdown(text, _MOST_CHARACTERS)))
    # Figures are ours: their points and minus signs stay as they are.
    environment.filters |= {
        "figure": _own(format_figure),
        "figure_name": _own(figure_name),
        "interval": _own(format_interval),
    }
    return environment


def _environment(show: Callable[[str], str]) -> jinja2.Environment:
    def finalize(value: Any) -> Any:
        is_foreign = isinstance(value, str) and not isinstance(value, Markup)
        return show(value) if is_foreign else value

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lmcl.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "figure": format_figure,
        "figure_name": figure_name,
        "interval": format_interval,
        "p_value": format_p,
    }
    environment.globals |= {
        "UNKNOWN": UNKNOWN,
        "interval_axis": interval_axis,
        "interval_bar": interval_bar,
        "reason_of_no_interval": reason_of_no_interval,
    }
    return environment


def _own(function: Callable[..., str]) -> Callable[..., Markup]:
    def marked(value: float | str | Evaluation, *arguments: Any) -> Markup:
        return Markup("{}").format(function(value, *arguments))

    return marked
