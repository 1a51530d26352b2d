"""The public loss: checks, choice of backend, and nothing of the arithmetic."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels import reference_backend, torch_op, validation
from kernels.precision import LossPlan, announce, float32_products, plan_for_rows
from kernels.types import LossInputs, LossOptions, LossOutput, divide_by_length, dtype_of_products


def manifold_contrastive_loss(
    rows: Float[Tensor, "n d"],
    hubs: Float[Tensor, "b d"],
    group: Int[Tensor, " n"],
    *,
    temperature: float | Float[Tensor, "..."],
    coldest: float = 0.0,
    intra_weight: float | str = 1.0,
    overlap: Float[Tensor, "n c"] | None = None,
    include_positive: bool = False,
    keys: Float[Tensor, "n d"] | None = None,
    gather: bool = True,
    rank_sizes: Sequence[tuple[int, int]] | None = None,
    backend: str = "auto",
    precision: str = "rows",
    normalize: bool = False,
    validate: bool = True,
) -> LossOutput:
    """Pull each random crop to its image's salient crop, push it from all other crops.

    Args:
        rows: Unit-length embeddings of random crops, image-major; gradients flow. May be empty.
        hubs: Unit-length embeddings of the salient crops, one per image; gradients flow.
        group: Image of each row: equal = same image, rows of an image stand together, ids are
            unique over all ranks. The j-th run of equal values belongs to hub j.
        temperature: Cosines are divided by it; > 0. A tensor learns.
        coldest: Bound that the caller keeps a temperature of a tensor above, by clamping it. From
            0.03 on the kernels need no running maximum. A colder one is refused by `validate`;
            without it the kernels' loss is NaN.
        intra_weight: Weight of the other crops of the same image in the denominator, or
            "balanced": .06 (T - 1) H / (H - 1) with T images on all ranks and H crops of this one.
        overlap: IoU of row i with the c-th crop of its own image, padded with 0: crops that share
            pixels count less, by 1 - IoU.
        include_positive: The positive stands in the denominator too (InfoNCE).
        keys: The teacher's embeddings of the same crops, to compare the rows with in place of the
            rows themselves; no gradient flows. Hubs are then expected from the teacher too.
        gather: Compare with the rows of all ranks, if torch.distributed is initialised.
        rank_sizes: Rows and images of every rank in rank order, where the caller knows them: the
            ranks then need not ask one another, which waits for a GPU once a pass. `validate`
            asks all the same, and compares.
        backend: "auto" (triton where it can run, chunked elsewhere), "triton", "chunked" or
            "dense".
        precision: Of the products; sums are float32 at least. "rows": what the rows came in, or
            autocast's type inside a GPU's autocast; float32 rows on a GPU are TF32 where torch's
            matmul precision allows it. "auto": bf16 where the fused kernels run, float32
            elsewhere. "bf16", "fp16", "tf32", "fp32": this or a refusal. Tables are rounded once;
            gradients keep the type of the rows.
        normalize: Divide rows, hubs and keys by their lengths first; a row of zeros stays one and
            gets no gradient.
        validate: Refuse rows that are not of unit length, scattered groups, overlaps outside
            [0, 1]; reads values, so it waits for a GPU.

    Returns:
        Loss and figures, float32 (float64 for float64 rows). The gradient is scaled so that the
        mean over ranks, which DDP takes, is the gradient of the loss. A row with an empty
        denominator has the loss of its positive alone; there is never a NaN that was not put in.

    Raises:
        ValueError: Unequal sizes, scattered images, lengths other than 1, values out of range.
        TypeError: Wrong element types or devices.
        RuntimeError: On a second derivative, and inside torch.func's transforms, except by "dense".

    Source: arXiv 2406.19247, the information loss of its equation set; options are ours
    (docs/kernels.md).
    """
    validation.check_transforms(
        "manifold_contrastive_loss", backend, rows, hubs, temperature, keys, overlap
    )
    validation.check_arguments(
        rows,
        hubs,
        group,
        temperature=temperature,
        coldest=coldest,
        intra_weight=intra_weight,
        overlap=overlap,
        keys=keys,
    )
    plan = plan_for_rows(
        rows.device,
        width=rows.shape[1],
        dtype=dtype_of_products(rows),
        precision=precision,
        backend=backend,
    )
    if not torch.compiler.is_compiling():
        announce(plan)
        if validate:
            validation.check_values(rows, hubs, keys, overlap, normalize=normalize)
    if plan.backend != "triton":
        rows, hubs, keys = _prepare_tables(rows, hubs, keys, plan, normalize=normalize)
    if isinstance(temperature, Tensor):
        tau = temperature
    else:
        tau = torch.tensor(temperature, dtype=torch.float64)
    inputs = LossInputs(
        rows=rows,
        hubs=hubs,
        group=group,
        temperature=tau,
        overlap=overlap,
        keys=None if keys is None else keys.detach(),
        options=LossOptions(
            intra_weight=0.0 if isinstance(intra_weight, str) else float(intra_weight),
            balanced=isinstance(intra_weight, str),
            include_positive=include_positive,
            normalize=normalize and plan.backend == "triton",
            gather=gather,
            rank_sizes=_flat_sizes(rank_sizes),
            validate=validate,
            has_keys=keys is not None,
            backend=plan.backend,
            precision=plan.precision,
            coldest=coldest,
        ),
    )
    if plan.backend == "dense":
        with float32_products(plan.precision):
            loss, figures = reference_backend.forward(inputs)
    else:
        loss, figures, *_ = torch_op.contrastive_forward(inputs)
    share, positive, intra = figures.detach().unbind()
    return LossOutput(loss, share, positive, intra, plan.backend, plan.precision, plan.reason)


def _flat_sizes(rank_sizes: Sequence[tuple[int, int]] | None) -> tuple[int, ...]:
    """An operation's schema knows flat lists of whole numbers only."""
    if rank_sizes is None:
        return ()
    return *(rows for rows, _ in rank_sizes), *(images for _, images in rank_sizes)


def _prepare_tables(
    rows: Float[Tensor, "n d"],
    hubs: Float[Tensor, "b d"],
    keys: Tensor | None,
    plan: LossPlan,
    *,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the Triton kernels do by themselves: lengths of 1, and rounding, once."""

    def prepare(table: Tensor) -> Tensor:
        table = divide_by_length(table) if normalize else table
        # The chunked backend widens half precision tile by tile and keeps the tables as they are.
        return table.to(plan.dtype) if plan.backend == "dense" else table

    return prepare(rows), prepare(hubs), None if keys is None else prepare(keys)
