"""Each wrong argument is refused with a sentence: what was asked, got, and the way out."""

import pytest
import torch

import kernels
from kernels import groups, validation


def given(**changes):
    arguments = {
        "rows": torch.nn.functional.normalize(torch.ones(5, 8), dim=1),
        "hubs": torch.nn.functional.normalize(torch.ones(2, 8), dim=1),
        "group": torch.tensor([0, 0, 0, 1, 1]),
        "temperature": 0.1,
        "intra_weight": 1.0,
        "overlap": None,
        "keys": None,
    }
    return arguments | changes


WRONG = {
    "unequal-widths": ({"hubs": torch.ones(2, 9)}, ValueError, "width of rows, 8, got 9"),
    "rows-3d": ({"rows": torch.ones(5, 2, 4)}, ValueError, r"got shape \[5, 2, 4\]"),
    "group-length": (
        {"group": torch.zeros(4).long()},
        ValueError,
        r"one image index per row, \[5\]",
    ),
    "more-hubs-than-rows": ({"hubs": torch.ones(6, 8)}, ValueError, "got 6 hubs for 5 rows"),
    "no-hubs": ({"hubs": torch.ones(0, 8)}, ValueError, "got 0 hubs for 5 rows"),
    "keys-shape": ({"keys": torch.ones(4, 8)}, ValueError, "embed the same crops"),
    "integer-rows": ({"rows": torch.ones(5, 8).long()}, TypeError, "got torch.int64"),
    "hubs-dtype": ({"hubs": torch.ones(2, 8).half()}, TypeError, r"hubs.to\(rows.dtype\)"),
    "keys-dtype": ({"keys": torch.ones(5, 8).double()}, TypeError, r"keys.to\(rows.dtype\)"),
    "float-group": ({"group": torch.zeros(5)}, TypeError, r"group.long\(\)"),
    "other-device": ({"hubs": torch.ones(2, 8, device="meta")}, TypeError, "device of rows, cpu"),
    "learned-elsewhere": (
        {"temperature": torch.ones((), device="meta", requires_grad=True)},
        TypeError,
        "temperature: asked for the device of rows",
    ),
    "overlap-rows": ({"overlap": torch.ones(4, 3)}, ValueError, r"\[5, c\], got \[4, 3\]"),
    "overlap-dtype": ({"overlap": torch.ones(5, 3).long()}, TypeError, "floating-point IoU"),
    "hubs-sparse": ({"hubs": torch.eye(2, 8).to_sparse()}, TypeError, r"hubs.to_dense\(\)"),
    "temperature-0": ({"temperature": 0.0}, ValueError, "above 0, got 0.0"),
    "temperature-nan": ({"temperature": float("nan")}, ValueError, "above 0, got nan"),
    "temperature-table": ({"temperature": torch.ones(2)}, ValueError, "one floating-point number"),
    "weight-negative": ({"intra_weight": -1.0}, ValueError, "at least 0, got -1.0"),
    "weight-name": ({"intra_weight": "ballanced"}, ValueError, "did you mean 'balanced'"),
}


@pytest.mark.parametrize(("changes", "error", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(changes, error, words) -> None:
    with pytest.raises(error, match=words):
        validation.check_arguments(**given(**changes))


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group": torch.tensor([0, 1, 0, 1, 1])}, "2 images in 4 runs"),
        ({"group": torch.tensor([0, 0, 0, 0, 0])}, "got 2 hubs for 1 images"),
        ({"rows": torch.ones(5, 8)}, r"got length 2.828 in row 0; pass normalize=True"),
        ({"hubs": torch.ones(2, 8)}, "hubs: asked for rows of unit length"),
        ({"temperature": torch.tensor(0.0)}, "learn its logarithm"),
        ({"overlap": torch.ones(5, 2)}, "3 here, got 2; pad the table with 0"),
        ({"overlap": torch.full((5, 3), 1.5)}, r"union in \[0, 1\], got 1.5"),
        ({"overlap": torch.full((5, 3), -0.5)}, r"union in \[0, 1\], got -0.5"),
    ],
    ids=[
        "scattered",
        "too-many-hubs",
        "long-rows",
        "long-hubs",
        "learned-0",
        "narrow-overlap",
        "overlap-above-1",
        "overlap-below-0",
    ],
)
def test_wrong_values_are_refused_by_every_backend(changes, words, backend) -> None:
    with pytest.raises(ValueError, match=words):
        kernels.manifold_contrastive_loss(**given(**changes) | {"backend": backend})


def test_normalize_accepts_rows_of_any_length() -> None:
    arguments = given(rows=3 * torch.ones(5, 8), hubs=torch.ones(2, 8))
    out = kernels.manifold_contrastive_loss(**arguments, normalize=True)
    torch.testing.assert_close(out.positive_similarity, torch.tensor(1.0))


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
def test_nan_in_an_overlap_makes_the_loss_nan(backend: str) -> None:
    overlap = torch.zeros(5, 3)
    overlap[0, 1] = torch.nan
    out = kernels.manifold_contrastive_loss(**given(overlap=overlap), backend=backend)
    assert out.loss.isnan()


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
def test_a_row_of_zeros_stays_one_and_gets_no_gradient(backend: str) -> None:
    rows = torch.eye(5, 8)
    rows[1] = 0
    hubs = torch.eye(2, 8)
    hubs[1] = 0
    rows.requires_grad_()
    hubs.requires_grad_()
    arguments = given(rows=rows, hubs=hubs)
    out = kernels.manifold_contrastive_loss(**arguments, normalize=True, backend=backend)
    out.loss.backward()
    assert out.loss.isfinite()
    assert rows.grad.abs().max() > 0
    assert rows.grad[1].abs().max() == hubs.grad[1].abs().max() == 0


def test_a_table_beyond_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"65536 x 32768 elements, the limit is 2\^31 - 1"):
        validation.check_table(2**16, 2**15)


def test_groups_are_runs_of_rows() -> None:
    found = groups.find_groups(torch.tensor([7, 7, 2, 9, 9, 9]), hubs=3)
    assert found.image.tolist() == [0, 0, 1, 2, 2, 2]
    assert found.first.tolist() == [0, 0, 2, 3, 3, 3]
    assert found.end.tolist() == [2, 2, 3, 6, 6, 6]
    assert found.counts.tolist() == [2, 1, 3]
    assert found.most() == 3


def _manifold(backend: str):
    return lambda a, b: (
        kernels.manifold_contrastive_loss(
            a, b, torch.arange(3), temperature=0.5, backend=backend, validate=False
        ).loss
    )


OPERATIONS = {
    "manifold": _manifold,
    "logsumexp": lambda backend: (
        lambda a, b: kernels.grouped_logsumexp(a, b, temperature=0.5, backend=backend).sum()
    ),
    "two-sided": lambda backend: (
        lambda a, b: kernels.two_sided_logsumexp(a, b, temperature=0.5, backend=backend)[0].sum()
    ),
    "supcon": lambda backend: (
        lambda a, b: kernels.supcon_loss(
            torch.cat([a, b]), torch.arange(3).repeat(2), backend=backend
        )
    ),
    "info-nce": lambda backend: lambda a, b: kernels.info_nce_loss(a, b, backend=backend),
    "clip": lambda backend: lambda a, b: kernels.clip_loss(a, b, backend=backend),
}
TRANSFORMS = {
    "vmap": lambda function, a, b: torch.vmap(function)(a[None], b[None])[0],
    "grad": lambda function, a, b: torch.func.grad(function)(a, b),
    "jvp": lambda function, a, b: torch.func.jvp(function, (a, b), (b, a))[1],
    "hessian": lambda function, a, b: torch.func.hessian(function)(a, b),
}


def _tangent(function, a, b):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, b)
        return torch.autograd.forward_ad.unpack_dual(function(dual, b)).tangent


TRANSFORMS["forward-mode"] = _tangent


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("make", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_a_transform_is_refused_and_the_way_out_takes_it(make, transform) -> None:
    a, b = torch.eye(3, 16), torch.eye(3, 16).flip(0)
    for backend in ("auto", "chunked", "triton"):
        with pytest.raises(RuntimeError, match=r"asked for a transform .* backend='dense'"):
            transform(make(backend), a, b)
    assert transform(make("dense"), a, b).isfinite().all()
