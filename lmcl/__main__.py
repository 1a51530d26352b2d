"""`python -m lmcl` is `lmcl`, and `accelerate launch -m lmcl` is `lmcl` on several processes."""

import sys

from lmcl.cli.main import main, report_errors
from lmcl.training.launcher import join_launcher

with report_errors():
    join_launcher(["--module", "lmcl"], sys.argv[1:])
main()
