"""Training on photographs for scripts/gpu_check.sh: which commands, and what their runs found.

`squeezenet-vit`, `vit-s` and `ladder` become `lmcl train` or `lmcl sweep`, which go on where they
were stopped; `lines` writes down each run that has come to its end since the last call.
"""

import argparse
import json
import os
import sys
import tomllib
from pathlib import Path

from gpu_check_book import Book, Figures

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LADDER = CONFIGS / "ablations" / "ladder"
SEEDS = 5
WRITTEN = ("metrics.json", "protocol.json", "report.html")
"""What a run leaves at its end, the report last."""

# The paper's crops and objective; its schedule is one for pretrained weights. 40 epochs of 2,400
# images are a million crops: some ten minutes at 2,000 crops/s.
VIT = (
    "encoder.weights=", "crops.max_side=512", "evaluation.select=last", "train.epochs=40",
    "train.batch_size=32", "schedule.lr=5e-4", "schedule.shape=cosine",
)  # fmt: skip

SMALL = (
    "crops.random=2", "crops.evaluation=2", "saliency.window=1", "train.epochs=1",
    "train.batch_size=8", "runtime.precision=no", "runtime.threads=1", "runtime.backend=torch",
)  # fmt: skip
"""Of every rehearsed run."""
SMALL_STEM = ("crops.size=64", "crops.pool=4", "saliency.view=64", "encoder.depth=2")
SMALL_VIT = (
    "crops.size=32", "saliency.view=32", "encoder.width=48", "encoder.depth=3", "encoder.heads=3",
)  # fmt: skip
SMALL_LADDER = ("0-baseline.toml", "4-intra-class.toml")


def command(run: str, *, photos: Path, runs: Path, stem: Path | None, rehearsed: bool) -> list[str]:
    """The command line of a step, without the interpreter."""
    small = SMALL if rehearsed else ()
    data = (f"data.root={json.dumps(str(photos))}", f"data.split={split_of(photos)}")
    if run == "vit-s":
        changes = (*data, *VIT, *small, *(SMALL_VIT if rehearsed else ()))
        return _train(CONFIGS / "paper" / "base.toml", runs / run, changes)
    weights = f"encoder.weights={json.dumps(str(stem)) if stem else ''}"
    cells = f"runtime.cells={json.dumps(str(runs / 'cells'))}"
    changes = (*data, weights, cells, *small, *(SMALL_STEM if rehearsed else ()))
    if run == "squeezenet-vit":
        return _train(CONFIGS / "biq2021-small.toml", runs / run, changes)
    rungs = [LADDER / name for name in SMALL_LADDER] if rehearsed else [LADDER]
    count = 1 if rehearsed else SEEDS
    sweep = ["-m", "lmcl", "sweep", *map(str, rungs), "--over", "seeds", "--count", str(count)]
    return [*sweep, "--output", str(runs / run), "--no-progress", *_set(changes)]


def split_of(photos: Path) -> str:
    """The set's own parts, or the first of what was drawn."""
    names = sorted(path.stem for path in (photos / "splits").glob("*.json"))
    return "official" if "official" in names else names[0]


def make_demo(folder: Path) -> None:
    """Pack and split a small synthetic set, unless it is there."""
    from shards.build.build import build
    from shards.datasets.demo import open_demo, write_demo
    from shards.read import open_set
    from shards.splits.draw import make_splits
    from shards.splits.split import write_split

    labels = write_demo(folder.with_name(f"{folder.name}-images"), contents=4)
    build(open_demo(labels.parent), folder, workers=1)
    if not list((folder / "splits").glob("*.json")):
        for split in make_splits(open_set(folder), repeats=1):
            write_split(folder, split)


def write_lines(book: Book, runs: Path) -> None:
    """A line for each run that is finished and has none."""
    there = {(line.get("step"), line.get("key")) for line in book.lines()}
    for pattern in ("squeezenet-vit", "vit-s", "ladder/*/seed-*"):
        for folder in sorted(runs.glob(pattern)):
            step, *rest = folder.relative_to(runs).parts
            key = "/".join(rest) or "run"
            is_finished = all((folder / name).is_file() for name in WRITTEN)
            if is_finished and (step, key) not in there:
                book.add({"step": step, "key": key, **figures(folder)})


def figures(folder: Path) -> Figures:
    """What a finished run is known by: correlations on its test part, and what training took."""
    config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    protocol = json.loads((folder / "protocol.json").read_text(encoding="utf-8"))
    log = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry for entry in map(json.loads, log) if entry["event"] == "step"]
    # Waiting is a mean over an epoch so far, so its last step has it all.
    waits = {entry["epoch"]: entry["data_wait"] for entry in steps}
    weights = config["encoder"].get("weights")
    wrong = {} if metrics["srcc"] is not None else {"wrong": ["the predictions have no SRCC"]}
    return {
        "encoder": config["encoder"]["name"],
        "weights": Path(weights).name if weights else "random",
        "epochs": config["train"]["epochs"],
        "set": protocol["set"],
        "split": protocol["split"],
        "split_hash": protocol["split_hash"],
        "trained_on": protocol["counts"]["train"],
        **_correlations(metrics),
        "subsets": {name: _correlations(one) for name, one in metrics["subsets"].items()},
        "seconds": protocol["train_seconds"],
        # Log and clock leave nothing out when a run goes on after a stop.
        "images_per_s": sum(entry["images"] for entry in steps) / max(steps[-1]["time_s"], 1e-9),
        "data_wait": sum(waits.values()) / len(waits),
        **wrong,
    }


def _correlations(found: Figures) -> Figures:
    return {"n": found["n"], "srcc": found["srcc"], "plcc": found["plcc_raw"]}


def _train(config: Path, output: Path, changes: tuple[str, ...]) -> list[str]:
    place = ["--output", str(output), "--resume", "auto", "--no-progress"]
    return ["-m", "lmcl", "train", "--config", str(config), *place, *_set(changes)]


def _set(changes: tuple[str, ...]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def main() -> None:
    """Do one step, or write down what is finished."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["squeezenet-vit", "vit-s", "ladder", "lines"])
    parser.add_argument("--book", type=Path, required=True, help="JSON lines of this part.")
    parser.add_argument("--photos", type=Path, required=True, help="A packed set with splits.")
    parser.add_argument("--runs", type=Path, required=True, help="Where the runs lie.")
    parser.add_argument("--stem", type=Path, help="Weights of SqueezeNet 1.1, .npz [random].")
    parser.add_argument("--rehearse", action="store_true", help="Tiny, on a synthetic set.")
    asked = parser.parse_args()
    runs, photos = asked.runs.resolve(), asked.photos.resolve()
    if asked.step == "lines":
        write_lines(Book(asked.book), runs)
        return
    if asked.rehearse:
        make_demo(photos)
    stem = asked.stem.resolve() if asked.stem else None
    if asked.step != "vit-s" and stem is None:
        print("photos: the stem has random weights; GPU_CHECK_STEM names a file of better ones")
    words = command(asked.step, photos=photos, runs=runs, stem=stem, rehearsed=asked.rehearse)
    # In place of this process: a signal then reaches the run, which writes a checkpoint.
    os.execv(sys.executable, [sys.executable, "-W", "ignore", *words])


if __name__ == "__main__":
    main()
