"""Front door of training: `accelerate launch train.py --config FILE` is `lmcl train`."""

import sys

from lmcl.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
