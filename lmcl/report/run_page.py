"""The page of one run."""

from lmcl.report.analysis import Analysis
from lmcl.report.formatting import format_figure, format_interval
from lmcl.report.page import Header, render_page
from lmcl.report.pictures import Pictures, hover_data
from lmcl.report.sections import hero, run_sections
from lmcl.report.weakness import weakness

FOOTER = "Written by lmcl report from the run folder alone. The same figures stand in results.json."


def run_page(a: Analysis) -> str:
    """The page of one run."""
    pictures = Pictures(a.run)
    header = Header(
        kicker=_origin(a),
        heading=a.run.name,
        lede=lede(a),
        note=weakness(a.run.headline, a.portions, a.run.scale),
        warning=_warning(a),
        figures=hero(a),
    )
    data = hover_data(a, pictures)
    sections = run_sections(a, pictures)
    return render_page(header, sections, title=a.run.name, footer=FOOTER, data=data)


def lede(a: Analysis) -> str:
    """The result in one sentence."""
    e = a.evaluation
    if "srcc" in e.reasons:
        return f"There is no rank correlation to report: {e.reasons['srcc']}."
    interval = format_interval(e, "srcc")
    sure = f" (95 % interval {interval})" if interval else ""
    turned = " The sign is negative: the model is inverted." if e.srcc < 0 else ""
    return (
        f"On {e.n} images of {a.run.set_name} that it never trained on, the model ranks quality "
        f"with a Spearman correlation of {format_figure(e.srcc)}{sure} and a Pearson correlation "
        f"of {format_figure(e.plcc_raw)}.{turned}"
        if a.run.part != "train"
        else f"On its own {e.n} training images the model reaches a Spearman correlation of "
        f"{format_figure(e.srcc)}{sure}; that says nothing about other images."
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
    return note.strip()
