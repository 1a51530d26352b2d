"""The Triton kernels, interpreted: truth, repeatability, and buffers that start as NaN."""

import pytest
import torch

from kernels import launch, tuning

if not launch.is_interpreted():
    pytest.skip(
        "the kernels are compiled here; tests/kernels/test_gpu.py has them", allow_module_level=True
    )

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RAGGED = [4, 1, 3, 26]
OPTIONS = {
    "paper": {},
    "balanced-infonce-normalize": {
        "intra_weight": "balanced", "include_positive": True, "normalize": True,
    },
    "overlap-no-weight": {"intra_weight": 0.5, "overlap": True},
    "teacher": {"keys": True},
    "teacher-all": {
        "keys": True, "overlap": True, "include_positive": True, "intra_weight": "balanced",
        "normalize": True,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*shape: int, **options: object) -> torch.Tensor:
        return torch.full(shape, torch.nan, **options)

    monkeypatch.setattr(launch, "empty", poisoned)


def _compare(batch, options, temperature, dtype, run, assert_no_worse, *, learned=False) -> None:
    results = [
        run(batch, options, backend=backend, temperature=temperature, dtype=of, learned=learned)
        for backend, of in (("triton", dtype), ("dense", dtype), ("dense", torch.float64))
    ]
    assert_no_worse(*results, dtype=dtype, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_no_worse_than_plain_torch(
    options, dtype, temperature, make_batch, run, assert_no_worse
) -> None:
    batch = make_batch(RAGGED, d=48)
    _compare(batch, options, temperature, dtype, run, assert_no_worse)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_learned_temperature_is_read_on_the_device(
    options, make_batch, run, assert_no_worse
) -> None:
    batch = make_batch(RAGGED, d=48)
    _compare(batch, options, 0.07, torch.float32, run, assert_no_worse, learned=True)


@pytest.mark.parametrize(
    "crops",
    [[1], [7], [1] * 5, [2, 3, 5, 7, 11, 13], [10] * 27],
    ids=["1-image-1-crop", "1-image", "1-crop-each", "primes", "larger-than-tiles"],
)
@pytest.mark.parametrize("options", ["paper", "teacher-all"])
def test_shapes(options, crops, make_batch, run, assert_no_worse) -> None:
    batch = make_batch(crops, d=32)
    _compare(batch, OPTIONS[options], 0.1, torch.float32, run, assert_no_worse)


@pytest.mark.parametrize("d", [16, 24, 80, 384])
def test_widths(d, make_batch, run, assert_no_worse) -> None:
    batch = make_batch([5, 2, 9], d=d)
    _compare(batch, {"normalize": d == 80}, 0.1, torch.bfloat16, run, assert_no_worse)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_all_equal_rows(temperature, make_batch, run, assert_no_worse) -> None:
    batch = make_batch(RAGGED, d=32, equal=True)
    _compare(batch, {}, temperature, torch.float32, run, assert_no_worse)


@pytest.mark.parametrize("options", ["paper", "teacher"])
def test_two_runs_give_the_same_bits(options, make_batch, run) -> None:
    batch = make_batch([10] * 21, d=32)
    one, other = (
        run(batch, OPTIONS[options], backend="triton", temperature=0.1, dtype=torch.bfloat16)
        for _ in range(2)
    )
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_splits_agree_with_one_walk(make_batch, run, monkeypatch) -> None:
    batch = make_batch([10] * 30, d=16)
    results = []
    for splits in (1, 3):
        monkeypatch.setattr(tuning, "choose_splits", lambda *_, splits=splits, **__: splits)
        results.append(
            run(batch, {}, backend="triton", temperature=0.1, dtype=torch.float32, learned=False)
        )
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=2e-6, atol=1e-7, msg=name)
