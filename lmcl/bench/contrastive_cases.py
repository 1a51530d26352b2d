"""The loss computed in seven ways, ours and the ways of others, and the losses over its operation.

The seven compute the paper's mode (weight 1, no overlap, positive outside the sum), so that they
agree in value and gradient; SupCon, InfoNCE and CLIP do so with their usual dense code.
tests/lmcl/bench/test_contrastive.py checks both.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lmcl.utils.kernels import clip_loss, info_nce_loss, manifold_contrastive_loss, supcon_loss

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]

_INF_CL_TILE = 512
_CHUNK = 1024


def make_inputs(
    m: int, d: int, crops: int, *, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, hubs and group of m // crops images; rows are leaves that want a gradient."""
    torch.manual_seed(0)
    images = m // crops
    rows = F.normalize(torch.randn(images * crops, d, device=device), dim=1).to(dtype)
    hubs = F.normalize(torch.randn(images, d, device=device), dim=1).to(dtype)
    group = torch.arange(images, device=device).repeat_interleave(crops)
    return rows.requires_grad_(), hubs.requires_grad_(), group


def naive_eager(rows: Tensor, hubs: Tensor, group: Tensor, temperature: float) -> Tensor:
    """Masks and log-softmax, as most public implementations have it; half precision by AMP."""
    half = rows.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(rows.device.type, dtype=rows.dtype if half else None, enabled=half):
        logits = rows @ rows.T / temperature
        positive = (rows * hubs[group]).sum(1, keepdim=True) / temperature
        same = group[:, None] == group[None, :]
        itself = torch.eye(rows.shape[0], device=rows.device, dtype=torch.bool)
        intra = torch.where(same & ~itself, logits, -torch.inf)
        inter = torch.where(same, -torch.inf, logits)
        both = torch.maximum(intra, inter)
        peak = both.amax(1, keepdim=True).detach()
        exponentials = torch.exp(both - peak) * (~itself).to(logits.dtype)
        log_sum = torch.log(exponentials.sum(1, keepdim=True)) + peak
        return (log_sum - positive).mean()


def careful_eager(rows: Tensor, hubs: Tensor, group: Tensor, temperature: float) -> Tensor:
    """One matrix, its diagonal filled in place, one logsumexp."""
    logits = (rows / temperature) @ rows.T
    logits = logits.float() if logits.dtype != torch.float64 else logits
    logits.fill_diagonal_(-torch.inf)
    positive = (rows * hubs[group]).sum(1) / temperature
    return (torch.logsumexp(logits, dim=1) - positive).mean()


def _traceable(rows: Tensor, hubs: Tensor, group: Tensor, temperature: float) -> Tensor:
    logits = ((rows / temperature) @ rows.T).float()
    place = torch.arange(rows.shape[0], device=rows.device)
    logits = torch.where(place[:, None] == place[None, :], -torch.inf, logits)
    positive = (rows * hubs[group]).sum(1) / temperature
    return (torch.logsumexp(logits, dim=1) - positive).mean()


def careful_compiled() -> Loss:
    """The careful version through torch.compile."""
    return torch.compile(_traceable, dynamic=False)


class _InfCL(torch.autograd.Function):
    """Inf-CL's published recipe: tile-wise log-sum-exp, backward in two sweeps of two products.

    Like the original it computes in float32 and treats rows and columns as two tensors, so each
    gradient recomputes every tile: four products. Source: DAMO-NLP-SG/Inf-CLIP, inf_cl/flash.py
    (Apache-2.0); this is our own writing of the idea.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, temperature: float) -> Tensor:
        table = rows.float()
        log_sum = torch.full((len(table),), -torch.inf, device=rows.device)
        for a in range(0, len(table), _INF_CL_TILE):
            for c in range(0, len(table), _INF_CL_TILE):
                block = _tile(table, a, c, temperature)
                part = torch.logsumexp(block, 1)
                here = slice(a, a + _INF_CL_TILE)
                log_sum[here] = torch.logaddexp(log_sum[here], part)
        ctx.save_for_backward(rows, log_sum)
        ctx.temperature = temperature
        return log_sum

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rows, log_sum = ctx.saved_tensors
        table, weight = rows.float(), gradients[0] / ctx.temperature
        d_rows, d_columns = torch.zeros_like(table), torch.zeros_like(table)
        steps = range(0, len(table), _INF_CL_TILE)
        for a in steps:
            here = slice(a, a + _INF_CL_TILE)
            for c in steps:
                block = (_tile(table, a, c, ctx.temperature) - log_sum[here, None]).exp()
                d_rows[here] += (block * weight[here, None]) @ table[c : c + _INF_CL_TILE]
        for c in steps:
            there = slice(c, c + _INF_CL_TILE)
            for a in steps:
                here = slice(a, a + _INF_CL_TILE)
                block = (_tile(table, a, c, ctx.temperature) - log_sum[here, None]).exp()
                d_columns[there] += (block * weight[here, None]).T @ table[here]
        return (d_rows + d_columns).to(rows.dtype), None


def _tile(table: Tensor, a: int, c: int, temperature: float) -> Tensor:
    block = table[a : a + _INF_CL_TILE] @ table[c : c + _INF_CL_TILE].T / temperature
    return block.fill_diagonal_(-torch.inf) if a == c else block


def inf_cl(rows: Tensor, hubs: Tensor, group: Tensor, temperature: float) -> Tensor:
    """Inf-CL's recipe with this loss's positive."""
    positive = (rows * hubs[group]).sum(1).float() / temperature
    log_sum: Tensor = _InfCL.apply(rows, temperature)
    return (log_sum - positive).mean()


def _sum_of_exponentials(block: Tensor, beta: float) -> Tensor:
    return (block.float() * beta - beta).exp().sum(1)


def _pair_weights(block: Tensor, beta: float, here: Tensor, there: Tensor) -> Tensor:
    return ((block.float() * beta - beta).exp() * (here[:, None] + there)).to(block.dtype)


class _CompiledChunks(torch.autograd.Function):
    """Row chunks: library products, and everything pointwise in two compiled functions."""

    sums: Any = None
    pairs: Any = None

    @staticmethod
    def forward(ctx: Any, rows: Tensor, temperature: float) -> Tensor:
        beta = 1 / temperature
        parts = []
        for a in range(0, len(rows), _CHUNK):
            block = rows[a : a + _CHUNK] @ rows.T
            _drop_diagonal(block, a)
            parts.append(_CompiledChunks.sums(block, beta))
        log_sum = torch.cat(parts).log() + beta
        ctx.save_for_backward(rows, log_sum)
        ctx.beta = beta
        return log_sum

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rows, log_sum = ctx.saved_tensors
        scale = gradients[0] * (ctx.beta - log_sum).exp() * len(rows)
        d_rows = torch.empty_like(rows)
        for a in range(0, len(rows), _CHUNK):
            block = rows[a : a + _CHUNK] @ rows.T
            _drop_diagonal(block, a)
            block = _CompiledChunks.pairs(block, ctx.beta, scale[a : a + _CHUNK], scale)
            d_rows[a : a + _CHUNK] = block @ rows
        return d_rows * (ctx.beta / len(rows)), None


def _drop_diagonal(block: Tensor, start: int) -> None:
    # Far below any cosine, and still finite in half precision.
    block.diagonal(offset=start).fill_(-600.0)


def chunked_compiled() -> Loss:
    """Row chunks whose pointwise part is compiled: the strongest baseline of kernel.md."""
    _CompiledChunks.sums = torch.compile(_sum_of_exponentials)
    _CompiledChunks.pairs = torch.compile(_pair_weights)

    def loss(rows: Tensor, hubs: Tensor, group: Tensor, temperature: float) -> Tensor:
        positive = (rows * hubs[group]).sum(1).float() / temperature
        log_sum: Tensor = _CompiledChunks.apply(rows, temperature)
        return (log_sum - positive).mean()

    return loss


def ours(backend: str) -> Loss:
    """The public loss; values are not checked, as in a tight loop."""

    def loss(rows: Tensor, hubs: Tensor, group: Tensor, temperature: float) -> Tensor:
        out = manifold_contrastive_loss(
            rows, hubs, group, temperature=temperature, backend=backend, validate=False
        )
        return out.loss

    return loss


def dense_supcon(rows: Tensor, labels: Tensor, temperature: float | Tensor) -> Tensor:
    """SupCon as it is usually written: masks over one (n, n) matrix."""
    rows = F.normalize(rows, dim=1)
    logits = rows @ rows.T / temperature
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    positive = (labels[:, None] == labels) & ~itself
    log_sum = torch.logsumexp(logits.masked_fill(itself, -torch.inf), 1)
    count = positive.sum(1)
    mean = torch.where(positive, logits, 0.0).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, log_sum - mean, 0.0).sum() / (count > 0).sum().clamp(min=1)


def dense_info_nce(one: Tensor, two: Tensor, temperature: float | Tensor) -> Tensor:
    """SimCLR's loss as it is usually written: cross-entropy over a (2n, 2n) matrix."""
    rows = F.normalize(torch.cat([one, two]), dim=1)
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    n = len(one)
    target = torch.arange(2 * n, device=one.device).roll(n)
    return F.cross_entropy(logits, target)


def dense_clip(
    image: Tensor,
    text: Tensor,
    temperature: float | Tensor,
    *,
    queue: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """CLIP's loss as it is usually written, each side's queue appended to its logits."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    logits = image @ text.T / temperature
    turned = logits.T
    if queue is not None:
        images, texts = (F.normalize(table, dim=1) for table in queue)
        logits = torch.cat([logits, image @ texts.T / temperature], 1)
        turned = torch.cat([turned, text @ images.T / temperature], 1)
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(turned, target)) / 2


def _halves(loss: Callable[[Tensor, Tensor, float], Tensor]) -> Loss:
    """A loss of two tables, over the upper and the lower half of the rows."""

    def of_rows(rows: Tensor, hubs: Tensor, group: Tensor, temperature: float) -> Tensor:
        half = len(rows) // 2
        return loss(rows[:half], rows[half:], temperature)

    return of_rows


CASES: dict[str, Callable[[], Loss]] = {
    "naive_eager": lambda: naive_eager,
    "careful_eager": lambda: careful_eager,
    "careful_compiled": careful_compiled,
    "inf_cl": lambda: inf_cl,
    "chunked": lambda: ours("chunked"),
    "chunked_compiled": chunked_compiled,
    "fused": lambda: ours("triton"),
    "supcon_dense": lambda: lambda rows, hubs, group, tau: dense_supcon(rows, group, tau),
    "supcon": lambda: lambda rows, hubs, group, tau: supcon_loss(rows, group, temperature=tau),
    "info_nce_dense": lambda: _halves(dense_info_nce),
    "info_nce": lambda: _halves(lambda one, two, tau: info_nce_loss(one, two, temperature=tau)),
    "clip_dense": lambda: _halves(dense_clip),
    "clip": lambda: _halves(lambda image, text, tau: clip_loss(image, text, temperature=tau)),
}
"""Name of each case -> what makes its function; `fused` needs a GPU."""

SHARE_OF_PAIRS = {"clip": 0.25, "clip_dense": 0.25}
"""Share of the pairs of rows that a case compares, if not all: half of them with the other half."""
