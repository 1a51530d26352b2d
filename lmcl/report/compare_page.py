"""The page that shows several runs side by side: what each section shows, for its template."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from lmcl.report import figures as draw
from lmcl.report.analysis import FEW, Analysis
from lmcl.report.compare import Comparison, Model, Pair, SplitPair, summary
from lmcl.report.formatting import UNKNOWN, format_figure
from lmcl.report.matrix import Entry, columns
from lmcl.report.page import Header, Section, render_page
from lmcl.report.published import (
    Published,
    PublishedAcross,
    published_across,
    published_for,
)
from lmcl.report.run_page import FOOTER
from lmcl.report.sections import TrainingChart, interval_axis

_MOST_SCATTERS = 8
_MOST_CURVES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunsView:
    """A row per run, and one per published model."""

    analyses: Sequence[Analysis]
    published: Sequence[Published]
    axis: tuple[float, float]
    """Of the drawn intervals."""
    has_several_sets: bool
    """Splits of different sets may have one name."""
    few: int
    """Runs over fewer images than this are grey."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsView:
    """Runs that were tested on the same images, and why others were not compared."""

    pairs: Sequence[Pair]
    refusals: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitsView:
    """Models over their splits."""

    models: Sequence[tuple[Model, dict[str, float]]]
    """Each with median, mean, deviation, least and greatest."""
    drawing: Markup
    pairs: Sequence[SplitPair]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PortionCell:
    """One model inside one subset or distortion."""

    srcc: float
    """Median over the model's runs; NaN where it is not defined."""
    n: int
    """Images of the largest of these runs; 0: the model was not tested there."""
    is_small: bool
    is_highest: bool
    """Of several that rest on enough images each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PortionRow:
    """One subset or distortion, a rank correlation per model."""

    name: str
    kind: str
    n: int
    is_small: bool
    cells: Sequence[PortionCell]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PortionsView:
    """Rank correlations inside portions."""

    models: Sequence[str]
    rows: Sequence[PortionRow]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScattersView:
    """Small scatters, and validation during training."""

    scatters: Sequence[tuple[str, Markup]]
    validation: TrainingChart | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixCell:
    """One model on one set."""

    entry: Entry
    title: str
    pearson: float
    """Raw on the model's own test part, after the mapping elsewhere."""
    published: Sequence[PublishedAcross]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """One model on all sets."""

    trained_on: str
    model: str
    cells: Sequence[MatrixCell | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixColumn:
    """What a tested set is about, in words: hovering is not for everybody."""

    name: str
    scale: str
    images: str
    direction: str
    mapping: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetsView:
    """The matrix across sets."""

    columns: Sequence[str]
    rows: Sequence[MatrixRow]
    facts: Sequence[MatrixColumn]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingsView:
    """Settings that are not the same in all runs."""

    names: Sequence[str]
    differing: Sequence[tuple[str, Sequence[str]]]


def compare_page(c: Comparison) -> str:
    """The page of a comparison."""
    every = (
        _runs(c),
        _pairs(c),
        _discrimination(c),
        _splits(c),
        _portions(c),
        _scatters(c),
        _sets(c),
        _settings(c),
    )
    title = ", ".join(a.run.name for a in c.analyses[:4]) + (
        " and more" if len(c.analyses) > 4 else ""
    )
    return render_page(
        Header(kicker=_kicker(c), heading=title, lede=verdict(c)),
        [section for section in every if section is not None],
        title=f"Comparison: {title}",
        footer=FOOTER,
    )


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
        f"{p.b if p.difference.value > 0 else p.a} by {format_figure(abs(p.difference.value))}"
        for p in clear[:3]
    ]
    rest = f", and {len(clear) - 3} more pairs differ" if len(clear) > 3 else ""
    equal = len(c.pairs) - len(clear)
    same = f" {equal} of {len(c.pairs)} pairs do not differ measurably." if equal else ""
    return f"{'; '.join(said)}{rest}.{same}"


def _runs(c: Comparison) -> Section:
    published = published_for(c.analyses[0].run.set_name) if len(_set_names(c)) == 1 else []
    return Section(
        key="runs",
        title="Side by side",
        note="\N{DAGGER} published under another protocol; report.md has the sources."
        if published
        else "",
        template="compare/runs.html",
        view=RunsView(
            analyses=c.analyses,
            published=published,
            axis=interval_axis(
                (a.evaluation for a in c.analyses), also=[p.srcc for p in published]
            ),
            has_several_sets=len(_set_names(c)) > 1,
            few=FEW,
        ),
    )


def _pairs(c: Comparison) -> Section | None:
    if not c.pairs and not c.refusals:
        return None
    return Section(
        key="pairs",
        title="Is the difference real?",
        note="Both models on the same images. The interval and p come from a bootstrap over "
        "groups; Williams and Meng compare the rank correlations, F the residuals after the "
        "mapping. Images that share a reference are not independent: then trust the bootstrap. "
        "A bold p is below .05 after Holm's correction.",
        template="compare/pairs.html",
        view=PairsView(pairs=c.pairs, refusals=c.refusals),
    )


def _discrimination(c: Comparison) -> Section | None:
    if not any(a.pairs.found for a in c.analyses):
        return None
    return Section(
        key="told-apart",
        title="Pairs people can tell apart",
        note="Two images are different if their scores differ at the 5 % level, given the spread "
        "and number of their ratings. Areas under the ROC curve; chance is 0.5.",
        template="compare/discrimination.html",
        view=c.analyses,
    )


def _splits(c: Comparison) -> Section | None:
    if max(len(m.runs) for m in c.models) < 2:
        return None
    return Section(
        key="splits",
        title="Over the splits",
        note="Runs whose settings differ only in the split or the seed are one model. Random "
        "splits overlap, so the deviation over splits is no standard error; the last test corrects "
        "for it.",
        template="compare/splits.html",
        view=SplitsView(
            models=[(m, summary(m)) for m in c.models],
            drawing=draw.boxes([(m.name, m.values("srcc")) for m in c.models], y_label="SRCC"),
            pairs=c.split_pairs,
        ),
    )


def _portions(c: Comparison) -> Section | None:
    names = dict.fromkeys((p.kind, p.name) for a in c.analyses for p in a.portions)
    if not names:
        return None
    several = any(len(m.runs) > 1 for m in c.models)
    over = "; medians over the splits, and the most images of a split" if several else ""
    return Section(
        key="portions",
        title="By subset and distortion",
        note=f"Rank correlation inside each group{over}. The highest of several is bold; "
        f"groups of fewer than {FEW} images are grey. A small number is a model's own count of "
        "images, where it had fewer.",
        template="compare/portions.html",
        view=PortionsView(
            models=[m.name for m in c.models], rows=[_portion_row(c, key) for key in names]
        ),
    )


def _portion_row(c: Comparison, key: tuple[str, str]) -> PortionRow:
    found = [_portion(m, key) for m in c.models]
    # Each model has its own images: two of them are no match for the 36 of another.
    rivals = [value for value, n in found if math.isfinite(value) and n >= FEW]
    highest = max(rivals) if len(rivals) > 1 else math.nan
    cells = [
        PortionCell(srcc=value, n=n, is_small=n < FEW, is_highest=n >= FEW and value == highest)
        for value, n in found
    ]
    n = max(cell.n for cell in cells)
    return PortionRow(name=key[1], kind=key[0], n=n, is_small=n < FEW, cells=cells)


def _portion(m: Model, key: tuple[str, str]) -> tuple[float, int]:
    """Median rank correlation of a model's runs inside a group, and the images of the largest."""
    found = [p.evaluation for a in m.runs for p in a.portions if (p.kind, p.name) == key]
    values = [e.srcc for e in found if math.isfinite(e.srcc)]
    middle = float(np.median(values)) if values else math.nan
    return middle, max((e.n for e in found), default=0)


def _scatters(c: Comparison) -> Section:
    shots = [(a.run.name, draw.scatter(a, live=False)) for a in c.analyses[:_MOST_SCATTERS]]
    return Section(
        key="scatter",
        title="Predictions against scores",
        template="compare/scatters.html",
        view=ScattersView(scatters=shots, validation=_validation(c)),
    )


def _validation(c: Comparison) -> TrainingChart | None:
    wanted = {"epoch", "val_srcc"}
    logged = [a for a in c.analyses if wanted <= set(a.run.curves.epochs)]
    if not logged:
        return None
    shortest = min(len(a.run.curves.epochs["epoch"]) for a in logged)
    at = logged[0].run.curves.epochs["epoch"][:shortest] + 1.0
    series = [
        (a.run.name, a.run.curves.epochs["val_srcc"][:shortest]) for a in logged[:_MOST_CURVES]
    ]
    if not any(np.any(np.isfinite(values)) for _, values in series):
        return None
    return TrainingChart(
        title="Validation SRCC",
        drawing=draw.curve(at, series, x_label="epochs"),
        lines=[name for name, _ in series],
    )


def _sets(c: Comparison) -> Section | None:
    """Cross-set matrix: trained on one set, tested on others."""
    if all(e.own for e in c.matrix):
        return None
    names = columns(c.matrix)
    models = dict.fromkeys(e.model for e in c.matrix)
    return Section(
        key="sets",
        title="Across sets",
        note="Large: SRCC. Small: PLCC, raw on a model's own test part (framed), after the "
        "mapping on other sets; below, what others have published, under their protocols.",
        template="compare/sets.html",
        view=SetsView(
            columns=names,
            rows=[_matrix_row(c, model, names) for model in models],
            facts=[_matrix_column(c, name) for name in names],
        ),
    )


def _matrix_row(c: Comparison, model: str, names: Sequence[str]) -> MatrixRow:
    entries = {e.column: e for e in c.matrix if e.model == model}
    own = next(e for e in entries.values() if e.own)
    runs = f", median of {own.runs} runs" if own.runs > 1 else ""
    return MatrixRow(
        trained_on=own.trained_on,
        model=f"{model}{runs}",
        cells=[_matrix_cell(entries.get(name)) for name in names],
    )


def _matrix_cell(e: Entry | None) -> MatrixCell | None:
    if e is None:
        return None
    over = f", median of {e.splits} splits" if e.splits > 1 else ""
    return MatrixCell(
        entry=e,
        title=f"{e.n} images{over}; {e.direction}; mapping {e.mapping}",
        pearson=e.plcc_raw if e.own else e.plcc_fit4,
        published=[] if e.own else published_across(e.trained_on, e.tested_on),
    )


def _matrix_column(c: Comparison, name: str) -> MatrixColumn:
    here = [e for e in c.matrix if e.column == name]
    across = [e for e in here if not e.own]
    scale = next((e.scale for e in here if e.scale.is_known), here[0].scale)
    counts = sorted({e.n for e in across})
    which = sorted({e.rule if e.splits > 1 else "all images" for e in across})
    left = max((e.left_out for e in across), default=0)
    judged = f"{', '.join(which)}, {counts[0]} images" if across else UNKNOWN
    directions = sorted({f"from {e.trained_on}: {e.direction}" for e in across})
    return MatrixColumn(
        name=name,
        scale=scale.description,
        images=judged + (f", {left} training images left out" if left else ""),
        direction="; ".join(directions) or UNKNOWN,
        mapping="; ".join(sorted({e.mapping for e in across})) or UNKNOWN,
    )


def _settings(c: Comparison) -> Section:
    return Section(
        key="settings",
        title="Settings that differ",
        template="compare/settings.html",
        view=SettingsView(names=[a.run.name for a in c.analyses], differing=c.differing),
    )


def _set_names(c: Comparison) -> list[str]:
    return list(dict.fromkeys(a.run.set_name for a in c.analyses))


def _kicker(c: Comparison) -> str:
    return f"Comparison of {len(c.analyses)} runs · {', '.join(_set_names(c))}"
