"""The network in onnxruntime: an exported model scores without torch.

`lmcl export RUN --format onnx` writes one file that holds everything scoring needs: pixels go in,
qualities come out, and its metadata say how crops are cut and what the numbers mean.
"""

import base64
import ctypes
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from jaxtyping import UInt8

from lmcl.errors import LmclError
from lmcl.evaluation.calibration import Meaning, parse_meaning
from lmcl.inference.adaptive_scoring import CropOutputs
from lmcl.models.folders import fingerprint_of
from pipeline.boxes import CropConfig
from shards.errors import ShardError
from shards.score_scale import ScoreScale
from shards.source_files import read_regular
from shards.text import printable

SUFFIX = ".onnx"
FORMAT_VERSION = 1
"""Of the metadata; a file of a later one is refused."""
_MOST_BYTES = 1 << 31
"""What one ONNX file can hold."""
_MOST_CROP_PIXELS = 1 << 27
"""Of all crops of an image, as of model folders."""
GRID_RULE = (
    "count crops of size x size on an image of h x w (after max_side or short_side, mirrored at "
    "its lower and right edge up to size): rows = min(max(round(sqrt(count * (h - size + 1) / "
    "(w - size + 1))), 1), count); row r has the crops from round(r * count / rows) to "
    "round((r + 1) * count / rows), rounding halves to even; place i of n along a side with room "
    "s = side - size is floor((2 i s + n - 1) / (2 (n - 1))), or floor(s / 2) if n is 1"
)
"""Where crops lie with the layout `grid` (docs/scoring.md works it out)."""


@dataclass(frozen=True, kw_only=True)
class ExportedCard:
    """What an exported file says about itself; each field is one entry of its metadata, in JSON."""

    lmcl_format: int
    mean: tuple[float, float, float]
    """Channel means taken off pixels in [0, 1], RGB; done inside the file."""
    std: tuple[float, float, float]
    """Channel deviations pixels are divided by; done inside the file."""
    crop_size: int
    crop_count: int
    crop_layout: Literal["grid", "seeded"]
    grid_rule: str
    max_side: int | None
    """Longest side an image is scaled down to before it is cut; null: never."""
    short_side: int | None
    """The same for the shorter side; null: never. At most one of the two is set."""
    scale: str
    """Kind of the scores: mos, dmos, or empty."""
    scale_low: float
    scale_high: float
    higher_is_better: bool
    training_set: str
    decoder: str
    """Recipe of the pixels the model learnt from."""
    precision: Literal["float32", "int8"]
    calibration: Any
    """The model folder's calibration.json; null if it has none."""
    sha256: str
    """Of the model folder: sha256 of the sha256s of config.json and model.safetensors."""
    calibration_sha256: str = ""
    """Of calibration.json; empty if there is none."""
    neighbours: str = ""
    """The model folder's neighbours.safetensors in base64; empty if there is none."""

    @property
    def meaning(self) -> Meaning | None:
        """What scores mean; None: the model had no calibration when it was exported.

        Raises:
            ValueError: If it is none that an export has written.
        """
        if self.calibration is None or not self.calibration_sha256:
            return None
        data = json.dumps(self.calibration).encode()
        found = parse_meaning(data, base64.b64decode(self.neighbours, validate=True))
        return replace(found, digest=self.calibration_sha256)

    @property
    def crops(self) -> CropConfig:
        """How an image is cut."""
        return CropConfig(
            size=self.crop_size,
            random=1,
            evaluation=self.crop_count,
            evaluation_layout=self.crop_layout,
            max_side=self.max_side,
            short_side=self.short_side,
        )

    @property
    def score(self) -> ScoreScale:
        """What the numbers mean."""
        kind = self.scale if self.scale in ("mos", "dmos") else ""
        return ScoreScale(
            kind=kind,  # type: ignore[arg-type]
            low=self.scale_low,
            high=self.scale_high,
            higher_is_better=self.higher_is_better,
        )

    @property
    def decode(self) -> str:
        """As a model folder's card calls it."""
        return self.decoder

    def metadata(self) -> dict[str, str]:
        """The entries of the file, each in JSON."""
        return {name: json.dumps(value) for name, value in msgspec.to_builtins(self).items()}


@dataclass(frozen=True)
class Processor:
    """The only device of this engine, as far as a `torch.device` would be asked."""

    type: str = "cpu"

    def __str__(self) -> str:
        return self.type


class OnnxEngine:
    """An exported model on the processor. Copies and forked processes open the file anew.

    Raises:
        LmclError: If onnxruntime is not installed (4), or the file is no exported model (5).
    """

    name: Literal["onnx"] = "onnx"
    batch_images = 1
    device = Processor()

    def __init__(self, file: Path) -> None:
        self.file = file
        data = self._read()
        self._own = (os.getpid(), self._open(data))
        self.card = _card_of(self._own[1].get_modelmeta().custom_metadata_map, file)
        self.precision = self.card.precision

    def __getstate__(self) -> dict[str, Any]:
        """All but the session, whose threads belong to this process."""
        return self.__dict__ | {"_own": (0, None)}

    @property
    def session(self) -> Any:
        """onnxruntime's, of this process: a fork copies none of its threads."""
        if self._own[0] != os.getpid():
            left = self._own[1]
            if left is not None:
                # Its end would wait for threads that only the process before the fork has.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(left))
            self._own = (os.getpid(), self._open(self._read()))
        return self._own[1]

    def forward(self, crops: Sequence[Any], *, batch_images: int) -> CropOutputs:
        """Quality and embedding of every crop; see `TorchEngine.forward`."""
        pixels = np.stack([np.asarray(one) for one in crops])
        missing = max(batch_images - len(pixels), 0)
        filled = np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), np.uint8)])
        flat = filled.reshape(-1, *filled.shape[2:])
        names = ["quality", "embedding", *["deviation"] * self.gives_deviation]
        found, embedding, *more = self.session.run(names, {"crops": flat})
        quality = np.asarray(found, dtype=np.float64).reshape(len(filled), -1)
        embedding = np.asarray(embedding, np.float32).reshape(*quality.shape, -1)
        kept = len(pixels)
        deviation = np.asarray(more[0], np.float64).reshape(quality.shape)[:kept] if more else None
        return CropOutputs(quality[:kept], embedding[:kept], deviation)

    @property
    def gives_deviation(self) -> bool:
        """Whether the model predicts how far ratings lie apart."""
        return any(each.name == "deviation" for each in self.session.get_outputs())

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        sizes = {each.name: each.shape for each in self.session.get_outputs()}
        return int(sizes["embedding"][-1])

    def home(self, folder: Path) -> Path:
        """The model folder this file was made of, if it lies where exports lie; else `folder`."""
        near = (folder, folder.parent, folder.parent.parent / "model", folder.parent.parent)
        for place in near:
            names = [place / name for name in ("config.json", "model.safetensors")]
            is_model = all(name.is_file() for name in names)
            if is_model and fingerprint_of(place) == self.card.sha256:
                return place
        return folder

    @property
    def view_side(self) -> int:
        """Not in an exported file.

        Raises:
            LmclError: Always; exit code 2.
        """
        raise self._lacks("view of where it looks (--boxes, details)")

    def salient_box(
        self, view: UInt8[np.ndarray, "g g 3"], size: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        """Not in an exported file.

        Raises:
            LmclError: Always; exit code 2.
        """
        raise self._lacks("view of where it looks (--boxes, details)")

    def quality(self, images: Any, keys: Sequence[int]) -> Any:
        """Not in an exported file.

        Raises:
            LmclError: Always; exit code 2.
        """
        raise self._lacks("gradients (quality)")

    def _lacks(self, what: str) -> LmclError:
        return LmclError(
            f"{printable(self.file)}: an exported model has no {what}; open the model folder it "
            "was made of, with the engine torch",
            exit_code=2,
        )

    def _read(self) -> bytes:
        try:
            return read_regular(self.file, limit_bytes=_MOST_BYTES)
        except ShardError as error:
            raise LmclError(str(error), exit_code=4) from error

    def _open(self, data: bytes) -> Any:
        try:
            onnxruntime = importlib.import_module("onnxruntime")
        except ImportError as error:
            raise LmclError(
                f"{printable(self.file)}: scoring an exported model needs the package onnxruntime, "
                "which is not installed; `pip install onnxruntime`",
                exit_code=4,
            ) from error
        options = onnxruntime.SessionOptions()
        # Its errors come as exceptions; in its log they hold the file's text as it is.
        options.log_severity_level = 4
        try:
            return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's classes are of its C++ side
            raise _no_model(self.file, printable(str(error), 300)) from error


def _card_of(entries: Mapping[str, str], file: Path) -> ExportedCard:
    try:
        values = {name: msgspec.json.decode(text) for name, text in entries.items()}
        card = msgspec.convert(values, ExportedCard)
        pixels = card.crops.evaluation * card.crops.size**2
        if pixels > _MOST_CROP_PIXELS or not card.score.is_known:
            raise ValueError(f"{pixels:,} pixels of crops, scale {card.score.description}")
        _ = card.meaning
    except (ValueError, RecursionError, AttributeError) as error:
        raise _no_model(file, f"its metadata: {printable(error, 300)}") from error
    if card.lmcl_format > FORMAT_VERSION:
        raise _no_model(file, f"it is of format {card.lmcl_format}, this is {FORMAT_VERSION}")
    return card


def _no_model(file: Path, why: str) -> LmclError:
    return LmclError(
        f"{printable(file)}: no model that `lmcl export --format onnx` of this version wrote "
        f"({why}); export it again",
        exit_code=5,
    )
