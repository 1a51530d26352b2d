import itertools

import pytest
import torch

from pipeline.backends.select import (
    agree_on_gpu,
    choose_decode,
    fill_machine_defaults,
    installed_dali,
    resolve_device,
)
from pipeline.backends.torch_backend import TorchBackend
from pipeline.decode_config import DecodeConfig
from pipeline.errors import PipelineError

PILLOW = TorchBackend.recipe
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
JPEGS, PNGS, BOTH = frozenset({"jpg"}), frozenset({"png", "bmp"}), frozenset({"jpg", "png"})


@pytest.mark.parametrize(
    ("config", "device", "dali", "codecs", "recipe", "fell_back"),
    [
        ({}, CPU, "2.4", None, "dali-cpu-2.4", False),
        ({}, CPU, None, None, PILLOW, True),
        ({}, GPU, "2.4", JPEGS, "dali-gpu-2.4", False),
        ({}, GPU, "2.4", BOTH, "dali-gpu-2.4", False),
        ({}, GPU, "2.4", PNGS, "dali-cpu-2.4", True),
        ({}, GPU, None, JPEGS, PILLOW, True),
        ({"decode": "cpu"}, GPU, "2.4", JPEGS, "dali-cpu-2.4", False),
        ({"decode": "gpu"}, GPU, "2.4", JPEGS, "dali-gpu-2.4", False),
        ({"decode": "gpu"}, GPU, "2.4", None, "dali-gpu-2.4", False),
        ({"backend": "torch"}, GPU, "2.4", JPEGS, PILLOW, False),
        ({"backend": "dali"}, GPU, "2.4", JPEGS, "dali-gpu-2.4", False),
        ({"hw_decoder_load": 0.65}, GPU, "2.4", JPEGS, "dali-gpu-2.4-hw0.65", False),
        ({"hw_decoder_load": 1.0}, GPU, "2.4", JPEGS, "dali-gpu-2.4-hw1", False),
        ({"hw_decoder_load": 0.65}, CPU, "2.4", JPEGS, "dali-cpu-2.4", False),
        ({}, torch.device("mps"), "2.4", JPEGS, "dali-cpu-2.4", False),
    ],
)  # fmt: skip
def test_the_decoder_follows_from_what_is_asked_and_what_is_there(
    config: dict[str, object], device: torch.device, dali: str | None,
    codecs: frozenset[str] | None, recipe: str, fell_back: bool,
) -> None:  # fmt: skip
    choice = choose_decode(DecodeConfig(**config), device=device, dali=dali, codecs=codecs)
    assert choice.recipe == recipe
    assert choice.backend == ("torch" if recipe == PILLOW else "dali")
    assert choice.decoder == ("gpu" if "gpu" in recipe else "cpu")
    assert choice.fell_back == fell_back
    assert choice.line.startswith(f"decode {recipe}")
    assert (choice.reason in choice.line) == fell_back


@pytest.mark.parametrize(
    ("config", "device", "dali", "nvidia", "codecs", "message", "exit_code"),
    [
        ({}, CPU, "2.4", True, JPEGS, "the device is 'cpu', which is no CUDA GPU", 2),
        ({"backend": "torch"}, GPU, "2.4", True, JPEGS, 'backend is "torch"', 2),
        ({}, GPU, None, True, JPEGS, "DALI is not installed", 4),
        ({}, GPU, "2.4", False, JPEGS, "the GPU is not NVIDIA's", 2),
        ({}, GPU, "2.4", True, PNGS, "takes JPEG alone, and the images are bmp and png", 2),
    ],
    ids=["no-gpu", "torch", "no-dali", "amd", "no-jpeg"],
)  # fmt: skip
def test_decoding_on_a_gpu_that_is_not_to_be_had_is_one_sentence_and_a_way_out(
    config: dict[str, object], device: torch.device, dali: str | None, nvidia: bool,
    codecs: frozenset[str], message: str, exit_code: int,
) -> None:  # fmt: skip
    with pytest.raises(PipelineError, match=message) as caught:
        choose_decode(
            DecodeConfig(decode="gpu", **config),
            device=device, dali=dali, nvidia=nvidia, codecs=codecs,
        )  # fmt: skip
    assert caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value)
    for way in ("auto", "cpu"):
        out = DecodeConfig(decode=way, **config)
        choose_decode(out, device=device, dali=dali, nvidia=nvidia, codecs=codecs)


def test_whatever_auto_is_given_it_finds_a_decoder() -> None:
    for device, dali, nvidia, codecs in itertools.product(
        (CPU, GPU, torch.device("mps")), ("2.4", None), (True, False), (JPEGS, PNGS, BOTH, None)
    ):
        choice = choose_decode(
            DecodeConfig(), device=device, dali=dali, nvidia=nvidia, codecs=codecs
        )
        if device == GPU and not nvidia:
            assert choice.backend == "torch"


def test_dali_by_name_is_refused_where_it_is_not_or_can_do_nothing() -> None:
    config = DecodeConfig(backend="dali")
    with pytest.raises(PipelineError, match="pip install nvidia-dali") as caught:
        choose_decode(config, device=CPU, dali=None)
    assert caught.value.exit_code == 4
    with pytest.raises(PipelineError, match="not NVIDIA's"):
        choose_decode(config, device=GPU, dali="2.4", nvidia=False)


def test_the_gpu_is_the_processs_current_one() -> None:
    assert agree_on_gpu(None, current=3) == torch.device("cuda", 3)
    assert agree_on_gpu(3, current=3) == torch.device("cuda", 3)
    with pytest.raises(PipelineError, match=r"cuda:1, but the process's current GPU is cuda:0"):
        agree_on_gpu(1, current=0)
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize(("local", "pinned"), [("1", False), ("4", True)])
def test_threads_are_pinned_where_processes_share_the_machine(
    monkeypatch: pytest.MonkeyPatch, local: str, pinned: bool
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert fill_machine_defaults(DecodeConfig()).pin_threads is pinned
    assert fill_machine_defaults(DecodeConfig(pin_threads=not pinned)).pin_threads is not pinned
    assert fill_machine_defaults(DecodeConfig(threads=3)).threads == 3


def test_the_installed_dali_is_found() -> None:
    assert installed_dali() == "2.4"
