"""Pretrained weights: files and timm's hub into an encoder."""

import logging
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from timm.models import load_pretrained, load_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from lmcl.errors import ConfigError, LmclError
from lmcl.models.conv_vit import ConvVit
from lmcl.models.encoder import Encoder, EncoderConfig
from lmcl.models.packaged import PACKAGED, read_packaged
from lmcl.models.stem import SqueezeLevels
from lmcl.models.timm_stem import TimmLevels
from lmcl.models.vit import TimmEncoder


def load_weights(
    encoder: Encoder, config: EncoderConfig
) -> Literal["random", "file", "hub", "package"]:
    """Fill the encoder with the weights its configuration names, and say where they came from.

    Raises:
        ConfigError: If the file's tensors do not fit the encoder (exit code 5).
        LmclError: If the file is missing (exit code 4) or damaged (exit code 5), or the hub cannot
            be reached.
    """
    if not config.weights:
        return "random"
    if config.weights == "timm":
        _load_from_hub(encoder, config)
        return "hub"
    if config.weights in PACKAGED:
        _load_package(encoder, config)
        return "package"
    path = Path(config.weights)
    if not path.is_file():
        raise LmclError(
            f"encoder.weights = {config.weights!r}: there is no such file (looked in "
            f"{path.absolute().parent}); name an existing file, or leave it empty: random weights",
            exit_code=4,
        )
    try:
        if path.suffix == ".npz":
            _load_squeezenet(encoder, path)
        elif (stem := _timm_stem(encoder)) is not None:
            _load_file(stem, path)
        else:
            _load_vit(encoder, path)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"encoder.weights = {config.weights!r} does not fit "
            f"{config.timm_name or config.name!r}: "
            f"{str(error).splitlines()[0]}; use the weights of that very architecture",
            exit_code=5,
        ) from error
    return "file"


def _timm_stem(encoder: Encoder) -> TimmLevels | None:
    stem = encoder.stem if isinstance(encoder, ConvVit) else None
    return stem if isinstance(stem, TimmLevels) else None


def _load_package(encoder: Encoder, config: EncoderConfig) -> None:
    weights, stem = PACKAGED[config.weights], _timm_stem(encoder)
    if stem is None or config.stem.partition(".")[0] != weights.timm_name:
        raise ConfigError(
            f"encoder.weights = {config.weights!r} are those of {weights.timm_name}; set "
            f"encoder.name = 'hybrid' and encoder.stem = {weights.timm_name!r}",
            exit_code=5,
        )
    tensors = read_packaged(weights)
    stem.layers.load_state_dict({name: tensors[name] for name in stem.layers.state_dict()})


def _load_file(stem: TimmLevels, path: Path) -> None:
    """Fill a stem from a checkpoint of the whole model.

    Raises:
        ValueError: If the checkpoint leaves tensors of the stem as they were: names it.
    """
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error
    first, second = (_filled_layers(stem, state, seed=seed) for seed in (0, 1))
    # timm loads parts of models without a word; what it did not load is random, and differs.
    left = [name for name, value in first.items() if not torch.equal(value, second[name])]
    if left:
        raise ValueError(f"{len(left)} tensors are missing, {left[0]} for one")
    stem.layers.load_state_dict(first)


def _filled_layers(
    stem: TimmLevels, state: Mapping[str, Tensor], *, seed: int
) -> dict[str, Tensor]:
    """The stem's tensors after timm has put those of the whole model where they belong."""
    with torch.random.fork_rng(devices=[]), _without_warnings():
        torch.manual_seed(seed)
        overlay = {"state_dict": dict(state), "custom_load": False}
        net = stem.create_layers(pretrained=True, pretrained_cfg_overlay=overlay)
    return net.state_dict()  # type: ignore[no-any-return]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence timm about the head that a stem has no use for."""
    logger = logging.getLogger("timm.models._builder")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_squeezenet(encoder: Encoder, path: Path) -> None:
    stem = encoder.stem if isinstance(encoder, ConvVit) else None
    if not isinstance(stem, SqueezeLevels):
        raise ValueError("an .npz file holds the weights of SqueezeNet only")
    try:
        # numpy would leave such a file open.
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no .npz archive")
        stem.load(path)
    except RuntimeError:
        raise  # names or shapes that do not fit
    except Exception as error:
        raise _unreadable(path, error) from error


def _load_vit(encoder: Encoder, path: Path) -> None:
    if not isinstance(encoder, TimmEncoder):
        raise ValueError("a checkpoint file holds a timm model; this encoder takes an .npz file")

    def without_head(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        kept = {name: value for name, value in state.items() if not name.startswith("head")}
        return checkpoint_filter_fn(kept, model)  # type: ignore[no-any-return]

    try:
        state = without_head(load_state_dict(str(path), weights_only=True), encoder.vit)
    except Exception as error:
        raise _unreadable(path, error) from error
    encoder.vit.load_state_dict(state)


def _unreadable(path: Path, error: Exception) -> LmclError:
    """Parsers say in any way they like that a file is none of theirs."""
    said = (str(error).splitlines() or ["nothing more is known"])[0]
    return LmclError(
        f"encoder.weights = {str(path)!r}: cannot be read as weights ({type(error).__name__}: "
        f"{said}); it is damaged or of another format: copy it again, or name a .safetensors, .pth "
        "or .npz file",
        exit_code=5,
    )


def _load_from_hub(encoder: Encoder, config: EncoderConfig) -> None:
    stem = _timm_stem(encoder)
    if stem is None and not isinstance(encoder, TimmEncoder):
        raise ConfigError(f"encoder.weights = 'timm' is for timm models, not {config.name!r}")
    try:
        if stem is not None:
            with _without_warnings():
                whole = stem.create_layers(pretrained=True)
            stem.layers.load_state_dict(whole.state_dict())
        elif isinstance(encoder, TimmEncoder):
            load_pretrained(encoder.vit, num_classes=0, filter_fn=checkpoint_filter_fn)
    except Exception as error:
        raise LmclError(
            f"encoder.weights = 'timm': the weights of {config.timm_name!r} could not be fetched "
            f"({error}); on a machine without a network give encoder.weights a local file",
            exit_code=4,
        ) from error
