"""`python -m lmcl` is `lmcl`, and `accelerate launch -m lmcl` is `lmcl` on several processes."""

import sys

from lmcl.cli.main import main
from lmcl.training.launcher import join_launcher
from shards.exit_codes import report_errors

with report_errors():
    join_launcher(["--module", "lmcl"], sys.argv[1:])
main()
