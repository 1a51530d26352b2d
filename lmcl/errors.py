"""What can be wrong with the world of a run, each with the exit code the command line gives it."""

from shards.text import bounded_message, redact_url


class LmclError(Exception):
    """A run cannot go on; the message names the thing, the place and the way out.

    Messages quote what others wrote: they are at most 2 KB of visible characters, and URLs stand in
    them without credentials (`shards.text`).

    Attributes:
        exit_code: What the process exits with (docs/architecture.md lists the codes).
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(bounded_message(redact_url(message)))
        self.exit_code = exit_code


class ConfigError(LmclError):
    """A configuration that cannot be used: unknown keys, wrong types, rules between fields."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message, exit_code=exit_code)
