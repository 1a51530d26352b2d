"""Our package `kernels`, whose name another distribution has too: `lmcl` imports it here only."""

import importlib.util
from pathlib import Path

from lmcl.errors import LmclError


class ForeignKernelsError(LmclError, ImportError):
    """Python found somebody else's package under the name of ours."""


def _refuse() -> ForeignKernelsError:
    found = importlib.util.find_spec("kernels")
    where = Path(str(found.origin)).parent if found is not None and found.origin else None
    home = Path(__file__).resolve().parents[2]
    if where is not None and where.resolve() == home / "kernels":
        # Installed on top of one another: files of both lie in one folder.
        way_out = "`pip uninstall kernels` and install lmcl again"
    else:
        way_out = f"put ours first, PYTHONPATH={home}, or `pip uninstall kernels`"
    return ForeignKernelsError(
        f"lmcl needs its own package `kernels` (the fused loss), but Python found another "
        f"distribution of that name, such as Hugging Face's, in {where}; {way_out}, or give lmcl "
        "an environment of its own"
    )


try:
    import kernels
except ImportError as error:
    raise _refuse() from error
if getattr(kernels, "PART_OF", None) != "lmcl":
    raise _refuse()

from kernels import Chip as Chip  # noqa: E402
from kernels import LossOutput as LossOutput  # noqa: E402
from kernels import LossPlan as LossPlan  # noqa: E402
from kernels import announce as announce  # noqa: E402
from kernels import clip_loss as clip_loss  # noqa: E402
from kernels import info_nce_loss as info_nce_loss  # noqa: E402
from kernels import manifold_contrastive_loss as manifold_contrastive_loss  # noqa: E402
from kernels import plan_loss as plan_loss  # noqa: E402
from kernels import read_chip as read_chip  # noqa: E402
from kernels import supcon_loss as supcon_loss  # noqa: E402
from kernels.distributed import gather_of_all_ranks as gather_of_all_ranks  # noqa: E402
from kernels.precision import DTYPES as DTYPES  # noqa: E402
