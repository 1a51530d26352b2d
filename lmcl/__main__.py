"""`python -m lmcl` is `lmcl`, and `accelerate launch -m lmcl` is `lmcl` on several processes."""

from lmcl.cli.main import main

main()
