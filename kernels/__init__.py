"""Contrastive losses without an (n, m) matrix: rows, groups and weights; nothing of images."""

from kernels.contrastive import manifold_contrastive_loss
from kernels.grouped import ComputeOptions, grouped_logsumexp, two_sided_logsumexp
from kernels.losses import clip_loss, info_nce_loss, supcon_loss
from kernels.precision import Chip, LossPlan, announce, plan_loss, read_chip
from kernels.types import LossOutput

__all__ = [
    "Chip",
    "ComputeOptions",
    "LossOutput",
    "LossPlan",
    "announce",
    "clip_loss",
    "grouped_logsumexp",
    "info_nce_loss",
    "manifold_contrastive_loss",
    "plan_loss",
    "read_chip",
    "supcon_loss",
    "two_sided_logsumexp",
]

PART_OF = "lmcl"
"""By this `lmcl` knows the package from others of the same name."""

_NAMES_OF_OTHERS = (
    "get_kernel", "get_local_kernel", "get_locked_kernel", "get_loaded_kernels", "has_kernel",
    "kernelize", "load_kernel", "register_kernel_mapping", "replace_kernel_forward_from_hub",
    "use_kernel_forward_from_hub", "use_kernel_func_from_hub", "use_kernel_mapping", "Device",
    "FuncRepository", "LayerRepository", "LocalLayerRepository", "LockedLayerRepository", "Mode",
)  # fmt: skip


def __getattr__(name: str) -> object:
    """Tell whoever wants Hugging Face's distribution `kernels` that this is not it."""
    if name in _NAMES_OF_OTHERS:
        # Not an AttributeError: `from kernels import NAME` would replace its sentence.
        raise ImportError(
            f"{name} is of Hugging Face's distribution `kernels`, but Python found lmcl's package "
            f"of the same name in {__file__.removesuffix('__init__.py')}; use an environment "
            "without lmcl, or one in which PYTHONPATH names the folder of theirs first"
        )
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")
