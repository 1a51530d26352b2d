"""bf16 only where the hardware multiplies in it, and one precision for the whole of a run."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmcl.config import Config, dump_config, load_run_config
from lmcl.errors import ConfigError
from lmcl.models.precision import choose_precision
from lmcl.training.setup import plan, prepare

CPU = torch.device("cpu")
Hardware = Callable[[str], None]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Hardware:
    """Makes torch say that the processor has these units, and no other."""

    def have(units: str) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in units)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in units)

    return have


@pytest.mark.parametrize(
    ("units", "asked", "name", "reason"),
    [
        ("avx512", "auto", "bf16", "auto: avx512_bf16"),
        ("amx avx512", "auto", "bf16", "auto: amx"),
        ("", "auto", "no", "auto: cpu has no bfloat16 products"),
        ("", "bf16", "bf16", "as asked"),
        ("avx512", "no", "no", "as asked"),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_in_it(
    processor: Hardware, units: str, asked: str, name: str, reason: str
) -> None:
    processor(units)
    choice = choose_precision(asked, CPU)
    assert (choice.name, choice.reason) == (name, reason)
    assert choice.dtype == {"bf16": torch.bfloat16, "no": torch.float32}[name]


@pytest.mark.parametrize(
    ("chip", "name"), [((7, 5), "no"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")]
)
def test_auto_is_bf16_on_gpus_from_sm_80_on(
    monkeypatch: pytest.MonkeyPatch, chip: tuple[int, int], name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip)
    assert choose_precision("auto", torch.device("cuda", 0)).name == name


def test_a_run_keeps_the_precision_it_began_with_on_any_machine(
    tiny: Callable[..., Config],
    processor: Hardware,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    config = tiny("runtime.precision=auto", "train.epochs=1")
    processor("avx512")
    assert "networks bf16 (auto: avx512_bf16)" in plan(config, tmp_path)
    here = prepare(config, tmp_path, resume="", progress=False)
    here.save_checkpoint()
    here.close()
    assert "networks bf16 (auto: avx512_bf16)" in caplog.text
    assert load_run_config(tmp_path / "config.toml").runtime.precision == "bf16"
    assert (
        '"precision": "networks bf16 (auto: avx512_bf16)"'
        in (tmp_path / "environment.json").read_text()
    )
    assert "emulates" not in caplog.text
    caplog.clear()
    processor("")
    elsewhere = prepare(config, tmp_path, resume="auto", progress=False)
    elsewhere.close()
    assert elsewhere.preprocessing.precision == torch.bfloat16
    assert "networks bf16 (as the run began)" in caplog.text
    assert re.search(r"emulates it: one batch of 4 crops took \d+\.\d times", caplog.text)
    with pytest.raises(ConfigError, match=r"runtime\.precision: 'no' / 'bf16'"):
        prepare(
            tiny("runtime.precision=no", "train.epochs=1"),
            tmp_path,
            resume="auto",
            progress=False,
        )


def test_measuring_the_emulation_moves_neither_weights_nor_random_numbers(
    tiny: Callable[..., Config], processor: Hardware, tmp_path: Path
) -> None:
    states = []
    for name in ("avx512", ""):
        processor(name)
        run = prepare(
            tiny("runtime.precision=bf16"), tmp_path / f"of{name}", resume="", progress=False
        )
        run.close()
        states.append({**run.core.state_dict(), "random": torch.get_rng_state()})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_run_of_a_version_without_auto_goes_on_in_float32(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    text = dump_config(tiny("runtime.precision=no"))
    path = tmp_path / "config.toml"
    path.write_text(text.replace('precision = "no"\n', ""))
    assert load_run_config(path).runtime.precision == "no"
