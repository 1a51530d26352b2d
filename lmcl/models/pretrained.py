"""The released model folder: config.json, model.safetensors and a model card.

Whoever opens the folder learns which pixels the model saw, in which scale it answers and what it
was trained on. Nothing is unpickled and no network is used.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

from lmcl.errors import LmclError
from lmcl.models.encoder import EncoderConfig
from lmcl.models.quality_model import MEAN, STD, DecoderConfig, QualityModel
from lmcl.models.saliency import SaliencyConfig
from pipeline.boxes import CropConfig
from shards import ScoreScale
from shards.files import atomic_folder, atomic_path

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Everything but the weights; becomes config.json."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    crops: CropConfig
    saliency: SaliencyConfig
    score: ScoreScale
    training_set: str
    split: str
    split_hash: str
    decode: str
    """The decode recipe of training; scores made with another one may differ slightly."""
    mean: tuple[float, float, float] = MEAN
    """Channel means taken off pixels scaled to [0, 1], RGB."""
    std: tuple[float, float, float] = STD
    """Channel deviations pixels are divided by."""
    test_srcc: float | None = None
    test_plcc: float | None = None
    note: str = ""
    format_version: int = field(default=FORMAT_VERSION)


@dataclass(frozen=True, kw_only=True)
class ReleasedModel:
    """A model ready to score, and its card."""

    model: QualityModel
    card: ModelCard


def save_model(folder: Path, model: QualityModel, card: ModelCard) -> None:
    """Write a model folder; an older one of the same name is replaced in one step."""
    card = replace(card, encoder=replace(card.encoder, weights=""))  # a path of this machine
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    config = msgspec.json.format(msgspec.json.encode(card), indent=2)
    with atomic_folder(folder) as new:
        with atomic_path(new / "model.safetensors", durable="nothing") as weights:
            save_file(state, weights, metadata={"format": "pt"})
        (new / "config.json").write_bytes(config + b"\n")
        (new / "README.md").write_text(_readme(card), encoding="utf-8")


def model_folder_of(folder: Path) -> Path:
    """The model folder that is meant: `folder` itself, or the one inside a run folder."""
    inner = folder / "model"
    return inner if not (folder / "config.json").is_file() and inner.is_dir() else folder


def load_model(folder: Path) -> ReleasedModel:
    """Open a model folder.

    Raises:
        LmclError: If it is missing (exit code 4), or its parts are damaged or do not fit each
            other (exit code 5).
    """
    config, weights = folder / "config.json", folder / "model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise LmclError(
                f"{path}: missing; a model folder holds config.json and model.safetensors, as in "
                "`<run>/model` of a finished run",
                exit_code=4,
            )
    try:
        card = msgspec.json.decode(config.read_bytes(), type=ModelCard)
    except msgspec.DecodeError as error:
        raise LmclError(
            f"{config}: not a model card of this version: {error}", exit_code=5
        ) from error
    if card.format_version != FORMAT_VERSION:
        raise LmclError(
            f"{config}: format_version is {card.format_version}, this version reads "
            f"{FORMAT_VERSION}; install the lmcl that wrote it",
            exit_code=5,
        )
    model = build_model(card)
    try:
        model.load_state_dict(load_file(weights))
    except Exception as error:  # safetensors raises its own, undocumented classes
        raise LmclError(
            f"{weights}: does not fit {config.name}: {str(error).splitlines()[0]}", exit_code=5
        ) from error
    return ReleasedModel(model=model.eval().requires_grad_(False), card=card)


def build_model(card: ModelCard) -> QualityModel:
    """The card's architecture with random weights; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return QualityModel(
            card.encoder, card.decoder, crop_size=card.crops.size, view_size=card.saliency.view
        )


def _readme(card: ModelCard) -> str:
    figures = (
        f"SRCC {card.test_srcc:.4f}, PLCC {card.test_plcc:.4f} on the test part"
        if card.test_srcc is not None and card.test_plcc is not None
        else "not evaluated"
    )
    better = "higher is better" if card.score.higher_is_better else "lower is better"
    return f"""---
license: other
tags: [image-quality-assessment, no-reference, lmcl]
datasets: [{card.training_set}]
metrics: [spearmanr, pearsonr]
---
# Image quality model trained on {card.training_set}

Encoder `{card.encoder.name}`, {card.crops.evaluation} crops of {card.crops.size} pixels an image.
Answers in the scale of {card.training_set}: {card.score.kind.upper()}, {card.score.low:g} to
{card.score.high:g}, {better}.

* Result: {figures} (split `{card.split}`, hash `{card.split_hash[:16]}`).
* Pixels: decoded by `{card.decode}`; EXIF orientation applied; never resampled.
* Limits: it knows the contents and distortions of its training set; other cameras, codecs and
  subjects shift its scores. {card.note}
* The weights derive from the training set; its licence applies to what you do with them.

    lmcl score PHOTOS --model {"<this folder>"} --output scores.csv
"""
