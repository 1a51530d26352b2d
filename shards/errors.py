"""The one exception of this package."""

from shards.text import bounded_message, redact_url


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
