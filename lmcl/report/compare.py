"""Several runs against each other: who is better, by how much, and how sure that is."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcl.evaluation import significance as statistics
from lmcl.evaluation.significance import Difference, Verdict
from lmcl.report.analysis import Analysis
from lmcl.report.matrix import Entry, matrix

# Runs that differ in nothing but these are one model on several splits.
_NOT_THE_MODEL = ("split", "seed", "root", "cache", "output", "backend", "threads")

_ROUNDS = 1000
_ROUNDS_A_PAIR = 200
_OTHER_IMAGES = "different test images; only their splits can be compared"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two runs on the same images."""

    a: str
    b: str
    n: int
    difference: Difference
    """Of the rank correlations, by a bootstrap over groups."""
    tests: tuple[Verdict, ...]
    """Williams and Meng on the rank correlations, F on the residuals after the mapping."""
    p_holm: float
    """The bootstrap's p-value after Holm's correction over all pairs of the report."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """One configuration on one or more splits."""

    name: str
    runs: tuple[Analysis, ...]

    def values(self, figure: str) -> NDArray[np.float64]:
        """A figure of every run, in their order."""
        return np.array([a.evaluation.figure(figure) for a in self.runs])

    def by_split(self) -> dict[str, list[Analysis]]:
        """The runs on each set and split; those that do not say their split are left out."""
        found: dict[str, list[Analysis]] = {}
        for a in self.runs:
            if split := a.run.protocol.get("split", ""):
                found.setdefault(f"{a.run.set_name}/{split}", []).append(a)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitPair:
    """Two models over the splits both were run on."""

    a: str
    b: str
    splits: int
    """Different splits; runs of one model on one split (other seeds) count once, as their mean."""
    runs: tuple[int, int]
    """Runs of each model on those splits."""
    mean: float
    """Mean difference in rank correlation, first minus second, over the splits."""
    tests: tuple[Verdict, ...]

    @property
    def averaged(self) -> str:
        """What was averaged before the splits were compared; empty if nothing was."""
        if self.runs == (self.splits, self.splits):
            return ""
        told = " and ".join(
            f"{count} runs of {name}"
            for name, count in zip((self.a, self.b), self.runs, strict=True)
        )
        return (
            f"{told} on {self.splits} {'split' if self.splits == 1 else 'splits'}: runs of one "
            "model on one split were averaged first"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Everything that can be said about several runs together."""

    analyses: tuple[Analysis, ...]
    models: tuple[Model, ...]
    pairs: tuple[Pair, ...]
    split_pairs: tuple[SplitPair, ...]
    matrix: tuple[Entry, ...]
    """Every model on its own set and on those `lmcl eval` judged it on."""
    refusals: tuple[str, ...]
    """Pairs that cannot be compared, and why; one sentence per reason."""
    differing: tuple[tuple[str, tuple[str, ...]], ...]
    """Settings that are not the same in all runs, with the value of each run."""

    def to_json(self) -> dict[str, Any]:
        """The comparison part of results.json; NaN becomes null."""
        found: dict[str, Any] = _plain(
            {
                "pairs": [dataclasses.asdict(p) for p in self.pairs],
                "split_pairs": [dataclasses.asdict(p) for p in self.split_pairs],
                "models": [
                    {"name": m.name, "runs": [a.run.name for a in m.runs], **summary(m)}
                    for m in self.models
                ],
                "matrix": [{**dataclasses.asdict(e), "column": e.column} for e in self.matrix],
                "refusals": list(self.refusals),
                "differing_settings": {name: list(values) for name, values in self.differing},
            }
        )
        return found


def compare(analyses: Sequence[Analysis]) -> Comparison:
    """Compare every run with every other one on the images they share entirely."""
    comparable: list[tuple[Analysis, Analysis]] = []
    refused: dict[str, list[str]] = {}
    models = _models(analyses)
    repeated = {a.run.root for m in models if len(m.runs) > 1 for a in m.runs}
    for a, b in itertools.combinations(analyses, 2):
        why = _why_not(a, b)
        split_of = [x.run.protocol.get("split", "") for x in (a, b)]
        on_splits = {a.run.root, b.run.root} <= repeated and split_of[0] != split_of[1]
        if why == _OTHER_IMAGES and on_splits:
            continue  # splits of one model, or of two: the section on splits compares those
        if why:
            refused.setdefault(why, []).append(f"{a.run.name} and {b.run.name}")
        else:
            comparable.append((a, b))
    # The least p of a bootstrap is two over its rounds; Holm multiplies it by the pairs.
    rounds = max(_ROUNDS, _ROUNDS_A_PAIR * len(comparable))
    pairs = [_pair(a, b, resamples=rounds) for a, b in comparable]
    corrected = statistics.holm([p.difference.p for p in pairs])
    return Comparison(
        analyses=tuple(analyses),
        models=models,
        pairs=tuple(
            dataclasses.replace(p, p_holm=q) for p, q in zip(pairs, corrected, strict=True)
        ),
        split_pairs=tuple(_split_pairs(models)),
        matrix=matrix([(m.name, m.runs) for m in models]),
        refusals=tuple(f"{_few(names)}: {why}" for why, names in refused.items()),
        differing=_differing(analyses),
    )


def summary(model: Model) -> dict[str, float]:
    """Median, mean, deviation, least and greatest rank correlation over a model's runs."""
    values = model.values("srcc")
    return {
        "median": float(np.median(values)),
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        "min": float(np.min(values)),
        "max": float(np.max(values)),
    }


def _why_not(a: Analysis, b: Analysis) -> str:
    p, q = a.run.headline, b.run.headline
    if a.run.set_name != b.run.set_name:
        return "different sets"
    if not np.array_equal(p.id, q.id):
        return _OTHER_IMAGES
    if not np.array_equal(p.mos, q.mos, equal_nan=True):
        return "the same images with different scores: the label files differ"
    bad = [x.run.name for x in (a, b) if "srcc" in x.evaluation.reasons]
    return f"no rank correlation for {', '.join(bad)}" if bad else ""


def _pair(a: Analysis, b: Analysis, *, resamples: int) -> Pair:
    p, q, keep = a.run.headline, b.run.headline, a.labelled
    x, y, mos = p.prediction[keep], q.prediction[keep], p.mos[keep]
    groups = np.unique(p.group[keep].astype(str), return_inverse=True)[1].astype(np.int64)
    (r_a, r_b, r_ab), _ = statistics.correlations_between(x, y, mos)
    residuals = [e.fit4(v) - mos for e, v in ((a.evaluation, x), (b.evaluation, y))]
    n = len(mos)
    return Pair(
        a=a.run.name,
        b=b.run.name,
        n=n,
        difference=statistics.srcc_difference(x, y, mos, groups, resamples=resamples),
        tests=(
            statistics.williams(r_a, r_b, r_ab, n),
            statistics.meng(r_a, r_b, r_ab, n),
            statistics.f_test(residuals[0], residuals[1]),
        ),
        p_holm=math.nan,
    )


def _models(analyses: Sequence[Analysis]) -> tuple[Model, ...]:
    groups: dict[tuple[tuple[str, str], ...], list[Analysis]] = {}
    for a in analyses:
        kept = ((k, v) for k, v in a.run.config.items() if k.split(".")[-1] not in _NOT_THE_MODEL)
        # Without a configuration nothing says that two runs are the same model.
        key = tuple(sorted(kept)) if a.run.config else (("", a.run.name),)
        # The set stands in the settings as a place only, and places do not count.
        key = (("trained on", a.run.set_name), *key)
        groups.setdefault(key, []).append(a)
    first = [runs[0].run.name for runs in groups.values()]
    shared = [_shared_name([a.run.name for a in runs]) for runs in groups.values()]
    names = shared if len(set(shared)) == len(shared) else first
    return tuple(
        Model(name=name, runs=tuple(runs))
        for name, runs in zip(names, groups.values(), strict=True)
    )


def _shared_name(names: Sequence[str]) -> str:
    """The folder that all runs of a model lie in, as far as their names tell; else the first's."""
    parts = [name.split("/")[:-1] for name in names]
    return "/".join(parts[0]) if parts[0] and parts.count(parts[0]) == len(parts) > 1 else names[0]


def _split_pairs(models: Sequence[Model]) -> list[SplitPair]:
    found = []
    for a, b in itertools.combinations(models, 2):
        of_a, of_b = a.by_split(), b.by_split()
        common = [name for name in of_a if name in of_b]
        runs = (sum(len(of_a[n]) for n in common), sum(len(of_b[n]) for n in common))
        # One run of each on one split: the test on the same images says all there is to say.
        if max(runs) < 2:
            continue
        left, right = (
            [float(np.mean([r.evaluation.srcc for r in of[n]])) for n in common]
            for of in (of_a, of_b)
        )
        first = of_a[common[0]][0]
        train = first.run.protocol.get("counts.train", "")
        found.append(
            SplitPair(
                a=a.name,
                b=b.name,
                splits=len(common),
                runs=runs,
                mean=float(np.mean(left) - np.mean(right)),
                tests=(
                    statistics.wilcoxon(left, right),
                    statistics.sign_test(left, right),
                    statistics.nadeau_bengio(
                        left,
                        right,
                        n_train=int(train) if train.isdecimal() and len(train) < 16 else 0,
                        n_test=first.evaluation.n,
                    ),
                ),
            )
        )
    return found


def _few(names: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more pairs" if len(names) > most else ""
    return "; ".join(names[:most]) + rest


def _differing(analyses: Sequence[Analysis]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    names = dict.fromkeys(name for a in analyses for name in a.run.config)
    rows = [(name, tuple(a.run.config.get(name, "") for a in analyses)) for name in names]
    return tuple(row for row in rows if len(set(row[1])) > 1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
