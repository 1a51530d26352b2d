"""Run folders in, report files out."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lmcl.report.analysis import Analysis, analyse
from lmcl.report.compare import Comparison, compare
from lmcl.report.compare_page import compare_page
from lmcl.report.run import RunData, read_run
from lmcl.report.run_page import run_page
from lmcl.report.text import (
    comparison_markdown,
    markdown,
    predictions_csv,
    results,
    results_csv,
    results_json,
)
from lmcl.utils.files import write_atomic
from shards.errors import ShardError
from shards.files import check_own, remove_stale_temporaries

_TABLE = "results.csv"
_TABLE_MARK = b"run,set,part,kind,name,n,"


def write_report(run_folders: Sequence[Path], output: Path, *, ratings: int | None = None) -> Path:
    """Write report.html, report.md, results.json, results.csv and, for one run, predictions.csv.

    Args:
        run_folders: One run, or several to be compared.
        output: Folder for the files; made if it is not there.
        ratings: Ratings each score is the mean of; else what is on file for the set.

    Returns:
        The page.

    Raises:
        ValueError: If no run is given.
        LmclError: If a run folder or its predictions are missing (4) or cannot be read (3).
        ShardError: If `output` is no run of these and holds files of such names that no report
            wrote (2).
    """
    if not run_folders:
        raise ValueError("a report needs at least one run folder")
    runs = _named_apart([read_run(folder) for folder in run_folders])
    analyses = [analyse(run, ratings=ratings) for run in runs]
    files = _single(analyses[0]) if len(analyses) == 1 else _several(compare(analyses))
    files["results.csv"] = results_csv(analyses)
    if not any(_is_same(output, folder) for folder in run_folders):
        _check_reports(output, files)
    # Of a report that was killed while it wrote.
    remove_stale_temporaries(output)
    # First the table that a folder of reports is known by.
    write_atomic(output / _TABLE, files[_TABLE].encode())
    for name, content in files.items():
        # The page goes last: whoever waits for it finds the rest complete.
        if name not in (_TABLE, "report.html"):
            write_atomic(output / name, content.encode())
    write_atomic(output / "report.html", files["report.html"].encode())
    return output / "report.html"


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one place."""
    return one.resolve() == other.resolve()


def _check_reports(output: Path, names: Iterable[str]) -> None:
    """Refuse a folder that holds files of a report's names and is none of a report."""
    if any(os.path.lexists(output / name) for name in names):
        check_own(output / _TABLE, _TABLE_MARK)
        if not os.path.lexists(output / _TABLE):
            there = next(name for name in names if os.path.lexists(output / name))
            raise ShardError(
                f"{output / there}: is there already and no report wrote it, so it is not "
                "replaced; choose another --output, or move it away",
                exit_code=2,
            )


def _named_apart(runs: Sequence[RunData]) -> list[RunData]:
    """Runs with as many of their folders' last parts as it takes: a sweep has a seed-0 a rung."""
    places = [run.root.resolve().parts for run in runs]
    names = [run.name for run in runs]
    most = max(map(len, places))
    for count in range(2, most + 1):
        # A run that was named twice is called the same however much of its path is shown.
        if len(set(names)) == len(set(places)):
            break
        names = ["/".join(parts[-count:]) for parts in places]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _single(a: Analysis) -> dict[str, str]:
    return {
        "report.html": run_page(a),
        "report.md": markdown(a),
        "results.json": results_json([results(a)], None),
        "predictions.csv": predictions_csv(a),
    }


def _several(c: Comparison) -> dict[str, str]:
    return {
        "report.html": compare_page(c),
        "report.md": comparison_markdown(c),
        "results.json": results_json([results(a) for a in c.analyses], c.to_json()),
    }
