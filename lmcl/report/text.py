"""The report without pictures: Markdown for people, JSON and CSV for programs."""

import csv
import dataclasses
import io
import json
from typing import Any

from lmcl.evaluation.metrics import Evaluation
from lmcl.evaluation.metrics.evaluate import FIGURES
from lmcl.evaluation.scope import SplitFigures
from lmcl.report.analysis import Analysis, mapping_words
from lmcl.report.compare import Comparison
from lmcl.report.markup import figure_name, shown, span
from lmcl.report.published import published_for

SCHEMA = "lmcl-report/1"
"""Name and version of results.json; the number rises when a field changes its meaning."""


def markdown(a: Analysis) -> str:
    """report.md: headline, published figures, portions, protocol."""
    e = a.evaluation
    lines = [f"# {a.run.name}", "", f"{a.run.set_name}, {a.run.part} part, {e.n} images.", ""]
    note = a.run.protocol.get("note", "")
    lines += [f"> {note}", ""] if note else []
    lines += ["| figure | value | 95 % interval |", "|---|---|---|"]
    lines += [
        f"| {figure_name(name)} | {shown(e.figure(name), 4)} | "
        f"{e.reasons.get(name, '') or span(e, name, 4)} |"
        for name in FIGURES
    ]
    published = published_for(a.run.set_name)
    if published:
        lines += ["", "## Published", "", "| model | SRCC | PLCC | protocol |", "|---|---|---|---|"]
        lines += [
            f"| {p.model} | {shown(p.srcc)} | {shown(p.plcc)} | "
            f"{'' if p.comparable else 'differs: '}{p.note} ({p.cite}) |"
            for p in published
        ]
    lines += _portion_lines(a)
    lines += _pair_lines(a)
    lines += ["", "## Protocol", ""]
    lines += [f"* {name}: {value}" for name, value in a.run.protocol.items() if value]
    lines += [f"* mapping: {mapping_words(a)}"]
    lines += ["", *(f"* not shown: {m}" for m in a.run.missing)] if a.run.missing else []
    return "\n".join(lines) + "\n"


def comparison_markdown(c: Comparison) -> str:
    """report.md of several runs: their figures, the paired tests, the settings that differ."""
    lines = [
        "# Comparison",
        "",
        "| run | set | split | images | SRCC | 95 % | PLCC raw | RMSE fitted |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [
        f"| {a.run.name} | {a.run.set_name} | {a.run.protocol.get('split', '')} | "
        f"{a.evaluation.n} | "
        f"{shown(a.evaluation.srcc, 4)} | {span(a.evaluation, 'srcc', 4)} | "
        f"{shown(a.evaluation.plcc_raw, 4)} | {shown(a.evaluation.rmse_fit4, 3)} |"
        for a in c.analyses
    ]
    if c.pairs:
        lines += ["", "## Paired on the same images", ""]
        lines += ["| pair | SRCC difference | p, bootstrap | p, Holm | Williams | Meng | F |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [
            f"| {p.a} - {p.b} | {shown(p.difference.value, 4)} | {shown(p.difference.p)} | "
            f"{shown(p.p_holm)} | {' | '.join(shown(t.p) for t in p.tests)} |"
            for p in c.pairs
        ]
    if c.split_pairs:
        lines += ["", "## Paired over splits", ""]
        lines += ["| pair | splits | mean difference | Wilcoxon | sign | Nadeau-Bengio |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {p.a} - {p.b} | {p.splits} | {shown(p.mean, 4)} | "
            f"{' | '.join(shown(t.p) for t in p.tests)} |"
            for p in c.split_pairs
        ]
        told = [f"* {p.averaged}" for p in c.split_pairs if p.averaged]
        lines += ["", *told] if told else []
    lines += _discrimination_lines(c)
    lines += _matrix_lines(c)
    lines += ["", *(f"* not compared: {r}" for r in c.refusals)] if c.refusals else []
    lines += ["", "## Settings that differ", ""]
    lines += [f"* {name}: {' / '.join(values)}" for name, values in c.differing] or ["none"]
    return "\n".join(lines) + "\n"


def results(a: Analysis) -> dict[str, Any]:
    """One run's entry in results.json."""
    return {
        "name": a.run.name,
        "set": a.run.set_name,
        "part": a.run.part,
        "protocol": dict(a.run.protocol),
        "evaluation": a.evaluation.to_json(),
        "mapping": mapping_words(a),
        "discrimination": a.pairs.to_json(),
        "portions": [
            {"kind": p.kind, "name": p.name, "bias": _null(p.bias), **p.evaluation.to_json()}
            for p in a.portions
        ],
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
        place = (a.run.name, a.run.set_name)
        writer.writerow([*place, a.run.part, "all", "", *_cells(a.evaluation)])
        for p in a.portions:
            writer.writerow([*place, a.run.part, p.kind, p.name, *_cells(p.evaluation)])
        for o in a.others:
            tested = o.scope.tested_on if o.scope else a.run.set_name
            writer.writerow([a.run.name, tested, o.name, "all", "", *_cells(o.evaluation)])
            for s in o.scope.splits if o.scope else ():
                writer.writerow([a.run.name, tested, o.name, "split", s.name, *_split_cells(s)])
    return out.getvalue()


def predictions_csv(a: Analysis) -> str:
    """predictions.csv: what others need to recompute every figure, with the mapped prediction."""
    p = a.run.headline
    mapped = a.evaluation.fit4(p.prediction)
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", "path", "group", "mos", "std", "pred", "pred_fit", "split"])
    for i in range(len(p)):
        values = (p.mos[i], p.mos_std[i], p.prediction[i], mapped[i])
        numbers = [repr(float(v)) if v == v else "" for v in values]
        writer.writerow([int(p.id[i]), p.path[i], p.group[i], *numbers, p.part[i] or a.run.part])
    return out.getvalue()


def _cells(e: Evaluation) -> list[str]:
    figures = [e.figure(name) for name in FIGURES]
    interval = e.intervals.get("srcc")
    ends = [f"{interval.low:.6f}", f"{interval.high:.6f}"] if interval else ["", ""]
    return [str(e.n), str(e.n_groups), *("" if v != v else f"{v:.6f}" for v in figures), *ends]


def _split_cells(s: SplitFigures) -> list[str]:
    values = [getattr(s, name, None) for name in FIGURES]
    return [str(s.n), "", *("" if v is None else f"{v:.6f}" for v in values), "", ""]


def _discrimination_lines(c: Comparison) -> list[str]:
    known = [(a.run.name, a.pairs.found) for a in c.analyses if a.pairs.found]
    if not known:
        return []
    return [
        "",
        "## Pairs people can tell apart",
        "",
        "| run | pairs | different | AUC different/similar | AUC better/worse |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {found.n_pairs} | {found.n_different} | "
            f"{shown(found.auc_different, 4)} | {shown(found.auc_better, 4)} |"
            for name, found in known
        ),
    ]


def _matrix_lines(c: Comparison) -> list[str]:
    if all(e.own for e in c.matrix):
        return []
    head = (
        "| trained on | tested on | images | SRCC | PLCC raw | PLCC fitted | direction | mapping |"
    )
    return [
        "",
        "## Across sets",
        "",
        head,
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {e.trained_on} ({e.model}) | {e.column}{', own test part' if e.own else ''} | "
            f"{e.n} | {shown(e.srcc)} | {shown(e.plcc_raw)} | {shown(e.plcc_fit4)} | "
            f"{e.scale.description}; {e.direction} | {e.mapping} |"
            for e in c.matrix
        ),
    ]


def _portion_lines(a: Analysis) -> list[str]:
    if not a.portions:
        return []
    lines = [
        "",
        "## Portions",
        "",
        "| | | images | SRCC | 95 % | PLCC raw |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {p.kind} | {p.name} | {p.evaluation.n} | {shown(p.evaluation.srcc)} | "
        f"{span(p.evaluation, 'srcc', 2)} | {shown(p.evaluation.plcc_raw)} |"
        for p in a.portions
    ]


def _pair_lines(a: Analysis) -> list[str]:
    head = ["", "## Pairs people can tell apart", ""]
    found = a.pairs.found
    if found is None:
        return [*head, f"Not shown: {a.pairs.reason}."]
    ends = [
        f"{shown(i.low, 4)} to {shown(i.high, 4)}" if i else ""
        for i in (found.auc_different_interval, found.auc_better_interval)
    ]
    return [
        *head,
        "| question | pairs | AUC | 95 %, too narrow: pairs share images |",
        "|---|---|---|---|",
        f"| different or similar | {found.n_different} against "
        f"{found.n_pairs - found.n_different} | {shown(found.auc_different, 4)} | {ends[0]} |",
        f"| better or worse | {found.n_different} | {shown(found.auc_better, 4)} | {ends[1]} |",
        "",
        f"{a.pairs.ratings} ratings a score: {a.pairs.source}."
        + (f" {a.pairs.reason.capitalize()}." if a.pairs.reason else ""),
    ]


def _null(value: float) -> float | None:
    return value if value == value else None
