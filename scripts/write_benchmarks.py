"""Rewrite the tables of docs/benchmarks.md from benchmarks/results: nobody copies figures.

What stands between the two marks is replaced; the words around it are people's. Of lines with the
same case and settings the newest, which is the last, counts.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- tables: scripts/write_benchmarks.py -->", "<!-- end of tables -->"

MEASURED = (
    "tflops", "share_of_matmul", "cpu_s", "mfu", "gflop_per_crop", "matmul_tflops", "share",
    "met", "target", "most", "crops_per_s",
)  # fmt: skip
"""Entries of `params` that are results or verdicts, not settings."""


def newest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each case with the same settings on the same device, in order."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        key = json.dumps([line["case"], _settings(line), line["device"]], sort_keys=True)
        found.pop(key, None)
        found[key] = line
    return list(found.values())


def table(lines: list[dict[str, Any]]) -> str:
    """One row a line; settings that are the same in all rows stand above the table."""
    settings = [_settings(line) for line in lines]
    common = {
        key: value
        for key, value in settings[0].items()
        if all(one.get(key) == value for one in settings)
    }
    rows = [
        "| case | settings | median [p10 .. p90] | cpu ms per image | peak, MiB | wanted |",
        "|---|---|---|---|---|---|",
    ]
    for line, own in zip(lines, settings, strict=True):
        spread = f"{line['median']:.4g} [{line['p10']:.4g} .. {line['p90']:.4g}] {line['unit']}"
        cells = [
            line["case"],
            _spelled({key: value for key, value in own.items() if key not in common}),
            spread,
            _number(line["cpu_ms_per_image"]),
            _number(line["peak_bytes"] and line["peak_bytes"] / 2**20),
            _verdict(line["params"]),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return _wrapped(f"All rows: {_spelled(common)}.") + "\n\n" + "\n".join(rows)


def provenance(lines: list[dict[str, Any]]) -> str:
    """Where and on which commits the figures were taken."""
    devices = ", ".join(dict.fromkeys(line["device"] for line in lines))
    commits = ", ".join(
        dict.fromkeys(
            line["commit"][:9] + (" with changes" if line["dirty"] else "") for line in lines
        )
    )
    versions = ", ".join(
        dict.fromkeys(
            " ".join(f"{k} {line['versions'][k]}" for k in ("torch", "python")) for line in lines
        )
    )
    engines = "; ".join(
        dict.fromkeys(engine for line in lines if (engine := line.get("engines", "")))
    )
    said = f" Engines: {engines}." if engines else ""
    return _wrapped(f"Device: {devices}. Commit: {commits}. {versions}.{said}")


def _wrapped(sentence: str) -> str:
    return textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False)


def page(old: str, results: Path) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: If the page lost one of its marks.
    """
    if BEGIN not in old or END not in old:
        raise ValueError(f"{PAGE.name}: lost its marks, {BEGIN!r} and {END!r}; put them back")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    blocks = []
    for path in sorted(results.glob("*.jsonl")):
        text = path.read_text(encoding="utf-8").splitlines()
        lines = newest([json.loads(line) for line in text])
        blocks += [f"## {path.stem}", provenance(lines), table(lines)]
        charts = sorted(results.glob(f"{path.stem}*.svg"))
        blocks += [f"![{chart.stem}](../benchmarks/results/{chart.name})" for chart in charts]
    return f"{before}{BEGIN}\n\n" + "\n\n".join(blocks) + f"\n\n{END}{after}"


def _settings(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line["params"].items() if key not in MEASURED}


def _spelled(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _verdict(params: dict[str, Any]) -> str:
    if "met" not in params:
        return ""
    bound = f">= {params['target']}" if "target" in params else f"<= {params['most']}"
    return f"{bound}: {'met' if params['met'] else '**missed**'}"


def main() -> None:
    """Write the page, or with --check say whether it is behind its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Write nothing; exit 1 if behind.")
    asked = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    new = page(old, RESULTS)
    if asked.check:
        raise SystemExit(new != old)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
