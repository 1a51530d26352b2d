"""Make `lmcl/starter` again: shards of biq2021's photographs, two runs, and what they learned.

    python scripts/make_starter.py --images ../shared/data/biq2021

The first run learns from all 2,400 photographs and is the model. The second, of the same
configuration, leaves 15 % of them out, and says how far such a model is off on photographs it has
not seen: intervals, distances and the rule of fewer crops are its own (docs/starter.md). Both are
then shown damaged copies of some of their training photographs (docs/decisions/0019). The stem's
weights stay in their package; the rest is written in half precision. What is done already is not
done again.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from lmcl.config import load_config, load_run_config
from lmcl.distributed import make_rank_context
from lmcl.evaluation.calibrate import calibrate, calibrate_run, sample_ids
from lmcl.evaluation.calibration import Calibration, write_calibration
from lmcl.evaluation.predict import PartPredictions, PixelSource, predict
from lmcl.evaluation.results import evaluate_predictions
from lmcl.inference.scorer import Scorer, decode_image, open_scorer
from lmcl.models.preprocess import Preprocessing, preprocess
from lmcl.models.pretrained import ReleasedModel, load_model, save_model
from lmcl.models.quality_model import QualityModel
from lmcl.models.stem import LevelStem
from lmcl.models.training_images import read_training_images, write_training_images
from lmcl.training.damage import fit_damage_head, join_examples, wanted_drop
from pipeline.decode_config import DecodeConfig
from shards.datasets.demo_distortions import FAMILIES, LEVELS, distort
from shards.progress import progress_bar
from shards.read import ShardSet, open_set
from shards.splits.split import load_split

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = "held-out.json"
"""The split whose val part is 15 % of the train photographs."""
DAMAGED = 120
"""Photographs of which copies are damaged."""
GOOD = 0.45
"""They are those scored above this, in [0, 1] units: a bad one is not much worse for noise."""
WIDTH = 32
"""Hidden width of the damage head."""
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
    shards = asked.work / "shards"
    run, held_out = asked.work / f"seed-{asked.seed}", asked.work / f"held-out-{asked.seed}"
    if not (shards / "splits" / "official.json").is_file():
        _shard("build", "biq2021", asked.images, "--output", shards)
        _shard("split", shards, "--protocol", "official", "--val-fraction", "0.15")
        (shards / "splits" / "official.json").rename(shards / "splits" / HELD_OUT)
        _shard("split", shards, "--protocol", "official", "--val-fraction", "0")
    for folder, split in ((run, "official"), (held_out, shards / "splits" / HELD_OUT)):
        if not (folder / "model" / "config.json").is_file():
            _call("lmcl.cli.main", *_train(asked.work, shards, folder, asked.seed, split))
        learn_damage(folder / "model", shards, split, seed=asked.seed)
    judge(run / "model", shards, "official")
    release(run / "model", asked.output)
    write_calibration(asked.output, *calibration(run, held_out))
    size = sum(path.stat().st_size for path in asked.output.iterdir())
    print(f"{asked.output}: {size / 1e6:.2f} MB")


def learn_damage(model: Path, shards: Path, split: str | Path, *, seed: int) -> None:
    """Give a model folder a damage head, unless it has one.

    Args:
        model: The folder; it is replaced.
        shards: The set it learned from.
        split: Its split: only photographs of the train part are shown.
        seed: Which of them are damaged, and of what the head starts with.
    """
    released = load_model(model)
    if released.card.decoder.damage:
        return
    shard_set = open_set(shards)
    train = load_split(shard_set, split).train
    scorer = open_scorer(model, device="cpu")
    good = train[shard_set.unit_mos()[train] > GOOD]
    drawn = np.random.default_rng(seed).permutation(good)[:DAMAGED]
    unhurt = [
        _look(scorer, released.model, [shard_set.read_bytes(int(one))], corner=number)
        for number, one in enumerate(progress_bar(train, desc="photographs", unit="img"))
    ]
    copies, wanted = [], []
    for number, one in enumerate(progress_bar(drawn, desc="damaged copies of", unit="img")):
        pixels = decode_image(shard_set.read_bytes(int(one)))
        level, pictures = damaged_copies(pixels, np.random.default_rng([seed, number]))
        seen = _look(scorer, released.model, pictures, corner=number)
        copies.append(seen.summary[1:])
        wanted.append(wanted_drop(seen.score, seen.score[0].expand(len(level)), level)[1:])
    examples = join_examples(
        torch.cat(copies), torch.cat(wanted), torch.cat([one.summary for one in unhurt])
    )
    card = replace(released.card, decoder=replace(released.card.decoder, damage=WIDTH))
    made = QualityModel(
        card.encoder, card.decoder, crop_size=card.crops.size, view_size=card.saliency.view
    )
    made.load_state_dict(released.model.state_dict(), strict=False)
    assert made.damage is not None
    made.damage.load_state_dict(
        fit_damage_head(examples, hidden=WIDTH, seed=seed).state_dict(), strict=True
    )
    _write(model, ReleasedModel(model=made, card=card), seen=model)


def damaged_copies(
    pixels: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[torch.Tensor, list[NDArray[np.uint8]]]:
    """A photograph (level 0) and its copies: all families of the demo at all levels.

    Args:
        pixels: [h, w, 3].
        rng: Of noise and places.
    """
    plain = pixels.astype(np.float32) / 255
    levels, pictures = [0], [pixels]
    for family in FAMILIES:
        for level in range(1, LEVELS + 1):
            levels.append(level)
            pictures.append(distort(plain, family=family, level=level, rng=rng))
    return torch.tensor(levels), pictures


class _Seen(NamedTuple):
    """What a model knows and says of one crop of each picture."""

    summary: torch.Tensor
    score: torch.Tensor


@torch.no_grad()
def _look(scorer: Scorer, model: QualityModel, pictures: Sequence[object], *, corner: int) -> _Seen:
    """One crop of each picture: the first of its corners or, at odd numbers, the last."""
    place = -(corner % 2)
    crops = np.stack([np.asarray(scorer.prepare(one).crops)[place] for one in pictures])
    card = scorer.card
    shown = preprocess(
        torch.from_numpy(crops)[None],
        Preprocessing(mean=card.mean, std=card.std, precision=torch.float32),
    )
    stem = model.encoder.stem
    assert isinstance(stem, LevelStem)
    cells = torch.cat([stem.cells(part) for part in torch.split(shown, 16)])
    return _Seen(stem(cells)[1], model.eval()(cells).score)


def calibration(run: Path, held_out: Path) -> tuple[Calibration, NDArray[np.float32]]:
    """What scores mean: the model's own population, and the residuals of the one that held out.

    Args:
        run: The run whose model is released.
        held_out: The run on fewer photographs, with a val part.
    """
    config, released = load_run_config(run / "config.toml"), load_model(run / "model")
    shard_set = open_set(config.data.root)
    split = load_split(shard_set, config.data.split)
    sample = _predict(released, shard_set, sample_ids(split.train), "a sample of the train part")
    crops = released.card.crops
    own, neighbours = calibrate(shard_set, split, val=None, sample=sample, crops=crops)
    # Anew: the run's own end did it before there was a damage head.
    theirs = calibrate_run(held_out, batch_size=32, progress=True).calibration
    return (
        replace(own, intervals=theirs.intervals, distances=theirs.distances, crops=theirs.crops),
        neighbours,
    )


def judge(model: Path, shards: Path, split: str | Path) -> None:
    """Write into a model folder how well it judges the test part, with what it has by now."""
    released, shard_set = load_model(model), open_set(shards)
    test = load_split(shard_set, split).test
    found = evaluate_predictions(
        shard_set, _predict(released, shard_set, test, "evaluating the test part")
    )
    card = replace(released.card, test_srcc=found.srcc, test_plcc=found.plcc_raw)
    _write(model, replace(released, card=card), seen=model)


def _predict(
    released: ReleasedModel, shard_set: ShardSet, ids: NDArray[np.int64], title: str
) -> PartPredictions:
    card = released.card
    context = make_rank_context(Accelerator(cpu=True), decode=DecodeConfig(), progress=True)
    return predict(
        released.model,
        PixelSource(shard_set=shard_set, context=context),
        ids,
        crops=card.crops,
        preprocessing=Preprocessing(mean=card.mean, std=card.std, precision=torch.float32),
        context=context,
        batch_size=32,
        title=title,
    )


def release(model: Path, output: Path) -> None:
    """What a run learned, without the stem, in half precision, and which images it has seen."""
    released = load_model(model)
    weights = load_config(ROOT / "configs" / "starter.toml").encoder.weights
    card = replace(released.card, stem_weights=weights, note=NOTE)
    _write(output, ReleasedModel(model=released.model.half(), card=card), seen=model)
    page = output / "README.md"
    page.write_text(page.read_text(encoding="utf-8") + figures(), encoding="utf-8")


def _write(folder: Path, released: ReleasedModel, *, seen: Path) -> None:
    """A model folder, with the list of images that the model in `seen` has learned from."""
    learned = read_training_images(seen)
    assert learned is not None
    save_model(folder, released.model, released.card)
    write_training_images(folder, learned)


def figures() -> str:
    """How well the shipped model judges, as docs/starter.md has it: a wheel holds no docs."""
    page = (ROOT / "docs" / "starter.md").read_text(encoding="utf-8")
    section = page.partition("## How well it judges")[2]
    return f"\n## How well the shipped model judges{section}".replace("](", "](../../docs/")


def _train(work: Path, shards: Path, run: Path, seed: int, split: str | Path) -> tuple[object, ...]:
    config = ROOT / "configs" / "starter.toml"
    data = (f"data.root='{shards}'", f"data.split='{split}'")
    changes = (*data, f"runtime.cells='{work / 'cells'}'", f"train.seed={seed}")
    settings = [part for change in changes for part in ("--set", change)]
    return ("train", "--config", config, "--output", run, "--resume", "auto", *settings)


def _shard(*arguments: object) -> None:
    _call("shards.cli", *arguments)


def _call(module: str, *arguments: object) -> None:
    code = f"from {module} import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
