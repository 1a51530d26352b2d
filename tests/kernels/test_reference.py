"""The whole matrix of the claim: no result is further from float64 than plain torch's.

Backend x option x element type x temperature x class of shape; value, figures and every gradient
(rows, hubs, temperature; keys have none by definition). On the CPU the kernels are interpreted.
"""

import itertools

import pytest
import torch

from kernels import triton_launch as launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = {
    "paper": {},
    "no-intra": {"intra_weight": 0.0},
    "overlap": {"intra_weight": 0.5, "overlap": True},
    "balanced-infonce-normalize": {
        "intra_weight": "balanced", "include_positive": True, "normalize": True,
    },
    "teacher": {"keys": True},
    "teacher-all": {
        "keys": True, "overlap": True, "include_positive": True, "intra_weight": "balanced",
        "normalize": True,
    },
}  # fmt: skip
SHAPES = {
    "1-image-1-crop": {"crops": [1]},
    "1-image": {"crops": [7]},
    "1-crop-each": {"crops": [1] * 5},
    "primes-ragged": {"crops": [3, 7, 1, 2, 13]},
    "duplicates": {"crops": [4, 1, 5, 2], "twice": True},
    "all-equal-rows": {"crops": [4, 1, 3, 26], "equal": True},
    "larger-than-a-tile": {"crops": [10] * 13 + [1]},
}
"""Every row has its hub, so what other losses call "no positive" is here a row whose denominator is
empty: one crop, or one image without intra weight."""

TEMPERATURES = {
    "cold-learned": (0.01, True),
    "warm-learned": (1.0, True),
    "warm-fixed": (1.0, False),
}
_interpreted = pytest.mark.skipif(
    not launch.is_interpreted(), reason="the kernels are compiled here: tests/kernels/test_gpu.py"
)
COVERING = {
    ("triton", "paper", "larger-than-a-tile"),
    ("triton", "overlap", "1-image"),
    ("triton", "balanced-infonce-normalize", "primes-ragged"),
    ("triton", "no-intra", "1-crop-each"),
    ("triton", "teacher", "duplicates"),
    ("triton", "teacher-all", "all-equal-rows"),
    ("triton", "paper", "1-image-1-crop"),
}
"""Each option and each shape once with the interpreted kernels; the other pairs are marked slow."""


def _cell(backend: str, options: str, shape: str):
    quick = backend == "chunked" or (backend, options, shape) in COVERING
    marks = [] if quick else [pytest.mark.slow]
    return pytest.param(
        backend, OPTIONS[options], SHAPES[shape], id=f"{backend}-{options}-{shape}",
        marks=[*marks, _interpreted] if backend == "triton" else marks,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*shape: int, **options: object) -> torch.Tensor:
        return torch.full(shape, torch.nan, **options)

    monkeypatch.setattr(launch, "empty", poisoned)


@pytest.mark.parametrize(
    ("backend", "options", "shape"),
    [_cell(*cell) for cell in itertools.product(("chunked", "triton"), OPTIONS, SHAPES)],
)
def test_no_worse_than_plain_torch(
    backend, options, shape, make_batch, run, assert_no_worse
) -> None:
    batch = make_batch(**shape, d=16)
    for temperature, learned in TEMPERATURES.values():
        truth = run(
            batch, options, backend="dense", temperature=temperature, dtype=torch.float64,
            learned=learned,
        )  # fmt: skip
        for dtype in DTYPES:
            got, plain = (
                run(
                    batch, options, backend=name, temperature=temperature, dtype=dtype,
                    learned=learned,
                )
                for name in (backend, "dense")
            )  # fmt: skip
            assert set(got) == set(truth)
            assert_no_worse(got, plain, truth, dtype=dtype, temperature=temperature)
