"""`lmcl bench score`: a folder of JPEGs through `lmcl score`, beside the bare model on ready crops.

Both cases run in one process on the same cores, in turns. The model is a ViT-S of random weights,
ten crops of 224 pixels an image: what it answers does not matter here, what it costs does.
"""

import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from lmcl.bench.record import append, cpu_seconds, make_record, timed, to_json
from lmcl.encoders import EncoderConfig
from lmcl.model import DecoderConfig
from lmcl.release import ModelCard, ReleasedModel, ScoreScale, build_model
from lmcl.saliency import SaliencyConfig
from lmcl.scoring.inputs import list_items
from lmcl.scoring.job import Job, score_items
from lmcl.scoring.scorer import Scorer
from pipeline.boxes import CropConfig


def make_photos(folder: Path, count: int, *, side: int = 512) -> None:
    """JPEGs with a photograph's size in bytes: low frequencies and a little noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        small = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
        noisy = np.clip(pixels + rng.normal(scale=6, size=pixels.shape), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)


def make_scorer(encoder: str, device: str) -> Scorer:
    """A model of random weights with the paper's crops."""
    torch.manual_seed(0)
    card = ModelCard(
        encoder=EncoderConfig(name=encoder),
        decoder=DecoderConfig(),
        crops=CropConfig(),
        saliency=SaliencyConfig(),
        score=ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True),
        training_set="benchmark",
        split="none",
        split_hash="",
        decode="torch-pillow",
    )
    return Scorer(ReleasedModel(model=build_model(card), card=card), device=device)


def bare(scorer: Scorer, images: int) -> None:
    """The model alone, on normalised crops that lie ready, in the batches that scoring uses."""
    crops = scorer.card.crops
    shape = (scorer.batch_images * crops.evaluation, 3, crops.size, crops.size)
    ready = torch.randn(shape, device=scorer.device).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(-(-images // scorer.batch_images)):
            scorer.model(ready).score.cpu()


def whole(scorer: Scorer, folder: Path, output: Path, threads: int) -> None:
    """Everything `lmcl score` does with a folder, the output file included."""
    output.unlink(missing_ok=True)
    job = Job(output=output, threads=threads, progress=False)
    score_items(scorer, list_items([str(folder)]), job)


@click.command()
@click.option("--images", default=24, show_default=True, help="Images per round.")
@click.option("--rounds", default=5, show_default=True, help="Rounds; both cases in each.")
@click.option("--encoder", default="deit3_small_patch16_224", show_default=True, help="Model.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--threads", default=2, show_default=True, help="Decoding threads.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Append records there.")
def command(
    images: int, rounds: int, encoder: str, device: str, threads: int, json_file: Path | None
) -> None:
    """Score a folder of 512 x 512 JPEGs, and the bare model on the same number of crops."""
    scorer = make_scorer(encoder, device)
    crops = images * scorer.card.crops.evaluation
    speeds: dict[str, list[float]] = {"bare_model": [], "lmcl_score": []}
    used = dict.fromkeys(speeds, 0.0)
    with tempfile.TemporaryDirectory() as place:
        folder, output = Path(place) / "photos", Path(place) / "scores.csv"
        make_photos(folder, images)
        bare(scorer, scorer.batch_images)
        whole(scorer, folder, output, threads)
        for _ in range(rounds):
            for name, call in (
                ("bare_model", lambda: bare(scorer, images)),
                ("lmcl_score", lambda: whole(scorer, folder, output, threads)),
            ):
                start = cpu_seconds()
                seconds, _ = timed(call)
                speeds[name].append(crops / seconds)
                used[name] += cpu_seconds() - start
    records = [
        make_record(
            "score",
            name,
            values,
            unit="crops/s",
            params={"images": images, "encoder": encoder, "side": 512, "threads": threads},
            cpu_ms_per_image=1000.0 * used[name] / (rounds * images),
            device=None if device == "cpu" else torch.cuda.get_device_name(),
        )
        for name, values in speeds.items()
    ]
    for record in records:
        click.echo(to_json(record))
    share = [s / b for s, b in zip(speeds["lmcl_score"], speeds["bare_model"], strict=True)]
    click.echo(f"lmcl score reaches {np.median(share):.1%} of the bare model (median of rounds)")
    if json_file is not None:
        append(records, json_file)
