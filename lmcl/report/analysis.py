"""From predictions to everything the report says about them."""

import collections
import dataclasses
import importlib.util
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcl.evaluation.metrics import Evaluation, LogisticMapping, evaluate
from lmcl.evaluation.predictions import NO_LEVEL, Predictions
from lmcl.evaluation.scope import ON_THEMSELVES, Scope
from lmcl.report.discrimination import PairAnalysis, analyse_pairs
from lmcl.report.floor import Floor, compare_with_probe
from lmcl.report.intervals import Coverage, coverages
from lmcl.report.run import RunData

FEW = 20
"""Below this many images a figure is printed in grey: the 95 % interval of an SRCC of .8 over 20
images is .50 to .93."""
MOST_OF_A_GROUP = 2
"""Images of one group (one content) among the best or the worst, while other groups have some."""
MOST_PORTIONS = 100
"""Subsets, or distortions, with figures of their own: those with the most images."""
MOST_LEVELS = 50
"""Levels of distortions in the heat map."""
_UMAP_NEIGHBOURS = 15
"""The default of UMAP's authors; it needs more points than that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Portion:
    """Images with something in common, and the figures among them."""

    kind: str
    """subset or distortion."""
    name: str
    evaluation: Evaluation
    bias: float
    """Mean of prediction minus score, in units of the scores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One distortion at one level."""

    distortion: str
    level: int
    n: int
    mae: float
    """Mean absolute error, in units of the scores."""
    bias: float
    """Mean of prediction minus score."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other:
    """Predictions beside the headline part: another part, or another set."""

    name: str
    """Of the predictions file."""
    evaluation: Evaluation
    scope: Scope | None
    """What they are about, if that was written down."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Analysis:
    """The headline part of one run, taken apart."""

    run: RunData
    evaluation: Evaluation
    labelled: NDArray[np.bool_]
    """Which predictions have a score."""
    residual: NDArray[np.float64]
    """Prediction minus score per image; NaN if unlabelled."""
    portions: tuple[Portion, ...]
    cells: tuple[Cell, ...]
    others: tuple[Other, ...]
    """Other parts, and other sets, of the same run."""
    pairs: PairAnalysis
    """Whether predictions tell apart what people can tell apart."""
    coverages: tuple[Coverage, ...]
    """How often people's scores lie in the intervals: over all images, then inside portions."""
    floor: Floor
    """A ridge on the same frozen features, or why there is none."""
    best: NDArray[np.int64]
    """Rows of the smallest absolute errors, smallest first."""
    worst: NDArray[np.int64]
    """Rows of the greatest, greatest first."""
    map_xy: NDArray[np.float64]
    """`[n, 2]` the embeddings brought to a plane; `[0, 2]` if there are none."""
    map_axes: tuple[str, str]
    """What its two axes are."""


def analyse(run: RunData, *, pictures: int = 16, ratings: int | None = None) -> Analysis:
    """Compute everything the report shows about the headline part of a run.

    Args:
        run: The run.
        pictures: Best and worst images to be shown.
        ratings: Ratings each score is the mean of; else what is on file for the set.
    """
    p = run.headline
    mapping = _fitted(run.scopes.get(run.part))
    residual = p.prediction - p.mos
    order = np.argsort(np.abs(residual), kind="stable").astype(np.int64)
    order = order[np.isfinite(residual[order])]
    xy, names = embedding_plane(run.embedding)
    portions = (*_portions(p, "subset", mapping), *_portions(p, "distortion", mapping))
    return Analysis(
        run=dataclasses.replace(run, missing=(*run.missing, *_crowded(p))),
        evaluation=_evaluate(p, mapping),
        labelled=np.isfinite(p.mos),
        residual=residual,
        portions=portions,
        cells=tuple(_cells(p)),
        others=tuple(
            Other(name=name, evaluation=_evaluate(table, _fitted(scope)), scope=scope)
            for name, table in run.predictions.items()
            for scope in [run.scopes.get(name)]
            if name != run.part
        ),
        pairs=analyse_pairs(p, run.set_name, ratings=ratings),
        floor=compare_with_probe(
            p,
            run.probe,
            part=run.part,
            split_hash=run.protocol.get("split_hash", ""),
            root=run.root,
        ),
        best=spread_over_groups(order, p.group)[:pictures],
        worst=spread_over_groups(order[::-1], p.group)[:pictures],
        coverages=tuple(coverages(p, [(q.kind, q.name) for q in portions])),
        map_xy=xy,
        map_axes=names,
    )


def spread_over_groups(rows: NDArray[np.int64], group: NDArray[Any]) -> NDArray[np.int64]:
    """The rows in their order, but those beyond `MOST_OF_A_GROUP` of one group come after all."""
    seen = collections.Counter[str]()
    first: list[int] = []
    later: list[int] = []
    for row in rows.tolist():
        name = str(group[row])
        seen[name] += 1
        # Images without a group are groups of their own.
        (later if name and seen[name] > MOST_OF_A_GROUP else first).append(row)
    return np.array(first + later, dtype=np.int64)


def embedding_plane(
    embedding: NDArray[np.float32],
) -> tuple[NDArray[np.float64], tuple[str, str]]:
    """Embeddings in a plane, and what its axes are: UMAP where it is installed, else components.

    Source: [McInnes, Healy, Melville, 2018], "UMAP"; cosine distance, fixed seed.
    """
    if len(embedding) > _UMAP_NEIGHBOURS and importlib.util.find_spec("umap") is not None:
        import umap

        reducer = umap.UMAP(n_neighbors=_UMAP_NEIGHBOURS, metric="cosine", random_state=0, n_jobs=1)
        return reducer.fit_transform(embedding).astype(np.float64), ("UMAP 1", "UMAP 2")
    xy, (first, second) = project(embedding)
    return xy, (
        f"component 1, {first:.0%} of variance",
        f"component 2, {second:.0%} of variance",
    )


def project(embedding: NDArray[np.float32]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """First two principal components, each with its larger tail to the right; their shares."""
    if embedding.shape[0] < 3 or embedding.shape[1] < 2:
        return np.zeros((0, 2)), (math.nan, math.nan)
    centred = embedding.astype(np.float64) - embedding.mean(axis=0, dtype=np.float64)
    left, strength, _ = np.linalg.svd(centred, full_matrices=False)
    xy = left[:, :2] * strength[:2]
    # The sign of a component is arbitrary; fixing it keeps the map the same on every machine.
    xy *= np.where(np.sum(xy**3, axis=0) < 0, -1.0, 1.0)
    share = strength**2 / max(float(np.sum(strength**2)), 1e-300)
    return xy, (float(share[0]), float(share[1]))


def mapping_words(a: Analysis) -> str:
    """How the 4-parameter mapping of the headline was made, and what came of it."""
    scope = a.run.scopes.get(a.run.part)
    where = scope.mapping if scope else ON_THEMSELVES
    return f"4 parameters, {where}: {a.evaluation.fit4.status.replace('_', ' ')}"


def _fitted(scope: Scope | None) -> LogisticMapping | None:
    return scope.fitted if scope else None


def _evaluate(
    p: Predictions, mapping: LogisticMapping | None, *, resamples: int = 1000
) -> Evaluation:
    return evaluate(
        p.prediction,
        p.mos,
        mos_std=p.mos_std,
        group=p.group,
        mapping=mapping,
        resamples=resamples,
    )


def _portions(p: Predictions, kind: str, mapping: LogisticMapping | None) -> list[Portion]:
    column = getattr(p, kind)
    found = []
    for name in _most_frequent(column):
        some = p.take(column == name)
        found.append(
            Portion(
                kind=kind,
                name=name,
                evaluation=_evaluate(some, mapping, resamples=400),
                bias=_mean(some.prediction - some.mos),
            )
        )
    return found


def _most_frequent(column: NDArray[Any]) -> list[str]:
    """The values with the most images, sorted by name."""
    counts = collections.Counter(str(v) for v in column if v != "")
    return sorted(name for name, _ in counts.most_common(MOST_PORTIONS))


def _crowded(p: Predictions) -> list[str]:
    """Sentences about portions that are not shown since there are too many."""
    found = []
    for kind in ("subset", "distortion"):
        count = len({str(v) for v in getattr(p, kind)} - {""})
        if count > MOST_PORTIONS:
            found.append(
                f"the predictions name {count} {kind}s: the {MOST_PORTIONS} with the most images "
                "are shown"
            )
    levels = len(np.unique(p.level))
    if levels > MOST_LEVELS:
        found.append(f"the predictions hold {levels} levels: the heat map shows {MOST_LEVELS}")
    return found


def _cells(p: Predictions) -> list[Cell]:
    found = []
    levels = sorted(set(p.level.tolist()) - {NO_LEVEL})[:MOST_LEVELS]
    for distortion in _most_frequent(p.distortion):
        mine = p.distortion == distortion
        for level in sorted({*p.level[mine].tolist()} & {*levels}):
            error = (p.prediction - p.mos)[mine & (p.level == level)]
            found.append(
                Cell(
                    distortion=distortion,
                    level=int(level),
                    n=len(error),
                    mae=_mean(np.abs(error)),
                    bias=_mean(error),
                )
            )
    return found


def _mean(values: NDArray[np.float64]) -> float:
    kept = values[np.isfinite(values)]
    return float(np.mean(kept)) if len(kept) else math.nan
