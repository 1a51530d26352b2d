"""Several gloo ranks against one process: value and every gradient, DDP's averaging included."""

import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import kernels

D = 16
CROPS = [3, 1, 4, 2, 3, 5, 2]
DEALS = {
    "1-rank": [7],
    "2-ranks": [2, 5],
    "3-ranks-one-empty": [4, 0, 3],
    "4-ranks-two-empty": [0, 3, 4, 0],
}
OPTIONS = {
    "paper": {},
    "all-options": {"intra_weight": "balanced", "include_positive": True, "overlap": True},
    "teacher": {"keys": True, "overlap": True},
    "cold": {"temperature": 0.001},
}


def _batch() -> dict[str, Tensor]:
    torch.manual_seed(3)
    n = sum(CROPS)
    unit = [F.normalize(torch.randn(k, D, dtype=torch.float64), dim=1) for k in (n, len(CROPS), n)]
    group = torch.repeat_interleave(torch.tensor([11, 3, 8, 2, 40, 6, 5]), torch.tensor(CROPS))
    return {
        "rows": unit[0],
        "hubs": unit[1],
        "keys": unit[2],
        "group": group,
        "overlap": torch.rand(n, max(CROPS), dtype=torch.float64),
    }


def _run(batch: dict[str, Tensor], name: str, backend: str) -> list[Tensor]:
    options = dict(OPTIONS[name])
    rows = batch["rows"].clone().requires_grad_()
    hubs = batch["hubs"].clone().requires_grad_()
    temperature = torch.tensor(
        options.pop("temperature", 0.2), dtype=torch.float64, requires_grad=True
    )
    for tensor in ("keys", "overlap"):
        if options.get(tensor):
            options[tensor] = batch[tensor]
    out = kernels.manifold_contrastive_loss(
        rows, hubs, batch["group"], temperature=temperature, backend=backend, **options
    )
    out.loss.backward()
    return [
        torch.stack([figure.detach() for figure in out]),
        rows.grad,
        hubs.grad,
        temperature.grad,
    ]


def _rank(rank: int, deal: list[int], folder: str) -> None:
    sys.stderr = open(Path(folder) / f"stderr-{rank}", "w")  # noqa: SIM115
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), len(deal))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(deal))
    first = sum(deal[:rank])
    images = slice(first, first + deal[rank])
    start = sum(CROPS[:first])
    rows = slice(start, start + sum(CROPS[images]))
    batch = {name: tensor[images if name == "hubs" else rows] for name, tensor in _batch().items()}
    results = {
        f"{name}/{backend}": _run(batch, name, backend)
        for name in OPTIONS
        for backend in ("chunked", "dense")
    }
    torch.save(results, Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS.keys())
def test_ranks_together_agree_with_one_process(deal: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (deal, folder), nprocs=len(deal), start_method="fork")
        ranks = [torch.load(Path(folder) / f"rank-{rank}.pt") for rank in range(len(deal))]
    for name in OPTIONS:
        truth = _run(_batch(), name, "dense")
        for backend in ("chunked", "dense"):
            parts = [rank[f"{name}/{backend}"] for rank in ranks]
            for part in parts:
                torch.testing.assert_close(part[0], truth[0], rtol=0, atol=1e-12)
            # DDP takes the mean over ranks.
            for place in (1, 2):
                whole = torch.cat([part[place] for part in parts]) / len(deal)
                torch.testing.assert_close(whole, truth[place], rtol=1e-12, atol=1e-12)
            temperature = torch.stack([part[3] for part in parts]).mean()
            torch.testing.assert_close(temperature, truth[3], rtol=1e-12, atol=1e-12)
