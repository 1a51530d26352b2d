"""The loss as an operation of torch: opaque to torch.compile, first derivative only.

Everything whose size depends on values (images per batch, rows of other ranks) stays inside the
operation, so `torch.compile(fullgraph=True)` sees two calls and nothing else. Defined through
`torch.library.Library` and not `custom_op`, whose wrapper loads the compiler (1.4 s, 300 MB) on the
first call and costs four times as much on each.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import chunked_backend as with_chunked
from kernels.distributed import is_distributed
from kernels.types import Forward, Options

_OPTIONS = (
    "float intra_weight, bool balanced, bool include_positive, bool normalize, bool gather, "
    "bool validate, str backend"
)
_TABLES = "Tensor rows, Tensor hubs, Tensor group, Tensor temperature, Tensor? overlap"
_SAVED = "Tensor stats, Tensor columns, Tensor used_hubs, Tensor hub_length, Tensor unit_d_rows"

_library: Any = torch.library.Library("lmcl", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    f"contrastive_forward({_TABLES}, Tensor? keys, {_OPTIONS}, bool with_gradient) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"contrastive_backward(Tensor d_loss, {_TABLES}, {_SAVED}, {_OPTIONS}, bool student) -> "
    "(Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def contrastive_forward(
    rows: Tensor,
    hubs: Tensor,
    group: Tensor,
    temperature: Tensor,
    overlap: Tensor | None,
    keys: Tensor | None,
    options: Options,
    *,
    with_gradient: bool,
) -> Forward:
    """Call the operation: differentiable once, by rows, hubs and temperature."""
    return Forward(
        *torch.ops.lmcl.contrastive_forward(
            rows, hubs, group, temperature, overlap, keys, *_scalars(options), with_gradient
        )
    )


def _scalars(options: Options) -> tuple[float | bool | str, ...]:
    return (
        options.intra_weight,
        options.balanced,
        options.include_positive,
        options.normalize,
        options.gather,
        options.validate,
        options.backend,
    )


def _options(scalars: tuple[Any, ...]) -> Options:
    intra_weight, balanced, include_positive, normalize, gather, validate, backend = scalars
    return Options(
        intra_weight=intra_weight,
        balanced=balanced,
        include_positive=include_positive,
        normalize=normalize,
        gather=gather,
        validate=validate,
        backend=backend,
    )


def _forward(
    rows: Tensor,
    hubs: Tensor,
    group: Tensor,
    temperature: Tensor,
    overlap: Tensor | None,
    keys: Tensor | None,
    *arguments: Any,
) -> Any:
    tensors = (rows, hubs, group, temperature, overlap, keys)
    options, with_gradient = _options(arguments[:-1]), arguments[-1]
    # Autocast would round the products inside; the caller has chosen the precision of the tables.
    with torch.autocast(rows.device.type, enabled=False):
        return _passes(options.backend).forward(*tensors, options, with_gradient=with_gradient)


def _backward(d_loss: Tensor, *arguments: Any) -> Any:
    rows, hubs, group, temperature, overlap = arguments[:5]
    empty = rows.new_empty(0)
    saved = Forward(empty, empty, *arguments[5:10])
    options = _options(arguments[10:-1])
    student = arguments[-1]
    with torch.autocast(rows.device.type, enabled=False):
        return _passes(options.backend).backward(
            d_loss, rows, hubs, group, temperature, overlap, saved, options, student=student
        )


def _passes(backend: str) -> Any:
    if backend != "triton":
        return with_chunked
    # Triton is there on Linux only, and its kernels read the environment when loaded.
    from kernels import triton_backend as with_triton

    return with_triton


def _fake_forward(*arguments: Any) -> Forward:
    rows, hubs, _, _, _, keys = arguments[:6]
    options, with_gradient = _options(arguments[6:-1]), arguments[-1]
    n, d = rows.shape
    many = keys is None and options.gather and is_distributed()
    work = with_chunked.working_dtype(rows.dtype)
    width, per_row, changed = d, with_chunked.STATS, False
    if options.backend == "triton":
        from kernels import triton_launch as launch
        from kernels import tuning

        width, per_row = sum(tuning.split_width(d)), launch.STATS
        changed = options.normalize or width != d
    columns = torch.library.get_ctx().new_dynamic_size() if many else (n if changed else 0)
    has_d_rows = keys is not None and (with_gradient or options.backend != "triton")
    return Forward(
        loss=rows.new_empty((), dtype=work),
        figures=rows.new_empty(3, dtype=work),
        stats=rows.new_empty(per_row, n, dtype=work),
        columns=rows.new_empty(columns, width),
        hubs=hubs.new_empty(hubs.shape[0] if changed else 0, width),
        hub_length=hubs.new_empty(hubs.shape[0] if options.normalize else 0, dtype=torch.float32),
        d_rows=rows.new_empty(
            n if has_d_rows else 0, d, dtype=rows.dtype if options.backend == "triton" else work
        ),
    )


def _fake_backward(d_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, hubs, _, temperature = arguments[:4]
    return rows.new_empty(rows.shape), hubs.new_empty(hubs.shape), torch.empty_like(temperature)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.scalars = inputs[6:-1]
    ctx.student = inputs[5] is None
    ctx.save_for_backward(*inputs[:5], *output[2:])
    ctx.set_materialize_grads(False)


def _derive(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 14
    if d_loss is None:
        return nothing
    d_rows, d_hubs, d_temperature = torch.ops.lmcl.contrastive_backward(
        d_loss, *ctx.saved_tensors, *ctx.scalars, ctx.student
    )
    return d_rows, d_hubs, None, d_temperature, *nothing[4:]


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "manifold_contrastive_loss: asked for a second derivative, only the first is implemented; "
        "call backward without create_graph=True, or use backend='dense'"
    )


_library.impl("contrastive_forward", _forward, "CompositeExplicitAutograd")
_library.impl("contrastive_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("lmcl::contrastive_forward", _fake_forward, lib=_library)
torch.library.register_fake("lmcl::contrastive_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "lmcl::contrastive_forward", _derive, setup_context=_keep, lib=_library
)
torch.library.register_autograd("lmcl::contrastive_backward", _refuse, lib=_library)
