"""The work of `lmcl eval`: evaluate, and say what came of it."""

import math
from pathlib import Path
from typing import Literal

import click
import numpy as np

from lmcl.evaluation.evaluate_run import PARTS, Asked, FitPart, evaluate_run
from lmcl.evaluation.metrics import Evaluation
from lmcl.evaluation.scope import (
    Scope,
    SplitFigures,
)
from lmcl.evaluation.words import caution_words, figures_words


def run(
    *,
    run: Path,
    data: str | None,
    part: str | None,
    split: str | None,
    protocol: str,
    fit_on: FitPart | None,
    decode: Literal["auto", "cpu", "gpu", "both"] | None,
    batch_size: int,
    no_progress: bool,
) -> None:
    """Evaluate a run and print its figures."""
    asked = Asked(
        data=data, part=_part(part, split), protocol=protocol, fit_on=fit_on, decode=decode
    )
    done = evaluate_run(run, asked, batch_size=batch_size, progress=not no_progress)
    found, scope, path = done.evaluation, done.scope, done.path
    click.echo(
        f"{path.stem}: {figures_words(found)}"
        + ("" if math.isnan(found.plcc_fit4) else f"  PLCC after the fit {found.plcc_fit4:.4f}")
        + f"\npredictions: {path}"
    )
    for words in (_unlabelled(found), caution_words(found)):
        if words:
            click.echo(words)
    if scope.tested_on != scope.trained_on:
        click.echo(_across(scope))
    if scope.tested_on != scope.trained_on or scope.fitted:
        click.echo(f"mapping: {scope.mapping}")
    if done.decoders is not None:
        click.echo(done.decoders.summary())
    for name, value in _medians(scope.splits):
        click.echo(f"median of {len(scope.splits)} splits: {name} {value:.4f}")


def _part(part: str | None, split: str | None) -> str:
    """The part, or the name of a split, that is meant by two options."""
    if part is not None and split is not None:
        raise click.UsageError(
            "--part is of the run's own split and --split names another one; give one of them"
        )
    if split in PARTS:
        click.echo(f"--split {split}: a part is named by --part {split} now", err=True)
    return part or split or "test"


def _unlabelled(found: Evaluation) -> str:
    """What became of predictions that nothing can be compared with; empty if there are none."""
    if not found.n_unlabelled:
        return ""
    return (
        f"{found.n_unlabelled} of the {found.n + found.n_unlabelled} evaluated images have no "
        "score in the set, their predictions are written all the same"
    )


def _medians(splits: tuple[SplitFigures, ...]) -> list[tuple[str, float]]:
    found = []
    for name in ("srcc", "plcc_raw", "plcc_fit4"):
        values = [v for s in splits if (v := getattr(s, name)) is not None]
        if values:
            found.append((name, float(np.median(values))))
    return found


def _across(scope: Scope) -> str:
    left = (
        f"; {scope.left_out} images of the run's train and val parts left out"
        if scope.left_out
        else ""
        if scope.left_out_known
        else "; the training set is not here, so shared images were not looked for"
    )
    return (
        f"trained on {scope.trained_on} ({scope.trained_scale.description}), tested on "
        f"{scope.tested_on} ({scope.scale.description}): {scope.direction}{left}"
    )
