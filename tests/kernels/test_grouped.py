"""The public operation against its definition in float64: every gradient, every backend, laws."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import triton_launch
from tests import warm

N, M, D = 21, 17, 24
SIDES = {"rows-and-columns": False, "among-themselves": True}
WEIGHTS = {
    "no-groups": None,
    "weight-1": 1.0,
    "weight-third": 1 / 3,
    "left-out": 0.0,
    "table": "table",
}


def weights_of(q_group: Tensor, k_group: Tensor, weight: float | Tensor) -> Tensor:
    """The (n, m) matrix of weights, by its definition."""
    same = q_group[:, None] == k_group
    if not isinstance(weight, Tensor):
        return torch.ones(same.shape, dtype=torch.float64).masked_fill(same, weight)
    place = (same.long().cumsum(1) - 1).clamp(0, weight.shape[1] - 1)
    return torch.where(same, weight.gather(1, place), 1.0)


def definition(q: Tensor, k: Tensor | None, tau: Tensor, weight: Tensor) -> Tensor:
    """Log-sum-exp of the matrix; rows without any weight are -inf."""
    weight = weight.clone()
    if k is None:
        weight.fill_diagonal_(0.0)
    logits = q @ (q if k is None else k).T / tau + torch.where(weight > 0, weight, 1.0).log()
    sums = torch.logsumexp(torch.where(weight > 0, logits, -1e300), dim=1)
    return torch.where((weight > 0).any(1), sums, -torch.inf)


def make_case(mirrored: bool, weights: object, *, dtype: torch.dtype, seed: int = 0):
    """Arguments of the operation, and its matrix of weights; what `dtype` holds, in float64."""
    make = torch.Generator().manual_seed(seed)

    def table(count: int) -> Tensor:
        values = torch.randn(count, D, generator=make, dtype=torch.float64)
        return F.normalize(values, dim=1).to(dtype).double()

    q, k = table(N), None if mirrored else table(M)
    groups = [torch.randint(0, 5, (count,), generator=make) for count in (N, M)]
    if mirrored:
        groups[1] = groups[0]
    if weights is None:
        return q, k, {}, torch.ones(N, N if mirrored else M, dtype=torch.float64)
    weight = weights
    if weights == "table":
        weight = torch.rand(N, N, generator=make, dtype=torch.float64)
        weight = torch.where(weight < 0.3, 0.0, weight)
    arguments = {"q_group": groups[0], "group_weight": weight}
    arguments |= {} if mirrored else {"k_group": groups[1]}
    return q, k, arguments, weights_of(*groups, weight)


def results(function, q: Tensor, k: Tensor | None, tau: float, dtype: torch.dtype) -> list[Tensor]:
    """Value and every gradient; each row has an upstream gradient of its own."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [
        None if value is None else value.to(kind).clone().requires_grad_()
        for value, kind in ((q, dtype), (k, dtype), (torch.tensor(tau).double(), precise))
    ]
    out = function(*leaves)
    upstream = torch.linspace(-1, 2, len(out), dtype=torch.float64)
    torch.where(out.isfinite(), out, 0.0).double().mul(upstream).sum().backward()
    grads = [leaf.grad for leaf in leaves if leaf is not None]
    return [value.detach().double() for value in (out, *grads)]


def compare(mirrored, weights, tau, *, backend: str, dtype: torch.dtype, tolerance: float, **more):
    q, k, arguments, matrix = make_case(mirrored, weights, dtype=dtype)
    truth = results(lambda *a: definition(*a, matrix), q, k, tau, torch.float64)
    got = results(
        lambda q, k, t: kernels.grouped_logsumexp(
            q, k, temperature=t, backend=backend, **arguments, **more
        ),
        q, k, tau, dtype,
    )  # fmt: skip
    for exact, value in zip(truth, got, strict=True):
        scale = max(1.0, float(exact[exact.isfinite()].abs().max()))
        torch.testing.assert_close(value, exact, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("tau", [0.01, 0.5])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("mirrored", SIDES.values(), ids=SIDES.keys())
@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_it_is_its_definition_in_float64(backend, mirrored, weights, tau, monkeypatch) -> None:
    monkeypatch.setattr("kernels.chunked.TILE", 8)
    compare(mirrored, weights, tau, backend=backend, dtype=torch.float64, tolerance=1e-11)


COVERING = {("rows-and-columns", "table"), ("among-themselves", "table")}
"""With the interpreted kernels; the other pairs are marked slow."""


@pytest.mark.skipif(not triton_launch.is_interpreted(), reason="the kernels are compiled here")
@pytest.mark.parametrize(
    ("mirrored", "weights"),
    [
        pytest.param(
            SIDES[side], WEIGHTS[weight], id=f"{side}-{weight}",
            marks=[] if (side, weight) in COVERING else [pytest.mark.slow],
        )
        for side, weight in itertools.product(SIDES, WEIGHTS)
    ],
)  # fmt: skip
def test_the_kernels_are_the_definition(mirrored, weights, monkeypatch) -> None:
    def poisoned(*shape: int, **options: object) -> Tensor:
        return torch.full(shape, torch.nan, **options)

    monkeypatch.setattr(triton_launch, "empty", poisoned)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        compare(mirrored, weights, 0.5, backend="triton", dtype=dtype, tolerance=tolerance)
    compare(mirrored, weights, 0.05, backend="triton", dtype=torch.float32, tolerance=2e-5,
            is_unit=True)  # fmt: skip


@pytest.mark.skipif(not triton_launch.is_interpreted(), reason="the kernels are compiled here")
def test_known_lengths_and_a_known_temperature_take_fixed_exponents() -> None:
    q, k, arguments, matrix = make_case(True, 0.5, dtype=torch.float32)
    q = 3 * q
    want = definition(F.normalize(q, dim=1), k, torch.tensor(0.1), matrix)
    got = kernels.grouped_logsumexp(
        q.float(), temperature=0.1, normalize=True, backend="triton", **arguments
    )
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_both_sides_at_once_agree_with_one_after_the_other(backend, monkeypatch) -> None:
    monkeypatch.setattr("kernels.chunked.TILE", 8)
    q, k, _, matrix = make_case(False, None, dtype=torch.float64)
    for tau in (0.01, 0.5):
        want = results(
            lambda q, k, t: torch.cat([definition(q, k, t, matrix), definition(k, q, t, matrix.T)]),
            q, k, tau, torch.float64,
        )  # fmt: skip
        got = results(
            lambda q, k, t: torch.cat(
                kernels.two_sided_logsumexp(q, k, temperature=t, backend=backend)
            ),
            q, k, tau, torch.float64,
        )  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"intra_weight": 0.3}], ids=str)
def test_the_manifold_loss_is_the_operation_and_a_hub(options, make_batch) -> None:
    batch = make_batch([3, 7, 1, 2, 13])
    chosen = dict(options)
    weight = chosen.get("intra_weight", 1.0)
    if "overlap" in options:
        chosen["overlap"] = batch["overlap"]
        weight = 1 - batch["overlap"]
    gradients = []
    for name in ("loss", "operation"):
        rows, hubs = (batch[key].clone().requires_grad_() for key in ("rows", "hubs"))
        if name == "loss":
            value = kernels.manifold_contrastive_loss(
                rows, hubs, batch["group"], temperature=0.2, **chosen
            ).loss
        else:
            image = torch.unique_consecutive(batch["group"], return_inverse=True)[1]
            log_sum = kernels.grouped_logsumexp(
                rows, temperature=0.2, q_group=batch["group"], group_weight=weight
            )
            value = (log_sum - (rows * hubs[image]).sum(1) / 0.2).mean()
        value.backward()
        gradients.append([value.detach(), rows.grad, hubs.grad])
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@given(seed=st.integers(0, 10_000), weight=st.sampled_from([0.0, 0.25, 1.0]))
@settings(max_examples=15, deadline=None)
def test_the_order_of_rows_and_columns_does_not_matter(seed, weight) -> None:
    q, k, arguments, _ = make_case(False, weight, dtype=torch.float64, seed=seed)
    make = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(count, generator=make) for count in (N, M))
    shuffled = arguments | {
        "q_group": arguments["q_group"][rows], "k_group": arguments["k_group"][columns]
    }  # fmt: skip
    one = kernels.grouped_logsumexp(q, k, temperature=0.1, **arguments)
    other = kernels.grouped_logsumexp(q[rows], k[columns], temperature=0.1, **shuffled)
    torch.testing.assert_close(one[rows], other, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 10_000), cut=st.integers(0, M), shift=st.floats(-3, 3))
@settings(max_examples=15, deadline=None)
def test_columns_in_two_parts_add_up_and_a_weight_is_a_shift(seed, cut, shift) -> None:
    q, k, _, _ = make_case(False, None, dtype=torch.float64, seed=seed)
    whole = kernels.grouped_logsumexp(q, k, temperature=0.1)
    parts = [kernels.grouped_logsumexp(q, part, temperature=0.1) for part in (k[:cut], k[cut:])]
    torch.testing.assert_close(torch.logaddexp(*parts), whole, rtol=1e-12, atol=1e-12)
    groups = {"q_group": torch.zeros(N).long(), "k_group": torch.zeros(M).long()}
    weight = float(torch.tensor(shift).double().exp())
    moved = kernels.grouped_logsumexp(q, k, temperature=0.1, group_weight=weight, **groups)
    torch.testing.assert_close(moved, whole + shift, rtol=1e-6, atol=1e-6)


def test_reductions_are_of_the_rows() -> None:
    q, k, arguments, _ = make_case(False, 0.5, dtype=torch.float64)
    each = kernels.grouped_logsumexp(q, k, temperature=0.1, **arguments)
    for reduction in ("mean", "sum"):
        got = kernels.grouped_logsumexp(q, k, temperature=0.1, reduction=reduction, **arguments)
        torch.testing.assert_close(got, getattr(each, reduction)())


def test_a_row_without_columns_is_minus_infinity_and_gets_no_gradient() -> None:
    q = torch.eye(3, 8).requires_grad_()
    for columns in (torch.empty(0, 8), torch.eye(2, 8)):
        groups = [torch.zeros(len(table)).long() for table in (q, columns)]
        out = kernels.grouped_logsumexp(
            q, columns, temperature=0.1, q_group=groups[0], k_group=groups[1], group_weight=0.0
        )
        assert (out == -torch.inf).all()
        (gradient,) = torch.autograd.grad(out.sum(), q)
        assert (gradient == 0).all()


BACKENDS = ["dense", "chunked", "triton"]


@pytest.mark.parametrize("tau", [0.5, 2.9, 50.0, 1e6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_row_is_empty_at_any_temperature(backend, tau) -> None:
    q = torch.eye(5, 16).requires_grad_()
    group = torch.tensor([0, 0, 0, 0, 1])
    out = kernels.grouped_logsumexp(
        q, q[:4].detach(), temperature=tau, q_group=group, k_group=group[:4], group_weight=0.0,
        backend=backend,
    )  # fmt: skip
    assert (out[:4] == -torch.inf).all()
    torch.testing.assert_close(out[4], torch.tensor(4.0).log())
    torch.where(out.isfinite(), out, 0.0).sum().backward()
    assert (q.grad[:4] == 0).all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(backend, wanted) -> None:
    q, k, arguments, _ = make_case(False, "table", dtype=torch.float32)
    found = []
    for chosen in ((0, 1, 2), wanted):
        leaves = [
            value.float().clone().requires_grad_(i in chosen)
            for i, value in enumerate((q, k, torch.tensor(0.3)))
        ]
        out = kernels.grouped_logsumexp(
            *leaves[:2], temperature=leaves[2], backend=backend, **arguments
        )
        torch.where(out.isfinite(), out, 0.0).dot(torch.linspace(-1, 2, N)).backward()
        found.append([leaves[i].grad for i in wanted])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("constant", [True, False], ids=["sum", "square"])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_a_second_derivative_is_refused_and_not_left_out(backend, constant) -> None:
    q = torch.eye(4, 16).requires_grad_()
    out = kernels.grouped_logsumexp(q, temperature=0.5, backend=backend)
    value = out.sum() if constant else out.square().sum()
    (first,) = torch.autograd.grad(value, q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"asked for a second derivative.*backend='dense'"):
        (value + first.square().sum()).backward()


@pytest.mark.parametrize("is_unit", [False, True], ids=["running-maximum", "fixed"])
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "one-group"])
@pytest.mark.parametrize("mirrored", SIDES.values(), ids=SIDES.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_a_number_has_no_number(backend, mirrored, grouped, is_unit) -> None:
    q, k, _, _ = make_case(mirrored, None, dtype=torch.float32)
    q = q.float()
    q[2, 1] = torch.nan
    groups = {"q_group": torch.zeros(N).long(), "group_weight": 0.5} if grouped else {}
    if grouped and not mirrored:
        groups["k_group"] = torch.zeros(M).long()
    out = kernels.grouped_logsumexp(
        q, None if mirrored else k.float(), temperature=0.5, is_unit=is_unit, backend=backend,
        **groups,
    )  # fmt: skip
    # Among themselves the others are compared with it.
    assert out.isnan().sum() == (N if mirrored else 1)
    assert out[2].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_may_have_no_columns_where_no_group_has_members(backend) -> None:
    q, k, _, matrix = make_case(False, None, dtype=torch.float32)
    q, k = (table.float().requires_grad_() for table in (q, k))
    out = kernels.grouped_logsumexp(
        q, k, temperature=0.5, q_group=torch.arange(N), k_group=-1 - torch.arange(M),
        group_weight=torch.empty(N, 0), backend=backend,
    )  # fmt: skip
    out.sum().backward()
    want = definition(q.double(), k.double(), torch.tensor(0.5), matrix)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.cat([q.grad, k.grad]).isfinite().all()


COMPILED = """
import sys, torch, kernels
torch.manual_seed(0)
tables = [torch.randn(n, 16) for n in (6, 6)]
labels = torch.tensor([4, 1, 4, 1, 7, 7])
operations = {
    "logsumexp": lambda a, b, tau: kernels.grouped_logsumexp(
        a, b, temperature=tau, q_group=labels, k_group=labels, group_weight=0.5).sum(),
    "supcon": lambda a, b, tau: kernels.supcon_loss(a, labels, temperature=tau) + 0 * b.sum(),
    "info-nce": lambda a, b, tau: kernels.info_nce_loss(a, b, temperature=tau),
    "clip": lambda a, b, tau: kernels.clip_loss(a, b, temperature=tau, queue=(b[:2], a[:3])),
}
for name in sys.argv[1:]:
    function = operations[name]
    gradients = []
    for call in (function, torch.compile(function, backend="aot_eager")):
        leaves = [leaf.clone().requires_grad_() for leaf in (*tables, torch.tensor(0.3))]
        call(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)
"""


@pytest.mark.parametrize(
    "names",
    [["logsumexp", "supcon"], pytest.param(["info-nce", "clip"], marks=pytest.mark.slow)],
    ids="-".join,
)
def test_under_compile_each_is_what_it_is_without(names) -> None:
    # In a process of its own, because the checker of shapes cannot be traced.
    done = warm.run([sys.executable, "-c", COMPILED, *names], capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_detached_columns_cost_no_gradient_and_two_runs_give_the_same_bits() -> None:
    q, k, arguments, _ = make_case(False, "table", dtype=torch.float64)
    runs = []
    for _ in range(2):
        rows = q.clone().requires_grad_()
        out = kernels.grouped_logsumexp(rows, k, temperature=0.1, **arguments)
        out.sum().backward()
        runs.append((out.detach(), rows.grad))
    assert k.grad is None
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_memory_does_not_grow_with_rows_times_columns() -> None:
    n = 4096
    q = F.normalize(torch.randn(n, 8), dim=1).requires_grad_()
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Watch():
        group = torch.arange(n) % 7
        kernels.grouped_logsumexp(q, temperature=0.1, q_group=group, group_weight=0.5).sum()
    assert max(largest) <= 384**2 < n * n


Q, K, G = torch.eye(4, 8), torch.eye(3, 8), torch.zeros(4).long()
WRONG = {
    "width": ({"k": torch.eye(3, 9)}, ValueError, "the width of q, 8, got 9"),
    "dtype": ({"k": K.double()}, TypeError, r"convert with k.to\(q.dtype\)"),
    "one-group": ({"q_group": G}, ValueError, "got only q_group; pass k_group too"),
    "group-length": ({"q_group": G, "k_group": G}, ValueError, r"row of k, \[3\], got \[4\]"),
    "weights-alone": ({"group_weight": 0.5}, ValueError, "weights without groups"),
    "columns-alone": ({"k": None, "k_group": G}, ValueError, "columns without columns"),
    "negative": ({"k": None, "q_group": G, "group_weight": -1.0}, ValueError, "at least 0, got -1"),
    "infinite": (
        {"k": None, "q_group": G, "group_weight": torch.full((4, 4), torch.inf)}, ValueError,
        "at least 0, got inf",
    ),
    "table": (
        {"k": None, "q_group": G, "group_weight": torch.ones(3, 4)}, ValueError, r"got \[3, 4\]",
    ),
    "narrow": (
        {"k": None, "q_group": G, "group_weight": torch.ones(4, 3)}, ValueError, "4 here, got 3",
    ),
    "reduction": ({"reduction": "avg"}, ValueError, "none, mean, sum, got 'avg'"),
    "option": ({"proces_group": 1}, TypeError, "did you mean 'process_group'"),
    "integers": ({"q": Q.long()}, TypeError, "q: asked for float16"),
    "temperature": ({"temperature": torch.tensor(-1.0)}, ValueError, "above 0, got -1.0"),
    "no-temperature": ({"temperature": None}, TypeError, r"a number, got None \(NoneType\)"),
    "weight": (
        {"k": None, "q_group": G, "group_weight": "1"}, TypeError,
        r"group_weight: asked for a number, got '1' \(str\)",
    ),
    "sparse": ({"k": K.to_sparse()}, TypeError, r"k: asked for a dense tensor.*k.to_dense\(\)"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(changes, error, words) -> None:
    with pytest.raises(error, match=words):
        kernels.grouped_logsumexp(**{"q": Q, "k": K, "temperature": 0.1} | changes)
