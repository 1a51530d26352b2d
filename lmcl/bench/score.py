"""`lmcl bench score`: a folder of JPEGs through `lmcl score`, beside the bare model on ready crops.

All cases run in turns in one sitting on the same cores: `bare_model` and `lmcl_score` in this
process, with `--pyiqa` also pyiqa's own command in the other environment's process. The model is a
ViT-S of random weights: what it answers does not matter here, what it costs does. On a machine that
others use, trust the processor time and not the clock.
"""

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from lmcl.bench import pyiqa_driver
from lmcl.bench.record import append, make_record, timed, to_json
from lmcl.errors import LmclError
from lmcl.inference.batch_job import ScoringOptions, score_items
from lmcl.inference.export import NO_IMAGES, export
from lmcl.inference.inputs import list_items
from lmcl.inference.onnx_engine import OnnxEngine
from lmcl.inference.scorer import Precision, Scorer
from lmcl.models.encoder import EncoderConfig
from lmcl.models.normalization import find_normalization
from lmcl.models.pretrained import ModelCard, ReleasedModel, build_model, save_model
from lmcl.models.quality_model import DecoderConfig
from lmcl.models.saliency import SaliencyConfig
from lmcl.utils.environment import engines_line
from pipeline.boxes import CropConfig
from shards import ScoreScale

SIDE = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spent:
    """What one round of one case took."""

    wall_s: float
    cpu_s: float


def make_photos(folder: Path, count: int, *, side: int = SIDE) -> None:
    """JPEGs with a photograph's size in bytes: low frequencies and a little noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        small = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
        noisy = np.clip(pixels + rng.normal(scale=6, size=pixels.shape), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)


def make_scorer(
    encoder: str, device: str, *, crops: int = 10, precision: Precision = "float32"
) -> Scorer:
    """A model of random weights with the paper's crops, `crops` of them an image."""
    torch.manual_seed(0)
    config = EncoderConfig(name=encoder)
    mean, std = find_normalization(config)
    card = ModelCard(
        encoder=config,
        decoder=DecoderConfig(),
        crops=CropConfig(evaluation=crops),
        saliency=SaliencyConfig(),
        score=ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True),
        training_set="benchmark",
        split="none",
        split_hash="",
        decode="torch-pillow",
        mean=mean,
        std=std,
    )
    released = ReleasedModel(model=build_model(card), card=card)
    return Scorer(released, device=device, precision=precision)


def exported_scorer(scorer: Scorer, folder: Path, engine: str) -> Scorer:
    """The same model by onnxruntime: `onnx` in float32, or `int8`.

    Raises:
        LmclError: If a package for the export is missing; exit code 4.
    """
    model, file = folder / "model", folder / "export" / "model.onnx"
    save_model(model, scorer.model, scorer.card)
    export(
        scorer,
        model,
        file,
        format="onnx",
        compared=NO_IMAGES,
        precision="int8" if engine == "int8" else "float32",
    )
    return Scorer(OnnxEngine(file))


def bare(scorer: Scorer, images: int) -> None:
    """The model alone, on normalised crops that lie ready, in the batches that scoring uses."""
    crops = scorer.card.crops
    shape = (scorer.batch_images * crops.evaluation, 3, crops.size, crops.size)
    ready = torch.randn(shape, device=scorer.device).to(memory_format=torch.channels_last)
    with torch.inference_mode(), scorer.autocast():
        for _ in range(-(-images // scorer.batch_images)):
            scorer.model(ready).score.cpu()


def whole(scorer: Scorer, folder: Path, output: Path, threads: int) -> None:
    """Everything `lmcl score` does with a folder, the output file included."""
    output.unlink(missing_ok=True)
    options = ScoringOptions(output=output, threads=threads, progress=False)
    score_items(scorer, list_items([str(folder)]), options)


def pyiqa(python: Path, metric: str, folder: Path, crops: int) -> Spent:
    """Run pyiqa's command on the folder, in its own environment; timed from the loaded metric on.

    Raises:
        LmclError: If it fails; exit code 1.
    """
    done = subprocess.run(
        [python, pyiqa_driver.__file__, metric, str(folder), str(crops)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,  # away from this project, whose packages must not be found
    )
    if done.returncode:
        raise LmclError(
            f"{python}: pyiqa did not run; `python -m venv ENV && ENV/bin/pip install pyiqa`, then "
            f"--pyiqa ENV/bin/python. It said:\n{done.stderr[-800:]}",
            exit_code=1,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return Spent(wall_s=found["seconds"], cpu_s=found["cpu_seconds"])


def _spent(case: Callable[[], None]) -> Spent:
    wall, cpu = timed(case)
    return Spent(wall_s=wall, cpu_s=cpu)


def _settings(
    case: str, *, encoder: str, threads: int, precision: Precision
) -> dict[str, int | float | str | bool]:
    """What else belongs to a case; pyiqa has its own network and knows no other precision."""
    if case.startswith("pyiqa_"):
        return {"metric": case.removeprefix("pyiqa_"), "precision": "float32"}
    return {"encoder": encoder, "threads": threads, "precision": precision}


def _engines(case: str, scorer: Scorer) -> str:
    """Device and decoder of a case of ours; pyiqa's command does not say its own."""
    if case.startswith("pyiqa_"):
        return ""
    parts = () if case == "bare_model" else (f"decode {scorer.recipe}",)
    runtime = case.removeprefix("lmcl_score_")
    named = (f"onnxruntime {runtime}",) if runtime != case else ()
    return engines_line(scorer.device, *parts, *named)


def run_rounds(cases: Mapping[str, Callable[[], Spent]], rounds: int) -> dict[str, list[Spent]]:
    """All cases in turns, so that what disturbs the machine disturbs them alike."""
    spent: dict[str, list[Spent]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            spent[name].append(case())
    return spent


def run(
    *,
    images: int,
    rounds: int,
    crops: int,
    encoder: str,
    device: str,
    precision: Precision,
    engines: Sequence[str],
    threads: int,
    python: Path | None,
    pyiqa_metric: str,
    json_file: Path | None,
) -> None:
    """Score a folder of 512 x 512 JPEGs, and the bare model on the same number of crops."""
    scorer = make_scorer(encoder, device, crops=crops, precision=precision)
    with tempfile.TemporaryDirectory() as place:
        folder, output = Path(place) / "photos", Path(place) / "scores.csv"
        make_photos(folder, images)
        exported = {}
        if device == "cpu" and precision == "float32":
            names = [name for name in engines if name != "torch"]
            exported = {n: exported_scorer(scorer, Path(place) / n, n) for n in names}
        bare(scorer, scorer.batch_images)
        for each in (scorer, *exported.values()):
            whole(each, folder, output, threads)
        cases = {
            "bare_model": lambda: _spent(lambda: bare(scorer, images)),
            "lmcl_score": lambda: _spent(lambda: whole(scorer, folder, output, threads)),
        }
        for name, other in exported.items():
            cases[f"lmcl_score_{name}"] = partial(
                _spent, partial(whole, other, folder, output, threads)
            )
        if python is not None:
            cases[f"pyiqa_{pyiqa_metric}"] = lambda: pyiqa(python, pyiqa_metric, folder, crops)
        spent = run_rounds(cases, rounds)
    records = [
        make_record(
            "score",
            name,
            [images * crops / s.wall_s for s in found],
            unit="crops/s",
            params={
                "images": images,
                "crops": crops,
                "side": SIDE,
                **_settings(name, encoder=encoder, threads=threads, precision=precision),
            },
            cpu_ms_per_image=1000.0 * float(np.median([s.cpu_s for s in found])) / images,
            device=None if device == "cpu" else torch.cuda.get_device_name(),
            engines=_engines(name, scorer),
        )
        for name, found in spent.items()
    ]
    for record in records:
        click.echo(to_json(record))
    for name in spent:
        if name != "lmcl_score":
            click.echo(_against(spent, name))
    if json_file is not None:
        append(records, json_file)


def _against(spent: Mapping[str, list[Spent]], other: str) -> str:
    """`lmcl_score` beside another case: median over the rounds of the paired ratios."""
    pairs = list(zip(spent["lmcl_score"], spent[other], strict=True))
    wall = float(np.median([theirs.wall_s / ours.wall_s for ours, theirs in pairs]))
    cpu = float(np.median([theirs.cpu_s / ours.cpu_s for ours, theirs in pairs]))
    return (
        f"lmcl_score / {other}: {wall:.3f} by the clock, {cpu:.3f} by processor time "
        f"(above 1: lmcl_score is faster; median of {len(pairs)} paired rounds)"
    )
