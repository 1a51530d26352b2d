"""Front door of training: `accelerate launch train.py --config FILE` is `lmcl train`."""

import sys

from lmcl.cli.main import main
from lmcl.training.launcher import join_launcher
from shards.exit_codes import report_errors

if __name__ == "__main__":
    with report_errors():
        join_launcher([__file__], sys.argv[1:])
    main(["train", *sys.argv[1:]])
