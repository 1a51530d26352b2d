"""Command lines: parse, call, print; nothing else."""
