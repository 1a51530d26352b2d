"""The one exception of this package, and how several problems are one message."""

from collections.abc import Sequence
from typing import Final

from shards.text import bounded_message, printable, redact_url

MOST_PROBLEMS: Final = 20
"""So many are named in one message; of the others there is a count."""

SKIP: Final = "complete them, or leave them out with `--on-error skip` (rejected.jsonl lists them)"

_MESSAGE = 1800


class ShardError(Exception):
    """The world is not as a shard command needs it: a file, a label, a manifest, a split.

    The message says what was asked, what was got, where, and the way out. `exit_code` is what a
    command line returns: 1 run-time failure, 3 data mismatch, 4 missing input. Messages quote what
    others wrote, so each is one line of visible characters and at most 2 KB, and URLs in it are
    without credentials (`shards.text`).
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(bounded_message(redact_url(message)))
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the exit code when a worker process hands the error back."""
        return _rebuild, (str(self), self.exit_code)


def _rebuild(message: str, exit_code: int) -> ShardError:
    return ShardError(message, exit_code=exit_code)


def several_problems(
    problems: Sequence[str], count: int, *, what: str, way_out: str = SKIP
) -> ShardError:
    """The error that names the first samples that cannot be packed, all in one message.

    Args:
        problems: Of the first few, each with its place.
        count: Of all.
        what: Beginning of the sentence.
        way_out: End of the sentence.
    """
    if count == 1:
        return ShardError(f"{problems[0]}; {way_out}", exit_code=3)
    # A message has two kilobytes; the reason stands at the end of a place.
    room = (_MESSAGE - len(way_out)) // len(problems)
    named = "; ".join(printable(problem, max(40, room)) for problem in problems)
    first = f"the first {len(problems)}" if count > len(problems) else "they"
    return ShardError(
        f"{what}, {count:,} cannot be packed, {first} are: {named}; {way_out}", exit_code=3
    )
