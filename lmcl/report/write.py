"""Run folders in, report files out."""

from collections.abc import Sequence
from pathlib import Path

from lmcl.predictions import write_atomic
from lmcl.report.analysis import analyse
from lmcl.report.page import run_page
from lmcl.report.run import read_run
from lmcl.report.text import markdown, predictions_csv, results, results_csv, results_json


def write_report(run_folders: Sequence[Path], output: Path) -> Path:
    """Write report.html, report.md, results.json, results.csv and, for one run, predictions.csv.

    Args:
        run_folders: One run, or several to be compared.
        output: Folder for the files; made if it is not there.

    Returns:
        The page.

    Raises:
        LmclError: If a run folder or its predictions are missing (4) or cannot be read (3).
    """
    analyses = [analyse(read_run(folder)) for folder in run_folders]
    first = analyses[0]
    files = {
        "report.html": run_page(first),
        "report.md": markdown(first),
        "predictions.csv": predictions_csv(first),
    }
    files["results.json"] = results_json([results(a) for a in analyses], None)
    files["results.csv"] = results_csv(analyses)
    for name, content in files.items():
        write_atomic(output / name, content.encode())
    return output / "report.html"
