"""Choice of backend, decoder, device and threads: what depends on the machine, in one place."""

import dataclasses
import importlib.util
import os
from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.backends.dali import dali_version
from pipeline.backends.torch_backend import TorchBackend
from pipeline.decode_config import BackendName, DecodeConfig, Decoder, dali_recipe
from pipeline.errors import PipelineError
from pipeline.gpu_formats import GPU_CODECS
from shards.processes import usable_cores

_INSTALL = "`pip install nvidia-dali-cuda130`"
_FOREIGN = "the GPU is not NVIDIA's, and DALI has nothing for it"


@dataclass(frozen=True, kw_only=True)
class DecodeChoice:
    """Who decodes, and why."""

    backend: Literal["dali", "torch"]
    decoder: Decoder
    recipe: str
    """Decoder and version (`pipeline.decode_config`)."""
    reason: str
    """Why this one: what was asked for, or what is and is not there."""
    fell_back: bool = False
    """Whether a faster one was wanted (asked for by `auto`) and is not to be had."""

    @property
    def line(self) -> str:
        """The decoder's part of the line that every command begins with."""
        return f"decode {self.recipe}" + (f" ({self.reason})" if self.fell_back else "")


def choose_decode(
    config: DecodeConfig,
    *,
    device: torch.device,
    dali: str | None,
    nvidia: bool = True,
    codecs: Set[str] | None = None,
) -> DecodeChoice:
    """Settle backend and decoder; a pure function.

    Args:
        config: What was asked for.
        device: Where the crops are wanted.
        dali: Version of the installed DALI; None where there is none.
        nvidia: False on an AMD GPU, which torch calls CUDA too; DALI has nothing for it.
        codecs: Codecs of the images, as far as known beforehand.

    Raises:
        PipelineError: If what was asked for is not to be had here: DALI not installed (exit code
            4), or decoding on a GPU without a GPU, without DALI or without a JPEG (2).
    """
    if config.decode == "gpu":
        _check_gpu_decoding(config, device=device, dali=dali, nvidia=nvidia, codecs=codecs)
    backend, reason = choose_backend(config.backend, dali=dali)
    foreign = device.type == "cuda" and not nvidia
    if foreign and config.backend == "dali":
        raise PipelineError(
            f'backend "dali" was asked for, but {_FOREIGN}; choose backend = "torch" or "auto"',
            exit_code=2,
        )
    if backend == "torch" or dali is None or foreign:
        return DecodeChoice(
            backend="torch",
            decoder="cpu",
            recipe=TorchBackend.recipe,
            reason=_FOREIGN if foreign and backend == "dali" else reason,
            fell_back=config.backend == "auto",
        )
    decoder, why = _choose_decoder(config, device=device, codecs=codecs)
    return DecodeChoice(
        backend="dali",
        decoder=decoder,
        recipe=dali_recipe(decoder, dali, hw_decoder_load=config.hw_decoder_load),
        reason=why or reason,
        fell_back=config.decode == "auto" and device.type == "cuda" and decoder == "cpu",
    )


def _check_gpu_decoding(
    config: DecodeConfig,
    *,
    device: torch.device,
    dali: str | None,
    nvidia: bool,
    codecs: Set[str] | None,
) -> None:
    if config.backend == "torch":
        problem = 'backend is "torch", which decodes on the CPU alone'
    elif device.type != "cuda":
        problem = f"the device is {device.type!r}, which is no CUDA GPU"
    elif not nvidia:
        problem = _FOREIGN
    elif dali is None:
        problem = f"DALI is not installed ({_INSTALL})"
    elif codecs is not None and not codecs & GPU_CODECS:
        problem = _no_jpeg(codecs)
    else:
        return
    raise PipelineError(
        f'decode "gpu" was asked for, but {problem}; choose decode = "auto" or "cpu"',
        exit_code=2 if dali is not None else 4,
    )


def _choose_decoder(
    config: DecodeConfig, *, device: torch.device, codecs: Set[str] | None
) -> tuple[Decoder, str]:
    if config.decode != "auto":
        return config.decode, "asked for"
    if device.type != "cuda":
        return "cpu", ""
    if codecs is not None and not codecs & GPU_CODECS:
        return "cpu", _no_jpeg(codecs)
    return "gpu", "the device is a GPU and DALI is installed"


def _no_jpeg(codecs: Set[str]) -> str:
    return f"the GPU decoder takes JPEG alone, and the images are {' and '.join(sorted(codecs))}"


def choose_backend(asked: BackendName, *, dali: str | None) -> tuple[Literal["dali", "torch"], str]:
    """The backend to use and why.

    Raises:
        PipelineError: If DALI was asked for by name and is not installed.
    """
    if asked == "torch":
        return "torch", "asked for"
    if asked == "dali":
        if dali is None:
            raise PipelineError(
                f"backend 'dali' was asked for, but DALI is not installed; {_INSTALL}, or choose "
                'backend = "torch"',
                exit_code=4,
            )
        return "dali", "asked for"
    if dali is not None:
        return "dali", f"DALI {dali} is installed"
    return "torch", "DALI is not installed"


def installed_dali() -> str | None:
    """Major and minor version of the installed DALI, found without importing it first; or None."""
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return None
    return dali_version() if found else None


def resolve_device(device: str | torch.device) -> torch.device:
    """The device with its index: "cuda" is the process's current one.

    Raises:
        PipelineError: If another GPU than the current one is named: DALI would decode on one and
            the kernels be launched on the other.
    """
    asked = torch.device(device)
    if asked.type != "cuda":
        return asked
    return agree_on_gpu(asked.index, current=torch.cuda.current_device())


def agree_on_gpu(index: int | None, *, current: int) -> torch.device:
    """The GPU of this process, by what was asked for (None: the current one) and what is current.

    Raises:
        PipelineError: If they differ.
    """
    if index is not None and index != current:
        raise PipelineError(
            f"crops are wanted on cuda:{index}, but the process's current GPU is cuda:{current}; "
            f'call torch.cuda.set_device({index}) first, or ask for "cuda"',
            exit_code=2,
        )
    return torch.device("cuda", current)


def is_nvidia() -> bool:
    """Whether what torch calls CUDA is NVIDIA's."""
    return torch.version.hip is None


def fill_machine_defaults(config: DecodeConfig) -> DecodeConfig:
    """The same with this machine's threads, and whether they are pinned, where none were given."""
    pinned = local_world_size() > 1 if config.pin_threads is None else config.pin_threads
    threads = config.threads or default_threads()
    return dataclasses.replace(config, threads=threads, pin_threads=pinned)


def local_world_size() -> int:
    """Processes of this run on this machine."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def default_threads() -> int:
    """This process's share of the cores it may use, at most 8."""
    return min(max(usable_cores() // local_world_size(), 1), 8)
