"""Train on one set, test on another: all runs as one table, direction and mapping stated.

On its own set a model is judged on its test part; on others on what `lmcl eval` judged. Scales
differ between sets, so there the correlation after the mapping is the one to read.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lmcl.evaluation.scope import ON_THEMSELVES, WHOLE
from lmcl.report.analysis import Analysis, Other
from shards.score_scale import UNKNOWN_SCALE, ScoreScale

FIGURES = ("srcc", "krcc", "plcc_raw", "plcc_fit4", "rmse_fit4")
_UNRECORDED = "not recorded"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One model on one set: medians over its runs, and over the splits of the tested set."""

    model: str
    """First run of the model."""
    trained_on: str
    tested_on: str
    own: bool
    """Whether it is the test part of the set the model was trained on."""
    rule: str
    """Which images: a part, `whole`, or the rule the tested set's splits were drawn by."""
    runs: int
    """Runs of the model the medians are taken over."""
    splits: int
    """Splits of the tested set in each; 1 if all its images were judged at once."""
    n: int
    """Images behind one figure, the least of all."""
    srcc: float
    krcc: float
    plcc_raw: float
    plcc_fit4: float
    rmse_fit4: float
    scale: ScoreScale
    """Of the tested set; figures are about predictions in this scale and direction."""
    direction: str
    """Whether the model's direction had to be turned for the tested set."""
    mapping: str
    """What the 4-parameter mapping was fitted on."""
    left_out: int
    """Images not judged since the model was trained on them."""

    @property
    def column(self) -> str:
        """The tested set, with the rule where it is a rule of splits."""
        return self.tested_on if self.own or self.splits == 1 else f"{self.tested_on}, {self.rule}"


def matrix(models: Sequence[tuple[str, Sequence[Analysis]]]) -> tuple[Entry, ...]:
    """All entries, models in their order, each on its own set first.

    Args:
        models: Name and runs of each; all runs of one were trained on the same set.
    """
    found: list[Entry] = []
    for name, runs in models:
        groups: dict[tuple[bool, str, str], list[Entry]] = {}
        for a in runs:
            for entry in (
                _own(name, a),
                *(_other(name, a, o) for o in a.others if is_across(a, o)),
            ):
                groups.setdefault((entry.own, entry.tested_on, entry.rule), []).append(entry)
        found += [_median(entries) for entries in groups.values()]
    return tuple(found)


def columns(entries: Sequence[Entry]) -> list[str]:
    """Tested sets: those that somebody was trained on first, in the order of the runs."""
    own = dict.fromkeys(e.column for e in entries if e.own)
    return list(dict.fromkeys([*own, *(e.column for e in entries)]))


def is_across(a: Analysis, other: Other) -> bool:
    """Whether predictions beside the headline are about another set."""
    if other.scope is not None:
        if other.scope.across is None:
            return other.scope.tested_on != a.run.set_name
        return other.scope.across
    return other.name not in ("train", "val", "test", "all")


def _own(model: str, a: Analysis) -> Entry:
    e, scope = a.evaluation, a.run.scopes.get(a.run.part)
    return Entry(
        model=model,
        trained_on=a.run.set_name,
        tested_on=a.run.set_name,
        own=True,
        rule=a.run.part,
        runs=1,
        splits=1,
        n=e.n,
        **{name: e.figure(name) for name in FIGURES},
        scale=a.run.scale,
        direction="same direction",
        mapping=scope.mapping if scope else ON_THEMSELVES,
        left_out=0,
    )


def _other(model: str, a: Analysis, other: Other) -> Entry:
    e, scope = other.evaluation, other.scope
    figures = {name: e.figure(name) for name in FIGURES}
    if scope is not None and scope.splits:
        figures = {name: _middle([getattr(s, name) for s in scope.splits]) for name in FIGURES}
    return Entry(
        model=model,
        trained_on=a.run.set_name,
        tested_on=scope.tested_on if scope else other.name,
        own=False,
        rule=scope.protocol if scope and scope.splits else scope.part if scope else WHOLE,
        runs=1,
        splits=len(scope.splits) if scope and scope.splits else 1,
        n=min(s.n for s in scope.splits) if scope and scope.splits else e.n,
        **figures,
        scale=scope.scale if scope else UNKNOWN_SCALE,
        direction=scope.direction if scope else f"direction {_UNRECORDED}",
        mapping=scope.mapping if scope else ON_THEMSELVES,
        left_out=scope.left_out if scope else 0,
    )


def _median(entries: Sequence[Entry]) -> Entry:
    first = entries[0]
    return dataclasses.replace(
        first,
        runs=len(entries),
        n=min(e.n for e in entries),
        left_out=max(e.left_out for e in entries),
        srcc=_middle([e.srcc for e in entries]),
        krcc=_middle([e.krcc for e in entries]),
        plcc_raw=_middle([e.plcc_raw for e in entries]),
        plcc_fit4=_middle([e.plcc_fit4 for e in entries]),
        rmse_fit4=_middle([e.rmse_fit4 for e in entries]),
    )


def _middle(values: Sequence[float | None]) -> float:
    """Median; NaN as soon as one is not defined: a median of the rest would flatter."""
    known = [math.nan if v is None else v for v in values]
    return float(np.median(known)) if known else math.nan
