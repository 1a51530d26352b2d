"""The folder a build works in: whose it is, what may be replaced there, what is cleaned up.

A command only replaces and removes what a build of this program put there. The records of an
unfinished build (`.build/`) say that one did.
"""

import contextlib
import hashlib
import itertools
import re
import shutil
from collections.abc import Iterator, Sequence

import msgspec

from shards.build.plan import Plan
from shards.cache import cache_root
from shards.errors import ShardError
from shards.files import remove_stale_temporaries
from shards.layout import STATE, index_name
from shards.lock import lock_at, lock_folder
from shards.manifest import MANIFEST, NOTED, REJECTED, SAMPLES, VERSIONS, Count, ShardInfo, decode
from shards.store import Store

_PLAN = f"{STATE}/plan.json"
_STARTED = f"{STATE}/started"
_STATE_FILE = re.compile(
    re.escape(STATE) + r"/([a-z0-9][a-z0-9_-]{0,40}-\d{6,}\.parquet|plan\.json|started)"
)
# Headers, the JSON member, padding and the row, for an estimate.
_BYTES_BESIDE_IMAGE = 2500
_VERSION_FILE = re.compile(re.escape(VERSIONS) + r"/v\d+\.(json|parquet)")


@contextlib.contextmanager
def hold_output(store: Store) -> Iterator[None]:
    """Let one build work on a folder; of a remote one, one of this user on this machine.

    Raises:
        ShardError: If another one does (exit code 2).
    """
    if store.folder is None:
        name = hashlib.sha256(store.shown.encode()).hexdigest()
        file = cache_root() / "locks" / f"{name}.lock"
        with lock_at(file, "building", what=store.shown):
            yield
        return
    is_new = not store.folder.exists()
    try:
        with lock_folder(store.folder, "building"):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                store.folder.rmdir()  # nothing was written, as if nothing had been asked


def begin(store: Store, plan: Plan, *, check_space: bool) -> None:
    """Make the folder an unfinished build, if it may be one.

    Args:
        store: The folder.
        plan: What is going to be written.
        check_space: Whether its size is known well enough to be compared with what is free.

    Raises:
        ShardError: If it holds files that no build wrote, or has too little room.
    """
    refuse_foreign(store, plan.name)
    if check_space:
        _need_space(store, plan)
    # From here on the folder is an unfinished build, even if nothing else is ever written to it.
    store.write(_STARTED, plan.source_sha256.encode())
    store.remove(MANIFEST)
    for file in store.names(VERSIONS):
        if _VERSION_FILE.fullmatch(file):
            store.remove(file)


def begin_again(store: Store, starts: tuple[int, ...]) -> None:
    """Make a finished set an unfinished build with the same borders of shards."""
    store.write(_PLAN, msgspec.json.encode(starts))
    store.write(_STARTED, b"retry")
    store.remove(MANIFEST)


def refuse_foreign(store: Store, name: str) -> None:
    """Stop before files are replaced that no build put there.

    Raises:
        ShardError: Naming the first of them (exit code 2).
    """
    if store.exists(_STARTED):
        return
    known = set[str]()
    if store.exists(MANIFEST):
        try:
            manifest = decode(store.read(MANIFEST), where=f"{store.root}/{MANIFEST}")
        except ShardError:
            return  # damaged, and it was asked to be replaced
        known = {SAMPLES, REJECTED, NOTED, *(shard.name for shard in manifest.shards)}
        known |= {index_name(shard.name) for shard in manifest.shards}
    ours = "|".join(map(re.escape, (SAMPLES, REJECTED, NOTED)))
    taken = re.compile(rf"{_shard_files(name)}|{ours}")
    foreign = [file for file in store.names() if taken.fullmatch(file) and file not in known]
    if foreign:
        raise ShardError(
            f"{store.root}: holds {foreign[0]}, which no build wrote there and this one would "
            f"replace ({len(foreign):,} such files); choose another `--output`",
            exit_code=2,
        )


def _shard_files(name: str) -> str:
    return re.escape(name) + r"-\d{6,}\.(tar|idx)"


def _need_space(store: Store, plan: Plan) -> None:
    """Compare what is to be written with what is free; shards that are there are written already.

    Raises:
        ShardError: If it cannot fit.
    """
    if store.folder is None:
        return
    ours = re.compile(_shard_files(plan.name))
    held = sum(store.size_bytes(file) for file in store.names() if ours.fullmatch(file))
    needed = plan.size_bytes + _BYTES_BESIDE_IMAGE * plan.rows - held
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        raise ShardError(
            f"{store.root}: about {needed / 1e9:,.1f} GB are to be written, {free / 1e9:,.1f} GB "
            "are free there; make room, or choose another `--output`"
        )


def remove_leftovers(store: Store, shards: Sequence[ShardInfo], name: str) -> None:
    """Remove the records of the build, and shards of an earlier one that no longer belong."""
    kept = {shard.name for shard in shards}
    kept |= {index_name(shard.name) for shard in shards}
    ours = re.compile(_shard_files(name))
    for file in store.names():
        if ours.fullmatch(file) and file not in kept:
            store.remove(file)
    for file in store.names(STATE):
        if _STATE_FILE.fullmatch(file):
            store.remove(file)
    if store.folder is not None:
        remove_stale_temporaries(store.folder)
        remove_stale_temporaries(store.folder / STATE)
        with contextlib.suppress(OSError):
            (store.folder / STATE).rmdir()  # unless somebody else's files are in it


def read_starts(store: Store) -> tuple[int, ...] | None:
    """First ids of the shards as an earlier build had them; None if there is none to follow.

    Raises:
        ShardError: If what it left is no such list.
    """
    if not store.exists(_PLAN):
        return None
    try:
        starts = msgspec.json.decode(store.read(_PLAN), type=tuple[Count, ...])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ShardError(
            f"{store.root}/{_PLAN}: is damaged ({error}); choose another `--output`", exit_code=3
        ) from error
    if not starts or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
        raise ShardError(
            f"{store.root}/{_PLAN}: is no list of first ids; choose another `--output`", exit_code=3
        )
    return starts
