"""The sections of a single run's page, in reading order."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcl.evaluation.metrics import Interval
from lmcl.report import figures as draw
from lmcl.report.analysis import FEW, Analysis, Cell, Other, Portion, mapping_words
from lmcl.report.markup import (
    UNKNOWN,
    facts,
    figure,
    figure_name,
    filter_button,
    row,
    section,
    shown,
    span,
    table,
)
from lmcl.report.pictures import shot
from lmcl.report.published import Published, published_across, published_for
from lmcl.report.svg import colour

_RAMP = '<span class="key"><i class="ramp"></i>scores, worst to best</span>'


def headline(a: Analysis) -> str:
    """The figures of the run, beside what others publish for the set."""
    e = a.evaluation
    published = published_for(a.run.set_name)
    values = [e.srcc, *(p.srcc for p in published)]
    values += [edge for i in [e.intervals.get("srcc")] if i for edge in (i.low, i.high)]
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite) - 0.02, min(1.0, max(finite) + 0.02)
    rows = [_own_row(a, (low, high))] + [_published_row(p, (low, high)) for p in published]
    note = (
        "Figures of others come from their papers. Most choose the epoch on the test part, so "
        "their protocol is easier than ours; the last column says how."
        if published
        else f"No published figures are on file for {escape(a.run.set_name)}."
    )
    head = ["", "SRCC", "", "95 % interval", "PLCC", "<Protocol"]
    return section("headline", "Beside published results", note, table(head, rows))


def agreement(a: Analysis) -> str:
    """Scatter and residuals with the filters."""
    p = a.run.headline
    chips = [_chips(p.subset, "subset"), _chips(p.distortion, "distortion")]
    fit = a.evaluation.fit4
    state = "" if fit.status == "ok" else f" The curve is a straight line: {escape(fit.reason)}."
    drawn = len(draw.drawn_rows(a))
    sample = f" {drawn} of {a.evaluation.n} images are drawn." if drawn < a.evaluation.n else ""
    body = (
        f'{"".join(chips)}<p id="status" aria-live="polite"></p><div class="two">'
        + figure(
            draw.scatter(a),
            f"{_RAMP}Solid: the fitted curve. Dotted: prediction equals score.{state}{sample}",
        )
        + figure(draw.residuals(a), "Errors over the range of scores, and how often they occur.")
        + "</div>"
    )
    note = "Point at an image to see it, click to keep it. Choose a group to see it alone."
    return section("agreement", "Predictions against scores", note, body)


def portions(a: Analysis) -> str:
    """Figures inside each subset and each distortion; empty if the set has neither."""
    parts = []
    for kind, title in (("subset", "Subsets"), ("distortion", "Distortions")):
        some = [p for p in a.portions if p.kind == kind]
        if some:
            parts.append(f"<h3>{title}</h3>" + _portion_table(some, a))
    if a.cells:
        heading = "<h3>Mean absolute error by distortion and level; small: images</h3>"
        parts.append(heading + _heat_map(a))
    if not parts:
        return ""
    note = (
        "Rank correlations inside a group are lower than over the whole set: the easy differences, "
        f"those between groups, are gone. Groups of fewer than {FEW} images are grey."
    )
    return section("portions", "Where it holds", note, "".join(parts))


def discrimination(a: Analysis) -> str:
    """Krasula's analysis: whether predictions tell apart what people can; or why not."""
    if a.pairs.found is None:
        reason = f"Not shown: {escape(a.pairs.reason)}."
        return section("pairs", "Pairs people can tell apart", reason, "")
    found = a.pairs.found
    similar = found.n_pairs - found.n_different
    rows = [
        _pair_row(
            "different or similar?",
            f"{found.n_different} against {similar}",
            found.auc_different,
            found.auc_different_interval,
        ),
        _pair_row(
            "which one is better?",
            str(found.n_different),
            found.auc_better,
            found.auc_better_interval,
        ),
    ]
    missing = f" {escape(a.pairs.reason).capitalize()}." if a.pairs.reason else ""
    note = (
        "Two images are different if their scores differ at the 5 % level, given the deviation of "
        f"each image's ratings and {a.pairs.ratings} ratings a score ({escape(a.pairs.source)}). "
        f"Chance is 0.5. The order of {shown(100 * found.correct, 1)} % of the different pairs is "
        "right. The intervals take pairs for independent, which they are not: they are too "
        f"narrow.{missing}"
    )
    head = ["Can the predictions tell", "Pairs", "AUC", "95 % interval"]
    return section("pairs", "Pairs people can tell apart", note, table(head, rows))


def _pair_row(question: str, pairs: str, auc: float, interval: Interval | None) -> str:
    ends = f"{shown(interval.low)} to {shown(interval.high)}" if interval else UNKNOWN
    return row([question, pairs, shown(auc), ends])


def gallery(a: Analysis) -> str:
    """Images with the greatest and the smallest errors."""
    if not len(a.worst):
        return ""
    switches = (
        '<div class="chips"><label><input type="checkbox" data-show="show-box" checked>'
        'salient box</label><label><input type="checkbox" data-show="show-attention">'
        "attention</label></div>"
    )
    shots = {
        "Furthest from their scores": a.worst,
        "Closest to their scores": a.best,
    }
    body = switches + "".join(
        f'<h3>{title}</h3><div class="gallery">'
        + "".join(shot(a.run, int(i)) for i in rows)
        + "</div>"
        for title, rows in shots.items()
    )
    note = "The box is the crop the teacher finds salient; attention is its CLS map."
    return section("images", "Images", note, body)


def embedding(a: Analysis) -> str:
    """The map of the embeddings; empty if the run kept none."""
    if not len(a.map_xy):
        return ""
    note = (
        "Mean embedding of each image's crops, brought to a plane (principal components, or UMAP "
        "where umap-learn is installed). Quality that is learned shows as a direction along which "
        "the colour changes."
    )
    body = f'<div class="narrow">{figure(draw.embedding_map(a), _RAMP)}</div>'
    return section("map", "Map of the embeddings", note, body)


def training(a: Analysis) -> str:
    """Losses, the mechanism's own figures, validation and speed over the epochs."""
    charts = training_charts(a)
    if not charts:
        return ""
    note = (
        "Intra-share is the part of the contrastive softmax that goes to other crops of the same "
        "image; intra-image similarity is the mean cosine between them. If the similarity reaches "
        "1 the crops of an image have collapsed."
    )
    return section("training", "Training", note, f'<div class="curves">{"".join(charts)}</div>')


def training_charts(a: Analysis) -> list[str]:
    """One small chart per group of logged values that are there."""
    steps, epochs = a.run.curves.steps, a.run.curves.epochs
    charts = []
    if len(steps.get("epoch", ())) and "step" in steps:
        at = draw.global_steps(a.run.curves)
        for title, names in (
            ("Loss", ("loss", "l1")),
            ("Contrastive term", ("contrastive",)),
            ("Intra-share", ("intra_share",)),
            (
                "Cosine to the salient crop, between crops",
                ("positive_similarity", "intra_similarity"),
            ),
            ("Learning rate", ("lr",)),
            ("Images per second", ("images_per_s",)),
        ):
            charts += _chart(title, names, steps, at)
    if len(epochs.get("epoch", ())):
        at = epochs["epoch"] + 1.0
        charts += _chart("Validation", ("val_srcc", "val_plcc"), epochs, at)
    return charts


def protocol(a: Analysis) -> str:
    """How the figures were made: split, selection, crops, fit, machine, configuration."""
    p, e, env = a.run.protocol, a.evaluation, a.run.environment
    method = next((i.method for i in e.intervals.values()), "none")
    measured = {
        "Data set": a.run.set_name,
        "Split": p.get("split", ""),
        "Split hash": p.get("split_hash", ""),
        "Protocol": p.get("protocol", ""),
        "Images": _counts(a),
        "Epoch chosen": p.get("selection", ""),
        "PartPredictions": " ".join((p.get("model", ""), "weights")) if p.get("model") else "",
        "Crops": p.get("crops", ""),
        "Decoding": p.get("decode", env.get("decode", "")),
        "Scores": _scale(a),
        "Mapping": mapping_words(a),
        "Intervals": f"95 %, {method}, {e.n_groups} independent groups",
        "Repeated ids": "none: predictions are kept by sample id",
    }
    machine = {
        "Trained for": _duration(p.get("train_seconds", "")),
        "Images per second": _rate(a),
        **{_machine_name(k): v for k, v in env.items() if k not in ("decode", "git_dirty")},
        "Uncommitted changes": {"true": "yes", "false": "no"}.get(env.get("git_dirty", ""), ""),
    }
    config = facts(a.run.config)
    gaps = "".join(f"<li>{escape(m)}</li>" for m in a.run.missing)
    body = (
        f'<div class="facts"><div><h3>Protocol</h3>{facts(measured)}</div>'
        f"<div><h3>Machine and speed</h3>{facts(machine)}</div></div>"
        f"<details><summary>All {len(a.run.config)} settings of the run</summary>{config}</details>"
        + (f"<h3>Not in the run folder</h3><ul>{gaps}</ul>" if gaps else "")
    )
    return section("protocol", "How it was measured", "", body)


def others(a: Analysis) -> str:
    """The same model on other parts and other sets; empty if there are none."""
    if not a.others:
        return ""
    rows = [
        row(_other_cells(other)).replace("</tr>", f"{_other_words(a, other)}</tr>")
        for other in a.others
    ]
    note = (
        f"The same weights, trained on {escape(a.run.set_name)}. For other sets look at the fitted "
        "PLCC: their scale is not the one the model answers in."
    )
    head = ["", "Images", "SRCC", "PLCC, raw", "PLCC, fitted", "<Scale, direction, mapping"]
    return section("others", "Other parts and other sets", note, table(head, rows))


def _other_cells(other: Other) -> list[str]:
    e = other.evaluation
    figures = (shown(e.figure(f)) for f in ("srcc", "plcc_raw", "plcc_fit4"))
    return [escape(other.name), str(e.n), *figures]


def _other_words(a: Analysis, other: Other) -> str:
    scope = other.scope
    if scope is None:
        return f'<td class="text">{UNKNOWN}</td>'
    words = [scope.scale.description, scope.direction, f"mapping {scope.mapping}"]
    if scope.splits:
        middle = float(np.median([math.nan if s.srcc is None else s.srcc for s in scope.splits]))
        words.append(f"median SRCC of {len(scope.splits)} splits {shown(middle)}")
    if scope.left_out:
        words.append(f"{scope.left_out} training images left out")
    if not scope.left_out_known:
        words.append("not searched for training images")
    words += [
        f"{p.model} {shown(p.srcc)} (published)"
        for p in published_across(a.run.set_name, scope.tested_on)
    ]
    return f'<td class="text">{escape("; ".join(words))}</td>'


def hero(a: Analysis) -> str:
    """The four figures a reader looks for first."""
    e = a.evaluation
    return (
        '<dl class="figures">'
        + "".join(
            f"<div><dt>{figure_name(name)}</dt><dd>{shown(e.figure(name), digits)}</dd>"
            f'<dd class="small">{escape(e.reasons.get(name, "") or span(e, name))}</dd></div>'
            for name, digits in (("srcc", 3), ("plcc_raw", 3), ("plcc_fit4", 3), ("krcc", 3))
        )
        + f"<div><dt>{figure_name('rmse_fit4')}</dt><dd>{_error(a)}</dd>"
        f'<dd class="small">in {escape(a.run.scale.name)} units, {_scale(a, short=True)}</dd></div>'
        "</dl>"
    )


def _error(a: Analysis) -> str:
    wide = a.run.scale.high - a.run.scale.low
    digits = 3 if math.isfinite(wide) and wide <= 5 else 2
    return shown(a.evaluation.rmse_fit4, digits)


def _own_row(a: Analysis, axis: tuple[float, float]) -> str:
    e = a.evaluation
    interval = e.intervals.get("srcc")
    low, high = (interval.low, interval.high) if interval else (math.nan, math.nan)
    bar = draw.interval_bar(e.srcc, low, high, axis)
    own = f'<td class="text">{escape(_own_protocol(a))}</td>'
    cells = [escape(a.run.name), shown(e.srcc), bar, span(e, "srcc"), shown(e.plcc_raw)]
    return row(cells, "own").replace("</tr>", f"{own}</tr>")


def _own_protocol(a: Analysis) -> str:
    p = a.run.protocol
    known = (p.get("protocol", ""), p.get("split", ""), p.get("selection", ""))
    return ", ".join(k for k in known if k) or "not recorded"


def _published_row(p: Published, axis: tuple[float, float]) -> str:
    mark = "" if p.comparable else "\N{DAGGER} "
    bar = draw.interval_bar(p.srcc, math.nan, math.nan, axis)
    why = f'<td class="text">{mark}{escape(p.note)}. {escape(p.cite)}</td>'
    cells = [escape(p.model), shown(p.srcc), bar, "", shown(p.plcc)]
    return row(cells).replace("</tr>", f"{why}</tr>")


def _chips(values: NDArray[Any], key: str) -> str:
    names = sorted({str(v) for v in values} - {""})
    if len(names) < 2:
        return ""
    return f'<div class="chips">{"".join(filter_button(n, [(key, n)]) for n in names)}</div>'


def _portion_table(some: Sequence[Portion], a: Analysis) -> str:
    spans = [
        edge
        for p in some
        for i in [p.evaluation.intervals.get("srcc")]
        for edge in ((i.low, i.high) if i else (p.evaluation.srcc,))
    ]
    finite = [v for v in spans if math.isfinite(v)] or [0.0, 1.0]
    axis = (min(finite) - 0.02, min(1.0, max(finite)) + 0.02)
    rows = []
    for p in some:
        e = p.evaluation
        interval = e.intervals.get("srcc")
        low, high = (interval.low, interval.high) if interval else (math.nan, math.nan)
        rows.append(
            row(
                [
                    filter_button(p.name, [(p.kind, p.name)]),
                    str(e.n),
                    shown(e.srcc) if "srcc" not in e.reasons else _why(e.reasons["srcc"]),
                    draw.interval_bar(e.srcc, low, high, axis),
                    span(e, "srcc", 2),
                    shown(e.plcc_raw),
                    shown(e.rmse_raw, 2),
                    shown(p.bias, 2),
                ],
                "few" if e.n < FEW else "",
            )
        )
    head = ["", "Images", "SRCC", "", "95 % interval", "PLCC, raw", "RMSE, raw", "Mean error"]
    return table(head, rows)


def _why(reason: str) -> str:
    return f'<span title="{escape(reason)}">{UNKNOWN}</span>'


def _heat_map(a: Analysis) -> str:
    levels = sorted({c.level for c in a.cells})
    by_place = {(c.distortion, c.level): c for c in a.cells}
    most = max((c.mae for c in a.cells if math.isfinite(c.mae)), default=1.0) or 1.0
    rows = []
    for name in sorted({c.distortion for c in a.cells}):
        cells = "".join(_heat_cell(by_place.get((name, level)), most) for level in levels)
        rows.append(f"<tr><td>{filter_button(name, [('distortion', name)])}</td>{cells}</tr>")
    return table(["", *(f"level {level}" for level in levels)], rows, "map")


def _machine_name(key: str) -> str:
    if key.startswith("versions."):
        return key.removeprefix("versions.")
    known = {"git_commit": "Commit", "world_size": "Processes", "cores": "Processor cores"}
    return known.get(key, key.replace("_", " ").capitalize())


def _heat_cell(cell: Cell | None, most: float) -> str:
    if cell is None or not math.isfinite(cell.mae):
        return f"<td>{UNKNOWN}</td>"
    label = shown(cell.mae, 2)
    where = [("distortion", cell.distortion), ("level", str(cell.level))]
    tint = colour(1.0 - cell.mae / most)
    few = " few" if cell.n < FEW else ""
    title = f"{cell.n} images, mean error {shown(cell.bias, 2)}"
    back = f"background:color-mix(in srgb, {tint} {'18' if few else '46'}%, transparent)"
    return (
        f'<td class="heat{few}" style="{back}" title="{title}">{filter_button(label, where)}'
        f"<small>{cell.n}</small></td>"
    )


def _chart(
    title: str,
    names: Sequence[str],
    columns: Mapping[str, NDArray[np.float64]],
    at: NDArray[np.float64],
) -> list[str]:
    found = [(n, columns[n]) for n in names if n in columns and np.any(np.isfinite(columns[n]))]
    if not found:
        return []
    keys = "".join(
        f'<span class="key k{i}"><i></i>{escape(n.replace("_", " "))}</span>'
        for i, (n, _) in enumerate(found)
    )
    drawing = draw.curve(at, found, x_label="epochs")
    return [f"<div><h3>{escape(title)}</h3>{figure(drawing, keys)}</div>"]


def _counts(a: Analysis) -> str:
    known = [
        f"{a.run.protocol[f'counts.{part}']} {part}"
        for part in ("train", "val", "test")
        if f"counts.{part}" in a.run.protocol
    ]
    here = f"{a.evaluation.n} scored in the {a.run.part} part"
    return f"{', '.join(known)}; {here}" if known else here


def _scale(a: Analysis, *, short: bool = False) -> str:
    s = a.run.scale
    if not math.isfinite(s.low + s.high):
        return "range not recorded"
    better = "higher is better" if s.higher_is_better else "lower is better"
    return f"{s.low:g} to {s.high:g}" if short else f"{s.name}, {s.low:g} to {s.high:g}, {better}"


def _rate(a: Analysis) -> str:
    rate = a.run.curves.steps.get("images_per_s")
    return f"{np.nanmedian(rate):.1f} in training (median)" if rate is not None else ""


def _duration(seconds: str) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(round(float(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
