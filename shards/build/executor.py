"""Where shard jobs run: in this process, in worker processes, or on a Ray cluster.

All three run `pack_shard` on the same jobs. Only a few jobs are in flight at a time, so memory does
not grow with the set.
"""

import concurrent.futures
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal

from shards.build.pack import ShardJob, ShardRecord, pack_shard
from shards.errors import ShardError
from shards.processes import end_with_parent

Engine = Literal["local", "ray"]
Progress = Callable[[int], None]

_POLL_S = 0.25
_counter: Any = None
_stop: Any = None


def run_jobs(
    jobs: Iterator[ShardJob], *, engine: Engine, workers: int, progress: Progress
) -> Generator[ShardRecord, None, None]:
    """Run every job and yield its record, in whatever order they finish.

    Closed early (an interrupt), it returns when all workers have left their image: half a shard
    is removed, finished ones stay.

    Args:
        jobs: Taken one by one as workers become free.
        engine: `local` processes, or `ray`.
        workers: How many jobs run at a time.
        progress: Called with the number of images finished since the last call.

    Raises:
        ShardError: The first one that a job raised; jobs not yet started are dropped.
    """
    if engine == "ray":
        yield from _run_on_ray(jobs, workers, progress)
    elif workers == 1:
        for job in jobs:
            yield pack_shard(job, progress=progress)
    else:
        yield from _run_in_processes(jobs, workers, progress)


def _run_in_processes(
    jobs: Iterator[ShardJob], workers: int, progress: Progress
) -> Iterator[ShardRecord]:
    # spawn: a fork of a process that already runs threads (torch, pyarrow) may never finish.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    seen = 0
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(counter, stop)
    )
    try:
        waiting: set[concurrent.futures.Future[ShardRecord]] = set()
        for job in jobs:
            waiting.add(pool.submit(_pack_and_count, job))
            while len(waiting) >= 2 * workers:
                waiting, seen = yield from _collect(waiting, counter, seen, progress)
        while waiting:
            waiting, seen = yield from _collect(waiting, counter, seen, progress)
        progress(int(counter.value) - seen)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ShardError(
            "a worker process died (killed for memory?); run the same command again with fewer "
            "`--workers`: finished shards are kept"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(waiting: Any, counter: Any, seen: int, progress: Progress) -> Any:
    done, waiting = concurrent.futures.wait(
        waiting, timeout=_POLL_S, return_when=concurrent.futures.FIRST_COMPLETED
    )
    now = int(counter.value)
    progress(now - seen)
    for future in done:
        yield future.result()
    return waiting, now


def _start_worker(counter: Any, stop: Any) -> None:
    global _counter, _stop
    end_with_parent()
    # A terminal sends them to every process; the parent is who decides, and tells.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _counter, _stop = counter, stop


def _pack_and_count(job: ShardJob) -> ShardRecord:
    return pack_shard(job, progress=_count)


def _count(images: int) -> None:
    if _stop.is_set():
        raise ShardError("stopped; the same command goes on where it was")
    with _counter.get_lock():
        _counter.value += images


def _run_on_ray(
    jobs: Iterator[ShardJob], workers: int, progress: Progress
) -> Iterator[ShardRecord]:
    try:
        import ray
    except ImportError as error:
        raise ShardError(
            "the engine `ray` needs the package ray; install it with `pip install lmcl[ray]`, or "
            "use `--engine local`",
            exit_code=2,
        ) from error
    if not ray.is_initialized():
        ray.init(num_cpus=None, include_dashboard=False, log_to_driver=False)
    remote = ray.remote(max_retries=2)(_pack_quietly)
    waiting: list[Any] = []
    try:
        for job in jobs:
            waiting.append(remote.remote(job))
            if len(waiting) >= 2 * workers:
                waiting = yield from _collect_from_ray(ray, waiting, progress)
        while waiting:
            waiting = yield from _collect_from_ray(ray, waiting, progress)
    finally:
        for left in waiting:
            ray.cancel(left)


def _collect_from_ray(ray: Any, waiting: list[Any], progress: Progress) -> Any:
    done, waiting = ray.wait(waiting, num_returns=1)
    for reference in done:
        outcome = ray.get(reference)
        if isinstance(outcome, ShardError):
            raise outcome
        progress(outcome.rows)
        yield outcome
    return waiting


def _pack_quietly(job: ShardJob) -> ShardRecord | ShardError:
    """Ray wraps what a task raises; an error handed back as a value keeps its exit code."""
    try:
        return pack_shard(job, progress=lambda images: None)
    except ShardError as error:
        return error
