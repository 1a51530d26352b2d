"""The work of `lmcl eval`: evaluate, and say what came of it."""

import math
from pathlib import Path
from typing import Literal

import click
import numpy as np

from lmcl.evaluation.evaluate_run import PARTS, Asked, FitPart, evaluate_run
from lmcl.evaluation.metrics import Evaluation
from lmcl.evaluation.scope import Scope, SplitFigures
from lmcl.evaluation.words import caution_words, figures_words
from lmcl.inference.evaluate_table import TableAsked, evaluate_table
from lmcl.models.named import STARTER
from shards.datasets.registry import SourceOptions
from shards.datasets.roles import ColumnNames
from shards.score_scale import ScoreScale, scale_of_range


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
    scope = done.scope
    _print_figures(done.evaluation, done.path)
    if scope.is_across:
        click.echo(_across(scope))
    if scope.is_across or scope.fitted:
        click.echo(f"mapping: {scope.mapping}")
    if done.decoders is not None:
        click.echo(done.decoders.summary())
    for name, value in _medians(scope.splits):
        click.echo(f"median of {len(scope.splits)} splits: {name} {value:.4f}")


def run_on_table(
    model: Path,
    table: str,
    *,
    images: str | None,
    score_range: tuple[float, float] | None,
    lower_is_better: bool,
    extra_files: Literal["error", "ignore"] | None,
    path_column: str | None,
    score_column: str | None,
    std_column: str | None,
    group_column: str | None,
    output: Path | None,
    no_progress: bool,
) -> None:
    """Evaluate a model on a labelled folder and print its figures."""
    if lower_is_better and score_range is None:
        raise click.UsageError("--lower-is-better needs --score-range LOW HIGH as well")
    columns = ColumnNames(path=path_column, score=score_column, std=std_column, group=group_column)
    options = SourceOptions(
        score=_scale(score_range, lower_is_better),
        columns=columns,
        extra_files=extra_files or "error",
        missing="error",
    )
    asked = TableAsked(table=table, images=images, options=options)
    name: str | Path = STARTER if str(model) == STARTER and not model.is_dir() else model
    done = evaluate_table(name, asked, output=output, progress=not no_progress)
    for line in done.notes:
        click.echo(line, err=True)
    if score_range is None:
        scale = done.scope.scale.description
        click.echo(
            f"scale: {scale}, as the scores are; --score-range LOW HIGH says otherwise", err=True
        )
    _print_figures(done.evaluation, done.path)
    click.echo(_across(done.scope))


def _scale(score_range: tuple[float, float] | None, lower_is_better: bool) -> ScoreScale | None:
    if score_range is None:
        return None
    try:
        return scale_of_range(*score_range, lower_is_better=lower_is_better)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _print_figures(found: Evaluation, path: Path) -> None:
    click.echo(
        f"{path.stem}: {figures_words(found)}"
        + ("" if math.isnan(found.plcc_fit4) else f"  PLCC after the fit {found.plcc_fit4:.4f}")
        + f"\npredictions: {path}"
    )
    for words in (_unlabelled(found), caution_words(found)):
        if words:
            click.echo(words)


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
    left = ""
    if scope.left_out:
        left = f"; {scope.left_out} images of the run's train and val parts left out"
    if not scope.left_out_known:
        left += "; the training set is not here, so " + (
            "there may be more of them" if left else "shared images were not looked for"
        )
    return (
        f"trained on {scope.trained_on} ({scope.trained_scale.description}), tested on "
        f"{scope.tested_on} ({scope.scale.description}): {scope.direction}{left}"
    )
