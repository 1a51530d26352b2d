"""A packed set as a person wants to see it: text, and a contact sheet."""

import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from shards.build.pack import read_noted
from shards.errors import ShardError
from shards.image_formats import UNREADABLE, describe_damage, open_image
from shards.manifest import NOTED, SPLITS
from shards.picture_counts import PictureCounts, size_sentences
from shards.read import ShardSet
from shards.text import printable

SHEET_MARK = b"lmcl-shard info"
"""Stands at the beginning of every contact sheet."""
_BINS = 12
_BAR = 40
_MOST_NAMES = 40
_MOST_OPENED = 2_000


def describe_set(shard_set: ShardSet) -> str:
    """Counts, scores, sizes, codecs, groups, distortions and splits, as lines of text."""
    return "\n".join(_lines(shard_set))


def contact_sheet(
    shard_set: ShardSet, *, columns: int = 8, rows: int = 5, tile: int = 160, seed: int = 123
) -> bytes:
    """A PNG of images spread over the range of scores, worst first, each with its score.

    Args:
        shard_set: The set.
        columns: Images side by side.
        rows: Lines of images.
        tile: Side of one image's place, pixels.
        seed: Which image is taken where scores are equal or missing.

    Raises:
        ShardError: If the set has no image, or one that is shown is damaged (exit code 3).
    """
    ids = _spread_ids(shard_set, columns * rows, seed)
    if ids.size == 0:
        raise ShardError(f"{shard_set.root}: holds no image to show", exit_code=3)
    caption = 18
    sheet = Image.new("RGB", (columns * tile, -(-len(ids) // columns) * (tile + caption)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, id in enumerate(ids.tolist()):
        x, y = place % columns * tile, place // columns * (tile + caption)
        upright = _upright(shard_set, id)
        upright.thumbnail((tile - 4, tile - 4))
        sheet.paste(upright, (x + (tile - upright.width) // 2, y + (tile - upright.height) // 2))
        mos = shard_set.samples.mos[id]
        text = f"{id}" if np.isnan(mos) else f"{id}: {mos:.4g}"
        draw.text((x + 4, y + tile), text, fill="black", font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG", pnginfo=_marked())
    return out.getvalue()


def _marked() -> PngInfo:
    found = PngInfo()
    found.add_text("Software", SHEET_MARK.decode())
    return found


def _upright(shard_set: ShardSet, id: int) -> Image.Image:
    try:
        with open_image(shard_set.read_bytes(id)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UNREADABLE as error:
        raise ShardError(
            f"{shard_set.root}: sample {id} cannot be decoded ({describe_damage(error)}); run "
            f"`lmcl-shard verify {shard_set.root} --deep`",
            exit_code=3,
        ) from error


def _spread_ids(shard_set: ShardSet, count: int, seed: int) -> NDArray[np.int64]:
    ids = shard_set.ids()
    rng = np.random.default_rng(seed)
    ids = ids[rng.permutation(ids.size)]
    unit = shard_set.unit_mos()[ids]
    ordered = ids[np.argsort(unit, kind="stable")]
    places = np.linspace(0, ids.size - 1, min(count, ids.size)).round().astype(int)
    spread: NDArray[np.int64] = ordered[places]
    return spread


def _lines(shard_set: ShardSet) -> Iterator[str]:
    manifest, table = shard_set.manifest, shard_set.samples
    ids = shard_set.ids()
    held = sum(shard.size_bytes for shard in manifest.shards)
    yield f"{printable(manifest.facts.title)} ({manifest.name})"
    yield f"  written by  {printable(manifest.producer)}, format {manifest.format_version}"
    yield f"  samples     {len(ids):,} in {len(manifest.shards)} shards, {held / 1e6:,.1f} MB"
    if manifest.num_rejected:
        yield f"  rejected    {manifest.num_rejected:,} (see rejected.jsonl)"
    if manifest.num_withdrawn:
        yield f"  withdrawn   {manifest.num_withdrawn:,}"
    for version in manifest.history:
        yield (
            f"  version {version.version:<3} {printable(version.date, 30) or 'as built':<26} "
            f"{version.num_samples:,} images: {printable(version.what, 120)}"
        )
    expected = manifest.facts.expected.samples
    if expected is not None and expected != len(ids):
        yield f"  a part      the complete set has {expected:,}"
    groups = np.unique(table.group_key[ids]).size
    yield f"  groups      {groups:,}" + (" (every image its own)" if groups == len(ids) else "")
    yield from _scores(shard_set, ids)
    yield from _sizes(shard_set, ids)
    for title, column in (
        ("codecs", table.codec),
        ("distortions", table.distortion),
        ("subsets", table.subset),
        ("parts", table.part),
    ):
        names, counts = np.unique(column[ids].astype(str), return_counts=True)
        if names.size > 1 or (names.size and names[0]):
            pairs = list(zip(names[:_MOST_NAMES], counts[:_MOST_NAMES], strict=True))
            listed = [f"{printable(name, 60) or '(none)'} {n:,}" for name, n in pairs]
            more = f" and {names.size - _MOST_NAMES:,} more" if names.size > _MOST_NAMES else ""
            yield f"  {title:<11} " + ", ".join(listed) + more
    yield from _subset_scores(shard_set, ids)
    yield from (f"  look at     {sentence}" for sentence in _remarks(shard_set, ids))
    for name in shard_set.store.names(SPLITS):
        yield f"  split       {printable(name)}"
    for name, text in (("licence", manifest.facts.licence), ("page", manifest.facts.page)):
        if text:
            yield f"  {name:<11} {printable(text, 500)}"


def _scores(shard_set: ShardSet, ids: NDArray[np.int64]) -> Iterator[str]:
    score, stats = shard_set.score, shard_set.manifest.labels
    if score is None or stats is None:
        yield "  scores      none: this set can be scored, not trained on"
        return
    better = "higher is better" if score.higher_is_better else "lower is better"
    yield f"  scores      {score.kind}, {score.low:g} .. {score.high:g}, {better}"
    yield (
        f"              {stats.count:,} labelled, {stats.low:g} .. {stats.high:g}, "
        f"mean {stats.mean:.4g}, standard deviation {stats.std:.4g}"
    )
    mos = shard_set.samples.mos[ids]
    mos = mos[np.isfinite(mos)]
    if mos.size == 0:
        return
    # Ends in numpy's own arithmetic: a range of a few bits cannot be cut into twelve.
    wide = max(float(np.ptp(mos)), 1e-9 * max(1.0, float(np.abs(mos).max())))
    counts, edges = np.histogram(mos, bins=_BINS, range=(mos.min(), mos.min() + wide))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * round(_BAR * count / max(counts.max(), 1))
        yield f"              {low:8.3g} .. {high:<8.3g} {count:7,} {bar}"


def _subset_scores(shard_set: ShardSet, ids: NDArray[np.int64]) -> Iterator[str]:
    """Scores of each subset where there are several: they need not be on one level."""
    table = shard_set.samples
    mos, subset = table.mos[ids], table.subset[ids].astype(str)
    names = np.unique(subset[np.isfinite(mos)])
    for name in names[:_MOST_NAMES].tolist() if names.size > 1 else ():
        scores = mos[(subset == name) & np.isfinite(mos)]
        yield (
            f"  subset      {printable(name, 60) or '(none)'}: {scores.size:,} labelled, "
            f"{scores.min():g} .. {scores.max():g}, mean {scores.mean():.4g}, standard deviation "
            f"{scores.std():.4g}"
        )


def _remarks(shard_set: ShardSet, ids: NDArray[np.int64]) -> Iterator[str]:
    """What should be known about the pictures, and is no error."""
    table = shard_set.samples
    yield from size_sentences(table.width[ids], table.height[ids])
    hashes = np.unique(np.asarray(table.sha256[ids]).reshape(len(ids), -1), axis=0)
    if len(hashes) < len(ids):
        yield f"{len(ids) - len(hashes):,} are copies of others, bit for bit"
    if noted := read_noted(shard_set.store):
        yield f"{len(noted):,} were damaged and packed as decoders repair them (see {NOTED})"
    counts = PictureCounts()
    for id in ids[np.linspace(0, len(ids) - 1, min(_MOST_OPENED, len(ids))).astype(int)].tolist():
        counts.add(shard_set.read_bytes(id))
    share = f", of {counts.seen:,} that were opened" if counts.seen < len(ids) else ""
    yield from (f"{sentence}{share}" for sentence in counts.sentences())


def _sizes(shard_set: ShardSet, ids: NDArray[np.int64]) -> Iterator[str]:
    if ids.size == 0:
        yield "  pixels      none: every image was rejected"
        return
    width, height = shard_set.samples.width[ids], shard_set.samples.height[ids]
    yield (
        f"  pixels      {width.min()}..{width.max()} wide, {height.min()}..{height.max()} high, "
        f"median {int(np.median(width))} x {int(np.median(height))}"
    )
    sizes, counts = np.unique(np.stack([width, height], 1), axis=0, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:5]
    listed = [f"{sizes[k][0]}x{sizes[k][1]} {counts[k]:,}" for k in most.tolist()]
    yield f"  frequent    {', '.join(listed)}" + (
        f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
    )
