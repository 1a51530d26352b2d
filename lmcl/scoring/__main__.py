"""`python -m lmcl.scoring` is `lmcl score`, without loading the other commands."""

from lmcl.score import command

command()
