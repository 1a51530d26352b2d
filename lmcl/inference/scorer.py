"""Score images with a released model: the same image gives the same score, always.

    model = lmcl.load("runs/x/model")
    model.score("photo.jpg")
    model.scale.description

Crops lie where the image's size says (never at random), every forward pass has the same shape
whatever stands in the batch, and the mean over crops is taken in float64. The network runs in an
engine (`lmcl.inference.torch_engine`); nothing here needs torch.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageOps

from lmcl.errors import LmclError
from lmcl.evaluation.adaptive import AdaptiveRule
from lmcl.evaluation.calibration import Meaning, image_spread, pooled_deviation, read_meaning
from lmcl.inference.adaptive_scoring import SeenCrops, look_adaptively, look_at_all
from lmcl.inference.arrays import as_array, is_array_like, rgb_pixels
from lmcl.inference.calibration import (
    DEFAULT_READING,
    NOTHING,
    Interpretation,
    Interpreter,
    Reading,
    adaptive_rule,
    make_interpreter,
    uncalibrated,
)
from lmcl.inference.engines import EngineName, open_export
from lmcl.inference.onnx_engine import SUFFIX, OnnxEngine
from lmcl.models.folders import fingerprint_of
from lmcl.models.named import STARTER, locate_model
from lmcl.utils.hub_names import is_hub_name
from pipeline.boxes import evaluation_boxes, frame_sizes, scaled_sizes
from pipeline.decode import PILLOW_RECIPE, decode_rgb, reflect_pad, resize_rgb, to_rgb
from pipeline.decode_config import DEFAULT_DECODE, DecodeConfig
from pipeline.errors import PipelineError
from shards.decoder_notes import decoder_notes
from shards.errors import ShardError
from shards.image_formats import UNREADABLE, count_frames, describe_damage, open_image
from shards.picture_notes import shape_note
from shards.score_scale import ScoreScale
from shards.source_files import MAX_FILE_BYTES, read_regular
from shards.text import printable

MOST_PIXELS = 250_000_000
"""Larger images are refused before they are decoded: a header may promise anything."""
Precision = Literal["float32", "bfloat16", "auto", "int8"]
"""What the network computes in; the head and the mean over crops are float32 or wider always.
`auto` is bfloat16 where the device has it; `int8` is an exported file's (`lmcl export`)."""
_LARGE = 25_000_000
"""Images of more pixels are decoded one at a time: four at once took 7.3 GB, one takes 2.6."""
_FILES = 16
"""Files that are decoded at once, where they are decoded in batches."""
_NO_VIEW = np.zeros((0, 0, 3), dtype=np.uint8)
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")
"""Formats of several frames or pages; an MPO's second picture belongs to its first."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """An image as the model wants it; everything that needs the processor but not the model."""

    crops: Any
    """Bytes `[v, s, s, 3]`: an array, or a tensor on the model's device where files were decoded in
    batches."""
    boxes: Int32[np.ndarray, "v 4"]
    """Where the crops lie: y, x, h, w in the upright image after `max_side`."""
    view: UInt8[np.ndarray, "g g 3"]
    """The whole image squeezed for the saliency pass; side 0 if it was not asked for."""
    size: tuple[int, int]
    """Height and width after `max_side`."""
    full_size: tuple[int, int]
    """Height and width of the upright image before `max_side`."""
    gpu_decoded: bool = False
    """Whether the GPU decoded it; otherwise it has the pixels of the CPU recipes."""
    notes: tuple[str, ...] = ()
    """What is unusual about the image; empty for most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageScore:
    """What a model says about one image."""

    score: float
    """In the scale of the training set."""
    quality: float
    """In [0, 1], higher = better; may leave the interval."""
    crops: tuple[float, ...]
    """Score of every crop that was looked at, in the scale of the training set."""
    boxes: tuple[tuple[int, int, int, int], ...]
    """Where the crops lie: y, x, h, w."""
    salient: tuple[int, int, int, int] | None
    """The salient crop, if it was asked for."""
    full_size: tuple[int, int]
    """Height and width of the upright image."""
    gpu_decoded: bool = False
    """Whether the GPU decoded the image; otherwise it has the pixels of the CPU recipes."""
    notes: tuple[str, ...] = ()
    """What is unusual about the image, and the score should be doubted for; empty for most."""
    deviation: float | None = None
    """Predicted deviation of people's ratings, in the scale of the training set; None of a model
    that gives none."""
    meaning: Interpretation = NOTHING
    """Percentile, interval and whether the image is unusual, where the model is calibrated."""

    @property
    def problem(self) -> str:
        """Why the score is none; empty if it is one."""
        if math.isfinite(self.quality):
            return ""
        return (
            f"the model answers {self.quality}, which is no score; its weights or its precision "
            "are at fault, not the image: take float32, or another model"
        )


class _ProcessLock:
    """A lock that stays in its process: it is not copied, and after a fork nobody holds it."""

    def __init__(self) -> None:
        self._own = (os.getpid(), threading.Lock())

    def __enter__(self) -> None:
        if self._own[0] != os.getpid():
            self.__init__()  # type: ignore[misc]
        self._own[1].acquire()

    def __exit__(self, *_: object) -> None:
        self._own[1].release()

    def __reduce__(self) -> tuple[object, ...]:
        return _ProcessLock, ()


class Scorer:
    """Predicts the quality of images; open one with `lmcl.load`.

    It can be copied, pickled and handed to other processes.
    """

    _has_overshot = False

    def __init__(
        self,
        released: Any,
        *,
        device: Any = "cpu",
        fingerprint: str = "",
        precision: Precision = "float32",
        decode: DecodeConfig = DEFAULT_DECODE,
        interpreter: Interpreter | None = None,
        what_scores_mean: str = "",
        adaptive: AdaptiveRule | None = None,
        source: str = "",
    ) -> None:
        if isinstance(released, OnnxEngine):
            self.engine: Any = released
        else:
            from lmcl.inference.torch_engine import TorchEngine

            if precision == "int8":
                raise LmclError(
                    "int8 is a precision of exported files; `lmcl export RUN --format onnx "
                    "--precision int8` makes one",
                    exit_code=2,
                )
            self.engine = TorchEngine(released, device=device, precision=precision)
        """What the network runs in."""
        self.card = self.engine.card
        self.precision = self.engine.precision
        self.device = self.engine.device
        self.fingerprint = fingerprint or getattr(self.card, "sha256", "")
        self.source = source
        """Where on a hub the model is from, `hf://USER/NAME@COMMIT`; empty if it is not."""
        self.scale = self.card.score
        self.training_set = self.card.training_set
        self.batch_images = self.engine.batch_images
        self._decode = decode
        self._one_large = _ProcessLock()
        self.interpreter = interpreter
        """Says what scores mean; None where the model has no calibration."""
        self.what_scores_mean = interpreter.sentence if interpreter else what_scores_mean
        """What percentiles and intervals are about, or what is missing, in one sentence."""
        self.adaptive = adaptive
        """When to stop looking at an image's crops; None: all are looked at."""
        self.files = self._file_decoder(decode)
        """Decodes files in batches; None where Pillow decodes one after the other."""

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: a decoder of batches belongs to its process."""
        return self.__dict__ | {"files": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.files = self._file_decoder(self._decode)

    @property
    def model(self) -> Any:
        """The network, a torch module (`lmcl.models.quality_model.QualityModel`)."""
        return self.engine.model

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The region the network runs in: products in bfloat16 if that was asked for."""
        region: contextlib.AbstractContextManager[None] = self.engine.autocast()
        return region

    def _file_decoder(self, decode: DecodeConfig) -> Any:
        # On a CPU Pillow in threads is as fast, and does not cost a graph; DALI comes by its name.
        if self.device.type != "cuda" and decode.backend != "dali" and decode.decode != "gpu":
            return None
        from pipeline.file_batches import FileDecoder

        decoder = FileDecoder(
            crops=self.card.crops, batch_size=_FILES, device=self.device, decode=decode
        )
        if decoder.choice.backend == "dali":
            return decoder
        decoder.close()
        return None

    @property
    def recipe(self) -> str:
        """Decoder and version of files' pixels; see `pipeline.decode_config.same_pixels`."""
        return PILLOW_RECIPE if self.files is None else self.files.choice.recipe

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether files are decoded on the GPU, as far as its decoder takes them."""
        return self.files is not None and self.files.choice.decoder == "gpu"

    @property
    def scale_label(self) -> str:
        """The training set and its scale, as in scores files: `koniq10k mos 0..100`."""
        return f"{self.training_set} {self.scale.label}"

    def score(
        self, images: Any, *, errors: Literal["raise", "nan"] = "raise"
    ) -> float | list[float]:
        """Score an image, or each image of a list, of a batch or of whatever yields images.

        A list is worked through image by image: memory does not grow with it.

        Args:
            images: A path, the bytes of a file, an open binary file, a PIL image, an array or a
                tensor (`lmcl.inference.arrays` has the rule); or many of them: a list, a
                generator, a batch `[b, 3, h, w]`.
            errors: What becomes of an image of a list that cannot be scored: an error that names
                its place, or NaN in its place.

        Returns:
            In the scale of the training set (`scale` says which, and which direction is better).

        Raises:
            LmclError: If an image cannot be read (exit code 3, or 4 if there is no such file), or
                the model's answer is not a number (5).
            ValueError: If an array or a tensor is no image of bytes, 16 bits, or floats in [0, 1].
            TypeError: If it is nothing that could be an image.
        """
        if errors not in ("raise", "nan"):
            raise ValueError(f"errors is {errors!r}; choose 'raise' or 'nan'")
        self._has_overshot = False
        many = _many(images)
        if many is None:
            found = self._scored_or_why(images)
            return _settled(found, errors)
        return list(self._score_all(many, errors))

    def _score_all(self, images: Iterator[Any], errors: str) -> Iterator[float]:
        """Scores in order; no more images are held than go through the network at once."""
        number = 0
        while batch := list(itertools.islice(images, self.batch_images)):
            names = [_name_of(image) for image in batch]
            prepared = [self._prepared_or_why(image) for image in batch]
            batch.clear()
            scored = iter(self.predict([p for p in prepared if isinstance(p, PreparedImage)]))
            for name, one in zip(names, prepared, strict=True):
                found = next(scored) if isinstance(one, PreparedImage) else one
                yield _settled(found, errors, place=f"images[{number}]", name=name)
                number += 1

    def _scored_or_why(self, image: object) -> "ImageScore | Exception":
        prepared = self._prepared_or_why(image)
        return prepared if isinstance(prepared, Exception) else self.predict([prepared])[0]

    def _prepared_or_why(self, image: object) -> PreparedImage | Exception:
        """An image's crops, or what is wrong with it; everything else is raised."""
        try:
            return self.prepare(image)
        except (LmclError, ValueError, TypeError) as error:
            return error

    def details(self, image: object) -> ImageScore:
        """Score, crops, boxes and the salient crop of one image; takes what `score` takes."""
        self._has_overshot = False
        return _checked(self.predict([self.prepare(image, salient=True)])[0])

    def quality(self, images: Any) -> Any:
        """Qualities of images as a tensor with gradients: a loss, a reward, a guide.

        The same crops and the same network as `score`, without the rounding to bytes, and without
        a limit to [0, 1], which would have no slope. Weights take no gradient.

        Args:
            images: Tensor `[b, 3, h, w]` or `[3, h, w]` of floats in [0, 1], red, green, blue;
                grey as one channel. float64 is computed in float64.

        Returns:
            Tensor `[b]` (or a scalar) in [0, 1] units, higher = better, on the model's device;
            `scale.from_unit` brings numbers to the training set's scale.

        Raises:
            ValueError: If it is no such tensor.
        """
        shape = tuple(getattr(images, "shape", ()))
        is_float = getattr(images, "is_floating_point", bool)()
        if len(shape) not in (3, 4) or shape[-3] not in (1, 3) or 0 in shape or not is_float:
            raise ValueError(
                "quality() takes a float tensor [b, 3, h, w] or [3, h, w] in [0, 1], got "
                f"{list(shape)} {getattr(images, 'dtype', type(images).__name__)}; score() takes "
                "everything else"
            )
        batch = images if len(shape) == 4 else images[None]
        keys = [0] * len(batch)
        if self.card.crops.evaluation_layout == "seeded":
            keys = [_pixels(one.detach().clamp(0, 1))[1] for one in batch]
        found = self.engine.quality(batch, keys)
        return found if len(shape) == 4 else found[0]

    def prepare(self, image: object, *, salient: bool = False) -> PreparedImage:
        """Decode an image and cut its crops; safe to call from several threads."""
        if isinstance(image, str | os.PathLike):
            image = _read_file(Path(image))
        elif isinstance(image, bytearray | memoryview) or hasattr(image, "read"):
            image = _read_bytes(image)
        if self.files is not None and isinstance(image, bytes):
            (prepared,) = self.prepare_files([image], salient=salient)
            if isinstance(prepared, str):
                raise LmclError(prepared, exit_code=3)
            return prepared
        large = isinstance(image, bytes) and _count_pixels(image) > _LARGE
        with self._one_large if large else contextlib.nullcontext():
            with decoder_notes() as notes:
                pixels, key, overshot = _pixels(image)
            if overshot:
                self._warn_of_overshoot()
            return self._cut(pixels, key, salient=salient, notes=notes.all())

    def _warn_of_overshoot(self) -> None:
        """Once a call of `score`: one sentence is read, a thousand are not."""
        if not self._has_overshot:
            self._has_overshot = True
            warnings.warn(
                "floats outside [0, 1] were clamped, as resampling overshoots (bicubic: by .14); "
                "clamp them yourself to say that it is meant",
                stacklevel=2,
            )

    def prepare_files(
        self, files: Sequence[bytes], *, salient: bool = False
    ) -> list[PreparedImage | str]:
        """Decode files in batches on the model's device; for each its crops, or why not.

        Only where `files` is there. An image's crops do not depend on the others.
        """
        assert self.files is not None
        found: list[PreparedImage | str] = [_problem_of(data) for data in files]
        sound = [row for row, problem in enumerate(found) if not problem]
        for start in range(0, len(sound), _FILES):
            rows = sound[start : start + _FILES]
            keys = np.array([_key(files[row]) for row in rows], dtype=np.int64)
            batch = self.files.decode([files[row] for row in rows], keys)
            for place, row in enumerate(rows):
                height, width = batch.full_sizes[place].tolist()
                found[row] = batch.errors[place] or PreparedImage(
                    crops=batch.crops[place],
                    boxes=batch.boxes[place],
                    view=self._view(files[row]) if salient else _NO_VIEW,
                    size=(int(batch.sizes[place, 0]), int(batch.sizes[place, 1])),
                    full_size=(height, width),
                    gpu_decoded=bool(batch.gpu_decoded[place]),
                    notes=_notes(width, height),
                )
        return found

    def _view(self, data: bytes) -> UInt8[np.ndarray, "g g 3"]:
        """The whole image for the saliency pass; by Pillow, whoever decodes the crops."""
        side = self.engine.view_side
        return np.ascontiguousarray(resize_rgb(_pixels(data)[0], side, side))

    def _cut(
        self,
        pixels: UInt8[np.ndarray, "h w 3"],
        key: int,
        *,
        salient: bool,
        notes: tuple[str, ...] = (),
    ) -> PreparedImage:
        crops = self.card.crops
        height, width = pixels.shape[:2]
        heights, widths = np.array([height]), np.array([width])
        target = scaled_sizes(heights, widths, crops)[0]
        tall, wide = int(target[0]), int(target[1])
        frame = reflect_pad(resize_rgb(pixels, tall, wide), crops.size)
        frames = frame_sizes(heights, widths, crops)
        boxes = evaluation_boxes(np.array([key], dtype=np.int64), frames, crops)[0]
        cut = np.empty((len(boxes), crops.size, crops.size, 3), dtype=np.uint8)
        for view, (y, x) in enumerate(boxes[:, :2].tolist()):
            cut[view] = frame[y : y + crops.size, x : x + crops.size]
        side = self.engine.view_side if salient else 0
        whole = np.ascontiguousarray(resize_rgb(pixels, side, side)) if salient else _NO_VIEW
        return PreparedImage(
            crops=cut,
            boxes=boxes,
            view=whole,
            size=(tall, wide),
            full_size=(height, width),
            notes=(*notes, *_notes(width, height)),
        )

    def predict(self, prepared: Sequence[PreparedImage]) -> list[ImageScore]:
        """Scores of prepared images, in their order, whatever else is in the list."""
        found: list[ImageScore] = []
        for start in range(0, len(prepared), self.batch_images):
            batch = prepared[start : start + self.batch_images]
            seen = self._look(batch)
            found += [self._scored(p, one) for p, one in zip(batch, seen, strict=True)]
        return found

    def _look(self, batch: Sequence[PreparedImage]) -> list[SeenCrops]:
        crops = [p.crops for p in batch]
        forward = functools.partial(self.engine.forward, batch_images=self.batch_images)
        if self.adaptive is None:
            return look_at_all(forward(crops))
        return look_adaptively(self.adaptive, crops, [p.boxes for p in batch], forward)

    def _scored(self, prepared: PreparedImage, seen: SeenCrops) -> ImageScore:
        quality = float(np.mean(seen.quality))
        deviation = None
        if seen.deviation is not None:
            deviation = float(pooled_deviation(seen.deviation, seen.quality))
        meaning = self._meaning(quality, seen, deviation)
        boxes = prepared.boxes[seen.places].tolist()
        salient = None
        if prepared.view.size:
            salient = self.engine.salient_box(prepared.view, prepared.size)
        return ImageScore(
            score=float(self.scale.from_unit(quality)),
            quality=quality,
            crops=tuple(self.scale.from_unit(seen.quality).tolist()),
            boxes=tuple((b[0], b[1], b[2], b[3]) for b in boxes),
            salient=salient,
            full_size=prepared.full_size,
            gpu_decoded=prepared.gpu_decoded,
            notes=(*prepared.notes, *meaning.notes),
            deviation=None if deviation is None else deviation * (self.scale.high - self.scale.low),
            meaning=meaning,
        )

    def _meaning(self, quality: float, seen: SeenCrops, deviation: float | None) -> Interpretation:
        if self.interpreter is None:
            return NOTHING
        mean = seen.embedding.mean(axis=0)
        unit = mean / max(float(np.linalg.norm(mean)), 1e-12)
        known = None if deviation is None else np.asarray(deviation)
        return self.interpreter(quality, float(image_spread(seen.quality, known)), unit)


def load(
    path: str | Path = STARTER,
    *,
    device: str = "auto",
    precision: Precision = "float32",
    decode: DecodeConfig = DEFAULT_DECODE,
    crops: Literal["all", "adaptive"] = "all",
    engine: EngineName = "torch",
) -> Scorer:
    """Open a released model folder, a run folder that holds one, or an exported .onnx file.

    Nothing is downloaded but a model that is named by its place on a hub; an exported file is
    opened without torch.

    Args:
        path: Folder with config.json and model.safetensors, or a file that `lmcl export` wrote;
            `hf://USER/NAME[@REVISION]`: a model on a hub (docs/hub.md); `starter` (the default):
            the model that comes with the project (docs/starter.md).
        device: `auto` takes a GPU if there is one.
        precision: `bfloat16` is faster where the processor knows it; scores move by some
            thousandths of the range (docs/scoring.md).
        decode: Who decodes files: on a GPU the GPU, on a CPU Pillow, unless asked otherwise.
        crops: `adaptive` looks at as few crops as keep the order (docs/scoring.md).
        engine: `onnx` takes the export that lies beside the folder, `auto` does so where it can
            (`lmcl.inference.engines`); gradients and `details` need `torch`.

    Raises:
        LmclError: If the folder is missing (4) or damaged (5), or the hub fails (1).
    """
    is_file = not is_hub_name(path) and not Path(path).is_dir()
    is_exported = is_file and str(path).endswith(SUFFIX)
    return open_scorer(
        path,
        device=device,
        precision=precision,
        decode=decode,
        engine="onnx" if is_exported or precision == "int8" else engine,
        reading=Reading(crops=crops),
    )


def open_scorer(
    model: str | Path,
    *,
    device: str = "auto",
    precision: Precision = "float32",
    decode: DecodeConfig = DEFAULT_DECODE,
    engine: EngineName = "torch",
    boxes: bool = False,
    reading: Reading = DEFAULT_READING,
    scale: str = "",
) -> Scorer:
    """Open a model folder (or a run folder that holds one), its export, `starter` or `hf://...`.

    Args:
        model: Its path or name.
        device: As `load` has it.
        precision: As `load` has it; `int8` is an export's.
        decode: As `load` has it.
        engine: As `load` has it.
        boxes: Whether salient crops will be asked for, which only torch finds.
        reading: What is to be said of scores, and by how many crops.
        scale: Name of one of several sets a model learned from, to answer in its scale.

    Raises:
        LmclError: If it is missing (4) or damaged (5), there is no such device or decoder (2), or
            what was asked for does not go together (2).
    """
    found = locate_model(model)
    folder, source = found.folder, found.source
    others = "--boxes" if boxes else "--decode gpu" if decode.decode == "gpu" else ""
    others = others or ("--scale" if scale else "")
    exported = open_export(folder, engine, device=device, precision=precision, needs_torch=others)
    if exported is not None:
        card, home = exported.card, exported.home(folder)
        # The folder's calibration may be newer than the file; the file has its own elsewhere.
        meaning = read_meaning(home) or card.meaning
        meant = _meant(meaning, home, reading, card.score, card.sha256, exported.width)
        return Scorer(exported, decode=decode, source=source, **meant)
    import torch

    from lmcl.models.pretrained import answer_for, load_model

    released, meaning = load_model(folder), read_meaning(folder)
    fingerprint = fingerprint_of(folder)
    if scale:
        # Its intervals are of the shared scale, and its scores are no others' to go on with.
        released, meaning = answer_for(released, scale), None
        fingerprint = hashlib.sha256(f"{fingerprint}, scale {scale}".encode()).hexdigest()
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    _check_device(chosen)
    if torch.device(chosen).index is not None and torch.device(chosen).type == "cuda":
        # Kernels and DALI go to the current device; it must be the one that was named.
        torch.cuda.set_device(chosen)
    answers, width = released.card.score, released.model.encoder.width
    meant = _meant(meaning, folder, reading, answers, fingerprint, width)
    try:
        return Scorer(
            released,
            device=chosen,
            fingerprint=fingerprint,
            precision=precision,
            decode=decode,
            source=source,
            **meant,
        )
    except PipelineError as error:
        raise LmclError(str(error), exit_code=error.exit_code) from error


def _meant(
    meaning: Meaning | None,
    place: Path,
    reading: Reading,
    scale: ScoreScale,
    fingerprint: str,
    width: int,
) -> dict[str, Any]:
    """Arguments of `Scorer` that say what scores mean, from a model's calibration."""
    interpreter = make_interpreter(
        meaning, place, reading, scale=scale, fingerprint=fingerprint, width=width
    )
    return {
        "interpreter": interpreter,
        "what_scores_mean": uncalibrated(place),
        "adaptive": adaptive_rule(place, reading, interpreter),
    }


def _check_device(asked: str) -> None:
    import torch

    try:
        # A name may be well spelled and have no driver, no card or no numbers behind it.
        torch.zeros(1, device=asked).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LmclError(
            f"device {asked!r} cannot be used ({str(error).splitlines()[0]}); name cpu, cuda or "
            "cuda:NUMBER, or auto for whatever is there",
            exit_code=2,
        ) from error


def _checked(found: ImageScore) -> ImageScore:
    if found.problem:
        raise LmclError(found.problem, exit_code=5)
    return found


def _pixels(image: object) -> tuple[UInt8[np.ndarray, "h w 3"], int, bool]:
    """Upright RGB, a number of the image alone (for seeded crops), whether floats were clamped."""
    if isinstance(image, bytes):
        return _decode(image), _key(image), False
    overshot = False
    if isinstance(image, Image.Image):
        pixels = _from_pillow(image)
    elif is_array_like(image):
        values, channels_first = as_array(image)
        pixels, overshot = rgb_pixels(values, channels_first=channels_first)
    else:
        raise TypeError(
            "an image must be a path, the bytes of a file, an open binary file, a PIL image, an "
            f"array or a tensor, got {type(image).__name__}"
        )
    return pixels, _key(pixels.tobytes()), overshot


def _many(images: Any) -> Iterator[Any] | None:
    """The images one by one, if they are several; None if it is one."""
    if isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image):
        return None
    if is_array_like(images) and not isinstance(images, list | tuple):
        # A column of paths is an array too.
        return iter(images) if getattr(images, "ndim", 0) in (1, 4) else None
    if hasattr(images, "read") or not isinstance(images, Iterable):
        return None
    return iter(images)


def _name_of(image: object) -> str:
    """How an image of a list is called besides its place; empty if it has no name."""
    return printable(image, 200) if isinstance(image, str | os.PathLike) else ""


def _settled(
    found: ImageScore | Exception, errors: str, *, place: str = "", name: str = ""
) -> float:
    """The score, or what the caller wants in its stead."""
    try:
        if isinstance(found, Exception):
            raise found
        return _checked(found).score
    except (LmclError, ValueError, TypeError) as error:
        if errors == "nan":
            return math.nan
        if not place:
            raise
        where = f"{place} ({name})" if name and name not in str(error) else place
        if isinstance(error, LmclError):
            raise LmclError(f"{where}: {error}", exit_code=error.exit_code) from error
        raise type(error)(f"{where}: {error}") from error


def _read_bytes(source: Any) -> bytes:
    """The bytes of a buffer or of an open binary file, from where it stands."""
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    data = source.read(MAX_FILE_BYTES + 1)
    if not isinstance(data, bytes):
        raise TypeError("an open file must be opened for reading bytes: open(path, 'rb')")
    if len(data) > MAX_FILE_BYTES:
        raise LmclError(
            f"an open file holds more than {MAX_FILE_BYTES >> 20} MiB, which is no image that is "
            "scored; scale it down",
            exit_code=3,
        )
    return data


def _read_file(file: Path) -> bytes:
    try:
        return read_regular(file)
    except ShardError as error:
        missing = not os.path.exists(file)
        raise LmclError(
            f"{error}; name a readable image file", exit_code=4 if missing else 3
        ) from error


def decode_image(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Upright RGB of an image file, by the rule of `pipeline/decode.py`.

    Raises:
        LmclError: If it is no still image of a known format and sane size; exit code 3.
    """
    _count_pixels(data)
    return _decode(data)


def _decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    try:
        return decode_rgb(data)
    except (PipelineError, ShardError) as error:
        raise LmclError(str(error), exit_code=3) from error


def _problem_of(data: bytes) -> str:
    """Why a file is not scored, by its header; empty if nothing speaks against it."""
    try:
        _count_pixels(data)
    except LmclError as error:
        return str(error)
    return ""


def _count_pixels(data: bytes) -> int:
    """Pixels of an image; refuses, before they are decoded, what is no still image of sane size."""
    try:
        # The limit of `_refuse_unscorable` is the lower one, and its sentence names this use.
        with open_image(data) as opened:
            _refuse_unscorable(opened)
            return opened.width * opened.height
    except ShardError as error:
        raise LmclError(str(error), exit_code=3) from error
    except UNREADABLE as error:
        raise _unreadable(error, data) from error


def _refuse_unscorable(image: Image.Image) -> None:
    """Refuse what is no still image of sane size in a range that is known."""
    pixels = image.width * image.height
    if not 0 < pixels <= MOST_PIXELS:
        raise LmclError(
            f"{pixels / 1e6:.0f} million pixels, at most {MOST_PIXELS / 1e6:.0f} and at least one "
            "are scored; scale it down",
            exit_code=3,
        )
    frames = count_frames(image) if image.format in _ANIMATED else 1
    if frames > 1:
        kind = "a document of {} pages" if image.format == "TIFF" else "an animation of {} frames"
        raise LmclError(f"{kind.format(frames)}; score a single one of them", exit_code=3)
    # Mode I also carries 16 bits, whose range is known; 32 bits do not say what white is.
    wide = image.mode == "I" and (image.format == "TIFF" or not _fits_16_bits(image))
    if wide or image.mode == "F":
        raise LmclError(
            f"pixels of 32 bits ({'float' if image.mode == 'F' else 'integer'}), whose range is "
            "not known; convert it to 8 or 16 bits",
            exit_code=3,
        )


def _fits_16_bits(image: Image.Image) -> bool:
    values = np.asarray(image)
    return bool(values.min() >= 0 and values.max() <= 0xFFFF)


def _from_pillow(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """What the decoder makes of a file of this image; the caller's image is left as it is."""
    try:
        _refuse_unscorable(image)
        return to_rgb(ImageOps.exif_transpose(image))
    except UNREADABLE as error:
        raise _unreadable(error) from error


def _unreadable(error: BaseException, data: bytes = b"") -> LmclError:
    reason = describe_damage(error, data)
    return LmclError(f"not an image this project can read ({reason})", exit_code=3)


def _key(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=5).digest(), "big")


def _notes(width: int, height: int) -> tuple[str, ...]:
    note = shape_note(width, height)
    return (note,) if note else ()
