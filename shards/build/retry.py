"""`--retry-failed`: take over the good shards of a finished set, leave the others to a build."""

import pyarrow as pa
import pyarrow.parquet as pq

from shards.build.pack import ShardRecord, read_noted, write_record
from shards.errors import ShardError
from shards.layout import shard_stem
from shards.manifest import MANIFEST, SAMPLES, Manifest, decode, ids_hash
from shards.sample import DataSet
from shards.store import Store


def keep_good_shards(store: Store, dataset: DataSet) -> tuple[int, ...]:
    """Write build records for the shards of a finished set that hold every image they should.

    Ids and the borders of shards stay as they were, so splits made before stay valid.

    Returns:
        First ids of all shards of the coming build.

    Raises:
        ShardError: If the source no longer lists the same images.
    """
    manifest = decode(store.read(MANIFEST), where=f"{store.root}/{MANIFEST}")
    if manifest.version > 1:
        raise ShardError(
            f"{store.root}: was updated (version {manifest.version}), and a build would lose that; "
            f"add repaired images with `lmcl-shard update {store.shown} TABLE`",
            exit_code=2,
        )
    names = ids_hash()
    for sample in dataset.samples():
        names.update(sample.path.encode("utf-8", "surrogateescape") + b"\n")
    if dataset.name != manifest.name or names.hexdigest() != manifest.ids_sha256:
        raise ShardError(
            f"{store.root}: was built from another list of images than the source has now; build "
            "into a new folder instead of `--retry-failed`",
            exit_code=3,
        )
    table = pq.read_table(pa.BufferReader(store.read(SAMPLES)))
    starts, noted = _starts(manifest), read_noted(store)
    by_start = {shard.first_id: shard for shard in manifest.shards}
    for index, start in enumerate(starts):
        shard = by_start.get(start)
        stem = shard_stem(manifest.name, index)
        if shard is None or shard.samples != shard.rows or shard.name != f"{stem}.tar":
            continue
        record = ShardRecord(
            fingerprint=None,
            first_id=start,
            rows=shard.rows,
            shard=shard,
            rejected=(),
            noted=tuple(line for line in noted if start <= line.id < start + shard.rows),
        )
        write_record(store, stem, record, table.slice(start, shard.rows))
    return starts


def _starts(manifest: Manifest) -> tuple[int, ...]:
    """First ids of the shards, those included that hold no image and so have no file."""
    starts: list[int] = []
    expected = 0
    for shard in manifest.shards:
        if shard.first_id > expected:
            starts.append(expected)
        starts.append(shard.first_id)
        expected = shard.first_id + shard.rows
    if expected < manifest.num_rows:
        starts.append(expected)
    return tuple(starts)
