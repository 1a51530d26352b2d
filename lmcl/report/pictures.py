"""Thumbnails, salient boxes and attention maps as they stand in the page.

A run folder may be a stranger's: its pictures are opened by `run_files`, decoded, and encoded
anew, so nothing but pixels of small images ever arrives in the page.
"""

import base64
import collections
import dataclasses
import io
import json
import math

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from lmcl.errors import LmclError
from lmcl.evaluation.predictions import Predictions
from lmcl.report.analysis import Analysis
from lmcl.report.formatting import format_figure
from lmcl.report.run import RunData
from lmcl.report.run_files import MAX_PICTURE_BYTES, read_run_file
from shards.errors import ShardError
from shards.image_formats import UNREADABLE, describe_damage, open_image
from shards.text import printable

_FORMATS = ("JPEG", "PNG")
_MOST_PIXELS = 1_000_000
"""Of a thumbnail or an attention map; `lmcl train` writes 192 x 192 at most."""
_SHOT_SIDE = 340
"""Twice the height at which the gallery shows a thumbnail: dense screens show more pixels."""
_HOVER_SIDE = 192
_MOST_HOVER = 2000
"""Images that are shown when they are pointed at; `lmcl train` keeps as many thumbnails."""
_MOST_BYTES = 16_000_000
"""All hover images together, before base64; beyond it the rest of the points show text only."""
_ATTENTION = (255, 158, 64)


class Pictures:
    """The pictures of a run folder; what is refused is counted."""

    def __init__(self, run: RunData) -> None:
        self._run = run
        self._refused: collections.Counter[str] = collections.Counter()
        self._example: dict[str, str] = {}

    def thumbnail(self, key: int) -> Image.Image | None:
        """The thumbnail of an image; None if there is none, or it is refused."""
        is_there = f"{key}.jpg" in self._run.thumbs
        return self._open(f"thumbs/{key}.jpg", "RGB") if is_there else None

    def attention(self, key: int) -> NDArray[np.float64] | None:
        """The attention map of an image, 0 to 255; None if there is none, or it is refused."""
        is_there = f"{key}.png" in self._run.attention
        image = self._open(f"attention/{key}.png", "L") if is_there else None
        return None if image is None else np.asarray(image, dtype=np.float64)

    def notes(self) -> list[str]:
        """A sentence per folder of which pictures were refused, so far."""
        return [
            f"{count} of the pictures in {folder}/ cannot be shown; {self._example[folder]}"
            for folder, count in self._refused.items()
        ]

    def _open(self, name: str, mode: str) -> Image.Image | None:
        try:
            data = read_run_file(self._run.root, name, limit_bytes=MAX_PICTURE_BYTES)
            with open_image(data, formats=_FORMATS, max_pixels=_MOST_PIXELS) as image:
                # Of the pixels alone: Pillow would hand on comments, profiles and EXIF.
                return Image.fromarray(np.array(image.convert(mode)))
        except (LmclError, ShardError) as error:
            reason = printable(getattr(error, "reason", error))
        except UNREADABLE as error:
            reason = describe_damage(error)
        folder = name.partition("/")[0]
        self._refused[folder] += 1
        self._example.setdefault(folder, f"{name}: {reason}")
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """One image of the gallery, as the template shows it."""

    row: int
    """Of the headline predictions; the page's script finds the image by it."""
    jpeg: Markup
    """Its thumbnail in base64; empty if there is none."""
    attention: Markup
    """Its attention map as a PNG in base64; empty if there is none."""
    box: str
    """The place of its salient box as declarations of CSS; empty if unknown."""
    score: str
    prediction: str
    error: str
    """Prediction minus score, with its sign."""
    path: str


def hover_data(a: Analysis, pictures: Pictures) -> str:
    """What the page's script knows about every image, as JSON that is safe inside HTML."""
    p = a.run.headline
    rows = [_row(p, i) for i in range(len(p))]
    thumbs: dict[str, str] = {}
    used = 0
    for key in p.id.tolist():
        if used > _MOST_BYTES or len(thumbs) == _MOST_HOVER:
            break
        image = pictures.thumbnail(key)
        if image is not None:
            thumbs[str(key)] = embedded_jpeg(image, side=_HOVER_SIDE, quality=72)
            used += len(thumbs[str(key)]) * 3 // 4
    text = json.dumps({"rows": rows, "thumbs": thumbs}, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def embedded_jpeg(image: Image.Image, *, side: int, quality: int) -> Markup:
    """A JPEG of the image in base64, its longer side at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=quality)
    return Markup(base64.b64encode(out.getvalue()).decode())


def shot(run: RunData, row: int, pictures: Pictures) -> Shot:
    """One image of the gallery with its box, its attention and its figures."""
    p = run.headline
    key = int(p.id[row])
    digits = 1 if float(np.nanmax(np.abs(p.mos))) > 20 else 2
    mos, prediction = float(p.mos[row]), float(p.prediction[row])
    sign = "+" if prediction >= mos else ""
    thumbnail, attention = pictures.thumbnail(key), pictures.attention(key)
    has_overlay = thumbnail is not None and attention is not None and attention.size > 0
    return Shot(
        row=row,
        jpeg=Markup()
        if thumbnail is None
        else embedded_jpeg(thumbnail, side=_SHOT_SIDE, quality=90),
        attention=_overlay(attention) if attention is not None and has_overlay else Markup(),
        box=_box_css(p, row),
        score=format_figure(mos, digits),
        prediction=format_figure(prediction, digits),
        error=sign + format_figure(prediction - mos, digits),
        path=str(p.path[row]),
    )


def box_percent(p: Predictions, row: int) -> tuple[float, float, float, float] | None:
    """Left, top, width and height of the salient box in percent of the image; None if unknown."""
    height, width = int(p.height[row]), int(p.width[row])
    if height <= 0 or width <= 0 or p.h[row] < 0:
        return None
    left, top = 100.0 * max(0, int(p.x[row])) / width, 100.0 * max(0, int(p.y[row])) / height
    # A crop larger than a small image was reflect-padded; the box shows the part inside.
    wide = max(0.0, min(100.0 * int(p.w[row]) / width, 100.0 - left))
    tall = max(0.0, min(100.0 * int(p.h[row]) / height, 100.0 - top))
    return round(left, 2), round(top, 2), round(wide, 2), round(tall, 2)


def _row(p: Predictions, i: int) -> dict[str, object]:
    return {
        "id": int(p.id[i]),
        "path": str(p.path[i]),
        "mos": _finite(float(p.mos[i])),
        "std": _finite(float(p.mos_std[i])),
        "prediction": _finite(float(p.prediction[i])),
        "subset": str(p.subset[i]),
        "distortion": str(p.distortion[i]),
        "level": int(p.level[i]),
        "box": box_percent(p, i),
    }


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def _overlay(grey: NDArray[np.float64]) -> Markup:
    """The attention map as one transparent colour; the browser smooths it over the image."""
    share = (grey - grey.min()) / max(float(np.ptp(grey)), 1.0)
    rgba = np.empty((*grey.shape, 4), dtype=np.uint8)
    rgba[..., :3] = _ATTENTION
    rgba[..., 3] = np.round(215 * share)
    out = io.BytesIO()
    Image.fromarray(rgba).save(out, "PNG")
    return Markup(base64.b64encode(out.getvalue()).decode())


def _box_css(p: Predictions, row: int) -> str:
    box = box_percent(p, row)
    if box is None:
        return ""
    left, top, wide, tall = box
    return f"left:{left}%;top:{top}%;width:{wide}%;height:{tall}%"
