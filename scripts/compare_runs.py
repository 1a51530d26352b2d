"""Whether two run folders hold the same bits: weights, predictions, figures, shards, log.

    python scripts/compare_runs.py runs/demo-before runs/demo-after

Both made on one machine with the same number of threads. Prints a line a file and exits with 1 if
anything differs. Times, places on disk, the decoder's machine and the git state may differ.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

_FILES = (
    "model/*",
    "predictions/*",
    "predictions.csv",
    "metrics.json",
    "log.jsonl",
    "saliency/*",
    "embeddings.npz",
    "shards/*.tar",
    "shards/*.idx",
    "shards/splits/*.json",
)
_LOGGED = ("event", "epoch", "step", "loss", "l1", "contrastive", "grad_norm", "lr", "val_srcc")
_MAY_DIFFER = ("time", "seconds", "root", "path", "run", "git")
"""Parts of a key whose value says when or where, not what."""


def compare(before: Path, after: Path) -> list[tuple[str, bool]]:
    """Every compared file by its name below the run folder, and whether it is the same."""
    if not (before / "log.jsonl").is_file():
        raise SystemExit(f"{before}: is no run folder (no log.jsonl); name two run folders")
    found = []
    for pattern in _FILES:
        names = {
            str(path.relative_to(run)) for run in (before, after) for path in run.glob(pattern)
        }
        for name in sorted(names):
            sides = before / name, after / name
            there = all(side.is_file() for side in sides)
            found.append((name, there and _content(sides[0]) == _content(sides[1])))
    return found


def _content(path: Path) -> Any:
    if path.name == "log.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return repr([{key: line.get(key) for key in _LOGGED} for line in lines])
    if path.name.endswith("metrics.json"):
        return repr(_figures(json.loads(path.read_text())))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _figures(tree: Any) -> Any:
    if isinstance(tree, dict):
        kept = {k: v for k, v in tree.items() if not any(part in k for part in _MAY_DIFFER)}
        return {key: _figures(value) for key, value in kept.items()}
    return [_figures(item) for item in tree] if isinstance(tree, list) else tree


def main() -> None:
    """Compare the two folders of the command line."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    rows = compare(Path(sys.argv[1]), Path(sys.argv[2]))
    for name, same in rows:
        print("same   " if same else "DIFFERS", name)
    different = [name for name, same in rows if not same]
    print(f"{len(rows) - len(different)} of {len(rows)} files hold the same bits")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
