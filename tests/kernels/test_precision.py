"""What the loss computes in: right values by rule, and a sentence for what cannot be had."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import kernels
from kernels import grouped_passes, precision, torch_op
from kernels.precision import Chip, LossPlan, plan_loss

A100, H100, B200 = (Chip(kind="cuda", capability=capability) for capability in (80, 90, 100))
V100, T4 = (Chip(kind="cuda", capability=capability) for capability in (70, 75))
ROCM = Chip(kind="cuda", capability=94, is_hip=True)
CPU = Chip(kind="cpu")
INTERPRETER = Chip(kind="cpu", is_interpreted=True)
NO_TRITON = Chip(kind="cuda", capability=90, has_triton=False)
FUSED = (A100, H100, B200)
OTHERS = (V100, T4, ROCM, CPU, NO_TRITON)


def both(plan: LossPlan) -> tuple[str, str]:
    return plan.backend, plan.precision


@pytest.mark.parametrize("chip", FUSED, ids=lambda chip: chip.name)
@pytest.mark.parametrize("width", [16, 48, 256, 384, 768])
def test_auto_is_bf16_in_the_fused_kernels_where_they_run(chip: Chip, width: int) -> None:
    assert both(plan_loss(chip, width=width)) == ("triton", "bf16")


@pytest.mark.parametrize(
    ("chip", "width", "words"),
    [
        (V100, 384, "this GPU is sm_70 and the fused kernels begin at sm_80"),
        (T4, 384, "this GPU is sm_75 and the fused kernels begin at sm_80"),
        (ROCM, 384, "this is ROCm and the fused kernels are for CUDA"),
        (NO_TRITON, 384, "the package triton is not installed"),
        (H100, 1024, "bf16 rows are 1024 wide and the fused kernels stop at 768"),
        (CPU, 384, "rows are on cpu and the fused kernels need CUDA"),
        (INTERPRETER, 384, "rows are on cpu and the fused kernels need CUDA"),
        (Chip(kind="mps"), 384, "rows are on mps and the fused kernels need CUDA"),
    ],
    ids=["sm_70", "sm_75", "rocm", "no-triton", "wide", "cpu", "interpreter", "mps"],
)
def test_auto_elsewhere_is_chunked_float32_and_says_why(chip: Chip, width: int, words: str) -> None:
    plan = plan_loss(chip, width=width)
    assert both(plan) == ("chunked", "fp32")
    assert plan.reason == words


@pytest.mark.parametrize("chip", FUSED, ids=lambda chip: chip.name)
@pytest.mark.parametrize(
    ("asked", "width", "expected"),
    [
        ("bf16", 768, ("triton", "bf16")),
        ("fp16", 768, ("triton", "fp16")),
        ("tf32", 256, ("triton", "tf32")),
        ("tf32", 384, ("chunked", "tf32")),
        ("fp32", 64, ("chunked", "fp32")),
        ("fp32", 1024, ("chunked", "fp32")),
    ],
)
def test_a_precision_by_name_is_what_the_products_are_in(
    chip: Chip, asked: str, width: int, expected: tuple[str, str]
) -> None:
    plan = plan_loss(chip, width=width, precision=asked)
    assert both(plan) == expected
    assert plan.dtype == precision.DTYPES[asked]


REFUSED = {
    "bf16-sm_70": (V100, 384, "bf16", "auto", "this GPU is sm_70 and only those from sm_80 on"),
    "fp16-sm_75": (T4, 384, "fp16", "auto", "this GPU is sm_75 and only those from sm_80 on"),
    "tf32-sm_70": (V100, 64, "tf32", "auto", "this GPU is sm_70 and only those from sm_80 on"),
    "bf16-rocm": (ROCM, 384, "bf16", "auto", "this GPU is ROCm and only those from sm_80 on"),
    "bf16-wide": (H100, 1024, "bf16", "auto", "1024 wide and the fused kernels stop at 768"),
    "fp16-wide": (H100, 800, "fp16", "triton", "800 wide and the fused kernels stop at 768"),
    "bf16-chunked": (H100, 384, "bf16", "chunked", "backend 'chunked' computes in float32"),
    "bf16-no-triton": (NO_TRITON, 384, "bf16", "auto", "triton is not installed"),
    "tf32-cpu": (CPU, 384, "tf32", "auto", "on cpu the loss computes in float32"),
    "fp16-cpu": (CPU, 384, "fp16", "auto", "on cpu the loss computes in float32"),
    "bf16-cpu": (CPU, 384, "bf16", "dense", "on cpu the loss computes in float32"),
    "bf16-cpu-chunked": (INTERPRETER, 384, "bf16", "auto", "on cpu the loss computes in float32"),
    "triton-cpu": (CPU, 384, "auto", "triton", "backend: asked for 'triton', but rows are on cpu"),
    "triton-rocm": (ROCM, 384, "auto", "triton", "but this is ROCm"),
    "triton-sm_70": (V100, 384, "auto", "triton", "but this GPU is sm_70"),
    "triton-wide": (H100, 1024, "auto", "triton", "bf16 rows are 1024 wide"),
    "triton-fp32-384": (H100, 384, "fp32", "triton", "fp32 rows are 384 wide and .* stop at 256"),
    "precision-name": (H100, 384, "half", "auto", "asked for one of auto, rows, bf16, fp16, tf32"),
    "backend-name": (H100, 384, "auto", "cuda", "auto, triton, chunked, dense, got 'cuda'"),
}


@pytest.mark.parametrize(
    ("chip", "width", "asked", "backend", "words"), REFUSED.values(), ids=REFUSED.keys()
)
def test_what_cannot_be_had_is_refused_with_one_sentence(
    chip: Chip, width: int, asked: str, backend: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        plan_loss(chip, width=width, precision=asked, backend=backend)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("chip", "width", "asked", "backend"),
    [row[:4] for name, row in REFUSED.items() if "name" not in name],
    ids=[name for name in REFUSED if "name" not in name],
)
def test_the_way_out_of_a_refusal_works(chip: Chip, width: int, asked: str, backend: str) -> None:
    with pytest.raises(ValueError, match=" ") as caught:
        plan_loss(chip, width=width, precision=asked, backend=backend)
    if str(caught.value).startswith("precision"):
        for way_out in ("auto", "fp32"):
            freed = "auto" if backend == "triton" else backend
            assert plan_loss(chip, width=width, precision=way_out, backend=freed)
    else:
        for way_out in ("auto", "chunked"):
            assert plan_loss(chip, width=width, precision=asked, backend=way_out)


@pytest.mark.parametrize(
    ("dtype", "matmul", "chip", "expected"),
    [
        (torch.bfloat16, "highest", H100, ("triton", "bf16")),
        (torch.float16, "highest", H100, ("triton", "fp16")),
        (torch.float32, "highest", H100, ("chunked", "fp32")),
        (torch.float32, "high", H100, ("triton", "tf32")),
        (torch.float64, "highest", H100, ("chunked", "fp64")),
        (torch.bfloat16, "highest", CPU, ("chunked", "fp32")),
        (torch.bfloat16, "highest", V100, ("chunked", "fp32")),
        (torch.float16, "highest", ROCM, ("chunked", "fp32")),
        (torch.float32, "high", V100, ("chunked", "fp32")),
        (torch.float32, "medium", CPU, ("chunked", "fp32")),
        (torch.float64, "high", CPU, ("chunked", "fp64")),
    ],
)
def test_rows_keep_what_they_came_in_where_the_caller_does_not_say(
    dtype: torch.dtype, matmul: str, chip: Chip, expected: tuple[str, str]
) -> None:
    plan = plan_loss(chip, width=64, precision="rows", rows_dtype=dtype, matmul_precision=matmul)
    assert both(plan) == expected


def test_float32_rows_on_a_gpu_hear_what_would_be_faster() -> None:
    plan = plan_loss(H100, width=384, precision="rows")
    assert both(plan) == ("chunked", "fp32")
    assert "precision 'bf16' has" in plan.reason
    assert plan.is_fallback


def test_a_fake_cuda_device_is_planned_for_sm_90() -> None:
    if torch.cuda.is_available():
        pytest.skip("the device is a real one here")
    assert precision.read_chip(torch.device("cuda", 1)).name == "sm_90"


def test_a_plan_is_said_once_and_a_fall_back_loudly(caplog, monkeypatch) -> None:
    monkeypatch.setattr(precision, "_announced", set())
    caplog.set_level(logging.INFO)
    for _ in range(3):
        kernels.announce(plan_loss(H100, width=384))
        kernels.announce(plan_loss(V100, width=384))
    said = [(record.levelname, record.message) for record in caplog.records]
    assert [level for level, _ in said] == ["INFO", "WARNING"]
    assert said[0][1].startswith("loss triton bf16 D=384 (sm_90): ")
    assert said[1][1].startswith("loss chunked fp32 D=384 (sm_70): this GPU is sm_70")


def test_the_output_says_what_ran(make_batch) -> None:
    batch = make_batch([3, 2], d=16)
    rows, hubs = batch["rows"].float(), batch["hubs"].float()
    given = [("auto", "rows"), ("triton", "bf16"), ("dense", "rows")]
    found = [
        kernels.manifold_contrastive_loss(
            rows, hubs, batch["group"], temperature=0.1, backend=backend, precision=asked
        )
        for backend, asked in given
    ]
    assert [(out.backend, out.precision) for out in found] == [
        ("chunked", "fp32"), ("triton", "bf16"), ("dense", "fp32"),
    ]  # fmt: skip
    assert found[0].reason == "rows are on cpu and the fused kernels need CUDA"


@pytest.mark.parametrize("asked", ["bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"keys": True, "normalize": True}], ids=["paper", "keys"])
def test_float32_rows_are_rounded_once_and_their_gradient_is_not(
    asked: str, options: dict, make_batch, run
) -> None:
    """The batch holds what bfloat16 holds, so rounding changes the gradients' type alone."""
    batch = make_batch([5, 1, 9, 3], d=16)
    settings = {"backend": "triton", "temperature": 0.1, "learned": False}
    wide = run(batch, options | {"precision": asked}, dtype=torch.float32, **settings)
    narrow = run(batch, options, dtype=precision.DTYPES[asked], **settings)
    assert torch.equal(wide["loss"], narrow["loss"])
    assert wide["d_rows"].dtype == torch.float32
    step = torch.finfo(precision.DTYPES[asked]).eps
    for name in ("d_rows", "d_hubs"):
        far = (wide[name] - narrow[name].float()).abs().max()
        assert 0 < far <= 2 * step * narrow[name].float().abs().max(), name


def test_products_are_put_back_to_what_the_process_had() -> None:
    before = torch.get_float32_matmul_precision()
    with precision.float32_products("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_the_rows_gpu_is_the_current_one_whatever_is_current_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(("in", self.device))

        def __exit__(self, *_: object) -> None:
            entered.append(("out", self.device))

    # There is no GPU here, so the guard itself is torch's to prove.
    monkeypatch.setattr(torch.cuda, "device", Guard)
    second = torch.device("cuda", 1)
    with precision.surroundings(second, "tf32"):
        assert entered == [("in", second)]
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.is_autocast_enabled("cuda")
    assert entered == [("in", second), ("out", second)]
    assert torch.get_float32_matmul_precision() == "highest"


def test_every_road_to_a_kernel_goes_through_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextmanager
    def watched(device: torch.device, precision: str) -> Iterator[None]:
        entered.append((device.type, precision))
        yield

    for module in (torch_op, grouped_passes):
        monkeypatch.setattr(module, "surroundings", watched)
    rows = torch.eye(4, 8).requires_grad_()
    group = torch.tensor([0, 0, 1, 1])
    for call in (
        lambda: kernels.manifold_contrastive_loss(rows, rows[::2], group, temperature=0.1).loss,
        lambda: kernels.grouped_logsumexp(rows, temperature=0.1, reduction="sum"),
    ):
        entered.clear()
        call().backward()
        assert entered == [("cpu", "fp32"), ("cpu", "fp32")]
