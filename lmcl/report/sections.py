"""The sections of a single run's page, in reading order: what each shows, for its template.

A section is a function here that returns a `Section` (None if there is nothing to show), its
template in `templates/run/`, and its place in `run_sections`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from lmcl.evaluation.calibration import CONFIDENCE
from lmcl.evaluation.metrics import Evaluation, Interval
from lmcl.evaluation.threshold import threshold_curve
from lmcl.report import figures as draw
from lmcl.report.analysis import FEW, MOST_OF_A_GROUP, Analysis, Cell, Other, Portion, mapping_words
from lmcl.report.formatting import (
    UNKNOWN,
    figure_name,
    format_figure,
    format_interval,
    reason_of_no_interval,
)
from lmcl.report.intervals import Coverage
from lmcl.report.page import HeroFigure, Section
from lmcl.report.pictures import Pictures, shot
from lmcl.report.published import Published, published_across, published_for

HEAT_DEEPEST = 62
"""Percent of the heat map's colour in its worst cell; the legend in page.css ends there too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadlineView:
    """The run's own row and those of others."""

    name: str
    evaluation: Evaluation
    protocol: str
    published: Sequence[Published]
    axis: tuple[float, float]
    """Of the drawn intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloorView:
    """The model's row and the ridge's."""

    rows: Sequence[tuple[str, Evaluation]]
    axis: tuple[float, float]
    """Of the drawn intervals."""
    method: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgreementView:
    """Scatter, residuals, and the buttons that filter them."""

    chips: Sequence[tuple[str, Sequence[str]]]
    """Column and its values, for columns with several."""
    scatter: Markup
    residuals: Markup
    line_because: str
    """Why the fitted curve is a straight line; empty if it is none."""
    drawn: int
    scored: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatCell:
    """The mean absolute error of one distortion at one level."""

    label: str
    title: str
    n: int
    is_small: bool
    background: str
    """A declaration of CSS."""
    conditions: Sequence[tuple[str, str]]
    """What leaves only its images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PortionsView:
    """Tables of portions, and the heat map of distortions."""

    tables: Sequence[tuple[str, tuple[float, float], Sequence[Portion], str]]
    """Title, axis of the drawn intervals, portions, and why some have no interval."""
    few: int
    """Fewer images than this are grey."""
    levels: Sequence[str]
    heat: Sequence[tuple[str, Sequence[HeatCell | None]]]
    """A row per distortion, a cell per level."""
    heat_most: str
    """The greatest error of the heat map, with its unit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntervalsView:
    """Coverage over all images and inside portions."""

    promised: str
    rows: Sequence[Coverage]
    few: int
    """Fewer images than this are grey."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingChart:
    """One small chart over the epochs."""

    title: str
    drawing: Markup
    lines: Sequence[str]
    """Names of its lines, in the order of their colours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolView:
    """Names and values in two columns, the settings, and what the folder lacks."""

    measured: Mapping[str, str]
    machine: Mapping[str, str]
    settings: Mapping[str, str]
    missing: Sequence[str]


def run_sections(a: Analysis, pictures: Pictures) -> list[Section]:
    """All sections of a run's page that have something to show."""
    every = (
        headline(a),
        floor(a),
        agreement(a),
        portions(a),
        intervals(a),
        thresholds(a),
        discrimination(a),
        gallery(a, pictures),
        embedding(a),
        training(a),
        others(a),
        # Last: it says which pictures were refused.
        protocol(a, pictures.notes()),
    )
    return [section for section in every if section is not None]


def headline(a: Analysis) -> Section | None:
    """The figures of the run, beside what others publish for the set; None if nobody does."""
    e = a.evaluation
    published = published_for(a.run.set_name)
    if not published:
        return None
    note = (
        "Figures of others come from their papers. Most choose the epoch on the test part, so "
        "their protocol is easier than ours; the last column says how."
    )
    axis = interval_axis([e], also=[p.srcc for p in published])
    return Section(
        key="headline",
        title="Beside published results",
        note=note,
        template="run/headline.html",
        view=HeadlineView(
            name=a.run.name,
            evaluation=e,
            protocol=_own_protocol(a),
            published=published,
            axis=axis,
        ),
    )


def floor(a: Analysis) -> Section:
    """The trained model beside a ridge on its encoder's frozen features; or how to make one."""
    key, title, found = "floor", "What training adds", a.floor
    facts, ridge = found.facts, found.evaluation
    if facts is None or ridge is None:
        return Section(key=key, title=title, note=f"Not shown: {found.reason}.")
    kind = "a ridge" if facts.ridge.width is None else "a kernel ridge"
    rows = [(a.run.name, a.evaluation), (f"{kind} on the frozen features", ridge)]
    return Section(
        key=key,
        title=title,
        note=found.words,
        template="run/floor.html",
        view=FloorView(
            rows=rows,
            axis=interval_axis([a.evaluation, ridge]),
            method=f"{facts.features} features of {facts.encoder} (weights {facts.weights}), means "
            f"and deviations over {facts.crops}; penalty and kernel chosen by "
            f"{facts.ridge.folds} folds of the {facts.train} training images.",
        ),
    )


def interval_axis(
    evaluations: Iterable[Evaluation], *, also: Iterable[float] = (), margin: float = 0.02
) -> tuple[float, float]:
    """An axis on which all these rank correlations and their intervals find room."""
    edges = [*also]
    for e in evaluations:
        interval = e.intervals.get("srcc")
        edges += [e.srcc, interval.low, interval.high] if interval else [e.srcc]
    finite = [v for v in edges if math.isfinite(v)] or [0.0, 1.0]
    return min(finite) - margin, min(1.0, max(finite)) + margin


def agreement(a: Analysis) -> Section:
    """Scatter and residuals with the filters."""
    fit = a.evaluation.fit4
    names = [
        (kind, [portion.name for portion in a.portions if portion.kind == kind])
        for kind in ("subset", "distortion")
    ]
    return Section(
        key="agreement",
        title="Predictions against scores",
        note="Point at an image to see it, click to keep it. Choose a group to see it alone.",
        template="run/agreement.html",
        view=AgreementView(
            chips=[(key, values) for key, values in names if len(values) > 1],
            scatter=draw.scatter(a),
            residuals=draw.residuals(a),
            line_because="" if fit.status == "ok" else fit.reason,
            drawn=len(draw.drawn_rows(a)),
            scored=a.evaluation.n,
        ),
    )


def portions(a: Analysis) -> Section | None:
    """Figures inside each subset and each distortion; None if the set has neither."""
    tables = []
    # One axis for all, or the tables could not be compared by eye.
    axis = interval_axis([a.evaluation, *(p.evaluation for p in a.portions)])
    for kind, title in (("subset", "Subsets"), ("distortion", "Distortions")):
        some = [p for p in a.portions if p.kind == kind]
        if some:
            tables.append((title, axis, some, _lacking(some)))
    if not tables and not a.cells:
        return None
    levels = sorted({c.level for c in a.cells})
    return Section(
        key="portions",
        title="Where it holds",
        note="Rank correlations inside a group are lower than over the whole set: the easy "
        "differences, those between groups, are gone. Groups of fewer than "
        f"{FEW} images are grey.",
        template="run/portions.html",
        view=PortionsView(
            tables=tables,
            few=FEW,
            levels=[f"level {level}" for level in levels],
            heat=_heat_map(a, levels),
            heat_most=f"{format_figure(_most_error(a), 2)} {a.run.scale.name}",
        ),
    )


def discrimination(a: Analysis) -> Section:
    """Krasula's analysis: whether predictions tell apart what people can; or why not."""
    key, title = "pairs", "Pairs people can tell apart"
    found = a.pairs.found
    if found is None:
        return Section(key=key, title=title, note=f"Not shown: {a.pairs.reason}.")
    similar = found.n_pairs - found.n_different
    missing = f" {a.pairs.reason.capitalize()}." if a.pairs.reason else ""
    rows: list[tuple[str, str, float, Interval | None]] = [
        (
            "different or similar?",
            f"{found.n_different} against {similar}",
            found.auc_different,
            found.auc_different_interval,
        ),
        (
            "which one is better?",
            str(found.n_different),
            found.auc_better,
            found.auc_better_interval,
        ),
    ]
    return Section(
        key=key,
        title=title,
        note="Two images are different if their scores differ at the 5 % level, given the "
        f"deviation of each image's ratings and {a.pairs.ratings} ratings a score "
        f"({a.pairs.source}). Chance is 0.5. The order of {format_figure(100 * found.correct, 1)} "
        "% of the different pairs is right. The intervals take pairs for independent, which they "
        f"are not: they are too narrow.{missing}",
        template="run/discrimination.html",
        view=rows,
    )


def intervals(a: Analysis) -> Section | None:
    """Coverage of the prediction intervals; None if the run has none."""
    if not a.coverages:
        return None
    promised = f"{100 * CONFIDENCE:g} %"
    broken = [c.name for c in a.coverages[1:] if not c.keeps and c.covered.of >= FEW]
    doubt = (
        f" Inside {', '.join(broken)} it differs by more than chance: there the intervals are not "
        "to be taken at their word."
        if broken
        else ""
    )
    return Section(
        key="intervals",
        title="Do the intervals hold?",
        note=f"People's score should lie inside an image's interval for {promised} of the images. "
        "The intervals come from errors on the val part alone, scaled by how far an image's crops "
        f"disagree; images of one group count as independent here.{doubt}",
        template="run/intervals.html",
        view=IntervalsView(promised=promised, rows=a.coverages, few=FEW),
    )


def thresholds(a: Analysis) -> Section | None:
    """What sorting out by a threshold costs; None if nothing can be said."""
    run, p = a.run, a.run.headline
    quality, truth = p.prediction_unit, run.scale.to_unit(p.mos)
    known = np.isfinite(quality) & np.isfinite(truth)
    if np.sum(known) < FEW:
        return None
    rules = run.rules
    worst_quarter = float(np.quantile(truth[known], 0.25))
    bad_below = rules[0].bad_below if rules else worst_quarter
    same = [rule for rule in rules if rule.bad_below == bad_below]
    curve = threshold_curve(quality[known], truth[known], bad_below=bad_below)
    if not curve.bad:
        return None
    raw = format_figure(float(run.scale.from_unit(bad_below)), 2)
    what = f"people score it below {bad_below:.3g} of quality ({raw} on the scale of the set)"
    named = (
        "The lines are the rules of the model folder."
        if rules
        else "That is the worst quarter of these images; `lmcl threshold` chooses a cut for "
        "another limit and keeps it in the model folder."
    )
    return Section(
        key="thresholds",
        title="What sorting out would cost",
        note=f"An image is bad if {what}: {curve.bad} of {curve.n}. {named}",
        template="run/thresholds.html",
        view=draw.threshold_chart(curve, [(rule.name, rule.cut) for rule in same]),
    )


def gallery(a: Analysis, pictures: Pictures) -> Section | None:
    """Images with the greatest and the smallest errors."""
    if not len(a.worst):
        return None
    lists = (("Furthest from their scores", a.worst), ("Closest to their scores", a.best))
    return Section(
        key="images",
        title="Images",
        note="The box is the crop the teacher finds salient; attention is its CLS map. At most "
        f"{MOST_OF_A_GROUP} images of one group are shown in a list while others are left.",
        template="run/gallery.html",
        view=[(title, [shot(a.run, int(i), pictures) for i in rows]) for title, rows in lists],
    )


def embedding(a: Analysis) -> Section | None:
    """The map of the embeddings; None if the run kept none."""
    if not len(a.map_xy):
        return None
    return Section(
        key="map",
        title="Map of the embeddings",
        note="Mean embedding of each image's crops, brought to a plane (principal components, or "
        "UMAP where umap-learn is installed). Quality that is learned shows as a direction along "
        "which the colour changes.",
        template="run/embedding.html",
        view=draw.embedding_map(a),
    )


def training(a: Analysis) -> Section | None:
    """Losses, the mechanism's own figures, validation and speed over the epochs."""
    charts = training_charts(a)
    if not charts:
        return None
    return Section(
        key="training",
        title="Training",
        note="Faint: single steps; strong: their means over each epoch. Intra-share is the part of "
        "the contrastive softmax that goes to other crops of the same image; intra-image "
        "similarity is the mean cosine between them. If the similarity reaches 1 the crops of an "
        "image have collapsed.",
        template="run/training.html",
        view=charts,
    )


def training_charts(a: Analysis) -> list[TrainingChart]:
    """One small chart per group of logged values that are there."""
    steps, epochs = a.run.curves.steps, a.run.curves.epochs
    charts = []
    if len(epochs.get("epoch", ())):
        at = epochs["epoch"] + 1.0
        charts += _chart("Validation", ("val_srcc", "val_plcc"), epochs, at)
    if len(steps.get("epoch", ())) and "step" in steps:
        at = draw.global_steps(a.run.curves)
        for title, names in (
            ("Loss", ("loss", "l1")),
            ("PLCC and rank loss", ("plcc_loss", "rank_loss")),
            ("Divergence from the ratings", ("distribution_loss",)),
            ("Contrastive term", ("contrastive",)),
            ("Intra-share", ("intra_share",)),
            (
                "Cosine to the salient crop, between crops",
                ("positive_similarity", "intra_similarity"),
            ),
            ("Learning rate", ("lr",)),
            ("Images per second", ("images_per_s",)),
        ):
            charts += _chart(title, names, steps, at, is_noisy=names != ("lr",))
    return charts


def others(a: Analysis) -> Section | None:
    """The same model on other parts and other sets; None if there are none."""
    if not a.others:
        return None
    return Section(
        key="others",
        title="Other parts and other sets",
        note=f"The same weights, trained on {a.run.set_name}. For other sets look at the fitted "
        "PLCC: their scale is not the one the model answers in.",
        template="run/others.html",
        view=[(other, _other_words(a, other)) for other in a.others],
    )


def protocol(a: Analysis, refused: Sequence[str] = ()) -> Section:
    """How the figures were made: split, selection, crops, fit, machine, configuration."""
    p, e, env = a.run.protocol, a.evaluation, a.run.environment
    method = next((i.method for i in e.intervals.values()), "none")
    measured = {
        "Data set": a.run.set_name,
        "Version of the set": p.get("set_version", ""),
        "Split": p.get("split", ""),
        "Split hash": p.get("split_hash", ""),
        "Protocol": p.get("protocol", ""),
        "Images": _counts(a),
        "Epoch chosen": p.get("selection", ""),
        "Judged": " ".join((p.get("model", ""), "weights")) if p.get("model") else "",
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
    return Section(
        key="protocol",
        title="How it was measured",
        template="run/protocol.html",
        view=ProtocolView(
            measured=measured,
            machine=machine,
            settings=a.run.config,
            missing=(*a.run.missing, *refused),
        ),
    )


def hero(a: Analysis) -> tuple[HeroFigure, ...]:
    """The figures a reader looks for first."""
    e = a.evaluation
    names = ("srcc", "plcc_raw", "plcc_fit4", "krcc")
    return (
        *(
            HeroFigure(
                name=figure_name(name),
                value=format_figure(e.figure(name)),
                detail=format_interval(e, name) or reason_of_no_interval(e, name),
            )
            for name in names
        ),
        HeroFigure(
            name=figure_name("rmse_fit4"),
            value=_error(a),
            detail=f"in {a.run.scale.name} units, {_scale(a, short=True)}",
        ),
    )


def _other_words(a: Analysis, other: Other) -> str:
    scope = other.scope
    if scope is None:
        return UNKNOWN
    words = [scope.scale.description, scope.direction, f"mapping {scope.mapping}"]
    if scope.splits:
        middle = float(np.median([math.nan if s.srcc is None else s.srcc for s in scope.splits]))
        words.append(f"median SRCC of {len(scope.splits)} splits {format_figure(middle)}")
    if scope.left_out:
        words.append(f"{scope.left_out} training images left out")
    if not scope.left_out_known:
        words.append("not searched for training images")
    words += [
        f"{p.model} {format_figure(p.srcc)} (published)"
        for p in published_across(a.run.set_name, scope.tested_on)
    ]
    return "; ".join(words)


def _error(a: Analysis) -> str:
    wide = a.run.scale.high - a.run.scale.low
    digits = 3 if math.isfinite(wide) and wide <= 5 else 2
    return format_figure(a.evaluation.rmse_fit4, digits)


def _own_protocol(a: Analysis) -> str:
    p = a.run.protocol
    known = (p.get("protocol", ""), p.get("split", ""), p.get("selection", ""))
    return ", ".join(k for k in known if k) or "not recorded"


def _heat_map(a: Analysis, levels: Sequence[int]) -> list[tuple[str, Sequence[HeatCell | None]]]:
    by_place = {(c.distortion, c.level): c for c in a.cells}
    most = _most_error(a)
    return [
        (name, [_heat_cell(by_place.get((name, level)), most) for level in levels])
        for name in sorted({c.distortion for c in a.cells})
    ]


def _lacking(portions: Iterable[Portion]) -> str:
    """Why some portions have no interval, a sentence: pointing at a dash is not for everybody."""
    reasons = [reason_of_no_interval(p.evaluation, "srcc") for p in portions]
    found = dict.fromkeys(reason for reason in reasons if reason)
    return f"No interval: {'; '.join(found)}." if found else ""


def _most_error(a: Analysis) -> float:
    return max((c.mae for c in a.cells if math.isfinite(c.mae)), default=1.0) or 1.0


def _heat_cell(cell: Cell | None, most: float) -> HeatCell | None:
    if cell is None or not math.isfinite(cell.mae):
        return None
    is_small = cell.n < FEW
    return HeatCell(
        label=format_figure(cell.mae, 2),
        title=f"{cell.n} images, mean error {format_figure(cell.bias, 2)}",
        n=cell.n,
        is_small=is_small,
        # The worst is the deepest; the legend runs from paper to the same colour.
        background="background:color-mix(in srgb, "
        f"var(--warm) {round(HEAT_DEEPEST * cell.mae / most)}%, transparent)",
        conditions=[("distortion", cell.distortion), ("level", str(cell.level))],
    )


def _machine_name(key: str) -> str:
    if key.startswith("versions."):
        return key.removeprefix("versions.")
    known = {"git_commit": "Commit", "world_size": "Processes", "cores": "Processor cores"}
    return known.get(key, key.replace("_", " ").capitalize())


def _chart(
    title: str,
    names: Sequence[str],
    columns: Mapping[str, NDArray[np.float64]],
    at: NDArray[np.float64],
    *,
    is_noisy: bool = False,
) -> list[TrainingChart]:
    found = [(n, columns[n]) for n in names if n in columns and np.any(np.isfinite(columns[n]))]
    if not found:
        return []
    drawing = draw.curve(at, found, x_label="epochs", is_noisy=is_noisy)
    lines = [name.replace("_", " ") for name, _ in found]
    return [TrainingChart(title=title, drawing=drawing, lines=lines)]


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
    try:
        minutes, rest = divmod(round(float(seconds)), 60)
    except (ValueError, OverflowError):
        # The protocol of a stranger may call anything a number of seconds.
        return ""
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
