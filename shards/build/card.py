"""Dataset card: the `README.md` of a set, which others' readers are told by how to open it.

Its YAML header names the tars and the types of their members for Hugging Face's `load_dataset`,
which would otherwise take the sample table for the whole set, or refuse tars of several codecs. A
README that a person wrote or changed is never replaced: the card's last line has the hash of the
rest. Nothing of ours reads it, and no hash of the set covers it.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator

import pyarrow as pa

from shards.errors import ShardError
from shards.manifest import CARD, Manifest
from shards.sample_table import DESCRIBED
from shards.store import Store
from shards.text import printable

logger = logging.getLogger(__name__)

_SEAL = re.compile(
    rb"\n<!-- written by lmcl-shard, sha256 ([0-9a-f]{64}); changed, it is kept -->\n"
)
_MOST_BYTES = 1 << 20
_TYPES = {pa.int64(): "int64", pa.float64(): "float64", pa.string(): "string"}
"""Arrow types as a card's header calls them."""


def write_card(store: Store, manifest: Manifest, codecs: Iterable[str]) -> bool:
    """Write a set's card, unless its folder holds a README that is not ours.

    Args:
        store: The set's folder.
        manifest: What the set is.
        codecs: Of the images in its tars.

    Returns:
        Whether the card is there now.
    """
    if store.exists(CARD) and not _is_ours(store):
        logger.info(
            "%s/%s is somebody's own, so no card of the set is written there (docs/formats.md)",
            store.shown,
            CARD,
        )
        return False
    store.write(CARD, make_card(manifest, codecs))
    return True


def make_card(manifest: Manifest, codecs: Iterable[str]) -> bytes:
    """The card of a set: the same bytes for the same set."""
    lines = [
        "---",
        *_header(manifest, sorted({one for one in codecs if one})),
        "---",
        "",
        *_body(manifest),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    content = text.encode("utf-8", "backslashreplace")
    digest = hashlib.sha256(content).hexdigest()
    seal = f"\n<!-- written by lmcl-shard, sha256 {digest}; changed, it is kept -->\n"
    return content + seal.encode()


def _is_ours(store: Store) -> bool:
    try:
        if store.size_bytes(CARD) > _MOST_BYTES:
            return False
        content = store.read(CARD)
    except ShardError:
        return False  # no file, or one that cannot be read: not ours to replace
    found = _SEAL.search(content)
    if found is None or found.end() != len(content):
        return False
    return hashlib.sha256(content[: found.start()]).hexdigest().encode() == found[1]


def _header(manifest: Manifest, codecs: list[str]) -> Iterator[str]:
    yield f"pretty_name: {json.dumps(_title(manifest))}"
    yield "configs:"
    yield "- config_name: default"
    yield "  data_files:"
    yield "  - split: train"
    yield f"    path: {json.dumps(f'{manifest.name}-*.tar')}"
    yield "dataset_info:"
    yield "  features:"
    for codec in codecs:
        yield from (f"  - name: {codec}", "    dtype: image")
    yield from ("  - name: json", "    struct:")
    for field in DESCRIBED:
        yield from (f"    - name: {field.name}", f"      dtype: {_TYPES[field.type]}")
    for name in ("__key__", "__url__"):
        yield from (f"  - name: {name}", "    dtype: string")


def _title(manifest: Manifest) -> str:
    return printable(manifest.facts.title or manifest.name, 200)


def _body(manifest: Manifest) -> Iterator[str]:
    facts, score = manifest.facts, manifest.score
    yield f"# {_title(manifest)}"
    yield ""
    yield f"{manifest.num_samples:,} images in {len(manifest.shards):,} tars, packed by lmcl-shard."
    if score is not None and manifest.labels is not None:
        count = manifest.labels.count
        yield f"Scores (`json.mos`): {score.description}; {count:,} images have one."
    else:
        yield "They have no scores."
    for name, value in (("Page", facts.page), ("Licence", facts.licence), ("Cite", facts.citation)):
        if value:
            yield from ("", f"{name}: {printable(value, 1000)}")
    yield from _reading(manifest.name)
    if manifest.version > 1:
        yield from _of_version(manifest)


def _reading(name: str) -> Iterator[str]:
    yield from ("", "## How to read it", "")
    yield "By Hugging Face's datasets, also with `streaming=True`, FOLDER being this one:"
    yield from ("", '    load_dataset("FOLDER", split="train")', "")
    yield "There is a column for each format of images (the others are None), and `json`."
    yield from ("By webdataset:", "")
    tars = f'sorted(glob.glob("FOLDER/{name}-*.tar"))'
    yield f"    webdataset.WebDataset({tars}, shardshuffle=False)"
    yield ""
    yield "Each `.idx` is NVIDIA DALI's index of a tar. `samples.parquet` has one row an image."


def _of_version(manifest: Manifest) -> Iterator[str]:
    yield from ("", "## This set was updated", "")
    gone = f"{manifest.num_withdrawn:,} images that were withdrawn"
    yield f"`samples.parquet` has the labels of version {manifest.version}. In the tars are those"
    yield f"that images were packed with, and {gone}:"
    yield ""
    yield '    table = load_dataset("parquet", data_files="FOLDER/samples.parquet", split="train")'
    yield '    rows = {row["id"]: row for row in table}'
    yield '    images = load_dataset("FOLDER", split="train").filter('
    yield '        lambda sample: rows[sample["json"]["id"]]["ok"]'
    yield "    )"
