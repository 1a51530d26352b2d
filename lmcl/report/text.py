"""The report without pictures: Markdown for people, JSON and CSV for programs."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator
from typing import Any

from lmcl.evaluation.calibration import CONFIDENCE
from lmcl.evaluation.metrics import Evaluation
from lmcl.evaluation.metrics.evaluate import FIGURES
from lmcl.evaluation.scope import SplitFigures
from lmcl.report.analysis import Analysis, mapping_words
from lmcl.report.compare import Comparison
from lmcl.report.published import published_for
from lmcl.report.templates import markdown_environment
from lmcl.report.weakness import weakness
from shards.text import spreadsheet_cell, spreadsheet_path

SCHEMA = "lmcl-report/1"
"""Name and version of results.json; the number rises when a field changes its meaning."""


def markdown(a: Analysis) -> str:
    """report.md: headline, published figures, portions, protocol."""
    return (
        markdown_environment()
        .get_template("report.md")
        .render(
            a=a,
            figures=FIGURES,
            published=published_for(a.run.set_name),
            mapping=mapping_words(a),
            weakness=weakness(a.run.headline, a.portions, a.run.scale),
        )
    )


def comparison_markdown(c: Comparison) -> str:
    """report.md of several runs: their figures, the paired tests, the settings that differ."""
    return (
        markdown_environment()
        .get_template("comparison.md")
        .render(c=c, crosses_sets=not all(e.own for e in c.matrix))
    )


def results(a: Analysis) -> dict[str, Any]:
    """One run's entry in results.json; what is not finite is null."""
    tree: dict[str, Any] = without_nan(_results(a))
    return tree


def without_nan(value: Any) -> Any:
    """A tree for JSON, which has no number that is not finite: null in its place."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _results(a: Analysis) -> dict[str, Any]:
    return {
        "name": a.run.name,
        "set": a.run.set_name,
        "part": a.run.part,
        "protocol": dict(a.run.protocol),
        "evaluation": a.evaluation.to_json(),
        "mapping": mapping_words(a),
        "discrimination": a.pairs.to_json(),
        "portions": [
            {"kind": p.kind, "name": p.name, "bias": p.bias, **p.evaluation.to_json()}
            for p in a.portions
        ],
        "coverage": [
            {
                "kind": c.kind,
                "name": c.name,
                "confidence": CONFIDENCE,
                "n": c.covered.of,
                "inside": c.covered.value,
                "low": c.covered.low,
                "high": c.covered.high,
                "mean_width": c.width,
            }
            for c in a.coverages
        ],
        "weakness": weakness(a.run.headline, a.portions, a.run.scale),
        "floor": a.floor.to_json(),
        "others": [
            {
                "name": o.name,
                "scope": dataclasses.asdict(o.scope) if o.scope else None,
                **o.evaluation.to_json(),
            }
            for o in a.others
        ],
        "missing": list(a.run.missing),
    }


def results_json(runs: list[dict[str, Any]], comparison: dict[str, Any] | None) -> str:
    """results.json as text."""
    tree = {"schema": SCHEMA, "runs": runs, "comparison": comparison}
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"


def results_csv(analyses: list[Analysis]) -> str:
    """results.csv: one row per run, part or set, and portion."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    ends = [f"srcc_{end}" for end in ("low", "high")]
    writer.writerow(["run", "set", "part", "kind", "name", "n", "n_groups", *FIGURES, *ends])
    for a in analyses:
        for place, figures in _result_rows(a):
            # Names are foreign, figures are ours: a spreadsheet runs what begins like a formula.
            writer.writerow([*map(spreadsheet_cell, place), *figures])
    return out.getvalue()


def _result_rows(a: Analysis) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Run, set, part, kind and name, with the figures."""
    place = (a.run.name, a.run.set_name, a.run.part)
    yield (*place, "all", ""), _cells(a.evaluation)
    for p in a.portions:
        yield (*place, p.kind, p.name), _cells(p.evaluation)
    for o in a.others:
        tested = o.scope.tested_on if o.scope else a.run.set_name
        yield (a.run.name, tested, o.name, "all", ""), _cells(o.evaluation)
        for s in o.scope.splits if o.scope else ():
            yield (a.run.name, tested, o.name, "split", s.name), _split_cells(s)


def predictions_csv(a: Analysis) -> str:
    """predictions.csv: what others need to recompute every figure, with the mapped prediction.

    Columns are called as in predictions/<part>.csv.
    """
    p = a.run.headline
    mapped = a.evaluation.fit4(p.prediction)
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["id", "path", "group", "part", "mos", "mos_std", "prediction", "prediction_fit"]
    )
    for i in range(len(p)):
        values = (p.mos[i], p.mos_std[i], p.prediction[i], mapped[i])
        numbers = [repr(float(v)) if v == v else "" for v in values]
        names = (spreadsheet_path(p.path[i]), spreadsheet_cell(p.group[i]))
        part = spreadsheet_cell(p.part[i] or a.run.part)
        writer.writerow([int(p.id[i]), *names, part, *numbers])
    return out.getvalue()


def _cells(e: Evaluation) -> list[str]:
    figures = [e.figure(name) for name in FIGURES]
    interval = e.intervals.get("srcc")
    ends = [f"{interval.low:.6f}", f"{interval.high:.6f}"] if interval else ["", ""]
    return [str(e.n), str(e.n_groups), *("" if v != v else f"{v:.6f}" for v in figures), *ends]


def _split_cells(s: SplitFigures) -> list[str]:
    values = [getattr(s, name, None) for name in FIGURES]
    return [str(s.n), "", *("" if v is None else f"{v:.6f}" for v in values), "", ""]
