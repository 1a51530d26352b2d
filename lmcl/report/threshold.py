"""`lmcl threshold`: the cut of a run, what it costs, a page with the curve and images at the cut.

Everything comes from the run folder's predictions; neither model nor set is needed.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from lmcl.errors import LmclError
from lmcl.evaluation.predictions import Predictions
from lmcl.evaluation.threshold import (
    Judgement,
    Target,
    ThresholdRule,
    check_rule_name,
    choose_cut,
    judge,
    threshold_curve,
    write_rule,
)
from lmcl.report import figures as draw
from lmcl.report.page import Header, HeroFigure, Section, render_page
from lmcl.report.pictures import Pictures, Shot, shot
from lmcl.report.run import RunData, read_run
from lmcl.utils.files import write_atomic
from shards.text import printable

_SHOTS = 12
"""Images shown on each side of the cut."""
_WORDS: dict[Target, str] = {
    "precision": "at least {:.0%} of the rejected images are bad",
    "recall": "at least {:.0%} of the bad images are rejected",
    "reject-share": "at most {:.0%} of all images are rejected",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdView:
    """The curve of a part and what the cut does there."""

    part: str
    drawing: Markup
    rows: Sequence[tuple[str, str, str, str]]
    """Name, share, interval, images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutView:
    """The images next to the cut, rejected and kept."""

    lists: Sequence[tuple[str, Sequence[Shot]]]


def choose_threshold(
    run_folder: Path, *, target: Target, wanted: float, bad_below: float, name: str | None = None
) -> tuple[ThresholdRule, Path]:
    """Choose a cut on the val part, judge it on the test part, write rule and page.

    Args:
        run_folder: A finished run.
        target: What is promised.
        wanted: The promised value.
        bad_below: People's quality in [0, 1] below which an image is bad.
        name: Of the rule; None: made of the others.

    Raises:
        LmclError: If the run, its model folder or its val part is missing (4), the name is none
            (2), or no cut keeps the promise (3).
    """
    rule_name = name or f"bad-{bad_below:g}-{target}-{wanted:g}"
    try:
        check_rule_name(rule_name)
    except ValueError as error:
        raise LmclError(f"--name: {error}", exit_code=2) from error
    run = read_run(run_folder)
    folder = run_folder / "model"
    if not folder.is_dir():
        raise LmclError(
            f"{printable(folder)}: there is no such model folder to keep the rule in; name a "
            "finished run",
            exit_code=4,
        )
    val = _labelled(run, "val")
    curve = threshold_curve(*val, bad_below=bad_below)
    cut = choose_cut(curve, target, wanted)
    test = _labelled(run, "test") if "test" in run.predictions else None
    rule = ThresholdRule(
        name=rule_name,
        cut=cut,
        bad_below=bad_below,
        target=target,
        wanted=wanted,
        split=run.protocol.get("split", "")[:1000],
        val=judge(*val, cut=cut, bad_below=bad_below),
        test=judge(*test, cut=cut, bad_below=bad_below) if test else None,
    )
    write_rule(folder, rule)
    page = run_folder / "thresholds" / f"{rule.name}.html"
    write_atomic(page, threshold_page(run, rule).encode())
    return rule, page


def _labelled(run: RunData, part: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the model and what people say of a part's scored images, as qualities.

    Raises:
        LmclError: If there is no such part (4), or no image of it has a score (3).
    """
    if part not in run.predictions:
        raise LmclError(
            f"{printable(run.root)}: there is no predictions/{part}.csv, and the cut is chosen on "
            f"the {part} part; write it by `lmcl eval {printable(run.root)} --part {part}`, or "
            "train on a split that has one (`lmcl-shard split --val-fraction 0.1`)",
            exit_code=4,
        )
    p = run.predictions[part]
    quality, truth = qualities(run, p)
    known = np.isfinite(quality) & np.isfinite(truth)
    if not np.any(known):
        raise LmclError(
            f"{printable(run.root)}: no image of the {part} part has a score and a prediction; "
            "a threshold is chosen by what people said",
            exit_code=3,
        )
    return quality[known], truth[known]


def qualities(run: RunData, p: Predictions) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the model and what people say of images, in [0, 1], higher = better; NaN: unknown."""
    return p.prediction_unit, run.scale.to_unit(p.mos)


def threshold_page(run: RunData, rule: ThresholdRule) -> str:
    """The page of a rule: the curves of val and test, and the test images next to the cut."""
    views = [
        _curve_view(run, rule, part, found)
        for part, found in (("test", rule.test), ("val", rule.val))
        if found is not None
    ]
    promise = _WORDS[rule.target].format(rule.wanted)
    scale = run.scale
    bad = f"{rule.bad_below:g} of quality"
    if scale.is_known:
        bad += f" ({scale.name} {float(scale.from_unit(rule.bad_below)):.4g})"
    header = Header(
        kicker=f"{run.name} · lmcl threshold",
        heading=rule.name,
        lede=f"Images that the model scores below {rule.cut:.3f} of quality are rejected: on the "
        f"val part {promise}. An image is bad if people score it below {bad}.",
        figures=_heroes(rule.test or rule.val),
    )
    sections = [
        Section(
            key="curve",
            title="What other cuts would cost",
            note="A cut further to the right finds more of the bad images and is more often wrong. "
            "The line is the chosen cut.",
            template="threshold/curve.html",
            view=views,
        )
    ]
    shots = _at_the_cut(run, rule)
    if shots.lists:
        sections.append(
            Section(
                key="images",
                title="Images at the cut",
                note="Nearest to it on both sides; of the test part where there is one.",
                template="threshold/images.html",
                view=shots,
            )
        )
    footer = "Written by lmcl threshold from the run folder alone."
    return render_page(header, sections, title=rule.name, footer=footer)


def _heroes(found: Judgement) -> tuple[HeroFigure, ...]:
    named = (
        ("Precision", found.precision, "of the rejected are bad"),
        ("Recall", found.recall, "of the bad are rejected"),
        ("Rejected", found.rejected, "of all"),
    )
    return tuple(
        HeroFigure(
            name=name,
            value=f"{share.value:.3f}" if share.of else "\N{EN DASH}",
            detail=f"{share.hits} of {share.of} {words}; 95 % interval {share.low:.3f} to "
            f"{share.high:.3f}",
        )
        for name, share, words in named
    )


def _curve_view(run: RunData, rule: ThresholdRule, part: str, found: Judgement) -> ThresholdView:
    curve = threshold_curve(*_labelled(run, part), bad_below=rule.bad_below)
    named = (("precision", found.precision), ("recall", found.recall), ("rejected", found.rejected))
    return ThresholdView(
        part="Test part" if part == "test" else "Val part, where the cut was chosen",
        drawing=draw.threshold_chart(curve, [(rule.name, rule.cut)]),
        rows=[
            (
                name,
                f"{share.value:.3f}" if share.of else "\N{EN DASH}",
                f"{share.low:.3f} to {share.high:.3f}",
                f"{share.hits} of {share.of}",
            )
            for name, share in named
        ],
    )


def _at_the_cut(run: RunData, rule: ThresholdRule) -> CutView:
    """The images of the headline part nearest to the cut, rejected and kept."""
    quality, _ = qualities(run, run.headline)
    pictures = Pictures(run)
    order = np.argsort(np.abs(quality - rule.cut), kind="stable")
    order = order[np.isfinite(quality[order])]
    lists = []
    for title, side in (
        ("Just below: rejected", quality < rule.cut),
        ("Just above: kept", quality >= rule.cut),
    ):
        rows = [int(i) for i in order if side[i]][:_SHOTS]
        if rows:
            lists.append((title, [shot(run, i, pictures) for i in rows]))
    return CutView(lists=lists)
