"""What a sweep found: figures over splits or seeds, and tests between its configurations.

Over splits the variance of a mean is corrected for the images that splits share; over seeds runs
are independent and it is not (docs/reports.md).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from scipy import stats

from lmcl.errors import LmclError
from lmcl.evaluation.metrics import Interval
from lmcl.evaluation.significance import holm, nadeau_bengio, sign_test, wilcoxon
from lmcl.sweep.launch import Failure
from lmcl.sweep.plan import Over, Task

FIGURES = ("srcc", "plcc_raw", "plcc_fit4", "krcc", "rmse_fit4")
HEADLINE = "srcc"


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One finished run."""

    label: str
    folder: Path
    n: int
    """Images judged."""
    figures: dict[str, float]
    """By the names of `FIGURES`; NaN where a figure is not defined."""
    n_train: int
    train_seconds: float


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One figure over the runs of a configuration."""

    n: int
    """Runs in which the figure is defined."""
    median: float
    mean: float
    sd: float
    """Between runs; NaN for one run."""
    low: float
    high: float
    interval: Interval | None
    """Of the mean; None for one run."""


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """All finished runs of one configuration."""

    name: str
    file: Path
    runs: tuple[RunFigures, ...]
    spreads: dict[str, Spread]
    """By the names of `FIGURES`."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """How much better one configuration is than another over the same splits or seeds."""

    model: str
    than: str
    n: int
    """Splits or seeds both have."""
    mean: float
    """Mean difference in rank correlation."""
    interval: Interval | None
    p_t: float
    """Paired t-test, corrected for overlapping splits where runs go over splits."""
    p_t_holm: float
    """The same after Holm's correction over all comparisons of the sweep."""
    p_wilcoxon: float
    p_sign: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything a sweep can say; becomes summary.json."""

    over: Over
    models: tuple[ModelFigures, ...]
    steps: tuple[Step, ...]
    """Each configuration against the one before it, then against the first."""
    unfinished: tuple[str, ...]
    failures: tuple[Failure, ...]
    schema: int = 1

    def to_json(self) -> bytes:
        """UTF-8; NaN becomes null."""
        return (
            msgspec.json.format(
                msgspec.json.encode(_null(msgspec.to_builtins(self, enc_hook=str))), indent=2
            )
            + b"\n"
        )


def summarise(tasks: Sequence[Task], over: Over, failures: Sequence[Failure]) -> Summary:
    """Read the figures of every finished run and compare.

    Raises:
        LmclError: If a finished run's files cannot be read (exit code 3).
    """
    models = []
    for name in dict.fromkeys(task.model for task in tasks):
        own = [task for task in tasks if task.model == name]
        runs = tuple(read_run(task) for task in own if task.is_finished)
        spreads = {figure: _spread(runs, figure, over) for figure in FIGURES}
        models.append(ModelFigures(name=name, file=own[0].file, runs=runs, spreads=spreads))
    return Summary(
        over=over,
        models=tuple(models),
        steps=_steps(models, over),
        unfinished=tuple(task.name for task in tasks if not task.is_finished),
        failures=tuple(failures),
    )


def read_run(task: Task) -> RunFigures:
    """The figures a finished run wrote."""
    try:
        metrics = msgspec.json.decode((task.folder / "metrics.json").read_bytes())
        protocol = msgspec.json.decode((task.folder / "protocol.json").read_bytes())
        figures = {name: metrics[name] for name in FIGURES}
        return RunFigures(
            label=task.label,
            folder=task.folder,
            n=int(metrics["n"]),
            figures={name: math.nan if v is None else float(v) for name, v in figures.items()},
            n_train=int(protocol["counts"]["train"]),
            train_seconds=float(protocol["train_seconds"]),
        )
    except (OSError, KeyError, TypeError, ValueError, msgspec.DecodeError) as error:
        raise LmclError(
            f"{task.folder}: metrics.json or protocol.json cannot be read ({error!r}); remove "
            "report.html there and call the sweep again: the run is evaluated anew",
            exit_code=3,
        ) from error


def table(summary: Summary) -> str:
    """The summary for a terminal."""
    width = max(len(model.name) for model in summary.models)
    unit = {"splits": "split", "seeds": "seed"}[summary.over]
    lines = [
        f"{'SRCC on the evaluated part':{width}}  {'n':>3} {'median':>8} {'mean':>8} {'sd':>7} "
        f"{'95 % of the mean':>18} {'PLCC median':>12}"
    ]
    for model in summary.models:
        srcc, plcc = model.spreads[HEADLINE], model.spreads["plcc_raw"]
        lines.append(
            f"{model.name:{max(width, 26)}}  {srcc.n:3d} {srcc.median:8.4f} {srcc.mean:8.4f} "
            f"{srcc.sd:7.4f} {_range(srcc.interval):>18} {plcc.median:12.4f}"
        )
    if summary.steps:
        lines += ["", f"difference in SRCC, paired by {unit} (p after Holm in brackets)"]
    for step in summary.steps:
        lines.append(
            f"{step.model} - {step.than}: {step.mean:+.4f} {_range(step.interval)}  "
            f"t-test p {step.p_t:.3g} ({step.p_t_holm:.3g}), Wilcoxon p {step.p_wilcoxon:.3g}, "
            f"n {step.n}"
        )
    for failure in summary.failures:
        words = f": {failure.last_words}" if failure.last_words else ""
        lines.append(f"FAILED {failure.name}, exit code {failure.exit_code}{words}")
    if summary.unfinished:
        lines.append(f"not finished: {', '.join(summary.unfinished)}")
    return "\n".join(lines)


def _spread(runs: Sequence[RunFigures], figure: str, over: Over) -> Spread:
    values = np.array([run.figures[figure] for run in runs], dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        nan = math.nan
        return Spread(n=0, median=nan, mean=nan, sd=nan, low=nan, high=nan, interval=None)
    return Spread(
        n=len(values),
        median=float(np.median(values)),
        mean=float(np.mean(values)),
        sd=float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        low=float(np.min(values)),
        high=float(np.max(values)),
        interval=_mean_interval(values.tolist(), *_counts(runs, over)),
    )


def _steps(models: Sequence[ModelFigures], over: Over) -> tuple[Step, ...]:
    pairs = list(zip(models[1:], models[:-1], strict=True))
    # The second configuration's step from the first is there already.
    pairs += [(model, models[0]) for model in models[2:]]
    steps = [step for model, than in pairs if (step := _step(model, than, over)) is not None]
    corrected = holm([step.p_t for step in steps])
    return tuple(
        dataclasses.replace(step, p_t_holm=p) for step, p in zip(steps, corrected, strict=True)
    )


def _step(model: ModelFigures, than: ModelFigures, over: Over) -> Step | None:
    theirs = {run.label: run for run in than.runs}
    pairs = [(run, theirs[run.label]) for run in model.runs if run.label in theirs]
    pairs = [pair for pair in pairs if all(math.isfinite(run.figures[HEADLINE]) for run in pair)]
    if not pairs:
        return None
    a = [ours.figures[HEADLINE] for ours, _ in pairs]
    b = [other.figures[HEADLINE] for _, other in pairs]
    n_train, n_test = _counts([ours for ours, _ in pairs], over)
    difference = [x - y for x, y in zip(a, b, strict=True)]
    # Without images judged the corrected test is the ordinary paired one.
    t_test = nadeau_bengio(a, b, n_train=n_train, n_test=n_test)
    return Step(
        model=model.name,
        than=than.name,
        n=len(pairs),
        mean=float(np.mean(difference)),
        interval=_mean_interval(difference, n_train, n_test),
        p_t=t_test.p,
        p_t_holm=math.nan,
        p_wilcoxon=wilcoxon(a, b).p,
        p_sign=sign_test(a, b).p,
    )


def _counts(runs: Sequence[RunFigures], over: Over) -> tuple[int, int]:
    """Images trained on and judged, over all runs; none judged over seeds: nothing overlaps."""
    trained = sum(run.n_train for run in runs)
    return max(trained, 1), sum(run.n for run in runs) if over == "splits" else 0


def _mean_interval(values: Sequence[float], n_train: int, n_test: int) -> Interval | None:
    """95 % interval of a mean over runs by Student's t.

    Source: Nadeau and Bengio [2003]: variance times 1/k + n_test/n_train.
    """
    k = len(values)
    if k < 2:
        return None
    error = math.sqrt((1 / k + n_test / n_train) * float(np.var(values, ddof=1)))
    half = float(stats.t.ppf(0.975, k - 1)) * error
    mean = float(np.mean(values))
    method = "nadeau-bengio" if n_test else "student-t"
    return Interval(low=mean - half, high=mean + half, method=method)


def _range(interval: Interval | None) -> str:
    return "-" if interval is None else f"[{interval.low:+.4f}, {interval.high:+.4f}]"


def _null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
