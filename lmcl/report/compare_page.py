"""The page that shows several runs side by side."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from lmcl.evaluation.significance import Verdict
from lmcl.report import figures as draw
from lmcl.report.analysis import FEW, Analysis
from lmcl.report.compare import Comparison, Model, summary
from lmcl.report.markup import UNKNOWN, figure, row, section, shown, span, table
from lmcl.report.matrix import Entry, columns
from lmcl.report.page import page
from lmcl.report.published import published_across, published_for

_NO_IMAGES = '{"rows":[],"thumbs":{}}'
_MOST_SCATTERS = 8


def compare_page(c: Comparison) -> str:
    """The page of a comparison."""
    parts = [
        _runs(c),
        _pairs(c),
        _discrimination(c),
        _splits(c),
        _portions(c),
        _scatters(c),
        _sets(c),
        _settings(c),
    ]
    title = ", ".join(a.run.name for a in c.analyses[:4]) + (
        " and more" if len(c.analyses) > 4 else ""
    )
    top = (
        f'<p class="kicker">{escape(_sets_named(c))}</p><h1>{escape(title)}</h1>'
        f'<p class="lede">{escape(verdict(c))}</p>'
    )
    return page(f"Comparison: {title}", top, parts, _NO_IMAGES)


def verdict(c: Comparison) -> str:
    """What the comparison comes to, in a sentence or two."""
    if not c.pairs:
        return "No two of these runs were tested on the same images, so only their splits compare."
    clear = [p for p in c.pairs if p.p_holm < 0.05]
    if not clear:
        return (
            "No difference between these runs is larger than chance would make it on these images "
            "(5 % level, corrected for the number of pairs)."
        )
    said = [
        f"{p.a if p.difference.value > 0 else p.b} ranks better than "
        f"{p.b if p.difference.value > 0 else p.a} by {shown(abs(p.difference.value))}"
        for p in clear[:3]
    ]
    rest = f", and {len(clear) - 3} more pairs differ" if len(clear) > 3 else ""
    equal = len(c.pairs) - len(clear)
    same = f" {equal} of {len(c.pairs)} pairs do not differ measurably." if equal else ""
    return f"{'; '.join(said)}{rest}.{same}"


def _runs(c: Comparison) -> str:
    published = published_for(c.analyses[0].run.set_name) if len(_set_names(c)) == 1 else []
    edges = [
        v
        for a in c.analyses
        for i in [a.evaluation.intervals.get("srcc")]
        for v in ((i.low, i.high) if i else (a.evaluation.srcc,))
    ]
    finite = [v for v in (*edges, *(p.srcc for p in published)) if math.isfinite(v)] or [0.0, 1.0]
    axis = (min(finite) - 0.02, min(1.0, max(finite)) + 0.02)
    rows = [_run_row(a, axis) for a in c.analyses]
    for p in published:
        bar = draw.interval_bar(p.srcc, math.nan, math.nan, axis)
        mark = "" if p.comparable else " \N{DAGGER}"
        cells = [escape(p.model) + mark, "", "", shown(p.srcc), bar, "", shown(p.plcc), "", "", ""]
        rows.append(row(cells, "few"))
    head = ["", "Split", "Images", "SRCC", "", "95 % interval", "PLCC, raw", "PLCC, fitted"]
    note = (
        "\N{DAGGER} published under another protocol; report.md has the sources."
        if published
        else ""
    )
    return section("runs", "Side by side", note, table([*head, "KRCC", "RMSE, fitted"], rows))


def _run_row(a: Analysis, axis: tuple[float, float]) -> str:
    e = a.evaluation
    interval = e.intervals.get("srcc")
    low, high = (interval.low, interval.high) if interval else (math.nan, math.nan)
    return row(
        [
            escape(a.run.name),
            escape(a.run.protocol.get("split", "") or UNKNOWN),
            str(e.n),
            shown(e.srcc),
            draw.interval_bar(e.srcc, low, high, axis),
            span(e, "srcc"),
            shown(e.plcc_raw),
            shown(e.plcc_fit4),
            shown(e.krcc),
            shown(e.rmse_fit4, 2),
        ]
    )


def _pairs(c: Comparison) -> str:
    if not c.pairs and not c.refusals:
        return ""
    rows = []
    for p in c.pairs:
        i = p.difference.interval
        ends = f"{shown(i.low)} to {shown(i.high)}" if i else UNKNOWN
        rows.append(
            row(
                [
                    f"{escape(p.a)} \N{MINUS SIGN} {escape(p.b)}",
                    str(p.n),
                    shown(p.difference.value),
                    ends,
                    probability(p.difference.p),
                    f"<b>{probability(p.p_holm)}</b>",
                    *(_tested(t) for t in p.tests),
                ]
            )
        )
    head = [
        "",
        "Images",
        "SRCC difference",
        "95 % interval",
        "p",
        "p, Holm",
        "Williams",
        "Meng",
        "F",
    ]
    note = (
        "Both models on the same images. The interval and p come from a bootstrap over groups; "
        "Williams and Meng compare the rank correlations, F the residuals after the mapping. "
        "Images that share a reference are not independent: then trust the bootstrap."
    )
    skipped = "".join(f"<li>{escape(r)}</li>" for r in c.refusals)
    body = (table(head, rows) if rows else "") + (
        f"<ul class='quiet'>{skipped}</ul>" if skipped else ""
    )
    return section("pairs", "Is the difference real?", note, body)


def _discrimination(c: Comparison) -> str:
    if not any(a.pairs.found for a in c.analyses):
        return ""
    rows = []
    for a in c.analyses:
        found = a.pairs.found
        if found is None:
            why = f'<span title="{escape(a.pairs.reason)}">{UNKNOWN}</span>'
            rows.append(row([escape(a.run.name), UNKNOWN, UNKNOWN, why, why]))
            continue
        areas = (shown(found.auc_different), shown(found.auc_better))
        rows.append(row([escape(a.run.name), str(found.n_pairs), str(found.n_different), *areas]))
    note = (
        "Two images are different if their scores differ at the 5 % level, given the spread and "
        "number of their ratings. Areas under the ROC curve; chance is 0.5."
    )
    head = ["", "Pairs", "Different", "AUC, different or similar", "AUC, better or worse"]
    return section("told-apart", "Pairs people can tell apart", note, table(head, rows))


def _splits(c: Comparison) -> str:
    if max(len(m.runs) for m in c.models) < 2:
        return ""
    rows = []
    for m in c.models:
        s = summary(m)
        cells = [escape(m.name), str(len(m.runs)), str(len(m.by_split()) or UNKNOWN)]
        rows.append(row([*cells, *(shown(s[k]) for k in ("median", "mean", "sd", "min", "max"))]))
    drawing = draw.boxes([(m.name, m.values("srcc")) for m in c.models], y_label="SRCC")
    tests = [
        row(
            [
                f"{escape(p.a)} \N{MINUS SIGN} {escape(p.b)}",
                str(p.splits),
                shown(p.mean),
                *(_tested(t) for t in p.tests),
            ]
        )
        for p in c.split_pairs
    ]
    heads = ["", "Splits", "Mean difference", "Wilcoxon", "Sign", "Nadeau-Bengio"]
    told = "".join(f"<li>{escape(p.averaged)}</li>" for p in c.split_pairs if p.averaged)
    averaged = f"<ul class='quiet'>{told}</ul>" if told else ""
    note = (
        "Runs whose settings differ only in the split or the seed are one model. Random splits "
        "overlap, so the deviation over splits is no standard error; the last test corrects for it."
    )
    body = (
        table(["", "Runs", "Splits", "Median SRCC", "Mean", "Deviation", "Least", "Greatest"], rows)
        + f'<div class="narrow">{figure(drawing, "Median, quartiles, range, and every run.")}</div>'
        + (f"<h3>Paired over splits</h3>{table(heads, tests)}{averaged}" if tests else "")
    )
    return section("splits", "Over the splits", note, body)


def _portions(c: Comparison) -> str:
    names = dict.fromkeys((p.kind, p.name) for a in c.analyses for p in a.portions)
    if not names:
        return ""
    rows = []
    for key in names:
        found = [_portion(m, key) for m in c.models]
        values = [value for value, _ in found]
        n = max(count for _, count in found)
        top = max((v for v in values if math.isfinite(v)), default=math.nan)
        cells = [f"<b>{shown(v)}</b>" if v == top and n >= FEW else shown(v) for v in values]
        rows.append(row([escape(key[1]), key[0], str(n), *cells], "few" if n < FEW else ""))
    head = ["", "", "Images", *(escape(m.name) for m in c.models)]
    several = any(len(m.runs) > 1 for m in c.models)
    over = "; medians over the splits, and the most images of a split" if several else ""
    note = f"Rank correlation inside each group{over}. The highest of a row is bold."
    return section("portions", "By subset and distortion", note, table(head, rows))


def _portion(m: Model, key: tuple[str, str]) -> tuple[float, int]:
    """Median rank correlation of a model's runs inside a group, and the images of the largest."""
    found = [p.evaluation for a in m.runs for p in a.portions if (p.kind, p.name) == key]
    values = [e.srcc for e in found if math.isfinite(e.srcc)]
    middle = float(np.median(values)) if values else math.nan
    return middle, max((e.n for e in found), default=0)


def _scatters(c: Comparison) -> str:
    shots = [
        f"<div><h3>{escape(a.run.name)}</h3>{draw.scatter(a, live=False)}</div>"
        for a in c.analyses[:_MOST_SCATTERS]
    ]
    charts = [a for a in c.analyses if "val_srcc" in a.run.curves.epochs]
    body = f'<div class="curves half">{"".join(shots)}</div>'
    if charts:
        shortest = min(len(a.run.curves.epochs["epoch"]) for a in charts)
        at = charts[0].run.curves.epochs["epoch"][:shortest] + 1.0
        series = [(a.run.name, a.run.curves.epochs["val_srcc"][:shortest]) for a in charts[:4]]
        if any(np.any(np.isfinite(v)) for _, v in series):
            keys = "".join(
                f'<span class="key k{i}"><i></i>{escape(n)}</span>'
                for i, (n, _) in enumerate(series)
            )
            body += "<h3>Validation SRCC</h3><div class='small'>"
            body += figure(draw.curve(at, series, x_label="epochs"), keys) + "</div>"
    return section("scatter", "Predictions against scores", "", body)


def _sets(c: Comparison) -> str:
    """Cross-set matrix: trained on one set, tested on others."""
    if all(e.own for e in c.matrix):
        return ""
    names = columns(c.matrix)
    rows = []
    for model in dict.fromkeys(e.model for e in c.matrix):
        entries = {e.column: e for e in c.matrix if e.model == model}
        own = next(e for e in entries.values() if e.own)
        runs = f", median of {own.runs} runs" if own.runs > 1 else ""
        title = f"{escape(own.trained_on)} <small>({escape(model)}{runs})</small>"
        cells = "".join(_set_cell(entries.get(name)) for name in names)
        rows.append(f"<tr><td>{title}</td>{cells}</tr>")
    note = (
        "Large: SRCC. Small: PLCC, raw on a model's own test part (framed), after the mapping on "
        "other sets; below, what others have published, under their protocols."
    )
    body = table(["Trained on", *(escape(n) for n in names)], rows, "matrix")
    body += _set_facts(c, names)
    return section("sets", "Across sets", note, body)


def _set_cell(e: Entry | None) -> str:
    if e is None:
        return f"<td>{UNKNOWN}</td>"
    pearson = e.plcc_raw if e.own else e.plcc_fit4
    others = (
        ""
        if e.own
        else "".join(
            f"<br><small>{escape(p.model)} {shown(p.srcc)}</small>"
            for p in published_across(e.trained_on, e.tested_on)
        )
    )
    kind = "own" if e.own else ""
    return (
        f'<td class="{kind}" title="{escape(_set_title(e))}">{shown(e.srcc)} '
        f"<small>{shown(pearson)}</small>{others}</td>"
    )


def _set_title(e: Entry) -> str:
    over = f", median of {e.splits} splits" if e.splits > 1 else ""
    return f"{e.n} images{over}; {e.direction}; mapping {e.mapping}"


def _set_facts(c: Comparison, names: Sequence[str]) -> str:
    """What each column is about, in words: hovering is not for everybody."""
    rows = []
    for name in names:
        here = [e for e in c.matrix if e.column == name]
        across = [e for e in here if not e.own]
        scale = next((e.scale for e in here if e.scale.is_known), here[0].scale)
        turned = sorted({f"from {e.trained_on}: {e.direction}" for e in across})
        counts = sorted({e.n for e in across})
        which = sorted({e.rule if e.splits > 1 else "all images" for e in across})
        left = max((e.left_out for e in across), default=0)
        judged = f"{', '.join(which)}, {counts[0]} images" if across else UNKNOWN
        cells = [
            escape(name),
            escape(scale.description),
            escape(judged + (f", {left} training images left out" if left else "")),
            escape("; ".join(turned)) or UNKNOWN,
            escape("; ".join(sorted({e.mapping for e in across}))) or UNKNOWN,
        ]
        rows.append(f"<tr><td>{cells[0]}</td>{''.join(_words(x) for x in cells[1:])}</tr>")
    head = ["Tested on", "<Scale", "<PartPredictions across sets", "<Direction", "<Mapping"]
    return table(head, rows)


def _words(text: str) -> str:
    return f'<td class="text">{text}</td>'


def _settings(c: Comparison) -> str:
    rows = [
        row([escape(name), *(escape(v) or UNKNOWN for v in values)]) for name, values in c.differing
    ]
    head = ["", *(escape(a.run.name) for a in c.analyses)]
    body = table(head, rows) if rows else "<p>The runs have the same settings.</p>"
    return section("settings", "Settings that differ", "", body)


def _tested(t: Verdict) -> str:
    if not math.isfinite(t.p):
        return f'<span title="{escape(t.reason)}">{UNKNOWN}</span>'
    mark = f'<span title="{escape(t.reason)}">*</span>' if t.reason else ""
    return f"p {probability(t.p)}{mark}"


def probability(p: float) -> str:
    """A p-value as readers expect it."""
    if not math.isfinite(p):
        return UNKNOWN
    return "&lt; .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def _set_names(c: Comparison) -> list[str]:
    return list(dict.fromkeys(a.run.set_name for a in c.analyses))


def _sets_named(c: Comparison) -> str:
    names: Sequence[str] = _set_names(c)
    return f"Comparison of {len(c.analyses)} runs · {', '.join(names)}"
