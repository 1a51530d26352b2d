"""Score images with a released model: the same image gives the same score, always.

    model = lmcl.load("runs/x/model")
    model.score("photo.jpg")
    model.scale.description

Crops lie where the image's size says (never at random), every forward pass has the same shape
whatever stands in the batch, and the mean over crops is taken in float64.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int32, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from lmcl.errors import LmclError
from lmcl.evaluation.adaptive import AdaptiveRule
from lmcl.evaluation.calibration import spread_of
from lmcl.inference.adaptive_scoring import (
    CropOutputs,
    SeenCrops,
    look_adaptively,
    look_at_all,
)
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
from lmcl.models.named import STARTER, find_model
from lmcl.models.pretrained import ReleasedModel, load_model
from lmcl.models.quality_model import to_bfloat16
from lmcl.models.saliency import best_window, window_to_box
from pipeline.backends.torch_backend import TorchBackend
from pipeline.boxes import evaluation_boxes, frame_sizes, scaled_sizes
from pipeline.decode import decode_rgb, reflect_pad, resize_rgb, to_rgb
from pipeline.decode_config import DEFAULT_DECODE, DecodeConfig
from pipeline.errors import PipelineError
from pipeline.file_batches import FileDecoder
from pipeline.normalize import normalize
from shards.decoder_notes import decoder_notes
from shards.errors import ShardError
from shards.image_formats import UNREADABLE, count_frames, describe_damage, open_image
from shards.picture_notes import shape_note
from shards.source_files import read_regular

MOST_PIXELS = 250_000_000
"""Larger images are refused before they are decoded: a header may promise anything."""
Precision = Literal["float32", "bfloat16"]
"""What the network computes in; the head and the mean over crops are float32 or wider always."""
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

    crops: UInt8[np.ndarray, "v s s 3"] | UInt8[Tensor, "v s s 3"]
    """A tensor on the model's device where files were decoded in batches."""
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


class Scorer:
    """Predicts the quality of images; open one with `lmcl.load`."""

    def __init__(
        self,
        released: ReleasedModel,
        *,
        device: str | torch.device = "cpu",
        fingerprint: str = "",
        precision: Precision = "float32",
        decode: DecodeConfig = DEFAULT_DECODE,
        interpreter: Interpreter | None = None,
        what_scores_mean: str = "",
        adaptive: AdaptiveRule | None = None,
    ) -> None:
        self.card = released.card
        self.interpreter = interpreter
        """Says what scores mean; None where the model has no calibration."""
        self.what_scores_mean = interpreter.sentence if interpreter else what_scores_mean
        """What percentiles and intervals are about, or what is missing, in one sentence."""
        self.adaptive = adaptive
        """When to stop looking at an image's crops; None: all are looked at."""
        self.precision = precision
        self.device = torch.device(device)
        # Channels-last changes which convolution is picked; it must be the same on every day.
        self.model = released.model.eval().requires_grad_(False).to(self.device)
        if precision == "bfloat16":
            to_bfloat16(self.model, self.device)
        self.fingerprint = fingerprint
        self._one_large = threading.Lock()
        self.scale = released.card.score
        self.training_set = released.card.training_set
        self.batch_images = 16 if self.device.type == "cuda" else 1
        self.files = self._file_decoder(decode)
        """Decodes files in batches; None where Pillow decodes one after the other."""

    def _file_decoder(self, decode: DecodeConfig) -> FileDecoder | None:
        # On a CPU Pillow in threads is as fast, and does not cost a graph; DALI comes by its name.
        if self.device.type != "cuda" and decode.backend != "dali" and decode.decode != "gpu":
            return None
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
        return TorchBackend.recipe if self.files is None else self.files.choice.recipe

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether files are decoded on the GPU, as far as its decoder takes them."""
        return self.files is not None and self.files.choice.decoder == "gpu"

    @property
    def scale_label(self) -> str:
        """The training set and its scale, as in scores files: `koniq10k mos 0..100`."""
        return f"{self.training_set} {self.scale.label}"

    def score(
        self, images: "Image.Image | np.ndarray | Tensor | str | Path | bytes | Sequence[object]"
    ) -> float | list[float]:
        """Score an image, or each image of a list.

        Args:
            images: A path, the bytes of a file, a PIL image, an array `[h, w, 3]` of bytes, or a
                tensor `[3, h, w]` (bytes, or floats in [0, 1]); or a list of them.

        Returns:
            In the scale of the training set (`scale` says which, and which direction is better).

        Raises:
            LmclError: If an image cannot be read (exit code 3, or 4 if there is no such file), or
                the model's answer is not a number (5).
            ValueError: If an array or a tensor is no image of bytes, or of floats in [0, 1].
        """
        if isinstance(images, list | tuple):
            found = self.predict([self.prepare(i) for i in images])
            return [_checked(scored).score for scored in found]
        return _checked(self.predict([self.prepare(images)])[0]).score

    def details(self, image: object) -> ImageScore:
        """Score, crops, boxes and the salient crop of one image; takes what `score` takes."""
        return _checked(self.predict([self.prepare(image, salient=True)])[0])

    def prepare(self, image: object, *, salient: bool = False) -> PreparedImage:
        """Decode an image and cut its crops; safe to call from several threads."""
        if isinstance(image, str | Path):
            image = _read_file(Path(image))
        if self.files is not None and isinstance(image, bytes):
            (prepared,) = self.prepare_files([image], salient=salient)
            if isinstance(prepared, str):
                raise LmclError(prepared, exit_code=3)
            return prepared
        large = isinstance(image, bytes) and _count_pixels(image) > _LARGE
        with self._one_large if large else contextlib.nullcontext():
            with decoder_notes() as notes:
                pixels, key = _pixels(image)
            return self._cut(pixels, key, salient=salient, notes=notes.all())

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
        side = self.card.saliency.view
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
        side = self.card.saliency.view if salient else 0
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
        if self.adaptive is None:
            return look_at_all(self.forward(self._stacked(crops)))
        boxes = [p.boxes for p in batch]
        return look_adaptively(
            self.adaptive, crops, boxes, lambda shown: self.forward(self._stacked(shown))
        )

    def _stacked(self, crops: Sequence[np.ndarray | Tensor]) -> UInt8[Tensor, "b v s s 3"]:
        if all(isinstance(one, np.ndarray) for one in crops):
            return torch.from_numpy(np.stack([np.asarray(one) for one in crops]))
        return torch.stack([torch.as_tensor(one, device=self.device) for one in crops])

    def forward(self, crops: UInt8[Tensor, "b v s s 3"]) -> CropOutputs:
        """Quality of every crop, in [0, 1] units, higher = better, and its embedding.

        Matrix products pick their algorithm by the shape of their input, and algorithms differ in
        the last bits: so a short batch is filled up, and every pass has one and the same shape.
        """
        missing = self.batch_images - len(crops)
        if missing > 0:
            crops = torch.cat([crops, crops.new_zeros((missing, *crops.shape[1:]))])
        pixels = crops.to(self.device)
        card = self.card
        with torch.inference_mode(), self.autocast():
            flat = normalize(pixels, mean=card.mean, std=card.std, dtype=torch.float32)
            output = self.model(flat)
        quality = output.score.double().cpu().numpy().reshape(len(crops), -1)
        embedding = output.embedding.float().cpu().numpy().reshape(*quality.shape, -1)
        kept = len(crops) - max(missing, 0)
        return CropOutputs(quality=quality[:kept], embedding=embedding[:kept])

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The region the network runs in: products in bfloat16 if that was asked for."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _scored(self, prepared: PreparedImage, seen: SeenCrops) -> ImageScore:
        quality = float(np.mean(seen.quality))
        meaning = self._meaning(quality, seen)
        boxes = prepared.boxes[seen.places].tolist()
        return ImageScore(
            score=float(self.scale.from_unit(quality)),
            quality=quality,
            crops=tuple(self.scale.from_unit(seen.quality).tolist()),
            boxes=tuple((b[0], b[1], b[2], b[3]) for b in boxes),
            salient=self._salient(prepared) if prepared.view.size else None,
            full_size=prepared.full_size,
            gpu_decoded=prepared.gpu_decoded,
            notes=(*prepared.notes, *meaning.notes),
            meaning=meaning,
        )

    def _meaning(self, quality: float, seen: SeenCrops) -> Interpretation:
        if self.interpreter is None:
            return NOTHING
        mean = seen.embedding.mean(axis=0)
        unit = mean / max(float(np.linalg.norm(mean)), 1e-12)
        return self.interpreter(quality, float(spread_of(seen.quality)), unit)

    def _salient(self, prepared: PreparedImage) -> tuple[int, int, int, int]:
        card = self.card
        view = torch.from_numpy(prepared.view[None, None]).to(self.device)
        with torch.inference_mode():
            flat = normalize(view, mean=card.mean, std=card.std, dtype=torch.float32)
            maps = self.model.encoder.cls_attention(flat, layers=card.saliency.layers).cpu()
        at = best_window(maps, card.saliency.window).numpy()
        box = window_to_box(
            at,
            np.array([prepared.size]),
            grid=maps.shape[-1],
            window=card.saliency.window,
            size=card.crops.size,
        )[0].tolist()
        return box[0], box[1], box[2], box[3]


def load(
    path: str | Path = STARTER,
    *,
    device: str = "auto",
    precision: Precision = "float32",
    decode: DecodeConfig = DEFAULT_DECODE,
    crops: Literal["all", "adaptive"] = "all",
) -> Scorer:
    """Open a released model folder, or a run folder that holds one; nothing is downloaded.

    Args:
        path: Folder with config.json and model.safetensors; `starter` (the default): the model
            that comes with the project (docs/starter.md).
        device: `auto` takes a GPU if there is one.
        precision: `bfloat16` is faster where the processor knows it; scores move by some
            thousandths of the range (docs/scoring.md).
        decode: Who decodes files: on a GPU the GPU, on a CPU Pillow, unless asked otherwise.
        crops: `adaptive` looks at as few crops as keep the order (docs/scoring.md).

    Raises:
        LmclError: If the folder is missing (4) or damaged (5).
    """
    reading = Reading(crops=crops)
    return open_scorer(path, device=device, precision=precision, decode=decode, reading=reading)


def open_scorer(
    model: str | Path,
    *,
    device: str = "auto",
    precision: Precision = "float32",
    decode: DecodeConfig = DEFAULT_DECODE,
    reading: Reading = DEFAULT_READING,
) -> Scorer:
    """Open a model folder (or a run folder that holds one), or `starter`.

    Raises:
        LmclError: If it is missing (4) or damaged (5), or there is no such device or decoder (2).
    """
    folder = find_model(model)
    released = load_model(folder)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    _check_device(chosen)
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if torch.device(chosen).index is not None and torch.device(chosen).type == "cuda":
        # Kernels and DALI go to the current device; it must be the one that was named.
        torch.cuda.set_device(chosen)
    fingerprint = digest.hexdigest()
    interpreter = make_interpreter(
        folder,
        reading,
        scale=released.card.score,
        fingerprint=fingerprint,
        width=released.model.encoder.width,
    )
    try:
        return Scorer(
            released,
            device=chosen,
            fingerprint=fingerprint,
            precision=precision,
            decode=decode,
            interpreter=interpreter,
            what_scores_mean=uncalibrated(folder),
            adaptive=adaptive_rule(folder, reading, interpreter),
        )
    except PipelineError as error:
        raise LmclError(str(error), exit_code=error.exit_code) from error


def _check_device(asked: str) -> None:
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


def _pixels(image: object) -> tuple[UInt8[np.ndarray, "h w 3"], int]:
    """Upright RGB, and a number that depends on the image alone (for seeded crops)."""
    if isinstance(image, bytes):
        return _decode(image), _key(image)
    if isinstance(image, Image.Image):
        pixels = _from_pillow(image)
    elif isinstance(image, Tensor):
        pixels = _from_tensor(image)
    elif isinstance(image, np.ndarray):
        pixels = _from_array(image)
    else:
        raise TypeError(
            f"an image must be a path, bytes, a PIL image, an array or a tensor, got {type(image)}"
        )
    return pixels, _key(pixels.tobytes())


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
        raise _unreadable(error) from error


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


def _unreadable(error: BaseException) -> LmclError:
    return LmclError(f"not an image this project can read ({describe_damage(error)})", exit_code=3)


def _from_tensor(image: Tensor) -> UInt8[np.ndarray, "h w 3"]:
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"a tensor image has shape [3, h, w], got {list(image.shape)}")
    values = image.detach().cpu()
    if not values.numel() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(
            f"a tensor image has pixels of bytes or floats, got {list(image.shape)} {image.dtype}"
        )
    # A comparison with NaN is false, so what is asked is that values are inside.
    if values.is_floating_point():
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                "a float image lies in [0, 1], without NaN; divide by 255, and do not normalise it"
            )
        values = (values * 255).round()
    elif not (values.min() >= 0 and values.max() <= 255):
        raise ValueError(
            f"an integer image lies in 0..255, got {int(values.min())}..{int(values.max())}; "
            "scale it to bytes"
        )
    return np.ascontiguousarray(values.to(torch.uint8).permute(1, 2, 0).numpy())


def _from_array(image: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"an array image has shape [h, w, 3] and type uint8, got {image.shape} {image.dtype}"
        )
    return np.ascontiguousarray(image)


def _notes(width: int, height: int) -> tuple[str, ...]:
    note = shape_note(width, height)
    return (note,) if note else ()


def _key(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=5).digest(), "big")
