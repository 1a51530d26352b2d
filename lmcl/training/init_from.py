"""Start a run from a model that has learned already (`train.start_from`).

Two uses: a published model goes on learning on one's own images, and a readout that has learned on
a frozen stem goes on together with it (docs/decisions/0010).
"""

import logging
import math
from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lmcl.config import Config
from lmcl.errors import ConfigError
from lmcl.models.encoder import EncoderConfig
from lmcl.models.named import find_model
from lmcl.models.normalization import find_normalization
from lmcl.models.pretrained import ModelCard, load_model
from lmcl.models.quality_model import DecoderConfig, QualityModel
from lmcl.models.tensor_files import refuse_nonfinite, timm_converter
from lmcl.models.training_images import (
    ImageSketch,
    TrainingImages,
    prefixes,
    read_training_images,
    sketch_images,
)
from shards.joined import JoinedSet
from shards.read import ShardSet
from shards.splits.split import Split
from shards.text import printable

logger = logging.getLogger(__name__)

_SCALES = "scales."
_DAMAGE = "damage."
_SIZED = ("encoder.vit.", "encoder.stem.layers.model.")
"""Networks of timm's whose positions depend on the crop's size."""


def start_from_model(
    student: QualityModel, config: Config, *, shard_set: ShardSet, split: Split
) -> None:
    """Give the student all weights of the model folder the configuration names, if it names one.

    Raises:
        ConfigError: With exit code 5 if the model is of another architecture, or has learned from
            images that this run judges.
        LmclError: If the folder is missing (exit code 4) or damaged (exit code 5).
    """
    asked = config.train.start_from
    if not asked:
        return
    folder = find_model(asked)
    released = load_model(folder)
    card = _without_damage_head(released.card, config)
    _check_architecture(card, config)
    seen = read_training_images(folder)
    if seen is None:
        _check_names(released.card, config, shard_set=shard_set, split=split)
    else:
        _check_unseen(seen, config, shard_set=shard_set, split=split)
    state = released.model.state_dict()
    refuse_nonfinite(state, f"train.start_from = {printable(asked)!r}")
    if card.decoder != released.card.decoder:
        state = {name: value for name, value in state.items() if not name.startswith(_DAMAGE)}
    state = _with_own_scales(student, state, released.card, shard_set)
    student.load_state_dict(_fit_to_crops(student, state, released.card, config))


def training_images_of(config: Config, shard_set: ShardSet, split: Split) -> TrainingImages:
    """What the model of a run will have seen: its own images, and those of the one it starts from.

    Raises:
        LmclError: As `start_from_model`.
    """
    sha256 = shard_set.samples.sha256
    own = TrainingImages(
        learned=sketch_images(sha256[split.part("train")]),
        selected=sketch_images(sha256[split.part("val")]),
        set_sha256=shard_set.manifest.samples_sha256,
    )
    if not config.train.start_from:
        return own
    return own.after(read_training_images(find_model(config.train.start_from)))


def _without_damage_head(card: ModelCard, config: Config) -> ModelCard:
    """The model's card as if it had no damage head, where the configuration asks for none.

    Configurations written before there was one go on; what they leave out is said.
    """
    width = card.decoder.damage
    if not width or config.decoder.damage:
        return card
    logger.info(
        "train.start_from: the model takes damage off its scores by a head that this "
        "configuration does not have, so it is left out; decoder.damage = %d keeps it",
        width,
    )
    return replace(card, decoder=replace(card.decoder, damage=0))


def _with_own_scales(
    student: QualityModel, state: dict[str, Tensor], card: ModelCard, shard_set: ShardSet
) -> dict[str, Tensor]:
    """The model's tensors, but for lines to the scales of other sets than the run's."""
    own = {n: t for n, t in student.state_dict().items() if n.startswith(_SCALES)}
    names = shard_set.names if isinstance(shard_set, JoinedSet) else ()
    if names and names == tuple(one.name for one in card.sets):
        return state
    return {n: t for n, t in state.items() if not n.startswith(_SCALES)} | own


def _fit_to_crops(
    student: QualityModel, state: dict[str, Tensor], card: ModelCard, config: Config
) -> dict[str, Tensor]:
    """The model's tensors for crops of this run's size: positions are resampled, as for files.

    Raises:
        ConfigError: If something else depends on the size; exit code 5.
    """
    wanted = student.state_dict()
    for prefix in _SIZED:
        network = _module_at(student, prefix)
        if network is None:
            continue
        own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        if all(wanted[prefix + name].shape == value.shape for name, value in own.items()):
            continue
        resized = timm_converter(network)(own)
        state = {**state, **{prefix + n: t for n, t in resized.items() if n in own}}
    unlike = [name for name, value in state.items() if value.shape != wanted[name].shape]
    if unlike:
        there, here = (
            (card.crops.size, card.saliency.view),
            (config.crops.size, config.saliency.view),
        )
        raise ConfigError(
            f"train.start_from = {printable(config.train.start_from)!r}: {unlike[0]} has shape "
            f"{list(state[unlike[0]].shape)} in it and {list(wanted[unlike[0]].shape)} here, and "
            f"cannot be brought from crops and views of {there} pixels to {here}; set crops.size "
            f"= {there[0]} and saliency.view = {there[1]}",
            exit_code=5,
        )
    return state


def _module_at(student: QualityModel, prefix: str) -> nn.Module | None:
    found: object = student
    for name in prefix.rstrip(".").split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _check_architecture(card: ModelCard, config: Config) -> None:
    asked = config.train.start_from
    # What learns, and from where, does not change what a model is; pixels are compared below.
    encoder = replace(
        card.encoder,
        normalize=config.encoder.normalize,
        drop_path=config.encoder.drop_path,
    )
    ours = replace(config.encoder, weights="", frozen=card.encoder.frozen)
    for part, here, there in (
        ("encoder", ours, encoder),
        ("decoder", config.decoder, card.decoder),
    ):
        if here != there:
            raise ConfigError(
                f"train.start_from = {asked!r} is another model: it has "
                f"{_unlike(part, there, here)}; take over the [{part}] table of its run's "
                "config.toml",
                exit_code=5,
            )
    pixels = find_normalization(config.encoder)
    if pixels != (card.mean, card.std):
        raise ConfigError(
            f"train.start_from = {asked!r} learned from pixels normalised by {card.mean} and "
            f"{card.std}, and here it would be {pixels.mean} and {pixels.std}; set "
            f"encoder.normalize = {[list(card.mean), list(card.std)]}",
            exit_code=5,
        )


def _unlike(part: str, there: EncoderConfig | DecoderConfig, here: object) -> str:
    """The fields in which a model's table differs from the configuration's."""

    def shown(table: object, name: str) -> str:
        value = getattr(table, name)
        return "nothing set" if value is None else printable(repr(value), 80)

    return ", ".join(
        f"{part}.{one.name} = {shown(there, one.name)} (here {shown(here, one.name)})"
        for one in fields(there)
        if getattr(there, one.name) != getattr(here, one.name)
    )


def _check_names(card: ModelCard, config: Config, *, shard_set: ShardSet, split: Split) -> None:
    """What can be told of a model that does not say which images it has seen.

    Raises:
        ConfigError: If it was trained on another split of a set of this name; exit code 5.
    """
    if card.training_set == shard_set.name and card.split_hash != split.hash:
        raise ConfigError(
            f"train.start_from = {config.train.start_from!r} was trained on another split of "
            f"{shard_set.name} ({card.split!r}, hash {card.split_hash[:16]}; here "
            f"{split.name!r}, hash {split.hash[:16]}): it may have learned from images that this "
            "run judges; train it on this split first, or name its own in data.split. If that is "
            "another set of the same name, pack this one under its own: `lmcl-shard reshard "
            "--name NAME`",
            exit_code=5,
        )
    logger.info(
        "train.start_from: the model, of an earlier version, does not say which images of %s it "
        "has seen, so it was not checked whether this run judges some of them",
        printable(card.training_set),
    )


def _check_unseen(
    seen: TrainingImages, config: Config, *, shard_set: ShardSet, split: Split
) -> None:
    """Refuse a model that has seen, byte for byte, what this run will be chosen or judged by.

    Images that this run's own split has in several parts are the split's matter.

    Raises:
        ConfigError: With the counts; exit code 5.
    """
    sha256 = shard_set.samples.sha256
    train, val, test = (sha256[split.part(name)] for name in ("train", "val", "test"))
    own, chosen = prefixes(train), prefixes(np.concatenate([train, val]))
    learned = {
        name: _count(seen.learned, part[~np.isin(prefixes(part), own)])
        for name, part in (("val", val), ("test", test))
    }
    selected = _count(seen.selected, test[~np.isin(prefixes(test), chosen)])
    if not (learned["val"] or learned["test"] or selected):
        if not seen.is_complete:
            logger.info(
                "train.start_from: the model began as one that does not say which images it had "
                "seen; none of those that are known is judged here"
            )
        return
    about = "" if seen.learned.is_whole and seen.selected.is_whole else "about "
    raise ConfigError(
        f"train.start_from = {printable(config.train.start_from)!r} has seen images that this run "
        f"judges, the same byte for byte: it learned from {about}{learned['val']} of the "
        f"{len(val)} images of the val part and {about}{learned['test']} of the {len(test)} of the "
        f"test part of {printable(shard_set.name)}, split {split.name!r}, and was chosen by "
        f"{about}{selected} of that test part, so the figures would be too good; train it on this "
        "split first, name its own split in data.split, or make one whose val and test parts "
        "leave these images out (`lmcl-shard split --from`)",
        exit_code=5,
    )


def _count(sketch: ImageSketch, sha256: NDArray[np.uint8]) -> int:
    """How many of some images are in a collection; of a sampled one an estimate, at least 1."""
    return math.ceil(int(sketch.holds(sha256).sum()) / sketch.share)
