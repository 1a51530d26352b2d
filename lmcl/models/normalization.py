"""Normalisation: the channel means and deviations a pretrained encoder was trained with.

timm keeps them in every model's `pretrained_cfg`: ImageNet's for most, .5 for augreg, PE and
EfficientNet-Lite, those of CLIP for CLIP and EVA-02. Another one shifts every feature.
"""

from typing import NamedTuple

from timm.models import get_pretrained_cfg

from lmcl.models.encoder import EncoderConfig

Channels = tuple[float, float, float]


class Normalization(NamedTuple):
    """What pixels in [0, 1] become before a network: (pixel - mean) / std, RGB."""

    mean: Channels
    std: Channels


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NAMED = {
    "imagenet": IMAGENET,
    "half": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": Normalization(
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
}
"""Values of `encoder.normalize` but `model`."""


def find_normalization(encoder: EncoderConfig) -> Normalization:
    """Mean and deviation an encoder's pixels are normalised with.

    `encoder.normalize` says which; with `model` they are those of timm's `pretrained_cfg`, and
    ImageNet's for stems that are not timm's and for models without one.
    """
    asked = encoder.normalize
    if isinstance(asked, str):
        return NAMED[asked] if asked in NAMED else _normalization_of_model(encoder)
    return Normalization(*asked)


def _normalization_of_model(encoder: EncoderConfig) -> Normalization:
    name = encoder.timm_name
    found = get_pretrained_cfg(name) if name is not None else None
    if found is None:
        return IMAGENET
    mean, std = _channels(found.mean), _channels(found.std)
    return Normalization(mean, std)


def _channels(values: tuple[float, ...]) -> Channels:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
