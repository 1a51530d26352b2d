"""Several gloo ranks against one process: value and every gradient, DDP's averaging included."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import kernels
from kernels import chunked_backend, distributed
from tests import warm

D = 16
CROPS = [3, 1, 4, 2, 3, 5, 2]
DEALS = {
    "1-rank": [7],
    "2-ranks": [2, 5],
    "3-ranks-one-empty": [4, 0, 3],
    "4-ranks-two-empty": [0, 3, 4, 0],
}
SINGLE_DEALS = {"kernels-2-ranks": [2, 5], "kernels-3-ranks-one-empty": [4, 0, 3]}
ALL = {name: (deal, False) for name, deal in DEALS.items()} | {
    name: (deal, True) for name, deal in SINGLE_DEALS.items()
}
OPTIONS = {
    "paper": {},
    "all-options": {"intra_weight": "balanced", "include_positive": True, "overlap": True},
    "teacher": {"keys": True, "overlap": True},
    "cold": {"temperature": 0.001},
    "sizes-known": {"rank_sizes": True, "validate": False},
}


def _batch(in_single: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(3)
    n = sum(CROPS)
    unit = [F.normalize(torch.randn(k, D, dtype=torch.float64), dim=1) for k in (n, len(CROPS), n)]
    group = torch.repeat_interleave(torch.tensor([11, 3, 8, 2, 40, 6, 5]), torch.tensor(CROPS))
    batch = {
        "rows": unit[0],
        "hubs": unit[1],
        "keys": unit[2],
        "group": group,
        "overlap": torch.rand(n, max(CROPS), dtype=torch.float64),
    }
    return {
        name: value.float() if in_single and value.is_floating_point() else value
        for name, value in batch.items()
    }


def _sizes(deal: list[int]) -> list[tuple[int, int]]:
    """Rows and images of every rank."""
    firsts = [sum(deal[:rank]) for rank in range(len(deal))]
    return [
        (sum(CROPS[first : first + images]), images)
        for first, images in zip(firsts, deal, strict=True)
    ]


def _run(
    batch: dict[str, Tensor], name: str, backend: str, deal: tuple[int, ...] = (7,)
) -> list[Tensor]:
    options = dict(OPTIONS[name])
    rows = batch["rows"].clone().requires_grad_()
    hubs = batch["hubs"].clone().requires_grad_()
    temperature = torch.tensor(
        options.pop("temperature", 0.2), dtype=torch.float64, requires_grad=True
    )
    for tensor in ("keys", "overlap"):
        if options.get(tensor):
            options[tensor] = batch[tensor]
    if options.get("rank_sizes"):
        options["rank_sizes"] = _sizes(list(deal))
    out = kernels.manifold_contrastive_loss(
        rows, hubs, batch["group"], temperature=temperature, backend=backend, **options
    )
    out.loss.backward()
    return [
        torch.stack([figure.detach() for figure in out[:4]]),
        rows.grad,
        hubs.grad,
        temperature.grad,
    ]


def _others(
    batch: dict[str, Tensor], numbers: Tensor, backend: str, process_group: object
) -> dict[str, list[Tensor]]:
    """The operation and the losses over it: groups cross ranks, columns are fewer than rows."""
    how = {"backend": backend, "process_group": process_group}
    group, few = numbers % 3, numbers % 2 == 0
    table = batch["overlap"].new_tensor([0.5, 0.0, 2.0, 1.0, 0.3, 1.0, 1.0]).repeat(1, 2)
    table = (table + 0.25 * (numbers % 4)[:, None]) * (table > 0)

    def columns(k: Tensor) -> dict[str, Tensor]:
        return {"k": k[few], "k_group": group[few]}

    calls = {
        "none": lambda q, k, tau: kernels.grouped_logsumexp(
            q, temperature=tau, q_group=group, group_weight=table, **how
        ),
        "mean": lambda q, k, tau: kernels.grouped_logsumexp(
            q, **columns(k), temperature=tau, q_group=group, group_weight=table, reduction="mean",
            **how,
        ),
        "sum": lambda q, k, tau: kernels.grouped_logsumexp(
            q, temperature=tau, reduction="sum", **how
        ),
        "supcon": lambda q, k, tau: kernels.supcon_loss(q, group, temperature=tau, **how),
        "info-nce": lambda q, k, tau: kernels.info_nce_loss(
            q, k, temperature=tau, include_positive=False, **how
        ),
        "clip": lambda q, k, tau: kernels.clip_loss(q, k, temperature=tau, **how),
        "clip-queue": lambda q, k, tau: kernels.clip_loss(
            q, k, temperature=tau, queue=(_batch()["keys"][:5].to(q), _batch()["hubs"].to(q)), **how
        ),
    }  # fmt: skip
    results = {}
    for name, call in calls.items():
        tau = batch["rows"].new_tensor(0.3)
        leaves = [leaf.clone().requires_grad_() for leaf in (batch["rows"], batch["keys"], tau)]
        value = call(*leaves)
        upstream = 1.0 + (numbers % 5).to(value) if name == "none" else torch.ones_like(value)
        gradients = torch.autograd.grad(value, leaves, upstream, materialize_grads=True)
        results[name] = [value.detach(), *gradients]
    return results


def _rank(rank: int, deal: list[int], folder: str, in_single: bool) -> None:
    sys.stderr = open(Path(folder) / f"stderr-{rank}", "w")  # noqa: SIM115
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), len(deal))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(deal))
    first = sum(deal[:rank])
    images = slice(first, first + deal[rank])
    start = sum(CROPS[:first])
    rows = slice(start, start + sum(CROPS[images]))
    batch = {
        name: tensor[images if name == "hubs" else rows]
        for name, tensor in _batch(in_single).items()
    }
    backends = ("triton",) if in_single else ("chunked", "dense")
    results, asked = {}, []
    ask = distributed._ask_ranks
    distributed._ask_ranks = lambda *given: asked.append(name) or ask(*given)
    for name in OPTIONS:
        for backend in backends:
            results[f"{name}/{backend}"] = _run(batch, name, backend, tuple(deal))
    results["asked"] = set(asked)
    numbers = torch.arange(sum(CROPS))[rows]
    for backend in backends:
        results[f"others/{backend}"] = _others(batch, numbers, backend, dist.group.WORLD)
    # Everybody makes the group. Its ranks are not those of all processes.
    apart = dist.new_group(list(range(1, len(deal)))) if len(deal) > 1 else None
    if rank:
        results["apart"] = _others(batch, numbers, backends[0], apart)
    results["refusal"] = _refusal_of_wrong_sizes(batch, deal, backends[0])
    torch.save(results, Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()


def _refusal_of_wrong_sizes(batch: dict[str, Tensor], deal: list[int], backend: str) -> str:
    """What a rank says whose neighbours hold other images than the caller claims."""
    if len(deal) == 1:
        return ""
    wrong = [(rows + 1, images) for rows, images in _sizes(deal)]
    with pytest.raises(ValueError, match="rank_sizes") as refused:
        kernels.manifold_contrastive_loss(
            batch["rows"], batch["hubs"], batch["group"],
            temperature=0.2, backend=backend, rank_sizes=wrong,
        )  # fmt: skip
    return str(refused.value)


def _run_all(folder: Path) -> None:
    """Every deal of images to ranks, each rank a fork of this process."""
    for name, (deal, in_single) in ALL.items():
        (folder / name).mkdir()
        mp.start_processes(
            _rank,
            (deal, str(folder / name), in_single),
            nprocs=len(deal),
            start_method="fork",
        )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict]]:
    # A process of its own: torch's autograd threads of the other tests do not survive a fork.
    folder = tmp_path_factory.mktemp("ranks")
    done = warm.run([sys.executable, __file__, folder], capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]

    def load(name: str) -> list[dict]:
        count = len(ALL[name][0])
        return [torch.load(folder / name / f"rank-{rank}.pt") for rank in range(count)]

    return load


def _assert_together(parts: list[list[Tensor]], truth: list[Tensor], tolerance: float) -> None:
    for part in parts:
        torch.testing.assert_close(part[0].double(), truth[0], rtol=tolerance, atol=tolerance)
    # DDP takes the mean over ranks.
    for place in (1, 2):
        whole = torch.cat([part[place] for part in parts]).double() / len(parts)
        torch.testing.assert_close(whole, truth[place], rtol=tolerance, atol=tolerance)
    temperature = torch.stack([part[3] for part in parts]).mean()
    torch.testing.assert_close(temperature, truth[3], rtol=10 * tolerance, atol=tolerance)


def _assert_others(
    parts: list[dict[str, list[Tensor]]], truth: dict[str, list[Tensor]], in_single: bool
) -> None:
    close = {"rtol": 3e-5, "atol": 3e-5} if in_single else {"rtol": 1e-11, "atol": 1e-11}
    for call, (value, *gradients) in truth.items():
        values = [part[call][0].double() for part in parts]
        got = torch.cat(values) if call == "none" else torch.stack(values)
        torch.testing.assert_close(got, value.expand_as(got), **close, msg=call)
        # A reduced value is that of all ranks, and DDP takes the mean of its gradients.
        times = 1 if call == "none" else len(parts)
        for place, gradient in enumerate(gradients, 1):
            shares = [part[call][place] for part in parts]
            # A temperature is everybody's, a row its rank's.
            together = torch.cat(shares) if gradient.ndim else torch.stack(shares).sum()
            torch.testing.assert_close(together.double() / times, gradient, **close, msg=call)


@pytest.mark.parametrize("name", DEALS)
def test_ranks_together_agree_with_one_process(name, ranks) -> None:
    results = ranks(name)
    for option in OPTIONS:
        truth = _run(_batch(), option, "dense")
        for backend in ("chunked", "dense"):
            _assert_together([each[f"{option}/{backend}"] for each in results], truth, 1e-12)


@pytest.mark.parametrize("name", SINGLE_DEALS)
def test_the_kernels_gather_rows_and_statistics(name, ranks) -> None:
    results = ranks(name)
    for option in set(OPTIONS) - {"cold"}:
        truth = _run(_batch(), option, "dense")
        _assert_together([each[f"{option}/triton"] for each in results], truth, 3e-6)


@pytest.mark.parametrize("name", [name for name in ALL if len(ALL[name][0]) > 1])
def test_ranks_whose_sizes_are_known_ask_nobody(name, ranks) -> None:
    for each in ranks(name):
        assert each["asked"] == set(OPTIONS) - {"sizes-known"}
        assert "the ranks ask one another" in each["refusal"]


@pytest.mark.parametrize("name", ALL)
def test_the_operation_and_its_losses_together_agree_with_one_process(name, ranks) -> None:
    results = ranks(name)
    in_single = ALL[name][1]
    truth = _others(_batch(), torch.arange(sum(CROPS)), "dense", None)
    for backend in ("triton",) if in_single else ("chunked", "dense"):
        _assert_others([each[f"others/{backend}"] for each in results], truth, in_single)


@pytest.mark.parametrize("name", [name for name in ALL if len(ALL[name][0]) > 1])
def test_a_group_without_the_first_rank_agrees_with_one_process(name, ranks) -> None:
    deal, in_single = ALL[name]
    first = sum(CROPS[: deal[0]])
    batch = {key: value[first:] for key, value in _batch().items() if key != "hubs"}
    truth = _others(batch, torch.arange(first, sum(CROPS)), "dense", None)
    _assert_others([each["apart"] for each in ranks(name)[1:]], truth, in_single)


@pytest.mark.parametrize(
    ("process_group", "error", "words"),
    [
        (dist.GroupMember.NON_GROUP_MEMBER, ValueError, "got one that was made without it"),
        ("gloo", TypeError, r"a group of torch.distributed, got str; pass .*group.WORLD"),
    ],
    ids=["another's", "a-word"],
)
def test_a_group_that_is_none_of_ours_is_named(process_group, error, words) -> None:
    with pytest.raises(error, match=words):
        kernels.grouped_logsumexp(torch.eye(3), temperature=0.1, process_group=process_group)


def test_the_backward_pass_sends_eight_bytes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    layout = distributed.RankLayout(rows=(4, 3), images=2, rank=0)
    monkeypatch.setattr(
        chunked_backend,
        "gather_rows",
        lambda local, _: sent.append(local) or local.repeat(2, 1)[:7],
    )
    chunked_backend._statistics_of_others(torch.zeros(4), torch.zeros(4), layout)
    assert [(table.shape, table.element_size()) for table in sent] == [((4, 2), 4)]


if __name__ == "__main__":
    _run_all(Path(sys.argv[1]))
