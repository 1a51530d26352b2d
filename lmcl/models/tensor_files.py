"""Weights of others: read a file's tensors, find those of a network among them, say what misfits.

Trainers wrap what they save: in containers (`state_dict`, DINO's `teacher`) and in prefixes
(`module.`, `backbone.`, open_clip's `visual.trunk.`). They are taken off when that makes all
tensors of the network fit, and only then. Nothing is unpickled but tensors and plain values.
"""

import argparse
import importlib
import io
import logging
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lmcl.errors import LmclError
from shards.text import printable

logger = logging.getLogger(__name__)

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
_MOST_WRAPPINGS, _MOST_CONTAINERS = 5, 64
_LOOKED_AT_BYTES = 1 << 20
_A_CLASS = b"c"
"""What a pickle of one object begins with, behind its version."""
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

    def __init__(
        self, message: str, *, way_out: str = "use the weights of that very architecture"
    ) -> None:
        super().__init__(message)
        self.way_out = way_out


def read_tensor_file(path: Path) -> Any:
    """What a .safetensors or torch file holds: tensors by name, within the trainer's containers.

    Raises:
        LmclError: If it is no such file, or a pickled module, which only its own code could read;
            exit code 5.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # parsers say in any way they like that a file is none of theirs
        raise _pickled_whole(path) or unreadable(path, error) from error


def _pickled_whole(path: Path) -> LmclError | None:
    """The sentence about a file that holds objects, not tensors; None if it does not."""
    name, is_whole = _pickled_class(path)
    if not name:
        return None
    what = "is a whole module" if is_whole else "holds an object, not its tensors alone"
    how = "torch.jit.save" if name.startswith("__torch__.") else "torch.save(model)"
    saved = f" saved by {how}" if is_whole else ""
    return LmclError(
        f"encoder.weights = {printable(path)!r}: {what} ({printable(name, 80)}){saved}, which runs "
        "code when it is read; save its tensors: torch.save(model.state_dict(), PATH)",
        exit_code=5,
    )


def unreadable(path: Path, error: Exception) -> LmclError:
    """The sentence about a file that no parser can read; exit code 5."""
    said = (str(error).splitlines() or ["nothing more is known"])[0]
    if said.startswith("Weights only load failed"):  # torch goes on with how to run its code
        said = "it is no file of torch.save"
    known = _known_kind(path) or (
        f"cannot be read as weights ({type(error).__name__}: {printable(said, 200)}); it is "
        "damaged or of another format: copy it again, or name a .safetensors, .pth or .npz file"
    )
    return LmclError(f"encoder.weights = {printable(path)!r}: {known}", exit_code=5)


def _known_kind(path: Path) -> str:
    """What often lies in place of weights, and what to do; empty if it is none of that."""
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError:
        return ""
    if not head:
        return "is empty; copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS and not the file itself; `git lfs pull` fetches that"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "is a web page, which a server gives in place of a file it does not hand out; look at "
            "it in a browser, and download the weights again"
        )
    return ""


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
    for where, tensors in _unwrapped(found):
        fitting, misfit = _compare(tensors, wanted, convert)
        if not misfit.count:
            _say_where(where)
            return fitting
        if best is None or misfit.count < best.count:
            best = misfit
    others = {where: _compare(one, wanted, convert) for where, one in _hidden(found, list(wanted))}
    fits = {where: fitting for where, (fitting, misfit) in others.items() if not misfit.count}
    if fits:
        return _only_one(fits)
    if best is None:
        raise TypeError(f"it holds a {type(found).__name__} where tensors by name were expected")
    raise MisfitError(f"of {best.wanted} tensors: {best}")


def best_wrapping(found: Any, names: Sequence[str]) -> Tensors:
    """The unwrapping of a file that has most of some names.

    Raises:
        MisfitError: If several networks lie under names that are not known here.
        TypeError: If the file holds no tensors by name.
    """
    known = set(names_wanted(names))
    candidates = list(_unwrapped(found))
    where, best = max(
        candidates, key=lambda one: len(known & one[1].keys()), default=("", Tensors())
    )
    if not known <= best.keys() and (others := dict(_hidden(found, sorted(known)))):
        return _only_one(others)
    if not candidates:
        raise TypeError(f"it holds a {type(found).__name__} where tensors by name were expected")
    _say_where(where)
    return best


def _say_where(where: str) -> None:
    """A file may hold several networks, a teacher and a student: say which was taken."""
    if where:
        logger.info("encoder.weights: took the tensors under %s", printable(where, 120))


def _only_one(fits: Mapping[str, Tensors]) -> Tensors:
    """The network of a file, if there is one.

    Raises:
        MisfitError: If there are several that differ.
    """
    where, first = next(iter(fits.items()))
    for other in fits.values():
        if other.keys() != first.keys() or any(not torch.equal(other[n], first[n]) for n in first):
            shown = ", ".join(printable(name, 60) for name in list(fits)[:4])
            raise MisfitError(
                f"it holds {len(fits)} networks that fit, under {shown}",
                way_out="save the one that is meant alone",
            )
    _say_where(where)
    return first


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


def _unwrapped(found: Any) -> Iterator[tuple[str, Tensors]]:
    """A file's tensors as they stand, then out of each container and behind each prefix.

    With the names that led there, `state_dict > module.`; empty for the tensors as they stand.
    """
    queue = [("", found, 0)]
    while queue:
        where, node, depth = queue.pop(0)
        if not isinstance(node, Mapping):
            continue
        tensors = _tensors_of(node)
        if tensors:
            yield where, tensors
        if depth == _MOST_WRAPPINGS:
            continue
        queue += [
            (_joined(where, name), node[name], depth + 1) for name in _CONTAINERS if name in node
        ]
        for prefix in _PREFIXES:
            inner = _behind(prefix, tensors)
            if inner:
                queue.append((_joined(where, prefix), inner, depth + 1))


def _hidden(found: Any, names: Sequence[str]) -> Iterator[tuple[str, Tensors]]:
    """Tensors of all these names in containers and behind prefixes of whatever name."""
    if not names:
        return
    longest = max(names, key=len)
    queue, seen = [("", found)], 0
    while queue and seen < _MOST_CONTAINERS:
        where, node = queue.pop(0)
        if not isinstance(node, Mapping):
            continue
        seen += 1
        tensors = _tensors_of(node)
        for prefix in [name.removesuffix(longest) for name in tensors if name.endswith(longest)]:
            if all(prefix + name in tensors for name in names):
                yield _joined(where, prefix) if prefix else where, _behind(prefix, tensors)
        if where.count(">") < _MOST_WRAPPINGS:
            queue += [(_joined(where, str(name)), one) for name, one in node.items()]


def _tensors_of(node: Mapping[Any, Any]) -> Tensors:
    return {str(name): one for name, one in node.items() if isinstance(one, Tensor)}


def _behind(prefix: str, tensors: Tensors) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _joined(where: str, name: str) -> str:
    return f"{where} > {name}" if where else name


def _pickled_class(path: Path) -> tuple[str, bool]:
    """The first class in a pickle that is none of tensors and plain values, if there is one.

    Returns:
        Its name, or an empty text; and whether the file's object is of it.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(one for one in archive.namelist() if one.endswith("data.pkl"))
                with archive.open(name) as file:
                    pickled = file.read(_LOOKED_AT_BYTES)
        else:
            with path.open("rb") as file:
                pickled = file.read(_LOOKED_AT_BYTES)
        classes = _classes_in(pickled)
        first = next(classes, "")
        name = first if not _is_plain(first) else next((c for c in classes if not _is_plain(c)), "")
    except (OSError, ValueError, zipfile.BadZipFile, StopIteration):
        return "", False
    # A pickle's first two bytes are its version, the third what it begins with.
    return name.replace(" ", "."), name == first and pickled[2:3] == _A_CLASS


def _classes_in(pickled: bytes) -> Iterator[str]:
    """`module name` of each class that a row of pickles mentions; old files of torch hold four."""
    rest = io.BytesIO(pickled)
    texts: list[str] = []
    for _ in range(4):
        try:
            for code, argument, _ in pickletools.genops(rest):
                if code.name == "GLOBAL":
                    yield str(argument)
                elif code.name == "STACK_GLOBAL" and len(texts) > 1:
                    yield f"{texts[-2]} {texts[-1]}"
                elif isinstance(argument, str):
                    texts = [*texts[-1:], argument]
        except Exception:  # cut short, or no pickle
            return


def _is_plain(name: str) -> bool:
    known = ("collections ", "argparse ", "numpy", "torch ", "torch._utils ", "torch.storage ")
    return not name or name.startswith(known)
