import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import _preprocess_triton as device
from pipeline.normalize import normalize, preprocess_crops
from pipeline.preprocess_launch import launch_preprocess

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _crops(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    crops = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    return crops, torch.rand(shape[0] * shape[1]) < 0.5


def _mirrored(flip: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.where(flip[:, None, None, None], out.flip(-1), out)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-6)],
    ids=["f32", "bf16", "f64"],
)
def test_normalised_crops_equal_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    crops, _ = _crops(2, 3, 17, 17)
    exact = (crops.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    exact = exact.flatten(0, 1).permute(0, 3, 1, 2)
    out = normalize(crops, mean=MEAN, std=STD, dtype=dtype)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= tolerance * exact.abs().clamp_min(1)).all()


def test_rows_are_image_major_and_memory_is_channels_last() -> None:
    crops = torch.arange(6, dtype=torch.uint8).reshape(2, 3, 1, 1, 1).expand(2, 3, 4, 4, 3)
    out = normalize(crops.contiguous(), mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert out[:, 0, 0, 0].round().tolist() == [0, 1, 2, 3, 4, 5]
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("size", [1, 17, 64, 224])
def test_mirroring_bytes_gives_the_bits_of_mirroring_floats(size: int, dtype: torch.dtype) -> None:
    crops, flip = _crops(2, 3, size, size)
    expected = _mirrored(flip, normalize(crops, mean=MEAN, std=STD, dtype=dtype))
    out = preprocess_crops(crops, flip, mean=MEAN, std=STD, dtype=dtype)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    plain = preprocess_crops(crops, flip, mean=MEAN, std=STD, dtype=dtype, channels_last=False)
    assert torch.equal(plain, expected)
    assert plain.is_contiguous()


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("flips", [True, False], ids=["mirrored", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_kernel_computes_what_the_cpu_does(
    dtype: torch.dtype, flips: bool, channels_last: bool
) -> None:
    if not isinstance(device.preprocess, device.triton.JITFunction):
        place = "cpu"
    elif torch.cuda.is_available():
        place = "cuda"
    else:
        pytest.skip("Triton's interpreter is off and there is no GPU")
    crops, flip = _crops(2, 2, 29, 29)
    chosen = flip if flips else None
    expected = preprocess_crops(
        crops, chosen, mean=MEAN, std=STD, dtype=dtype, channels_last=channels_last
    )
    out = launch_preprocess(
        crops.flatten(0, 1).to(place),
        None if chosen is None else chosen.to(place),
        scale=[1 / (255 * s) for s in STD],
        shift=[-m / s for m, s in zip(MEAN, STD, strict=True)],
        dtype=dtype,
        channels_last=channels_last,
    ).cpu()
    assert out.stride() == expected.stride()
    # The product, at most 5, is rounded by itself or not; then the sum to `dtype`.
    step = 5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps * expected.float().abs()
    assert ((out.float() - expected.float()).abs() <= step).all()


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "prim":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_it_is_one_operator_that_the_host_does_not_wait_for() -> None:
    with FakeTensorMode(), _Operators() as seen:
        crops = torch.empty((2, 3, 8, 8, 3), dtype=torch.uint8, device="cuda")
        flip = torch.empty(6, dtype=torch.bool, device="cuda")
        seen.names.clear()
        out = preprocess_crops(crops, flip, mean=MEAN, std=STD, dtype=torch.bfloat16)
    assert out.shape == (6, 3, 8, 8)
    assert out.dtype == torch.bfloat16
    assert out.device.type == "cuda"
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert seen.names == ["aten.view.default", "lmcl.preprocess_crops.default"]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_without_spilling(capability: int, tmp_path: Path) -> None:
    script = (
        "import re, sys; sys.path[:0] = ['scripts', 'pipeline']\n"
        "import compile_kernels as ck, triton, _preprocess_triton as t\n"
        "for flips in (True, False):\n"
        "    constants = {'HAS_FLIP': flips, 'CHANNELS_LAST': True, 'BLOCK': 2048}\n"
        "    kinds = {'p_crops': '*u8', 'p_flip': '*u8', 'p_out': '*bf16', 'SIZE': 'i32'}\n"
        "    names = t.preprocess.arg_names\n"
        "    kinds = {n: 'constexpr' if n in constants else kinds.get(n, 'fp32') for n in names}\n"
        "    values = {(names.index(n),): v for n, v in constants.items()}\n"
        "    source = ck.ASTSource(t.preprocess, kinds, values)\n"
        "    target = ck.GPUTarget('cuda', int(sys.argv[1]), 32)\n"
        "    sass, usage = ck._disassemble(triton.compile(source, target=target).asm['cubin'])\n"
        "    print(len(re.findall(r'\\b(?:STL|LDL)\\b', sass)), len(sass) > 0)\n"
    )
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(capability)],
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0", "True"] * 2


def test_every_module_but_device_code_is_checked_for_shapes_in_tests() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    (listed,) = [o for o in options["addopts"] if o.startswith("--jaxtyping-packages=")]
    names = listed.partition("=")[2].split(",")
    for path in (ROOT / "pipeline").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        checked = any(module == name or module.startswith(f"{name}.") for name in names)
        device_code = path.name.startswith("_") and path.name.endswith("_triton.py")
        assert checked != device_code or path.name == "__init__.py", module
