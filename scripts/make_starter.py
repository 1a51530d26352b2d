"""Make `lmcl/starter` again: shards of biq2021's photographs, one run, and what it learned.

    python scripts/make_starter.py --images ../shared/data/biq2021

The stem's weights stay in their package; blocks, panel and head are written in half precision. A
step that is done already is not done again.
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from lmcl.config import load_config
from lmcl.models.pretrained import load_model, save_model

ROOT = Path(__file__).resolve().parents[1]
NOTE = (
    "Trained on 2,400 photographs of 512 x 512 pixels scored in a laboratory; not meant for "
    "drawings, screens, medical images, or as the only judge of anything that matters to people. "
    "Figures, and where it fails: docs/starter.md."
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=ROOT.parent / "shared/data/biq2021")
    parser.add_argument("--work", type=Path, default=Path("runs/starter"))
    parser.add_argument("--output", type=Path, default=ROOT / "lmcl" / "starter")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    shards, run = asked.work / "shards", asked.work / f"seed-{asked.seed}"
    if not (shards / "splits" / "official.json").is_file():
        _shard("build", "biq2021", asked.images, "--output", shards)
        _shard("split", shards, "--protocol", "official", "--val-fraction", "0")
    if not (run / "model" / "config.json").is_file():
        _call("lmcl.cli.main", *_train(asked.work, shards, run, asked.seed))
    release(run / "model", asked.output)


def release(model: Path, output: Path) -> None:
    """What a run learned, without the stem, in half precision."""
    released = load_model(model)
    weights = load_config(ROOT / "configs" / "starter.toml").encoder.weights
    save_model(
        output, released.model.half(), replace(released.card, stem_weights=weights, note=NOTE)
    )
    card = output / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + figures(), encoding="utf-8")
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"{output}: {size / 1e6:.2f} MB")


def figures() -> str:
    """How well the shipped model judges, as docs/starter.md has it: a wheel holds no docs."""
    page = (ROOT / "docs" / "starter.md").read_text(encoding="utf-8")
    section = page.partition("## How well it judges")[2]
    return f"\n## How well the shipped model judges{section}".replace("](", "](../../docs/")


def _train(work: Path, shards: Path, run: Path, seed: int) -> tuple[object, ...]:
    config = ROOT / "configs" / "starter.toml"
    changes = (f"data.root='{shards}'", f"runtime.cells='{work / 'cells'}'", f"train.seed={seed}")
    settings = [part for change in changes for part in ("--set", change)]
    return ("train", "--config", config, "--output", run, "--resume", "auto", *settings)


def _shard(*arguments: object) -> None:
    _call("shards.cli", *arguments)


def _call(module: str, *arguments: object) -> None:
    code = f"from {module} import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
