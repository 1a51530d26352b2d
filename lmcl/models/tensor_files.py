"""Weights of others: read a file's tensors, find those of a network among them, say what misfits.

Trainers wrap what they save: in containers (`state_dict`, DINO's `teacher`) and in prefixes
(`module.`, `backbone.`, open_clip's `visual.trunk.`). They are taken off when that makes all
tensors of the network fit, and only then. Nothing is unpickled but tensors and plain values.
"""

import argparse
import importlib
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lmcl.errors import LmclError
from shards.text import printable

Tensors = dict[str, Tensor]
Convert = Callable[[Tensors], Mapping[str, Tensor]]
"""From the names and positions of others to those of a network; whatever it raises is a misfit."""

_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "module")
_PREFIXES = (
    "module.",
    "_orig_mod.",
    "backbone.",
    "model.",
    "visual.trunk.",
    "teacher.",
    "student.",
    "encoder.",
)
_MOST_WRAPPINGS = 5
_HEADS = ("head", "fc.", "classifier.", "mask_token", "attn_pool.", "dino_head.")
"""Beginnings of names that an encoder has no use for, and that are left out without a word."""
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64, np.bool_)),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""Classes that trainers save beside tensors and that run no code when they are read."""


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """How far tensors are from those a network wants."""

    wanted: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    """`NAME [4, 8] in place of [8, 8]`."""

    @property
    def count(self) -> int:
        """Names that stand in the way."""
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)

    def __str__(self) -> str:
        """Counts, and the first of each kind."""
        kinds = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.reshaped),
        )
        return ", ".join(
            f"{len(names)} {kind} ({printable(names[0], 120)}{', ...' if len(names) > 1 else ''})"
            for kind, names in kinds
            if names
        )


class MisfitError(ValueError):
    """Tensors that are not a network's; the message names the first of each kind."""


def read_tensor_file(path: Path) -> Any:
    """What a .safetensors or torch file holds: tensors by name, within the trainer's containers.

    Raises:
        LmclError: If it is no such file, or a pickled module, which only its own code could read;
            exit code 5.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # parsers say in any way they like that a file is none of theirs
        name = _pickled_class(path)
        if name:
            raise LmclError(
                f"encoder.weights = {printable(path)!r}: is a whole module ({printable(name, 80)}) "
                "saved by torch.save(model), which runs code when it is read; save its tensors: "
                "torch.save(model.state_dict(), PATH)",
                exit_code=5,
            ) from error
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> LmclError:
    """The sentence about a file that no parser can read; exit code 5."""
    said = (str(error).splitlines() or ["nothing more is known"])[0]
    return LmclError(
        f"encoder.weights = {printable(path)!r}: cannot be read as weights "
        f"({type(error).__name__}: {printable(said, 200)}); it is damaged or of another format: "
        "copy it again, or name a .safetensors, .pth or .npz file",
        exit_code=5,
    )


def fit_tensors(found: Any, wanted: Mapping[str, Tensor], convert: Convert = dict) -> Tensors:
    """The tensors of a network among what a file holds, by the network's names.

    Args:
        found: What `read_tensor_file` gave.
        wanted: The network's tensors; their names and shapes count.
        convert: Names and shapes of the network from those of whoever trained it.

    Raises:
        MisfitError: If no unwrapping gives all of them; names the first that misfit in the best.
        TypeError: If the file holds no tensors by name.
    """
    best: Misfit | None = None
    for tensors in _unwrapped(found):
        fitting, misfit = _compare(tensors, wanted, convert)
        if not misfit.count:
            return fitting
        if best is None or misfit.count < best.count:
            best = misfit
    if best is None:
        raise TypeError(f"it holds a {type(found).__name__} where tensors by name were expected")
    raise MisfitError(f"of {best.wanted} tensors: {best}")


def best_wrapping(found: Any, names: Sequence[str]) -> Tensors:
    """The unwrapping of a file that has most of some names.

    Raises:
        TypeError: If the file holds no tensors by name.
    """
    known = set(names)
    candidates = list(_unwrapped(found))
    if not candidates:
        raise TypeError(f"it holds a {type(found).__name__} where tensors by name were expected")
    return max(candidates, key=lambda tensors: len(known & tensors.keys()))


def names_wanted(names: Iterable[str]) -> list[str]:
    """Names of tensors but for those of heads, which an encoder has no use for."""
    return [name for name in names if not name.startswith(_HEADS)]


def refuse_nonfinite(tensors: Mapping[str, Tensor], asked: str) -> None:
    """Refuse weights that would make every score NaN.

    Args:
        tensors: By name.
        asked: Field and value that named them.

    Raises:
        LmclError: Names the first tensor; exit code 5.
    """
    bad = [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if bad:
        raise LmclError(
            f"{asked}: NaN or infinite numbers in {len(bad)} of {len(tensors)} tensors, "
            f"{printable(bad[0], 120)} for one; its training broke: take an earlier checkpoint",
            exit_code=5,
        )


def timm_converter(network: nn.Module) -> Convert:
    """What timm does to weights of others for a model: names, patches, and positions resampled."""
    module = importlib.import_module(type(network).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return dict

    def converted(tensors: Tensors) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = convert(dict(tensors), network)
        return found

    return converted


def _compare(
    tensors: Tensors, wanted: Mapping[str, Tensor], convert: Convert
) -> tuple[Tensors, Misfit]:
    try:
        given = {
            name: value for name, value in convert(tensors).items() if isinstance(value, Tensor)
        }
    except Exception:  # conversions index into what they take for their own kind of file
        given = tensors
    missing = tuple(name for name in wanted if name not in given)
    unexpected = tuple(name for name in names_wanted(given) if name not in wanted)
    both = [name for name in wanted if name in given]
    reshaped = tuple(
        f"{name} {list(given[name].shape)} in place of {list(wanted[name].shape)}"
        for name in both
        if given[name].shape != wanted[name].shape
    )
    misfit = Misfit(wanted=len(wanted), missing=missing, unexpected=unexpected, reshaped=reshaped)
    return {name: given[name] for name in both}, misfit


def _unwrapped(found: Any) -> Iterator[Tensors]:
    """A file's tensors as they stand, then out of each container and behind each prefix."""
    queue = [(found, 0)]
    while queue:
        node, depth = queue.pop(0)
        if not isinstance(node, Mapping):
            continue
        tensors = {str(name): one for name, one in node.items() if isinstance(one, Tensor)}
        if tensors:
            yield tensors
        if depth == _MOST_WRAPPINGS:
            continue
        queue += [(node[name], depth + 1) for name in _CONTAINERS if name in node]
        for prefix in _PREFIXES:
            inner = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            if inner:
                queue.append((inner, depth + 1))


def _pickled_class(path: Path) -> str:
    """The class of an object that was pickled whole; empty if the file begins with a dictionary."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(one for one in archive.namelist() if one.endswith("data.pkl"))
            operations = islice(pickletools.genops(archive.read(name)[:4096]), 3)
            first = next((arg for code, arg, _ in operations if code.name == "GLOBAL"), "")
    except (OSError, ValueError, zipfile.BadZipFile, StopIteration):
        return ""
    known = ("collections ", "argparse ", "numpy", "torch._utils")
    return "" if str(first).startswith(known) else str(first).replace(" ", ".")
