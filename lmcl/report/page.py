"""One self-contained HTML page: style, script, data and pictures inside, nothing outside."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources

import jinja2
from markupsafe import Markup

from lmcl.report.templates import html_environment

NO_DATA = '{"rows":[],"thumbs":{}}'
"""What the script of a page without points knows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeroFigure:
    """One of the large figures at the top."""

    name: str
    value: str
    detail: str
    """An interval, a unit, or why there is no value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The top of a page."""

    kicker: str
    """The line above the heading: what the page is about."""
    heading: str
    lede: str = ""
    """The result in a sentence."""
    note: str = ""
    warning: str = ""
    figures: tuple[HeroFigure, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page with a heading; a template below `templates/` shows its `view`."""

    key: str
    """Its anchor."""
    title: str
    note: str = ""
    """A sentence about what is seen."""
    template: str = ""
    """Empty: the note is all there is."""
    view: object = None
    """What the template prints, as `view`."""


class StyleRules:
    """Declarations that belong to one element, as classes of the page's own style sheet.

    `style` attributes would need 'unsafe-inline' in the content security policy.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def name(self, declarations: str) -> str:
        """The class that carries these declarations."""
        return self._names.setdefault(declarations, f"s{len(self._names)}")

    def css(self) -> str:
        """All rules, in the order in which they were asked for."""
        return "".join(f".{name}{{{rule}}}\n" for rule, name in self._names.items())


def render_page(
    header: Header, sections: Sequence[Section], *, title: str, footer: str, data: str = NO_DATA
) -> str:
    """A whole page.

    Args:
        header: The top.
        sections: In reading order.
        title: Of the browser's window.
        footer: Who wrote the page.
        data: JSON for the script, without `<` (`pictures.hover_data`).
    """
    rules = StyleRules()
    template = _html().get_template("body.html")
    # The body comes first: while it is made the style sheet grows.
    body = Markup(template.render(header=header, sections=sections, rules=rules, footer=footer))
    style, script = asset("page.css") + rules.css(), asset("page.js")
    return (
        _html()
        .get_template("page.html")
        .render(
            title=title,
            policy=_policy(style, script),
            style=Markup(style),
            script=Markup(script),
            data=Markup(data),
            body=body,
        )
    )


def asset(name: str) -> str:
    """A text file of this package."""
    return resources.files("lmcl.report").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """The page must never ask anybody for anything; this makes the browser enforce it."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _html() -> jinja2.Environment:
    environment = html_environment()
    environment.filters["filter_json"] = filter_json
    return environment


def filter_json(conditions: Sequence[tuple[str, str]]) -> Markup:
    """What images a button leaves, e.g. ("subset", "night"), for an attribute.

    The script compares it with its own JSON.stringify: no spaces, no escapes.
    """
    pairs = [list(condition) for condition in conditions]
    return Markup("{}").format(json.dumps(pairs, separators=(",", ":"), ensure_ascii=False))
