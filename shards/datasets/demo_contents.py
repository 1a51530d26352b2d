"""Procedural pictures with the statistics of photographs: edges at every scale, 1/f spectra, depth.

Each picture is a pure function of its generator's state. Kinds: dead leaves (occluding discs and
polygons with a power law of sizes), coloured 1/f texture, landscape, still life of shaded shapes,
a printed page, a house front, cobblestones, and foliage. Drawn at twice the size, then halved.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Rng = np.random.Generator
Pixels = NDArray[np.float32]
"""[h, w, 3] in 0..1."""

_OVER = 2
_WORDS = (
    "morning river quiet harvest letters music bread salt iron glass paper stone market tower",
    "the light fell on boats that waited for wind and people spoke of rain and of the garden",
    "a winter road between two towns carries more stories than any book that was ever bound",
)


def render(kind: int, *, height: int, width: int, rng: Rng) -> Pixels:
    """One content picture, full contrast, sharp, without noise of its own.

    Args:
        kind: Which sort, taken modulo the number of sorts.
        height: Pixels.
        width: Pixels.
        rng: Source of all its chances.
    """
    large = _KINDS[kind % len(_KINDS)](height * _OVER, width * _OVER, rng)
    image = _to_image(large).resize((width, height), Image.Resampling.BOX)
    image = image.filter(ImageFilter.UnsharpMask(radius=1.0, percent=40, threshold=0))
    pixels = np.asarray(image, np.float32) / 255.0
    low, high = np.percentile(pixels, [0.5, 99.5])
    stretched: Pixels = np.clip((pixels - low) / max(high - low, 0.1), 0, 1).astype(np.float32)
    return stretched


KIND_NAMES = (
    "dead-leaves",
    "texture",
    "landscape",
    "still-life",
    "page",
    "house-front",
    "cobblestones",
    "foliage",
)


def noise_1_over_f(height: int, width: int, rng: Rng, *, slope: float = 1.0) -> Pixels:
    """A field with an amplitude spectrum of 1/f^slope, mean 0, standard deviation 1, [h, w]."""
    fy = np.fft.fftfreq(height)[:, None]
    fx = np.fft.rfftfreq(width)[None, :]
    radius = np.sqrt(fy**2 + fx**2)
    radius[0, 0] = 1.0
    spectrum = rng.standard_normal(radius.shape) + 1j * rng.standard_normal(radius.shape)
    spectrum *= radius**-slope
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=(height, width))
    return np.asarray(field / (field.std() + 1e-12), np.float32)


def _dead_leaves(height: int, width: int, rng: Rng) -> Pixels:
    image = _to_image(_gradient(height, width, rng))
    draw = ImageDraw.Draw(image)
    colours = _palette(rng, 9)
    smallest, largest = 0.025 * width, 0.35 * width
    # Density r^-3 of sizes, as in natural scenes.
    span = 1 - (smallest / largest) ** 2
    radii = smallest / np.sqrt(1 - rng.random(450) * span)
    for radius in radii:
        x, y = rng.random(2) * (width, height)
        colour = _jitter(colours[rng.integers(len(colours))], rng)
        if rng.random() < 0.6:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        else:
            draw.polygon(_polygon(x, y, float(radius), int(rng.integers(3, 8)), rng), fill=colour)
    return _textured(to_pixels(image), rng, 0.06)


def _texture(height: int, width: int, rng: Rng) -> Pixels:
    shape = noise_1_over_f(height, width, rng, slope=1.6)
    bent = shape + 0.5 * np.abs(noise_1_over_f(height, width, rng, slope=1.3))
    stops = np.asarray(_palette(rng, 5), np.float32) / 255
    place = (np.argsort(np.argsort(bent.ravel())) / bent.size).reshape(bent.shape) * 3.999
    index = place.astype(int)
    part = (place - index)[..., None]
    mixed = stops[index] * (1 - part) + stops[index + 1] * part
    return _textured(mixed.astype(np.float32), rng, 0.05)


def _landscape(height: int, width: int, rng: Rng) -> Pixels:
    top, bottom = rng.uniform(0.2, 0.6, 3), rng.uniform(0.7, 1.0, 3)
    top[2] = rng.uniform(0.7, 1.0)
    y = np.linspace(0, 1, height)[:, None, None]
    picture = (top * (1 - y) + bottom * y) * np.ones((1, width, 1))
    clouds = np.clip(noise_1_over_f(height, width, rng, slope=1.4), 0, 2)[..., None] * 0.22
    picture = picture + clouds
    layers = int(rng.integers(3, 6))
    rows = np.arange(height)[:, None]
    for layer in range(layers):
        depth = (layer + 1) / layers
        ridge = noise_1_over_f(2, width, rng, slope=1.1)[0]
        ridge = np.convolve(np.pad(ridge, 4, mode="wrap"), np.full(9, 1 / 9), mode="valid")
        line = height * (0.35 + 0.45 * layer / layers) - height * (0.1 - 0.04 * depth) * ridge
        colour = rng.uniform(0.05, 0.5, 3) * depth + 0.6 * (1 - depth)
        ground = noise_1_over_f(height, width, rng, slope=1.1)[..., None]
        lit = colour * (1 + 0.35 * depth * ground)
        picture = np.where((rows > line[None, :])[..., None], lit, picture)
    return np.clip(picture, 0, 1).astype(np.float32)


def _still_life(height: int, width: int, rng: Rng) -> Pixels:
    picture = _textured(_gradient(height, width, rng), rng, 0.05)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    light = rng.uniform(-0.6, 0.6, 2)
    for _ in range(int(rng.integers(9, 16))):
        radius = rng.uniform(0.06, 0.24) * width
        cx, cy = rng.random(2) * (width, height)
        dx, dy = (x - cx) / radius, (y - cy) / (radius * rng.uniform(0.7, 1.4))
        angle = rng.uniform(0, np.pi)
        dx, dy = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        power = rng.choice([2.0, 2.0, 4.0, 12.0])
        inside = (np.abs(dx) ** power + np.abs(dy) ** power) < 1
        shade = np.clip(0.75 + 0.5 * (dx * light[0] + dy * light[1]) - 0.3 * (dx**2 + dy**2), 0, 2)
        stripes = 1 + 0.35 * np.sign(np.sin(dx * rng.uniform(4, 24))) * (rng.random() < 0.5)
        colour = np.asarray(_palette(rng, 1)[0], np.float32) / 255
        picture = np.where(inside[..., None], colour * (shade * stripes)[..., None], picture)
    return np.clip(picture, 0, 1).astype(np.float32)


def _page(height: int, width: int, rng: Rng) -> Pixels:
    paper = rng.random() < 0.6
    ground = _gradient(height, width, rng) * 0.25 + (0.72 if paper else 0.08)
    image = _to_image(_textured(np.clip(ground, 0, 1), rng, 0.03))
    draw = ImageDraw.Draw(image)
    ink = _jitter((25, 25, 40) if paper else (235, 230, 210), rng)
    y = height * 0.04
    while y < height * 0.97:
        size = int(rng.choice([14, 18, 18, 24, 24, 40])) * _OVER // 2
        font = ImageFont.load_default(size)
        words = " ".join(rng.permutation(_WORDS[rng.integers(len(_WORDS))].split()).tolist())
        colour = ink if rng.random() < 0.8 else _jitter(_palette(rng, 1)[0], rng)
        draw.text((width * rng.uniform(0.03, 0.1), y), words, fill=colour, font=font)
        y += size * 1.35
    if rng.random() < 0.6:
        leaves = _to_image(_dead_leaves(height, width, rng))
        left, top = (int(side * rng.uniform(0.1, 0.5)) for side in (width, height))
        right, bottom = left + int(width * 0.4), top + int(height * 0.35)
        image.paste(leaves.crop((left, top, right, bottom)), (left, top))
    return to_pixels(image)


def _house_front(height: int, width: int, rng: Rng) -> Pixels:
    image = _to_image(_bricks(height, width, rng))
    draw = ImageDraw.Draw(image)
    columns, rows = int(rng.integers(3, 8)), int(rng.integers(3, 8))
    frame, glass = (_palette(rng, 2)[k] for k in range(2))
    for row in range(rows):
        for column in range(columns):
            x0, y0 = width * (column + 0.18) / columns, height * (row + 0.18) / rows
            x1, y1 = width * (column + 0.82) / columns, height * (row + 0.85) / rows
            draw.rectangle((x0 - 5, y0 - 5, x1 + 5, y1 + 5), fill=_jitter(frame, rng))
            draw.rectangle((x0, y0, x1, y1), fill=_jitter(glass, rng, 60))
            draw.line((x0, (y0 + y1) / 2, x1, (y0 + y1) / 2), fill=frame, width=5)
            draw.line(((x0 + x1) / 2, y0, (x0 + x1) / 2, y1), fill=frame, width=5)
            draw.polygon([(x0, y1), (x1, y0), (x1, y1)], fill=_jitter(glass, rng, 40))
    return _textured(to_pixels(image), rng, 0.04)


def _bricks(height: int, width: int, rng: Rng) -> Pixels:
    wall = _textured(_gradient(height, width, rng) * 0.5 + 0.3, rng, 0.08)
    y, x = np.mgrid[0:height, 0:width]
    course = int(rng.integers(20, 40))
    joint = ((y % course) < 3) | (((x + (y // course % 2) * course) % (2 * course)) < 3)
    return np.asarray(wall * np.where(joint, 0.65, 1.0)[..., None], np.float32)


def _cobblestones(height: int, width: int, rng: Rng) -> Pixels:
    across = int(rng.integers(8, 18))
    step = width / across
    down = int(np.ceil(height / step))
    grid = np.stack(np.meshgrid(np.arange(-1, across + 1), np.arange(-1, down + 1)), -1)
    centres = (grid.reshape(-1, 2) + rng.uniform(0.1, 0.9, (grid.size // 2, 2))) * step
    y, x = np.mgrid[0:height:2, 0:width:2].astype(np.float32)
    nearest = np.full(y.shape, np.inf, np.float32)
    second = nearest.copy()
    owner = np.zeros(y.shape, int)
    for index, (cx, cy) in enumerate(centres):
        distance = (x - cx) ** 2 + (y - cy) ** 2
        closer = distance < nearest
        second = np.where(closer, nearest, np.minimum(second, distance))
        owner = np.where(closer, index, owner)
        nearest = np.where(closer, distance, nearest)
    edge = np.clip((np.sqrt(second) - np.sqrt(nearest)) / (0.25 * step), 0, 1)[..., None]
    colours = np.asarray(_palette(rng, len(centres)), np.float32)[owner] / 255
    tone = np.asarray(_palette(rng, 1)[0], np.float32) / 255
    small = (0.5 * colours + 0.5 * tone) * (0.15 + 0.85 * edge**0.6)
    image = _to_image(small.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return _textured(to_pixels(image), rng, 0.07)


def _foliage(height: int, width: int, rng: Rng) -> Pixels:
    image = _to_image(_gradient(height, width, rng) * 0.35)
    draw = ImageDraw.Draw(image)
    base = np.asarray(_palette(rng, 1)[0], float) * 0.4 + np.array([40, 110, 30]) * 0.6
    for number in range(450):
        x, y = rng.random(2) * (width, height)
        length, angle = rng.uniform(0.05, 0.18) * width, rng.uniform(0, 2 * np.pi)
        depth = number / 450
        lit = np.clip(base * (0.4 + 1.1 * depth) + rng.normal(0, 22, 3), 0, 255)
        colour = tuple(int(value) for value in lit)
        along = np.array([np.cos(angle), np.sin(angle)]) * length
        across = np.array([-along[1], along[0]]) * rng.uniform(0.12, 0.3)
        centre = np.array([x, y])
        tips = [centre - along, centre + across, centre + along, centre - across]
        draw.polygon([(float(p[0]), float(p[1])) for p in tips], fill=colour)
        vein = tuple(min(255, value + 40) for value in colour)
        draw.line([tuple(centre - along), tuple(centre + along)], fill=vein, width=2)
    return _textured(to_pixels(image), rng, 0.05)


_KINDS: tuple[Callable[[int, int, Rng], Pixels], ...] = (
    _dead_leaves,
    _texture,
    _landscape,
    _still_life,
    _page,
    _house_front,
    _cobblestones,
    _foliage,
)


def _gradient(height: int, width: int, rng: Rng) -> Pixels:
    corners = np.asarray(_palette(rng, 4), np.float32).reshape(2, 2, 3)
    image = Image.fromarray(corners.astype(np.uint8))
    return to_pixels(image.resize((width, height), Image.Resampling.BICUBIC))


def _textured(picture: Pixels, rng: Rng, strength: float) -> Pixels:
    """Surfaces of the real world are never flat: multiply by a little 1/f noise."""
    height, width = picture.shape[:2]
    field = noise_1_over_f(height, width, rng, slope=0.75)[..., None]
    return np.clip(picture * (1 + strength * field), 0, 1).astype(np.float32)


def _palette(rng: Rng, count: int) -> list[tuple[int, int, int]]:
    """Colours around two related hues, from dark to light."""
    hue = rng.random()
    colours = []
    for _ in range(count):
        h = (hue + rng.choice([0.0, 0.08, 0.45]) + rng.normal(0, 0.03)) % 1.0
        s, v = rng.uniform(0.05, 0.7), rng.uniform(0.12, 0.98)
        wheel = np.clip(np.abs((h * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
        red, green, blue = (255 * v * (1 - s + s * wheel)).astype(int)
        colours.append((int(red), int(green), int(blue)))
    return colours


def _jitter(colour: tuple[int, ...], rng: Rng, spread: float = 18) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.asarray(colour) + rng.normal(0, spread, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def _polygon(
    x: float, y: float, radius: float, corners: int, rng: Rng
) -> list[tuple[float, float]]:
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    return [(x + radius * float(np.cos(a)), y + radius * float(np.sin(a))) for a in angles]


def _to_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))


def to_pixels(image: Image.Image) -> Pixels:
    """An 8-bit RGB image as numbers in 0..1."""
    return np.asarray(np.asarray(image) / np.float32(255), np.float32)
