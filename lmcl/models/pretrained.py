"""The released model folder: config.json, model.safetensors and a model card.

Whoever opens the folder learns which pixels the model saw, in which scale it answers and what it
was trained on. Nothing is unpickled and no network is used.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmcl.errors import LmclError
from lmcl.models.encoder import EncoderConfig, encoder_as_written
from lmcl.models.folders import MODEL_FILES
from lmcl.models.folders import model_folder_of as model_folder_of
from lmcl.models.normalization import IMAGENET
from lmcl.models.packaged import PACKAGED
from lmcl.models.quality_model import DecoderConfig, QualityModel
from lmcl.models.saliency import SaliencyConfig
from lmcl.models.set_scales import MOST_SETS
from lmcl.models.weights import load_weights
from pipeline.boxes import CropConfig
from shards import ScoreScale
from shards.errors import ShardError
from shards.files import atomic_folder, atomic_path
from shards.source_files import open_regular, read_regular
from shards.text import looked_at, printable

FORMAT_VERSION = 1

_MOST_HEADER_BYTES = 1 << 24
"""Of model.safetensors: names and shapes; a ViT-g has 60 kB of them."""
_MOST_TEXT = 1000
_MOST_CROP_PIXELS = 1 << 27
"""Pixels of all crops of an image: 2,600 crops of 224."""
_STEM = "encoder.stem.layers."
"""Names of a stem's own layers among a model's tensors."""
_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "BOOL")
_MOST: Mapping[str, Mapping[str, int]] = {
    "encoder": {"width": 1 << 14, "depth": 512, "heads": 1 << 10, "patch": 1 << 10, "frozen": 64},
    "decoder": {
        **{"queries": 1 << 12, "heads": 1 << 10, "bins": 1 << 10},
        **{"direct": 1 << 14, "damage": 1 << 14},
    },
    "crops": {"size": 1 << 12, "evaluation": 1 << 14, "max_side": 1 << 20, "short_side": 1 << 20},
    "saliency": {"view": 1 << 12, "layers": 512, "window": 1 << 12},
}
"""More is no model anybody has trained, but an attempt at somebody's memory."""


@dataclass(frozen=True, kw_only=True)
class NamedScale:
    """A set of a joint run, whose scale the model can answer in."""

    name: str
    score: ScoreScale


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
    mean: tuple[float, float, float] = IMAGENET.mean
    """Channel means taken off pixels scaled to [0, 1], RGB. Models of earlier versions keep
    ImageNet's, whatever their encoder."""
    std: tuple[float, float, float] = IMAGENET.std
    """Channel deviations pixels are divided by."""
    stem_weights: str = ""
    """Name of the installed package that the frozen stem's weights come with
    (`lmcl.models.packaged`); empty: they are in the folder."""
    sets: tuple[NamedScale, ...] = ()
    """The sets it learned from, if several: `score` is the shared scale, 0 to 1, on which the
    first set's scale is its range, and the weights hold a line from it to each set's own."""
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
    """Write a model folder; an older one of the same name is replaced in one step.

    With `card.stem_weights` the stem's layers are left out: `load_model` takes the package's.
    """
    card = replace(card, encoder=replace(card.encoder, weights=""))  # a path of this machine
    state = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if not (card.stem_weights and name.startswith(_STEM))
    }
    config = msgspec.json.format(msgspec.json.encode(card), indent=2)
    with atomic_folder(folder) as new:
        with atomic_path(new / "model.safetensors", durable="nothing") as weights:
            save_file(state, weights, metadata={"format": "pt"})
        (new / "config.json").write_bytes(config + b"\n")
        (new / "README.md").write_text(_readme(card), encoding="utf-8")


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
                f"{printable(path)}: missing{looked_at(path)}; a model folder holds config.json "
                "and model.safetensors, as in `<run>/model` of a finished run",
                exit_code=4,
            )
    card = read_card(config)
    shapes = _read_shapes(weights)
    expected = _expected_shapes(config, card)
    if shapes != expected:
        raise _misfit(weights, _first_difference(shapes, expected))
    model = build_model(card)
    try:
        _fill(model, load_file(weights), card)
    except LmclError:
        raise
    except Exception as error:  # safetensors raises its own, undocumented classes
        raise _misfit(weights, printable(str(error).splitlines()[0])) from error
    return ReleasedModel(model=model.eval().requires_grad_(False), card=card)


def _fill(model: QualityModel, state: dict[str, Tensor], card: ModelCard) -> None:
    """Give a model the folder's tensors, and its stem those of the package the card names."""
    if card.stem_weights:
        encoder = replace(card.encoder, weights=card.stem_weights)
        load_weights(model.encoder, encoder)
        stem = {name: t for name, t in model.state_dict().items() if name.startswith(_STEM)}
        state = {**state, **stem}
    model.load_state_dict(state)


def read_card(config: Path) -> ModelCard:
    """Read a model folder's config.json; its encoder is one that is built here, by name alone.

    Raises:
        LmclError: If it is damaged, of another version, or asks for what no model has (5).
    """
    try:
        data = read_regular(config, limit_bytes=MODEL_FILES["config.json"])
        card = msgspec.json.decode(data, type=ModelCard)
        table = msgspec.json.decode(data)["encoder"]
        card = replace(card, encoder=encoder_as_written(card.encoder, table))
        _check_card(card)
    except (msgspec.DecodeError, ValueError, RecursionError, ShardError) as error:
        raise LmclError(
            f"{printable(config)}: not a model card of this version: {printable(error)}; take the "
            "folder as lmcl wrote it",
            exit_code=5,
        ) from error
    if card.format_version != FORMAT_VERSION:
        raise LmclError(
            f"{printable(config)}: format_version is {printable(card.format_version, 40)}, this "
            f"version reads {FORMAT_VERSION}; install the lmcl that wrote it",
            exit_code=5,
        )
    # Weights come from the folder and from nowhere else.
    return replace(card, encoder=replace(card.encoder, weights=""))


def _check_card(card: ModelCard) -> None:
    for table, limits in _MOST.items():
        for name, most in limits.items():
            value = getattr(getattr(card, table), name)
            if value is not None and value > most:
                raise ValueError(
                    f"{table}.{name} is {printable(value, 40)}, more than the {most:,} allowed"
                )
    pixels = card.crops.evaluation * card.crops.size**2
    if pixels > _MOST_CROP_PIXELS:
        raise ValueError(
            f"{card.crops.evaluation} crops of {card.crops.size} are {pixels:,} pixels an image, "
            f"more than the {_MOST_CROP_PIXELS:,} allowed"
        )
    numbers = (*card.mean, *card.std, card.score.low, card.score.high)
    if not all(map(math.isfinite, numbers)) or min(card.std) <= 0:
        raise ValueError("mean, std and score are finite numbers, std above 0")
    if not card.score.low < card.score.high:
        raise ValueError("score.low is below score.high")
    if card.stem_weights and card.stem_weights not in PACKAGED:
        raise ValueError(f"stem_weights names no package known here ({', '.join(PACKAGED)})")
    if len(card.sets) > MOST_SETS or len(card.sets) == 1:
        raise ValueError(f"sets are 2 to {MOST_SETS}, or none")
    for one in card.sets:
        if not (math.isfinite(one.score.low) and one.score.low < one.score.high):
            raise ValueError(f"the scale of {printable(one.name, 40)} has no two ends")
        if not 0 < len(one.name) <= _MOST_TEXT:
            raise ValueError(f"a set's name has 1 to {_MOST_TEXT} characters")
    for name in ("training_set", "split", "split_hash", "decode", "note"):
        if len(getattr(card, name)) > _MOST_TEXT:
            raise ValueError(f"{name} is longer than {_MOST_TEXT} characters")


def _expected_shapes(config: Path, card: ModelCard) -> dict[str, list[int]]:
    """Names and shapes of the card's weights, found without memory for them."""
    try:
        with torch.device("meta"):
            tensors = build_model(card).state_dict()
    except Exception as error:  # timm's models refuse sizes in any way they like
        raise LmclError(
            f"{printable(config)}: its model cannot be built: {printable(error)}; take the folder "
            "as lmcl wrote it",
            exit_code=5,
        ) from error
    left_out = _STEM if card.stem_weights else None
    return {
        name: list(tensor.shape)
        for name, tensor in tensors.items()
        if left_out is None or not name.startswith(left_out)
    }


def _read_shapes(weights: Path) -> dict[str, list[int]]:
    """Names and shapes in a safetensors file; no tensor is read.

    Raises:
        LmclError: If it is none, or its tensors are of no type that weights have; exit code 5.
    """
    try:
        with open_regular(weights, limit_bytes=MODEL_FILES["model.safetensors"]) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > _MOST_HEADER_BYTES:
            raise ValueError(f"its header claims {header_bytes:,} bytes")
        shapes = {}
        with safe_open(weights, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                view = tensors.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise ValueError(f"tensor {name!r} is of type {view.get_dtype()}")
                shapes[name] = list(view.get_shape())
    except (SafetensorError, ShardError, ValueError, OSError) as error:
        raise _misfit(weights, printable(error)) from error
    return shapes


def _first_difference(found: Mapping[str, list[int]], expected: Mapping[str, list[int]]) -> str:
    for name, shape in expected.items():
        if name not in found:
            return f"tensor {name} is missing"
        if found[name] != shape:
            return f"tensor {name} has shape {printable(found[name], 60)}, not {shape}"
    more = next(name for name in found if name not in expected)
    return f"there is a tensor {printable(more, 60)} that the model has not"


def _misfit(weights: Path, why: str) -> LmclError:
    return LmclError(
        f"{printable(weights)}: does not fit config.json: {why}; take the folder as lmcl wrote it",
        exit_code=5,
    )


def answer_for(released: ReleasedModel, name: str) -> ReleasedModel:
    """The model answering in the scale of one of the sets it learned from.

    Args:
        released: A model; it is changed.
        name: Of the set.

    Raises:
        LmclError: If it learned from no set of that name (exit code 2).
    """
    names = [one.name for one in released.card.sets]
    if name not in names:
        known = f"it has those of {', '.join(names)}" if names else "it learned from one set alone"
        raise LmclError(
            f"--scale {printable(name, 80)}: the model has no scale of that name; {known}: leave "
            "the option out for its own scale",
            exit_code=2,
        )
    number = names.index(name)
    released.model.answers_for = number
    card = replace(released.card, score=released.card.sets[number].score, training_set=name)
    return replace(released, card=card)


def build_model(card: ModelCard) -> QualityModel:
    """The card's architecture with random weights; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return QualityModel(
            card.encoder,
            card.decoder,
            crop_size=card.crops.size,
            view_size=card.saliency.view,
            sets=len(card.sets),
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

{_sets_line(card)}* Result: {figures} (split `{card.split}`, hash `{card.split_hash[:16]}`).
* Pixels: decoded by `{card.decode}`; EXIF orientation applied; {_resampling(card)}; normalised by
  mean {card.mean} and deviation {card.std}.
{_stem_line(card)}* Limits: it knows the contents and distortions of its training set; other
  cameras, codecs and subjects shift its scores. {card.note}
* The weights derive from the training set; its licence applies to what you do with them.

    lmcl score PHOTOS --model {"<this folder>"} --output scores.csv
"""


def _resampling(card: ModelCard) -> str:
    crops = card.crops
    if not crops.scales:
        return "never resampled"
    which, limit = ("longer", crops.max_side) if crops.max_side else ("shorter", crops.short_side)
    return f"{which} sides above {limit} pixels scaled down to it"


def _sets_line(card: ModelCard) -> str:
    if not card.sets:
        return ""
    scales = "; ".join(f"{one.name} ({one.score.description})" for one in card.sets)
    return (
        f"* Learned from several sets: {scales}. Its own answers are on a scale they share, 0 to\n"
        f"  1, {card.sets[0].name}'s range; `lmcl score --scale NAME` answers in the scale of the\n"
        "  set NAME. The result below is over all sets together, each in its own scale.\n"
    )


def _stem_line(card: ModelCard) -> str:
    if not card.stem_weights:
        return ""
    return (
        f"* The stem `{card.encoder.stem}` keeps its pretrained weights, which are not in this\n"
        f"  folder: they come with the package `{card.stem_weights}`\n"
        f"  ({PACKAGED[card.stem_weights].licence}).\n"
    )
