"""`lmcl bench score`: a folder of JPEGs through `lmcl score`, beside the bare model on ready crops.

All cases run in turns in one sitting on the same cores: `bare_model` and `lmcl_score` in this
process, with `--pyiqa` also pyiqa's own command in the other environment's process. The model is a
ViT-S of random weights, and its order of the images says what another engine changes; `--model`
takes a real one, and adaptive crops where it is calibrated for them. On a machine that others use,
trust the processor time and not the clock.
"""

import copy
import dataclasses
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lmcl.bench import pyiqa_driver
from lmcl.bench.record import Record, append, make_record, timed, to_json
from lmcl.errors import LmclError
from lmcl.evaluation.metrics.correlation import srcc
from lmcl.inference.batch_job import ScoringOptions, Summary, score_items
from lmcl.inference.export import NO_IMAGES, export
from lmcl.inference.inputs import Item, list_items
from lmcl.inference.scorer import Precision, Scorer, open_scorer
from lmcl.inference.scores_file import read_rows
from lmcl.models.encoder import EncoderConfig
from lmcl.models.named import find_model
from lmcl.models.normalization import find_normalization
from lmcl.models.pretrained import ModelCard, ReleasedModel, build_model, save_model
from lmcl.models.quality_model import DecoderConfig
from lmcl.models.saliency import SaliencyConfig
from lmcl.utils.environment import engines_line
from pipeline.boxes import CropConfig
from shards import ScoreScale
from shards.text import printable

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


def link_photos(source: Path, folder: Path, most: int) -> None:
    """The first images below a folder, by their names, as links in a folder of their own.

    Raises:
        LmclError: If there is none; exit code 4.
    """
    items = [item for item in list_items([str(source)]) if not item.problem][:most]
    if not items:
        raise LmclError(f"--photos {printable(source)}: holds no image; name a folder", exit_code=4)
    folder.mkdir(parents=True)
    for number, item in enumerate(items):
        file = Path(item.file).resolve()
        (folder / f"{number:05d}{file.suffix}").symlink_to(file)


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


def exported_file(scorer: Scorer, folder: Path, engine: str, model: Path | None) -> Path:
    """The same model for onnxruntime: `onnx` in float32, or `int8`.

    Args:
        scorer: What is exported.
        folder: Where to.
        engine: Which of the two.
        model: Its model folder; None: one is written, of random weights.

    Raises:
        LmclError: If a package for the export is missing; exit code 4.
    """
    file = folder / "export" / "model.onnx"
    if model is None:
        model = folder / "model"
        save_model(model, scorer.model, scorer.card)
    precision: Literal["float32", "int8"] = "int8" if engine == "int8" else "float32"
    export(scorer, model, file, format="onnx", compared=NO_IMAGES, precision=precision)
    return file


def open_cases(
    scorer: Scorer, place: Path, *, engines: Sequence[str], model: Path | None
) -> dict[str, Scorer]:
    """Every way `lmcl score` has to score by one model: engines, and adaptive crops of each."""
    found = {"lmcl_score": scorer}
    if scorer.device.type == "cpu" and scorer.precision == "float32":
        for name in (name for name in engines if name != "torch"):
            file = exported_file(scorer, place / name, name, model)
            found[f"lmcl_score_{name}"] = open_scorer(file, engine="onnx", device="cpu")
    rule = scorer.interpreter.meaning.calibration.crops if scorer.interpreter else None
    if rule is not None:
        for name, each in list(found.items()):
            twin = copy.copy(each)
            twin.adaptive = rule
            found[f"{name}_adaptive"] = twin
    return found


def bare(scorer: Scorer, images: int) -> None:
    """The model alone, on normalised crops that lie ready, in the batches that scoring uses."""
    crops = scorer.card.crops
    shape = (scorer.batch_images * crops.evaluation, 3, crops.size, crops.size)
    ready = torch.randn(shape, device=scorer.device).to(memory_format=torch.channels_last)
    with torch.inference_mode(), scorer.autocast():
        for _ in range(-(-images // scorer.batch_images)):
            scorer.model(ready).score.cpu()


def whole(scorer: Scorer, items: Sequence[Item], output: Path, threads: int) -> Summary:
    """Everything `lmcl score` does with a folder, the output file included."""
    output.unlink(missing_ok=True)
    options = ScoringOptions(output=output, threads=threads, progress=False)
    return score_items(scorer, items, options)


def qualities(output: Path) -> NDArray[np.float64]:
    """What a scores file holds, in its order; NaN for an image without a score."""
    return np.array([math.nan if r.quality is None else r.quality for r in read_rows(output)])


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


def _spent(case: Callable[[], object]) -> Spent:
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
    runtime = case.removeprefix("lmcl_score").removesuffix("_adaptive").removeprefix("_")
    named = (f"onnxruntime {runtime}",) if runtime not in ("", "bare_model") else ()
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
    model: str | None,
    photos: Path | None,
    device: str,
    precision: Precision,
    engines: Sequence[str],
    threads: int,
    python: Path | None,
    pyiqa_metric: str,
    json_file: Path | None,
) -> None:
    """Score a folder of photographs, and the bare model on the same number of crops."""
    if model is None:
        scorer = make_scorer(encoder, device, crops=crops, precision=precision)
    else:
        scorer = open_scorer(model, device=device, precision=precision)
        crops, encoder = scorer.card.crops.evaluation, model
    home = find_model(model) if model is not None else None
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder = place / "photos"
        if photos is None:
            make_photos(folder, images)
        else:
            link_photos(photos, folder, images)
        items = list_items([str(folder)])
        ours = open_cases(scorer, place, engines=engines, model=home)
        outputs = {case: place / f"{case}.csv" for case in ours}
        bare(scorer, scorer.batch_images)
        # Once each before the rounds: what is slow the first time only is not measured.
        shares = {
            case: whole(each, items, outputs[case], threads).crop_share
            for case, each in ours.items()
        }
        cases = {"bare_model": lambda: _spent(lambda: bare(scorer, len(items)))}
        for case, each in ours.items():
            cases[case] = partial(_spent, partial(whole, each, items, outputs[case], threads))
        if python is not None:
            cases[f"pyiqa_{pyiqa_metric}"] = lambda: pyiqa(python, pyiqa_metric, folder, crops)
        spent = run_rounds(cases, rounds)
        values = {case: qualities(output) for case, output in outputs.items()}
    params = {"images": len(items), "crops": crops, "side": SIDE if photos is None else 0}
    records = [
        make_record(
            "score",
            case,
            [len(items) * crops / s.wall_s for s in found],
            unit="crops/s",
            params=params | _settings(case, encoder=encoder, threads=threads, precision=precision),
            cpu_ms_per_image=1000.0 * float(np.median([s.cpu_s for s in found])) / len(items),
            device=None if device == "cpu" else torch.cuda.get_device_name(),
            engines=_engines(case, scorer),
            crop_share=shares.get(case),
            agreement=_agreement(values, case),
        )
        for case, found in spent.items()
    ]
    for record in records:
        click.echo(to_json(record))
    for record in records:
        if record.case != "lmcl_score":
            click.echo(_against(spent, record.case) + _same_order(record))
    if json_file is not None:
        append(records, json_file)


def _agreement(values: Mapping[str, NDArray[np.float64]], case: str) -> float | None:
    """SRCC of a case's scores with those of `lmcl_score`; None where there is none."""
    if case not in values:
        return None
    found = srcc(values["lmcl_score"], values[case])
    return found if math.isfinite(found) else None


def _same_order(record: Record) -> str:
    """How much of the order a case keeps, and of the crops it looks at."""
    if record.agreement is None or record.crop_share is None:
        return ""
    return f"; SRCC with lmcl_score {record.agreement:.4f}, {record.crop_share:.0%} of the crops"


def _against(spent: Mapping[str, list[Spent]], other: str) -> str:
    """`lmcl_score` beside another case: median over the rounds of the paired ratios."""
    pairs = list(zip(spent["lmcl_score"], spent[other], strict=True))
    wall = float(np.median([theirs.wall_s / ours.wall_s for ours, theirs in pairs]))
    cpu = float(np.median([theirs.cpu_s / ours.cpu_s for ours, theirs in pairs]))
    return (
        f"lmcl_score / {other}: {wall:.3f} by the clock, {cpu:.3f} by processor time "
        f"(above 1: lmcl_score is faster; median of {len(pairs)} paired rounds)"
    )
