"""One self-contained HTML page: style, script, data and pictures inside, nothing outside."""

from collections.abc import Sequence
from html import escape
from importlib import resources

from lmcl.report import sections
from lmcl.report.analysis import Analysis
from lmcl.report.markup import shown
from lmcl.report.pictures import hover_data

_OF_A_REPORT = (
    "Written by lmcl report from the run folder alone. The same figures stand in results.json."
)


def run_page(a: Analysis) -> str:
    """The page of one run."""
    parts = [
        sections.headline(a),
        sections.agreement(a),
        sections.portions(a),
        sections.discrimination(a),
        sections.gallery(a),
        sections.embedding(a),
        sections.training(a),
        sections.others(a),
        sections.protocol(a),
    ]
    top = (
        f'<p class="kicker">{escape(_origin(a))}</p><h1>{escape(a.run.name)}</h1>'
        f'<p class="lede">{escape(lede(a))}</p>{_warning(a)}{sections.hero(a)}'
    )
    return page(a.run.name, top, parts, hover_data(a))


def page(
    title: str, top: str, parts: Sequence[str], data: str, *, footer: str = _OF_A_REPORT
) -> str:
    """A whole page; `top` and `parts` are HTML, `data` is JSON without `<`, `footer` is text."""
    kept = [part for part in parts if part]
    links = "".join(_link(part) for part in kept) if len(kept) > 1 else ""
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The page must never ask anybody for anything; this makes the browser enforce it.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{style}</style>'
        f'</head><body><header class="top">{top}<nav>{links}</nav></header>'
        f"<main>{''.join(kept)}</main><footer>{escape(footer)}</footer>"
        f'<aside id="card" hidden></aside><script type="application/json" id="data">{data}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def lede(a: Analysis) -> str:
    """The result in one sentence."""
    e = a.evaluation
    if "srcc" in e.reasons:
        return f"There is no rank correlation to report: {e.reasons['srcc']}."
    interval = e.intervals.get("srcc")
    sure = f" (95 % interval {shown(interval.low)} to {shown(interval.high)})" if interval else ""
    turned = " The sign is negative: the model is inverted." if e.srcc < 0 else ""
    return (
        f"On {e.n} images of {a.run.set_name} that it never trained on, the model ranks quality "
        f"with a Spearman correlation of {shown(e.srcc)}{sure} and a Pearson correlation of "
        f"{shown(e.plcc_raw)}.{turned}"
        if a.run.part != "train"
        else f"On its own {e.n} training images the model reaches a Spearman correlation of "
        f"{shown(e.srcc)}{sure}; that says nothing about other images."
    )


def _origin(a: Analysis) -> str:
    started = a.run.environment.get("started", "")[:10]
    commit = a.run.environment.get("git_commit", "")[:10]
    known = [a.run.set_name, f"{a.run.part} part", started, f"commit {commit}" if commit else ""]
    return " · ".join(k for k in known if k)


def _warning(a: Analysis) -> str:
    p = a.run.protocol
    note = p.get("note", "")
    if not note and p.get("synthetic") == "true":
        note = "This set is synthetic: nobody rated its images."
    if "test" in p.get("selection", "") and "best" in p.get("selection", ""):
        note += " The epoch was chosen on the test part: these figures flatter the model."
    return f'<p class="warn">{escape(note.strip())}</p>' if note.strip() else ""


def _link(part: str) -> str:
    key = part.partition('id="')[2].partition('"')[0]
    title = part.partition("<h2>")[2].partition("</h2>")[0]
    return f'<a href="#{key}">{title}</a>'


def _asset(name: str) -> str:
    return resources.files("lmcl.report").joinpath(name).read_text(encoding="utf-8")
