"""Batch scoring: items go through decoding threads and the model into journals, then one output.

Every process of an `accelerate launch` takes every world-size-th item; processes meet only once, at
the end, and no step needs more memory for a million images than for ten.
"""

import dataclasses
import itertools
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from lmcl.errors import LmclError
from lmcl.inference.inputs import Item, text_of_name
from lmcl.inference.scorer import ImageScore, PreparedImage, Scorer
from lmcl.inference.scores_file import (
    JournalRows,
    Layout,
    Row,
    RowJournal,
    check_output,
    journals_of,
    note_path,
    read_note,
    read_rows,
    write_note,
    write_rows,
)
from pipeline.backends.torch_backend import TorchBackend

logger = logging.getLogger(__name__)

_AHEAD = 4
"""Batches that are decoded ahead of the model."""


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
    progress: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a job came to."""

    rows: int
    failed: int
    reused: int
    """Rows taken over from an earlier options."""


def list_on_all_ranks(scorer: Scorer, list_all: Callable[[], list[Item]]) -> list[Item]:
    """What the first process lists, in every process: a pipe can be read by one only."""
    state = PartialState(cpu=scorer.device.type == "cpu")
    found = [list_all() if state.is_main_process else []]
    broadcast_object_list(found)
    return found[0]


def score_items(scorer: Scorer, items: Sequence[Item], options: ScoringOptions) -> Summary:
    """Score all items and write the output; call it in every process, with the same arguments.

    Raises:
        LmclError: If the output or rows of a job that did not end exist and `resume` was not asked
            for (2), or what is there comes from another model (5).
    """
    # Without `cpu` the processes of a launch without GPUs would not know of each other.
    state = PartialState(cpu=scorer.device.type == "cpu")
    check_output(options.output)
    layout = Layout(
        scale=scorer.scale_label,
        higher_is_better=scorer.scale.higher_is_better,
        box=options.box,
        crops=options.crops,
    )
    if state.is_main_process:
        _prepare_output(options, _note(scorer, options))
        _warn_of_another_decoder(scorer.card.decode)
    state.wait_for_everyone()
    before = JournalRows(options.output)
    paths = [item.path for item in items]
    reused = sum(path in before and path not in before.failed for path in paths)
    todo = [i for i in items if i.path not in before or i.path in before.failed]
    mine = todo[state.process_index :: state.num_processes]
    state.wait_for_everyone()  # nobody adds rows before everybody has dealt the same hand
    _score_into(RowJournal(options.output, rank=state.process_index), scorer, mine, options, state)
    state.wait_for_everyone()
    after = JournalRows(options.output)
    failed = sum(path in after.failed for path in paths)
    state.wait_for_everyone()  # every process has read the journals before they go
    if state.is_main_process:
        write_rows(after.rows(paths), options.output, layout)
        after.remove()
    state.wait_for_everyone()
    return Summary(rows=len(paths), failed=failed, reused=reused)


def score_stream(scorer: Scorer, items: Sequence[Item], options: ScoringOptions) -> Iterator[Row]:
    """Rows of items in their order, decoded ahead by threads; errors become rows."""
    size = scorer.batch_images
    batches = (items[i : i + size] for i in range(0, len(items), size))
    with ThreadPoolExecutor(options.threads, thread_name_prefix="lmcl-decode") as pool:

        def begin(
            batch: Sequence[Item],
        ) -> tuple[Sequence[Item], list[Future[PreparedImage | str]]]:
            return batch, [pool.submit(_prepare, scorer, item, options.box) for item in batch]

        ahead = deque(begin(batch) for batch in itertools.islice(batches, _AHEAD))
        while ahead:
            batch, jobs = ahead.popleft()
            done = [future.result() for future in jobs]
            following = next(batches, None)
            if following is not None:
                ahead.append(begin(following))
            yield from _rows(scorer, batch, done, options)


def _rows(
    scorer: Scorer,
    batch: Sequence[Item],
    done: Sequence[PreparedImage | str],
    options: ScoringOptions,
) -> Iterator[Row]:
    scored = iter(scorer.predict([p for p in done if isinstance(p, PreparedImage)]))
    for item, found in zip(batch, done, strict=True):
        if isinstance(found, str):
            yield _failed(item, found)
        else:
            yield _row(item, next(scored), options)


def _failed(item: Item, error: str) -> Row:
    return Row(path=item.path, score=None, quality=None, error=text_of_name(error))


def _row(item: Item, found: ImageScore, options: ScoringOptions) -> Row:
    if found.problem:
        return _failed(item, found.problem)
    return Row(
        path=item.path,
        score=found.score,
        quality=found.quality,
        error="",
        box=found.salient if options.box else None,
        crops=found.crops if options.crops else (),
    )


def _prepare(scorer: Scorer, item: Item, salient: bool) -> PreparedImage | str:
    """An image ready for the model, or the sentence for its row."""
    try:
        return scorer.prepare(item.read(), salient=salient)
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
    state: PartialState,
) -> None:
    bar = tqdm(
        total=len(items),
        desc="scoring",
        unit="img",
        disable=None if options.progress and state.is_main_process else True,
    )
    try:
        with bar, torch.inference_mode():
            for row in score_stream(scorer, items, options):
                journal.append(row)
                bar.update()
    finally:
        journal.close()


def _note(scorer: Scorer, options: ScoringOptions) -> dict[str, str]:
    crops = scorer.card.crops
    return {
        "model": scorer.fingerprint,
        "scale": scorer.scale_label,
        "crops": f"{crops.evaluation} x {crops.size}, {crops.evaluation_layout}",
        "max_side": str(crops.max_side),
        "precision": scorer.precision,
        "decode": TorchBackend.recipe,
        "columns": json.dumps({"box": options.box, "crops": options.crops}),
    }


def _warn_of_another_decoder(trained_with: str) -> None:
    # DALI's decoder on the CPU gives the same bits (docs/loader.md).
    if trained_with != TorchBackend.recipe and not trained_with.startswith("dali-cpu-"):
        logger.warning(
            "the model learnt from pixels decoded by %s, these scores are of pixels decoded by %s: "
            "they may differ slightly (docs/loader.md)",
            *(trained_with, TorchBackend.recipe),
        )


def _prepare_output(options: ScoringOptions, note: dict[str, str]) -> None:
    """Decide what becomes of an earlier job's files."""
    journals = journals_of(options.output)
    there = options.output.exists()
    if not options.resume:
        if there:
            raise LmclError(
                f"{options.output}: exists; go on with it by --resume, or choose another --output",
                exit_code=2,
            )
        if journals:
            raise LmclError(
                f"{options.output}: a job that did not end left its rows in "
                f"{', '.join(j.name for j in journals)}; go on with it by --resume, or remove "
                "them to begin again, or choose another --output",
                exit_code=2,
            )
    elif there or journals:
        found = read_note(options.output)
        differing = [name for name, value in note.items() if found.get(name) != value]
        if differing:
            raise LmclError(
                f"{options.output}: was begun with another {' and '.join(differing)} "
                f"({note_path(options.output).name} says which); choose another --output",
                exit_code=5,
            )
        if there:
            _back_to_journal(options.output)
    write_note(options.output, note)


def _back_to_journal(output: Path) -> None:
    """Rows of a finished output as a journal, so that new ones can join them."""
    journal = RowJournal(output, rank=9999)
    try:
        for row in read_rows(output):
            journal.append(row)
    except (ValueError, KeyError, TypeError) as error:
        journal.path.unlink()
        raise LmclError(
            f"{output}: cannot be read as a scores file ({error}); restore it, or choose another "
            "--output",
            exit_code=5,
        ) from error
    finally:
        journal.close()
