"""Torch's launcher with our last words: `python -m lmcl.training.torch_launcher OPTIONS TARGET`.

Torch's own ends in fifty lines of traceback when a rank is killed or Ctrl-C is pressed twice. This
one gives the exit code of the first rank that failed, and a sentence where that rank could not say
anything itself.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from lmcl.training.signals import way_on
from shards.exit_codes import end

_INTERRUPTED = 130


def main(arguments: Sequence[str]) -> None:
    """Run the ranks that torch's options ask for.

    Raises:
        SystemExit: With the exit code of the first rank that failed, 130 if they were asked to
            stop, 1 if one was killed.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        options = parse_args(list(arguments))  # type: ignore[no-untyped-call]
        run(options)  # type: ignore[no-untyped-call]
    except (SignalException, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)  # every rank has said how far it came
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        end(
            f"error: rank {rank} was ended by {name}"
            + (" (out of memory? `dmesg` says)" if name == "SIGKILL" else "")
            + f"; the others were stopped. {way_on()} goes on from the newest checkpoint",
            _INTERRUPTED if name in ("SIGINT", "SIGTERM") else 1,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
