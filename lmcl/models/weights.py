"""Pretrained weights: files and timm's hub into an encoder."""

import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from timm.models import load_pretrained
from torch import Tensor, nn

from lmcl.errors import ConfigError, LmclError
from lmcl.models.conv_vit import ConvVit
from lmcl.models.encoder import Encoder, EncoderConfig
from lmcl.models.packaged import PACKAGED, read_packaged
from lmcl.models.stem import SqueezeLevels
from lmcl.models.tensor_files import (
    Misfit,
    MisfitError,
    best_wrapping,
    fit_tensors,
    names_wanted,
    read_tensor_file,
    refuse_nonfinite,
    timm_converter,
    unreadable,
)
from lmcl.models.timm_stem import TimmLevels
from lmcl.models.vit import TimmEncoder
from shards.text import printable

_NUMBER = re.compile(r"\d+")


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
    if path.is_dir():
        raise LmclError(
            f"encoder.weights = {printable(config.weights)!r}: is a folder; name the file in it, "
            "or, if it is a model folder of lmcl, train.start_from",
            exit_code=4,
        )
    if not path.is_file():
        raise LmclError(
            f"encoder.weights = {config.weights!r}: there is no such file (looked in "
            f"{path.absolute().parent}); name an existing file, or leave it empty: random weights",
            exit_code=4,
        )
    try:
        _load_file(encoder, path)
    except (RuntimeError, ValueError, KeyError) as error:
        way = error if isinstance(error, MisfitError) else MisfitError("")
        raise ConfigError(
            f"encoder.weights = {printable(config.weights)!r} does not fit "
            f"{config.timm_name or config.name!r}: {str(error).splitlines()[0]}; {way.way_out}",
            exit_code=5,
        ) from error
    return "file"


def _load_file(encoder: Encoder, path: Path) -> None:
    """Fill an encoder, or its stem, from a file of whoever trained it."""
    stem = encoder.stem if isinstance(encoder, ConvVit) else None
    if isinstance(stem, SqueezeLevels):
        network: nn.Module = stem.layers
    elif isinstance(stem, TimmLevels):
        network = stem.layers
    elif isinstance(encoder, TimmEncoder):
        network = encoder.vit
    else:
        raise ValueError("conv-vit starts from scratch; no weights of others are of its kind")
    is_npz = path.suffix == ".npz"
    if is_npz and not isinstance(stem, SqueezeLevels):
        raise ValueError("an .npz file holds the weights of SqueezeNet only")
    found = _read_npz(path) if is_npz else read_tensor_file(path)
    try:
        if isinstance(stem, TimmLevels):
            tensors = _fit_levels(stem, found)
        elif isinstance(stem, SqueezeLevels):
            tensors = fit_tensors(found, network.state_dict(), _features_alone)
        else:
            tensors = fit_tensors(found, _without_pooling(network), timm_converter(network))
    except TypeError as error:
        raise unreadable(path, error) from error
    refuse_nonfinite(tensors, f"encoder.weights = {printable(path)!r}")
    network.load_state_dict(tensors, strict=False)  # all that takes part is there


def _without_pooling(network: nn.Module) -> dict[str, Tensor]:
    """A ViT's tensors but for those of a pooling that takes no part (`TimmEncoder`)."""
    state = network.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("attn_pool.")}


def _features_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SqueezeNet's convolutions out of a whole torchvision model."""
    return {name.removeprefix("features."): value for name, value in tensors.items()}


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        # numpy would leave such a file open.
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no .npz archive")
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:
        raise unreadable(path, error) from error


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


def _fit_levels(stem: TimmLevels, found: Any) -> dict[str, Tensor]:
    """A stem's tensors out of a checkpoint of the whole model.

    Raises:
        MisfitError: If the checkpoint leaves tensors of the stem as they were: names the first.
    """
    with torch.device("meta"):
        whole = timm.create_model(stem.name, pretrained=False).state_dict()
    state = best_wrapping(found, list(whole))
    reshaped = [
        f"{name} {list(value.shape)} in place of {list(whole[name].shape)}"
        for name, value in state.items()
        if name in whole and value.shape != whole[name].shape
    ]
    try:
        first, second = (_filled_layers(stem, state, seed=seed) for seed in (0, 1))
    except RuntimeError as error:
        raise MisfitError(_misfit_of_levels([], state, whole, reshaped)) from error
    # timm loads parts of models without a word; what it did not load is random, and differs.
    missing = [name for name, value in first.items() if not torch.equal(value, second[name])]
    if missing:
        absent = [name for name in names_wanted(whole) if name not in state]
        raise MisfitError(_misfit_of_levels(absent or missing, state, whole, reshaped))
    if _is_deeper(state, whole):
        raise MisfitError(_misfit_of_levels([], state, whole, reshaped))
    return first


def _is_deeper(state: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> bool:
    """Whether tensors are those of a model and of more layers of its kind.

    timm fills the layers there are from a deeper model's without a word.
    """
    if not set(names_wanted(whole)) <= state.keys():
        return False
    kinds = {_NUMBER.sub("#", name) for name in whole}
    return any(_NUMBER.sub("#", name) in kinds for name in state.keys() - whole.keys())


def _misfit_of_levels(
    missing: list[str],
    state: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    reshaped: list[str],
) -> str:
    unexpected = tuple(name for name in names_wanted(state) if name not in whole)
    misfit = Misfit(
        wanted=len(whole),
        missing=tuple(missing),
        unexpected=unexpected,
        reshaped=tuple(reshaped),
    )
    return f"of {misfit.wanted} tensors: {misfit}"


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
            filter_fn = timm_converter(encoder.vit)
            load_pretrained(encoder.vit, num_classes=0, filter_fn=lambda own, _: filter_fn(own))
    except Exception as error:
        raise LmclError(
            f"encoder.weights = 'timm': the weights of {config.timm_name!r} could not be fetched "
            f"({error}); on a machine without a network give encoder.weights a local file",
            exit_code=4,
        ) from error
