"""Learns to judge the quality of images without a reference (LML-IQA, arXiv 2406.19247)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcl.inference.scorer import load as load


def __getattr__(name: str) -> object:
    """`lmcl.load`, imported when it is asked for: importing lmcl loads nothing else."""
    if name == "load":
        from lmcl.inference.scorer import load

        return load
    raise AttributeError(f"module 'lmcl' has no attribute {name!r}")
