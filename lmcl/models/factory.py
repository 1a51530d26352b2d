"""Encoder by name, with random weights."""

from collections.abc import Sequence

from lmcl.errors import ConfigError
from lmcl.models.conv_vit import ConvVit
from lmcl.models.encoder import Encoder, EncoderConfig
from lmcl.models.stem import SqueezeLevels, small_stem
from lmcl.models.vit import TimmEncoder


def make_encoder(config: EncoderConfig, *, sizes: Sequence[int]) -> Encoder:
    """An encoder with random weights; never touches the network or a file.

    Args:
        config: Which encoder.
        sizes: Pixel sides it will be shown: the crop's first, then the whole-image view's.

    Raises:
        ConfigError: If the name is unknown or cannot serve the method.
    """
    if config.name == "squeezenet-vit":
        return ConvVit(SqueezeLevels(frozen=config.frozen, patch=config.patch or 16), config)
    if config.frozen:
        raise ConfigError(
            f"encoder.frozen = {config.frozen} is for squeezenet-vit, not {config.name!r}; "
            "set it to 0"
        )
    if config.name == "conv-vit":
        return ConvVit(small_stem(config.patch or 16), config)
    return TimmEncoder(config, sizes=sizes)
