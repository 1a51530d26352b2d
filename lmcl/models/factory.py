"""Encoder by name, with random weights."""

from collections.abc import Sequence

from lmcl.errors import ConfigError
from lmcl.models.conv_vit import ConvVit
from lmcl.models.encoder import Encoder, EncoderConfig
from lmcl.models.stem import LevelStem, SqueezeLevels, small_stem
from lmcl.models.timm_stem import TimmLevels
from lmcl.models.vit import TimmEncoder


def make_encoder(config: EncoderConfig, *, sizes: Sequence[int]) -> Encoder:
    """An encoder with random weights; never touches the network or a file.

    Args:
        config: Which encoder.
        sizes: Pixel sides it will be shown: the crop's first, then the whole-image view's.

    Raises:
        ConfigError: If the name is unknown or cannot serve the method.
    """
    if config.is_squeezenet or config.name == "hybrid":
        return ConvVit(_level_stem(config, sizes=sizes), config)
    if config.frozen:
        raise ConfigError(
            f"encoder.frozen = {config.frozen} is for hybrid encoders, not {config.name!r}; "
            "set it to 0"
        )
    if config.name == "conv-vit":
        return ConvVit(small_stem(config.patch or 16), config)
    return TimmEncoder(config, sizes=sizes)


def _level_stem(config: EncoderConfig, *, sizes: Sequence[int]) -> LevelStem:
    if config.is_squeezenet:
        return SqueezeLevels(frozen=config.frozen, patch=config.patch or 16)
    return TimmLevels(
        config.stem, levels=config.levels, frozen=config.frozen, patch=config.patch, sizes=sizes
    )
