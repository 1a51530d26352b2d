"""The operation as torch sees it: opcheck, one graph under torch.compile, one derivative only."""

import sys

import pytest
import torch

import kernels
from kernels import torch_op
from kernels.types import LossInputs, LossOptions
from tests import warm

BACKENDS = ["chunked", "triton"]


def arguments(backend, make_batch, *, teacher=False, normalize=False):
    batch = make_batch([3, 1, 2], d=16)
    rows, hubs, keys = (batch[name].float() for name in ("rows", "hubs", "keys"))
    options = LossOptions(
        intra_weight=1.0,
        balanced=True,
        include_positive=True,
        normalize=normalize and backend == "triton",
        gather=True,
        rank_sizes=(),
        validate=True,
        has_keys=teacher,
        backend=backend,
        precision="fp32",
    )
    inputs = LossInputs(
        rows=rows.requires_grad_(),
        hubs=hubs.requires_grad_(),
        group=batch["group"],
        temperature=torch.tensor(0.2, requires_grad=True),
        overlap=batch["overlap"].float(),
        keys=keys if teacher else None,
        options=options,
    )
    return torch_op.flatten(inputs)


@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore")
def test_opcheck_is_clean(backend, teacher, make_batch) -> None:
    given = arguments(backend, make_batch, teacher=teacher, normalize=True)
    torch.library.opcheck(torch.ops.lmcl.contrastive_forward.default, (*given, True))


ONE_GRAPH = """
import sys, torch, warnings, kernels
warnings.simplefilter("ignore")
backend, chosen = sys.argv[1:]
torch.manual_seed(0)
group = torch.tensor([4, 4, 4, 1, 1])
tables = [torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (5, 2, 5)]
keys = tables.pop()
tau = torch.tensor(0.1)
options = {
    "paper": {},
    "all": {"overlap": torch.rand(5, 3), "intra_weight": "balanced", "include_positive": True,
            "normalize": True},
    "teacher": {"keys": keys, "overlap": torch.rand(5, 3)},
}[chosen]

def step(rows, hubs, tau):
    out = kernels.manifold_contrastive_loss(
        rows * 1.0, hubs, group, temperature=0.1 if chosen == "paper" else tau, backend=backend,
        **options,
    )
    return out.loss * 2 + 0 * out.intra_share + 0 * tau

gradients = []
compiled = [
    torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for dynamic in (False, True)
]
for function in (step, *compiled):
    leaves = [table.clone().requires_grad_() for table in (*tables, tau)]
    function(*leaves).backward()
    gradients.append([leaf.grad for leaf in leaves])
torch.testing.assert_close(gradients[1], gradients[0])
torch.testing.assert_close(gradients[2], gradients[0])
"""


@pytest.mark.parametrize(
    ("backend", "options"),
    [("chunked", "all"), ("triton", "teacher")]
    + [
        pytest.param(backend, options, marks=pytest.mark.slow)
        for backend in ("chunked", "triton")
        for options in ("paper", "all", "teacher")
        if (backend, options) not in (("chunked", "all"), ("triton", "teacher"))
    ],
)
def test_one_graph_under_compile_with_static_and_dynamic_sizes(backend, options) -> None:
    # In a process of its own, because the checker of shapes cannot be traced.
    done = warm.run([sys.executable, "-c", ONE_GRAPH, backend, options], capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused_with_a_sentence(backend, make_batch) -> None:
    batch = make_batch([3, 2], d=16)
    rows = batch["rows"].float().requires_grad_()
    out = kernels.manifold_contrastive_loss(
        rows, batch["hubs"].float(), batch["group"], temperature=0.1, backend=backend
    )
    (first,) = torch.autograd.grad(out.loss, rows, create_graph=True)
    with pytest.raises(RuntimeError, match=r"asked for a second derivative.*backend='dense'"):
        first.sum().backward()


@pytest.mark.parametrize("tau", [0.5, 2.9, 50.0])
@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_denominator_is_one_at_any_learned_temperature(
    backend, teacher, tau, make_batch
) -> None:
    batch = make_batch([3], d=16)
    rows, hubs = batch["rows"].float().requires_grad_(), batch["hubs"].float()
    learned = torch.tensor(tau, requires_grad=True)
    out = kernels.manifold_contrastive_loss(
        rows, hubs, batch["group"], temperature=learned, intra_weight=0.0, backend=backend,
        keys=batch["keys"].float() if teacher else None,
    )  # fmt: skip
    out.loss.backward()
    positive = (rows.detach() @ hubs.T).mean()
    torch.testing.assert_close(out.loss.detach(), -positive / tau)
    torch.testing.assert_close(rows.grad, -hubs.expand_as(rows) / (3 * tau))
    torch.testing.assert_close(learned.grad, positive / tau**2)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(
    backend, teacher, wanted, make_batch
) -> None:
    batch = make_batch([3, 1, 2], d=16)
    values = batch["rows"].float(), batch["hubs"].float(), torch.tensor(0.3)
    keys = batch["keys"].float() if teacher else None
    found = []
    for chosen in ((0, 1, 2), wanted):
        leaves = [value.clone().requires_grad_(i in chosen) for i, value in enumerate(values)]
        out = kernels.manifold_contrastive_loss(
            *leaves[:2], batch["group"], temperature=leaves[2], keys=keys, backend=backend,
            overlap=batch["overlap"].float(),
        )  # fmt: skip
        out.loss.backward()
        found.append([leaves[i].grad for i in wanted])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_nothing_is_recorded(backend, make_batch) -> None:
    batch = make_batch([3, 2], d=16)
    with torch.no_grad():
        out = kernels.manifold_contrastive_loss(
            batch["rows"].float().requires_grad_(), batch["hubs"].float(), batch["group"],
            temperature=0.1, keys=batch["keys"].float(), backend=backend,
        )  # fmt: skip
    assert not out.loss.requires_grad


def test_autocast_on_the_cpu_leaves_precision_alone(make_batch) -> None:
    batch = make_batch([3, 2], d=16)
    rows, hubs = batch["rows"].float(), batch["hubs"].float()
    plain = kernels.manifold_contrastive_loss(rows, hubs, batch["group"], temperature=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kernels.manifold_contrastive_loss(rows, hubs, batch["group"], temperature=0.1)
    assert torch.equal(plain.loss, inside.loss)


def test_scaled_losses_scale_their_gradients(make_batch) -> None:
    batch = make_batch([3, 2], d=16)
    gradients = []
    for scale in (1.0, 1024.0):
        rows = batch["rows"].half().requires_grad_()
        out = kernels.manifold_contrastive_loss(
            rows, batch["hubs"].half(), batch["group"], temperature=0.1, backend="triton"
        )
        (out.loss * scale).backward()
        gradients.append(rows.grad.float() / scale)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-3, atol=1e-4)
