"""Thumbnails, salient boxes and attention maps as they stand in the page."""

import base64
import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from lmcl.evaluation.predictions import Predictions
from lmcl.report.analysis import Analysis
from lmcl.report.formatting import format_figure
from lmcl.report.run import RunData

_HOVER_SIDE = 160
_HOVER_BYTES = 7000
_MOST_BYTES = 16_000_000
"""All hover images together, before base64; beyond it the rest of the points show text only."""
_ATTENTION = (255, 158, 64)


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


def hover_data(a: Analysis, *, pictures: bool = True) -> str:
    """What the page's script knows about every image, as JSON that is safe inside HTML."""
    p = a.run.headline
    rows = [_row(p, i) for i in range(len(p))]
    thumbs: dict[str, str] = {}
    used = 0
    for key in p.id.tolist() if pictures else []:
        file = a.run.thumb(key)
        if not file.is_file() or used > _MOST_BYTES:
            continue
        data = _small(file)
        used += len(data)
        thumbs[str(key)] = base64.b64encode(data).decode()
    text = json.dumps({"rows": rows, "thumbs": thumbs}, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def embedded_jpeg(image: Image.Image, *, side: int, quality: int) -> Markup:
    """A JPEG of the image in base64, its longer side at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=quality)
    return Markup(base64.b64encode(out.getvalue()).decode())


def shot(run: RunData, row: int) -> Shot:
    """One image of the gallery with its box, its attention and its figures."""
    p = run.headline
    key = int(p.id[row])
    digits = 1 if float(np.nanmax(np.abs(p.mos))) > 20 else 2
    mos, prediction = float(p.mos[row]), float(p.prediction[row])
    sign = "+" if prediction >= mos else ""
    return Shot(
        row=row,
        jpeg=_base64(run.thumb(key)),
        attention=_overlay(run.attention(key)),
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
    wide = min(100.0 * int(p.w[row]) / width, 100.0 - left)
    tall = min(100.0 * int(p.h[row]) / height, 100.0 - top)
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


def _small(file: Path) -> bytes:
    data = file.read_bytes()
    if len(data) <= _HOVER_BYTES:
        return data
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
        small.thumbnail((_HOVER_SIDE, _HOVER_SIDE))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=72)
    return out.getvalue()


def _base64(file: Path) -> Markup:
    return Markup(base64.b64encode(file.read_bytes()).decode()) if file.is_file() else Markup()


def _overlay(file: Path) -> Markup:
    """The attention map as one transparent colour; the browser smooths it over the image."""
    if not file.is_file():
        return Markup()
    with Image.open(file) as image:
        grey = np.asarray(image.convert("L"), dtype=np.float64)
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
