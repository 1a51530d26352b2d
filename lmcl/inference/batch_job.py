"""Batch scoring: items go through decoding threads and the model into journals, then one output.

Every process of an `accelerate launch` takes every world-size-th item; processes meet only once, at
the end, and no step needs more memory for a million images than for ten.
"""

import dataclasses
import itertools
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from lmcl.errors import LmclError
from lmcl.inference.inputs import Item
from lmcl.inference.moves import MOVES_KEY, recorded_moves
from lmcl.inference.resume import ResumePlan, after_move, name_rows, plan_resume, source_of
from lmcl.inference.scorer import ImageScore, PreparedImage, Scorer
from lmcl.inference.scores_file import (
    JournalRows,
    Layout,
    Row,
    RowJournal,
    Source,
    check_output,
    is_name_key,
    journals_of,
    note_path,
    read_note,
    read_rows,
    read_sources,
    write_note,
    write_rows,
)
from pipeline.decode_config import same_pixels
from shards.files import remove_stale_temporaries
from shards.lock import lock_path
from shards.picture_notes import join_notes, too_small
from shards.progress import progress_bar
from shards.text import printable

logger = logging.getLogger(__name__)

SOURCE_KEY = "source"
"""Where on a hub a model is from, in a scores file's origin."""

T = TypeVar("T")
_AHEAD = 4
"""Batches that are decoded ahead of the model."""
_MOST_ERROR = 500
"""Characters of a row's error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Options of a batch scoring: output file, optional columns, threads."""

    output: Path
    box: bool = False
    """Add the salient crop of every image; one more forward pass."""
    crops: bool = False
    """Add the score of every crop."""
    resume: bool = False
    """Keep the rows an earlier job has written; failed ones are tried again."""
    threads: int = 2
    """Decoding threads of this process."""
    min_side: int = 0
    """An image with a shorter side (pixels) is an error, not a score."""
    progress: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Result of a batch scoring."""

    rows: int
    """Rows of the output."""
    failed: int
    """Images that were named and could not be scored."""
    reused: int
    """Rows of named images taken over from an earlier job."""
    others: int = 0
    """Rows of an earlier job whose images were not named this time; they stay."""
    noted: int = 0
    """Rows with a note: the score should be doubted."""
    crop_share: float = 1.0
    """Share of the images' crops that were looked at; 1 unless that is up to the image."""
    first_failure: str = ""
    """The first row without a score: its path, and why; empty if all have one."""
    names: tuple[str, ...] = ()
    """The row of each item; empty where there is none of the file as it is now. Rank 0 only."""


def list_on_all_ranks(scorer: Scorer, list_all: Callable[[], list[Item]]) -> list[Item]:
    """What the first process lists, in every process: a pipe can be read by one only."""
    return _from_main(_state(scorer), list_all)


@contextmanager
def hold_output(scorer: Scorer, output: Path) -> Iterator[None]:
    """Hold the lock of an output on rank 0: one scoring writes it at a time.

    Raises:
        LockedError: If another process holds it; exit code 2.
    """
    check_output(output)
    if not _state(scorer).is_main_process:
        yield
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock_path(output, "lmcl score"):
        remove_stale_temporaries(output.parent)
        yield


def score_items(scorer: Scorer, items: Sequence[Item], options: ScoringOptions) -> Summary:
    """Score all items and write the output; call it in every process, with the same arguments.

    Raises:
        LmclError: If the output or rows of a job that did not end exist and `resume` was not asked
            for (2), or what is there comes from another model (5).
        LockedError: If another process scores into the same output; exit code 2.
    """
    with hold_output(scorer, options.output):
        return score_held(scorer, items, options)


def score_held(scorer: Scorer, items: Sequence[Item], options: ScoringOptions) -> Summary:
    """`score_items` for a caller that holds the output (`hold_output`)."""
    state = _state(scorer)
    plan: ResumePlan | None = None
    if state.is_main_process:
        _prepare_output(options, _note(scorer, options))
        _warn_of_another_decoder(scorer.card.decode, scorer.recipe)
        before = JournalRows(options.output)
        plan = plan_resume(before, items, keeps_others=options.resume)
        _tell(before, plan)
    todo = _from_main(state, lambda: [items[i] for i in plan.todo] if plan else [])
    mine = todo[state.process_index :: state.num_processes]
    journal = RowJournal(options.output, rank=state.process_index)
    _score_into(journal, scorer, mine, options, state)
    state.wait_for_everyone()
    return _from_main(state, lambda: _write_output(scorer, items, plan, options))


def _write_output(
    scorer: Scorer, items: Sequence[Item], plan: ResumePlan | None, options: ScoringOptions
) -> Summary:
    """The journals' rows as one file; they go when it is whole."""
    assert plan is not None
    layout = Layout(
        scale=scorer.scale_label,
        higher_is_better=scorer.scale.higher_is_better,
        box=options.box,
        crops=options.crops,
        decoder=scorer.decodes_on_gpu,
        meaning=scorer.interpreter is not None,
        crops_used=scorer.adaptive is not None,
        deviation=scorer.engine.gives_deviation,
    )
    after = JournalRows(options.output)
    order = plan.order(after)
    names = name_rows(after, order.keys)
    # What an earlier version wrote says from now on which file it is about.
    sources = {
        plan.keys[i]: source_of(items[i])
        for i in set(range(len(items))) - set(plan.absent)
        if is_name_key(plan.keys[i])
    }
    rows = (
        dataclasses.replace(row, path=name, source=row.source or sources.get(key))
        for key, name, row in zip(order.keys, names, after.rows(order.keys), strict=True)
    )
    noted = _Counted(rows)
    count = write_rows(iter(noted), options.output, layout)
    after.remove()
    attempted = {plan.keys[i] for i in plan.todo}
    stale = {key for key in attempted if after.entries[key].is_retry_failed}
    failed = [key for key in plan.keys if after.entries[key].is_failed or key in stale]
    if stale:
        logger.warning(
            "%d images have changed since they were scored and cannot be scored as they are now; "
            "their rows are those of the old files",
            len(stale),
        )
    by_key = dict(zip(order.keys, names, strict=True))
    moves = recorded_moves(options.output) if plan.absent else {}
    absent = stale | {plan.keys[i] for i in plan.absent if not _follows(items[i], moves)}
    return Summary(
        rows=count,
        failed=len(failed),
        reused=len(plan.keys) - len(plan.todo),
        others=order.others,
        noted=noted.notes,
        crop_share=noted.crop_share(scorer.card.crops.evaluation),
        first_failure=noted.failure,
        names=tuple("" if key in absent else by_key[key] for key in plan.keys),
    )


class _Counted:
    """Rows as they pass: how many have a note, the crops looked at, the first without a score."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self.notes = 0
        self.crops = 0
        self.scored = 0
        self.failure = ""

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.notes += bool(row.note)
            self.crops += row.crops_used or 0
            self.scored += row.crops_used is not None
            if row.score is None and not self.failure:
                self.failure = f"{printable(row.path)}: {printable(row.error)}"
            yield row

    def crop_share(self, every: int) -> float:
        """Share of the crops of the scored images that were looked at."""
        return self.crops / (self.scored * every) if self.scored else 1.0


def _follows(item: Item, moves: Mapping[str, str]) -> bool:
    """Whether it is a link to an image that a killed job has moved, and the link not yet."""
    return os.path.islink(item.file) and os.path.realpath(item.file) in moves


def _tell(before: JournalRows, plan: ResumePlan) -> None:
    if before.torn:
        logger.warning(
            "%d lines of journals are torn (a job was killed while it wrote); their images are "
            "scored again",
            before.torn,
        )
    if plan.changed:
        logger.warning(
            "%d images have changed since they were scored (size or time of the file); they are "
            "scored again",
            plan.changed,
        )
    if plan.absent:
        logger.warning(
            "%d images that were scored earlier are not there now; their rows are kept",
            len(plan.absent),
        )


class _Alone:
    """The one process of a job that no launcher started; the part of `PartialState` used here."""

    is_main_process, process_index, num_processes = True, 0, 1

    def wait_for_everyone(self) -> None:
        """Nobody to wait for."""


def _state(scorer: Scorer) -> Any:
    """An `accelerate.PartialState`, or its stand-in where there is one process."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return _Alone()
    from accelerate import PartialState

    # Without `cpu` the processes of a launch without GPUs would not know of each other.
    return PartialState(cpu=scorer.device.type == "cpu")


def _from_main(state: Any, make: Callable[[], T]) -> T:
    """What the first process makes, in every process."""
    found: list[Any] = [make() if state.is_main_process else None]
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    return cast(T, found[0])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Decoded:
    """What a thread makes of an item."""

    image: PreparedImage | str
    """Crops, or why there are none."""
    source: Source


def score_stream(scorer: Scorer, items: Sequence[Item], options: ScoringOptions) -> Iterator[Row]:
    """Rows of items in their order, decoded ahead by threads; errors become rows."""
    size = scorer.batch_images
    batches = (items[i : i + size] for i in range(0, len(items), size))
    with ThreadPoolExecutor(options.threads, thread_name_prefix="lmcl-decode") as pool:

        def begin(batch: Sequence[Item]) -> tuple[Sequence[Item], list[Future[list[_Decoded]]]]:
            if scorer.files is not None:
                return batch, [pool.submit(_decode_batch, scorer, batch, options.box)]
            return batch, [pool.submit(_decode, scorer, item, options.box) for item in batch]

        ahead = deque(begin(batch) for batch in itertools.islice(batches, _AHEAD))
        while ahead:
            batch, jobs = ahead.popleft()
            done = [decoded for future in jobs for decoded in future.result()]
            following = next(batches, None)
            if following is not None:
                ahead.append(begin(following))
            yield from _rows(scorer, batch, done, options)


def _rows(
    scorer: Scorer,
    batch: Sequence[Item],
    done: Sequence[_Decoded],
    options: ScoringOptions,
) -> Iterator[Row]:
    done = [_large_enough(decoded, options.min_side) for decoded in done]
    scored = iter(scorer.predict([d.image for d in done if isinstance(d.image, PreparedImage)]))
    for item, decoded in zip(batch, done, strict=True):
        if isinstance(decoded.image, str):
            yield _failed(item, decoded.image, decoded.source)
        else:
            yield _row(item, next(scored), options, decoded.source, scorer.adaptive is not None)


def _large_enough(decoded: _Decoded, min_side: int) -> _Decoded:
    if isinstance(decoded.image, str):
        return decoded
    height, width = decoded.image.full_size
    problem = too_small(width, height, min_side)
    return dataclasses.replace(decoded, image=problem) if problem else decoded


def _failed(item: Item, error: str, source: Source) -> Row:
    error = printable(error, _MOST_ERROR)
    return Row(path=item.path, score=None, quality=None, error=error, source=source)


def _row(
    item: Item, found: ImageScore, options: ScoringOptions, source: Source, is_adaptive: bool
) -> Row:
    if found.problem:
        return _failed(item, found.problem, source)
    return Row(
        path=item.path,
        score=found.score,
        quality=found.quality,
        error="",
        box=found.salient if options.box else None,
        crops=found.crops if options.crops else (),
        decoder="gpu" if found.gpu_decoded else "cpu",
        note=join_notes(found.notes),
        width=found.full_size[1],
        height=found.full_size[0],
        **dataclasses.asdict(found.meaning),
        deviation=found.deviation,
        crops_used=len(found.crops) if is_adaptive else None,
        source=source,
    )


def _decode(scorer: Scorer, item: Item, salient: bool) -> list[_Decoded]:
    # Looked at before it is read: what changes meanwhile has changed since, and is scored again.
    source = source_of(item)
    image = _or_why(item, lambda: scorer.prepare(item.read(), salient=salient))
    return [_Decoded(image=image, source=source)]


def _decode_batch(scorer: Scorer, items: Sequence[Item], salient: bool) -> list[_Decoded]:
    """The same for a batch of files, by the scorer's graph."""
    sources = [source_of(item) for item in items]
    files = [_or_why(item, item.read) for item in items]
    sound = {row: data for row, data in enumerate(files) if isinstance(data, bytes)}
    try:
        prepared = scorer.prepare_files(list(sound.values()), salient=salient)
    except Exception:
        # Whatever it is, it is one file's fault, and the others are still to be scored.
        logger.debug("a batch of files could not be decoded together", exc_info=True)
        return [decoded for item in items for decoded in _decode(scorer, item, salient)]
    by_row = dict(zip(sound, prepared, strict=True))
    return [
        _Decoded(image=by_row[row] if row in by_row else str(files[row]), source=source)
        for row, source in enumerate(sources)
    ]


def _or_why(item: Item, make: Callable[[], T]) -> T | str:
    """What is made of an item, or the sentence for its row."""
    try:
        return make()
    except LmclError as error:
        return str(error)
    except MemoryError:
        return "the image does not fit into memory; scale it down"
    except Exception as error:
        # A decoder may fail in any way on a hostile file; the other images are still to be scored.
        logger.debug("%s", item.path, exc_info=True)
        return f"not an image this project can read ({type(error).__name__}: {error})"


def _score_into(
    journal: RowJournal,
    scorer: Scorer,
    items: Sequence[Item],
    options: ScoringOptions,
    state: Any,
) -> None:
    shows = options.progress and state.is_main_process
    bar = progress_bar(total=len(items), desc="scoring", unit="img", off=not shows)
    failed = 0
    try:
        with bar:
            for row in score_stream(scorer, items, options):
                journal.append(row)
                if row.error:
                    failed += 1
                    bar.set_postfix_str(f"{failed} failed", refresh=False)
                bar.update()
    finally:
        journal.close()


def _note(scorer: Scorer, options: ScoringOptions) -> dict[str, str]:
    crops = scorer.card.crops
    return {
        "model": scorer.fingerprint,
        **({SOURCE_KEY: scorer.source} if scorer.source else {}),
        "scale": scorer.scale_label,
        "crops": f"{crops.evaluation} x {crops.size}, {crops.evaluation_layout}",
        "max_side": str(crops.max_side),
        **({"short_side": str(crops.short_side)} if crops.short_side else {}),
        "precision": scorer.precision,
        "engine": scorer.engine.name,
        "decode": scorer.recipe,
        "columns": json.dumps({"box": options.box, "crops": options.crops}),
        **_meaning_note(scorer),
    }


def _meaning_note(scorer: Scorer) -> dict[str, str]:
    """What the columns of a calibrated model depend on; empty texts without one, as in 0.1."""
    interpreter, rule = scorer.interpreter, scorer.adaptive
    population = interpreter.population if interpreter else None
    return {
        "calibration": interpreter.meaning.digest if interpreter else "",
        "confidence": f"{interpreter.confidence:g}" if interpreter else "",
        "population": population.label if population else "",
        "crops used": rule.description if rule else "",
    }


def _warn_of_another_decoder(trained_with: str, recipe: str) -> None:
    if not same_pixels(trained_with, recipe):
        logger.warning(
            "the model learnt from pixels decoded by %s, these scores are of pixels decoded by %s: "
            "they may differ slightly (docs/loader.md)",
            *(printable(trained_with), recipe),
        )


def _prepare_output(options: ScoringOptions, note: dict[str, str]) -> None:
    """Decide what becomes of an earlier job's files."""
    output, journals = options.output, journals_of(options.output)
    is_there = output.exists()
    # A mistyped name leaves a file without a single score; the corrected command may replace it.
    if (is_there or journals) and _holds_scores(output, is_there=is_there):
        if not options.resume:
            raise _begun(output, journals if not is_there else [])
        found = read_note(output)
        differing = [name for name, value in note.items() if not _agrees(name, found, value)]
        before, now = found.get(SOURCE_KEY, ""), note.get(SOURCE_KEY, "")
        is_moved = before and now and before != now
        moved = f"{printable(before)} before, {printable(now)} now" if is_moved else ""
        if differing:
            raise LmclError(
                f"{printable(output)}: was begun with another {' and '.join(differing)} "
                f"({moved or f'{printable(note_path(output).name)} says which'}); choose another "
                "--output",
                exit_code=5,
            )
        if moved:
            logger.warning("%s: the same weights and calibration, from %s", output, moved)
        if is_there:
            _back_to_journal(output)
        note = {key: value for key, value in found.items() if key == MOVES_KEY} | note
    write_note(output, note)


def _agrees(name: str, found: Mapping[str, str], value: str) -> bool:
    if name == SOURCE_KEY:
        # Commits may differ in the model card alone; weights and calibration are compared.
        return True
    # Before there was a choice, the engine was PyTorch.
    before = found.get(name, "torch" if name == "engine" else "")
    # Recipes of one decoder have different names in different versions.
    return same_pixels(before, value) if name == "decode" else before == value


def _holds_scores(output: Path, *, is_there: bool) -> bool:
    """Whether an earlier job of this program left a score, or what is there is not its file."""
    if JournalRows(output).has_scores:
        return True
    if is_there and not note_path(output).is_file():
        return True
    return is_there and any(row.score is not None for row in read_rows(output))


def _begun(output: Path, journals: Sequence[Path]) -> LmclError:
    if not journals:
        return LmclError(
            f"{printable(output)}: exists; go on with it by --resume, or choose another --output",
            exit_code=2,
        )
    return LmclError(
        f"{printable(output)}: a job that did not end left its rows in "
        f"{', '.join(printable(j.name) for j in journals)}; go on with it by --resume, or remove "
        "them to begin again, or choose another --output",
        exit_code=2,
    )


def _back_to_journal(output: Path) -> None:
    """Rows of a finished output as a journal, so that new ones can join them; it stays itself."""
    journal = RowJournal(output, rank="base")
    try:
        sources = read_sources(output)
        moves = recorded_moves(output)
        for row in read_rows(output):
            source = sources.get(row.path)
            journal.append(dataclasses.replace(row, source=source and after_move(source, moves)))
    except BaseException:
        journal.close()
        journal.path.unlink()
        raise
    journal.close()
