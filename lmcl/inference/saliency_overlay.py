"""Saliency overlays: the attention, salient window and salient crop of a model over photographs.

One picture an image: the CLS attention as warmth over the darkened photograph, the window of tokens
that holds most of it (orange), and the crop that is cut there at native resolution (white).
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lmcl.errors import LmclError
from lmcl.inference.inputs import list_items
from lmcl.inference.scorer import decode_image
from lmcl.models.named import find_model
from lmcl.models.pretrained import ReleasedModel, load_model
from lmcl.models.saliency import best_window, window_to_box
from lmcl.utils.files import make_output_folder, write_atomic
from pipeline.boxes import CropConfig, scaled_sizes
from pipeline.decode import resize_rgb
from pipeline.normalize import normalize
from shards.files import check_own
from shards.progress import progress_bar
from shards.side_files import PICTURE_ENDINGS
from shards.text import printable, spreadsheet_cell

_MARK, _TABLE_MARK = b"lmcl saliency", b"path,picture,box_y,"
"""Stand at the beginning of every overlay and of the table."""

_HEAT = np.array([[0, 0, 0], [120, 0, 40], [230, 60, 0], [255, 170, 0], [255, 255, 190]], float)
"""Colours from no attention to the most, evenly spaced."""
_WINDOW, _BOX, _PAPER, _INK = (255, 150, 0), (255, 255, 255), (20, 20, 20), (235, 235, 235)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSaliency:
    """What a model finds salient in one image."""

    pixels: UInt8[np.ndarray, "h w 3"]
    """The image as boxes see it: upright, after `max_side`."""
    attention: Float32[np.ndarray, "g g"]
    """CLS attention over the tokens of the squeezed image; sums to less than 1."""
    window_at: tuple[int, int]
    """Row and column of the window's first token."""
    window: int
    """Tokens per side of the window."""
    box: tuple[int, int, int, int]
    """The salient crop: y, x, h, w in pixels."""

    @property
    def share(self) -> float:
        """Share of the attention that lies in the window."""
        y, x = self.window_at
        inside = self.attention[y : y + self.window, x : x + self.window]
        return float(inside.sum() / self.attention.sum())

    @property
    def window_box(self) -> tuple[int, int, int, int]:
        """The window in pixels: y, x, h, w."""
        height, width = self.pixels.shape[:2]
        grid = self.attention.shape[0]
        y, x = self.window_at
        top, left = round(y * height / grid), round(x * width / grid)
        bottom = round((y + self.window) * height / grid)
        right = round((x + self.window) * width / grid)
        return top, left, bottom - top, right - left


def draw_all(images: Sequence[str], model: str | Path, output: Path, *, progress: bool) -> int:
    """Overlays of all images as `<output>/<name>.png`, and `saliency.csv` with the boxes.

    Returns:
        How many were drawn.

    Raises:
        ShardError: If an overlay would replace a file that is none (exit code 2).
        LmclError: If the output is called like a picture (exit code 2).
        LmclError: If some cannot be read, after the others were drawn; names them (exit code 3,
            or 4 if all of those are not there).
    """
    if output.suffix.lower() in PICTURE_ENDINGS and not output.is_dir():
        raise LmclError(
            f"--output {printable(output)}: is called like a picture, and a folder is made, of a "
            f"picture each and saliency.csv; name it {printable(output.with_suffix(''))}",
            exit_code=2,
        )
    make_output_folder(output)
    check_own(output / "saliency.csv", _TABLE_MARK)
    marked = PngInfo()
    marked.add_text("Software", _MARK.decode())
    released = load_model(find_model(model))
    rows: list[tuple[object, ...]] = []
    problems: list[str] = []
    are_missing: list[bool] = []
    taken: set[str] = set()
    for item in progress_bar(list_items(images), desc="looking", unit="img", off=not progress):
        try:
            seen = image_saliency(released, decode_image(item.read()))
        except LmclError as error:
            are_missing.append(error.exit_code == 4)
            problems.append(f"{printable(item.path)}: {printable(error, 300)}")
            continue
        name = _free_name(PurePath(item.path).stem, taken)
        buffer = io.BytesIO()
        overlay(seen).save(buffer, "PNG", pnginfo=marked)
        check_own(output / name, _MARK)
        write_atomic(output / name, buffer.getvalue())
        rows.append((item.path, name, *seen.box, *seen.window_box, round(seen.share, 4)))
    _write_table(output / "saliency.csv", rows)
    if problems:
        raise LmclError(
            f"{len(problems)} of {len(problems) + len(rows)} images could not be drawn: "
            f"{'; '.join(problems[:5])}. Name image files (JPEG, PNG, BMP, WebP)"
            + (f"; the others are in {printable(output)}" if rows else ""),
            exit_code=4 if all(are_missing) else 3,
        )
    return len(rows)


def image_saliency(released: ReleasedModel, pixels: UInt8[np.ndarray, "h w 3"]) -> ImageSaliency:
    """The saliency pass on one upright image, as training does it (method.md, steps 2 and 3)."""
    card = released.card
    side, window = card.saliency.view, card.saliency.window
    # A copy: decoders may give memory that torch must not be handed.
    view = torch.from_numpy(np.array(resize_rgb(pixels, side, side), order="C")[None, None])
    with torch.inference_mode():
        flat = normalize(view, mean=card.mean, std=card.std, dtype=torch.float32)
        maps = released.model.encoder.cls_attention(flat, layers=card.saliency.layers)
    at = best_window(maps, window).numpy()
    extent = _scaled(pixels, card.crops)
    box = window_to_box(at, extent, grid=maps.shape[-1], window=window, size=card.crops.size)
    (y, x), (tall, wide) = at[0].tolist(), extent[0].tolist()
    top, left, height, width = box[0].tolist()
    return ImageSaliency(
        pixels=np.array(resize_rgb(pixels, tall, wide), order="C"),
        attention=maps[0].float().numpy(),
        window_at=(y, x),
        window=window,
        box=(top, left, height, width),
    )


def overlay(seen: ImageSaliency) -> Image.Image:
    """The picture of one look: photograph, warmth, window, box, and a line that reads them."""
    height, width = seen.pixels.shape[:2]
    photo = Image.fromarray(seen.pixels)
    heat = Image.fromarray(_warm(seen.attention)).resize((width, height), Image.Resampling.BICUBIC)
    grey = photo.convert("L").convert("RGB")
    picture = Image.blend(grey, heat, 0.55)
    y, x, h, w = seen.box
    # What is cut is shown as it is: that is what the student gets.
    inside = (x, y, min(x + w, width), min(y + h, height))
    picture.paste(Image.blend(photo.crop(inside), heat.crop(inside), 0.15), inside[:2])
    pen = ImageDraw.Draw(picture)
    line = max(2, round(max(height, width) / 250))
    for (top, left, tall, wide), colour in ((seen.window_box, _WINDOW), (seen.box, _BOX)):
        # An image of a few pixels has windows of less than one.
        left, top = min(left, width - 1), min(top, height - 1)
        right, bottom = min(left + wide, width) - 1, min(top + tall, height) - 1
        frame = (left, top, max(left, right), max(top, bottom))
        pen.rectangle(frame, outline=colour, width=line)
    return _with_caption(picture, seen)


def _with_caption(picture: Image.Image, seen: ImageSaliency) -> Image.Image:
    size = max(11, round(picture.width / 55))
    font = ImageFont.load_default(size)
    tokens, grid = seen.window, seen.attention.shape[0]
    area = tokens**2 / grid**2
    parts = (
        (f"window {tokens} x {tokens} of {grid} x {grid} tokens: ", _WINDOW),
        (f"{seen.share:.0%} of the attention on {area:.0%} of the image   ", _INK),
        (f"crop {seen.box[3]} x {seen.box[2]}", _BOX),
    )
    page = Image.new("RGB", (picture.width, picture.height + 2 * size), _PAPER)
    page.paste(picture)
    pen = ImageDraw.Draw(page)
    at = size / 2
    for text, colour in parts:
        pen.text((at, picture.height + size * 0.4), text, fill=colour, font=font)
        at += pen.textlength(text, font=font)
    return page


def _warm(attention: Float32[np.ndarray, "g g"]) -> UInt8[np.ndarray, "g g 3"]:
    low, high = float(attention.min()), float(attention.max())
    unit = (attention - low) / ((high - low) or 1.0)
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(unit, stops, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _scaled(pixels: UInt8[np.ndarray, "h w 3"], crops: CropConfig) -> Int64[np.ndarray, "1 2"]:
    height, width = pixels.shape[:2]
    return scaled_sizes(np.array([height]), np.array([width]), crops)


def _free_name(stem: str, taken: set[str]) -> str:
    """A file name of its own for every image: two folders may hold images of one name."""
    name, number = f"{stem}.png", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.png"
    taken.add(name)
    return name


def _write_table(path: Path, rows: Sequence[tuple[object, ...]]) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    box = [f"{what}_{side}" for what in ("box", "window") for side in ("y", "x", "h", "w")]
    writer.writerow(["path", "picture", *box, "attention_share"])
    for row in rows:
        writer.writerow([spreadsheet_cell(v) if isinstance(v, str) else v for v in row])
    write_atomic(path, out.getvalue())
