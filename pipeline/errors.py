"""What goes wrong between a shard and a batch."""

LEAVE_OUT = (
    'training leaves damaged images of the train part out with runtime.on_error = "skip", a Loader '
    'with on_error="skip"'
)
"""The way out that every error about an image names."""


class PipelineError(Exception):
    """The data, a shard or a decoder is not what the loader was promised.

    Attributes:
        exit_code: What a command line should exit with: 3 for data that does not fit its manifest,
            4 for missing input, 5 for a state of another run, 1 otherwise.
        ids: The samples concerned, empty if none can be named.
    """

    def __init__(self, message: str, *, exit_code: int = 1, ids: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.ids = ids
