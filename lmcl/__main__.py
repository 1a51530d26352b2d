"""`python -m lmcl` is `lmcl`."""

from lmcl.cli import main

main()
