"""The kernels interpreted: widths, splits, repeatability; test_reference.py has the rest."""

import pytest
import torch

import kernels
from kernels import triton_launch as launch
from kernels import tuning

if not launch.is_interpreted():
    pytest.skip(
        "the kernels are compiled here; tests/kernels/test_gpu.py has them", allow_module_level=True
    )

STUDENT = {"overlap": True, "include_positive": True, "intra_weight": "balanced", "normalize": True}


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*shape: int, **options: object) -> torch.Tensor:
        return torch.full(shape, torch.nan, **options)

    monkeypatch.setattr(launch, "empty", poisoned)


@pytest.mark.parametrize("options", [{}, STUDENT, STUDENT | {"keys": True}], ids=len)
@pytest.mark.parametrize("d", [16, 24, 80, 112, 384, 768])
def test_widths_are_padded_and_split_without_a_trace(
    d, options, make_batch, run, assert_no_worse
) -> None:
    batch = make_batch([5, 2, 9], d=d)
    results = [
        run(batch, options, backend=backend, temperature=0.1, dtype=dtype, learned=False)
        for backend, dtype in (
            ("triton", torch.bfloat16), ("dense", torch.bfloat16), ("dense", torch.float64),
        )
    ]  # fmt: skip
    assert_no_worse(*results, dtype=torch.bfloat16, temperature=0.1)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("options", [{}, STUDENT, {"keys": True}], ids=["paper", "all", "teacher"])
def test_two_runs_give_the_same_bits(options, learned, make_batch, run) -> None:
    batch = make_batch([10] * 21, d=32)
    one, other = (
        run(
            batch, options, backend="triton", temperature=0.1, dtype=torch.bfloat16,
            learned=learned,
        )
        for _ in range(2)
    )  # fmt: skip
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_teachers_keys_may_be_as_far_from_the_rows_as_can_be(
    dtype, make_batch, run, assert_no_worse
) -> None:
    # At the coldest temperature with a fixed exponent each term is 2^-96 of the largest possible.
    batch = make_batch([3, 4, 2, 5], d=32)
    near = batch["rows"][:1] + 0.02 * batch["rows"]
    batch["rows"] = torch.nn.functional.normalize(near, dim=1)
    batch["keys"] = -batch["rows"].flip(0)
    results = [
        run(batch, {"keys": True}, backend=backend, temperature=0.03, dtype=kind, learned=False)
        for backend, kind in (("triton", dtype), ("dense", dtype), ("dense", torch.float64))
    ]
    assert_no_worse(*results, dtype=dtype, temperature=0.03)


RAGGED = {
    "1-tile": [5, 7, 3],
    "2-tiles": [40, 1, 9],
    "3-full-tiles": [10] * 9 + [6],
    "4-tiles": [33, 2, 64, 1, 5],
    "5-tiles": [7] * 20 + [3, 1, 1],
    "6-tiles": [1, 90, 4, 31, 50],
}


@pytest.fixture
def meets_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small tiles, each met once wherever that is possible; how many rows did so."""
    tile = tuning.Tile(rows=32, columns=16, warps=4, stages=2)
    real, met = launch._symmetric_sums, []
    monkeypatch.setattr(tuning, "_half_tiles", lambda *_: (tile, tile, tile))
    monkeypatch.setattr(tuning, "_single_tiles", lambda *_: (tile, tile, tile))
    monkeypatch.setattr(tuning, "is_once_cheaper", lambda *_, **__: True)
    monkeypatch.setattr(
        launch, "_symmetric_sums", lambda given: met.append(len(given.rows.table)) or real(given)
    )
    return met


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [(name, {}, torch.float32) for name in RAGGED]
    + [(name, STUDENT, torch.bfloat16) for name in ("2-tiles", "5-tiles")],
    ids=str,
)  # fmt: skip
def test_tiles_that_meet_once_give_the_sums_of_all_rows(
    name, options, dtype, make_batch, run, assert_no_worse, meets_once
) -> None:
    crops = RAGGED[name]
    batch = make_batch(crops, d=32)
    results = [
        run(batch, options, backend=backend, temperature=0.05, dtype=kind, learned=False)
        for backend, kind in (("triton", dtype), ("dense", dtype), ("dense", torch.float64))
    ]
    assert_no_worse(*results, dtype=dtype, temperature=0.05)
    assert meets_once == [sum(crops)]
    again = run(batch, options, backend="triton", temperature=0.05, dtype=dtype, learned=False)
    assert all(torch.equal(value, again[figure]) for figure, value in results[0].items())


BOUNDED = {"coldest": 0.05}


@pytest.mark.parametrize("options", [BOUNDED, STUDENT | BOUNDED, {"keys": True} | BOUNDED], ids=len)
@pytest.mark.parametrize("temperature", [0.05, 0.3])
def test_a_learned_temperature_with_a_bound_takes_fixed_exponents(
    options, temperature, make_batch, run, assert_no_worse, meets_once
) -> None:
    batch = make_batch([40, 9, 3, 20], d=32)
    results = [
        run(batch, options, backend=backend, temperature=temperature, dtype=dtype)
        for backend, dtype in (
            ("triton", torch.float32), ("dense", torch.float32), ("dense", torch.float64),
        )
    ]  # fmt: skip
    assert_no_worse(*results, dtype=torch.float32, temperature=temperature)
    assert meets_once == ([] if "keys" in options else [72])


@pytest.mark.parametrize("backend", ["triton", "chunked", "dense"])
def test_a_temperature_below_its_bound_is_refused_and_never_a_wrong_number(
    backend, make_batch
) -> None:
    batch = make_batch([3, 4], d=16)
    arguments = (batch["rows"].float(), batch["hubs"].float(), batch["group"])
    how = {"temperature": torch.tensor(0.01), "coldest": 0.03}
    with pytest.raises(ValueError, match=r"at least coldest, 0\.03, got 0\.0099"):
        kernels.manifold_contrastive_loss(*arguments, backend=backend, **how)
    if backend == "triton":
        unchecked = kernels.manifold_contrastive_loss(
            *arguments, backend=backend, validate=False, **how
        )
        assert unchecked.loss.isnan()
    with pytest.raises(ValueError, match="coldest: asked for a number of at least 0, got -1"):
        kernels.manifold_contrastive_loss(*arguments, temperature=0.1, coldest=-1.0)


@pytest.mark.parametrize("changes", [{"learned": True}, {"temperature": 0.02}, {"keys": True}])
def test_tiles_meet_twice_without_a_fixed_exponent_and_with_other_columns(
    changes, make_batch, run, meets_once
) -> None:
    chosen = {"temperature": 0.1, "learned": False} | changes
    options = {"keys": True} if chosen.pop("keys", False) else {}
    run(make_batch([40, 9], d=16), options, backend="triton", dtype=torch.float32, **chosen)
    assert meets_once == []


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


def test_the_exponents_scale_is_that_of_a_learned_temperature_too() -> None:
    rows = torch.eye(4, 16)
    known, learned = (
        launch.configure(rows, torch.tensor([0.2], dtype=dtype), "fp32", coldest=0.1)
        for dtype in (torch.float64, torch.float32)
    )
    assert known.learned is None
    assert learned.learned is not None
    assert launch.is_fixed(learned)
    assert float(launch.exponent_scale(learned)) == pytest.approx(launch.exponent_scale(known))
