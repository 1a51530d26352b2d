"""The loss as an operation of torch: opaque to torch.compile, first derivative only.

Everything whose size depends on values (images per batch, rows of other ranks) stays inside the
operation, so `torch.compile(fullgraph=True)` sees two calls and nothing else. Defined through
`torch.library.Library` and not `custom_op`, whose wrapper loads the compiler (1.4 s, 300 MB) on the
first call and costs four times as much on each. A schema knows tensors and scalars only, so the
fields of `LossInputs` are laid flat on one side of it and put together again on the other.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kernels import chunked_backend
from kernels.distributed import is_distributed
from kernels.precision import DTYPES, surroundings
from kernels.types import Forward, LossInputs, LossOptions

_OPTIONS = (
    "float intra_weight, bool balanced, bool include_positive, bool normalize, bool gather, "
    "int[] rank_sizes, bool validate, bool has_keys, str backend, str precision, "
    "float coldest"
)
_TABLES = "Tensor rows, Tensor hubs, Tensor group, Tensor temperature, Tensor? overlap"
_SAVED = (
    "Tensor stats, Tensor columns, Tensor used_hubs, Tensor hub_length, Tensor tables, "
    "Tensor unit_d_rows"
)
_TABLE_COUNT = 5
_SAVED_COUNT = 6
_OPTION_NAMES = tuple(field.name for field in dataclasses.fields(LossOptions))

_library: Any = torch.library.Library("lmcl", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    f"contrastive_forward({_TABLES}, Tensor? keys, {_OPTIONS}, bool with_gradient) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"contrastive_backward(Tensor d_loss, {_TABLES}, {_SAVED}, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def contrastive_forward(inputs: LossInputs) -> Forward:
    """Call the operation: differentiable once, by rows, hubs and temperature."""
    # A teacher's gradient is finished in the forward pass; that by the temperature is made of it.
    wanted = inputs.rows.requires_grad or inputs.temperature.requires_grad
    with_gradient = torch.is_grad_enabled() and wanted
    return Forward(*torch.ops.lmcl.contrastive_forward(*flatten(inputs), with_gradient))


def flatten(inputs: LossInputs) -> tuple[Any, ...]:
    """Tables, keys and options in the order of the schema of the forward operation."""
    tables = (inputs.rows, inputs.hubs, inputs.group, inputs.temperature, inputs.overlap)
    return *tables, inputs.keys, *(getattr(inputs.options, name) for name in _OPTION_NAMES)


def _unflatten(
    tables: tuple[Any, ...], keys: Tensor | None, scalars: tuple[Any, ...]
) -> LossInputs:
    rows, hubs, group, temperature, overlap = tables
    fields = dict(zip(_OPTION_NAMES, scalars, strict=True))
    fields["rank_sizes"] = tuple(fields["rank_sizes"])
    return LossInputs(
        rows=rows,
        hubs=hubs,
        group=group,
        temperature=temperature,
        overlap=overlap,
        keys=keys,
        options=LossOptions(**fields),
    )


def _forward_inputs(arguments: tuple[Any, ...]) -> tuple[LossInputs, bool]:
    tables, (keys, *scalars, with_gradient) = arguments[:_TABLE_COUNT], arguments[_TABLE_COUNT:]
    return _unflatten(tables, keys, tuple(scalars)), with_gradient


def _forward(*arguments: Any) -> Forward:
    inputs, with_gradient = _forward_inputs(arguments)
    with surroundings(inputs.rows.device, inputs.options.precision):
        return _backend(inputs).forward(inputs, with_gradient=with_gradient)  # type: ignore[no-any-return]


def _backward(d_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tables, rest = arguments[:_TABLE_COUNT], arguments[_TABLE_COUNT:]
    inputs = _unflatten(tables, None, rest[_SAVED_COUNT:])
    empty = inputs.rows.new_empty(0)
    saved = Forward(empty, empty, *rest[:_SAVED_COUNT])
    with surroundings(inputs.rows.device, inputs.options.precision):
        return _backend(inputs).backward(d_loss, inputs, saved)  # type: ignore[no-any-return]


def _backend(inputs: LossInputs) -> Any:
    if inputs.options.backend != "triton":
        return chunked_backend
    # Triton is there on Linux only, and its kernels read the environment when loaded.
    from kernels import triton_backend

    return triton_backend


def _fake_forward(*arguments: Any) -> Forward:
    inputs, with_gradient = _forward_inputs(arguments)
    rows, hubs, options = inputs.rows, inputs.hubs, inputs.options
    n, d = rows.shape
    many = not options.has_keys and options.gather and is_distributed()
    work = chunked_backend.working_dtype(rows.dtype)
    width, per_row, changed, table = d, chunked_backend.STATS, False, rows.dtype
    per_image, length = 0, n
    is_triton = options.backend == "triton"
    if is_triton:
        from kernels import triton_launch, tuning

        width, per_row = sum(tuning.split_width(d)), triton_launch.STATS
        table = DTYPES[options.precision]
        changed = options.normalize or width != d or table != rows.dtype
        length = triton_launch.padded_length(n)
        per_image = triton_launch.padded_length(hubs.shape[0] + 1) + 3 * length
    columns: Any = n if changed else 0
    if many:
        sizes = options.rank_sizes
        known = sum(sizes[: len(sizes) // 2])
        columns = known if sizes else torch.library.get_ctx().new_dynamic_size()
    has_d_rows = options.has_keys and (with_gradient or not is_triton)
    kept_hubs, lengths = (hubs.shape[0] if kept else 0 for kept in (changed, options.normalize))
    return Forward(
        loss=rows.new_empty((), dtype=work),
        figures=rows.new_empty(3, dtype=work),
        stats=rows.new_empty(per_row, length, dtype=work),
        columns=rows.new_empty(columns, width, dtype=table),
        hubs=hubs.new_empty(kept_hubs, width, dtype=table),
        hub_length=hubs.new_empty(lengths, dtype=torch.float32),
        tables=hubs.new_empty(per_image, dtype=torch.int32),
        d_rows=rows.new_empty(n if has_d_rows else 0, d, dtype=rows.dtype if is_triton else work),
    )


def _fake_backward(d_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, hubs, _, temperature = arguments[:4]
    return rows.new_empty(rows.shape), hubs.new_empty(hubs.shape), torch.empty_like(temperature)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.scalars = inputs[_TABLE_COUNT + 1 : -1]
    ctx.save_for_backward(*inputs[:_TABLE_COUNT], *output[2:])
    ctx.set_materialize_grads(False)


def _derive(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (_TABLE_COUNT + 1 + len(_OPTION_NAMES) + 1)
    if d_loss is None:
        return nothing
    d_rows, d_hubs, d_temperature = torch.ops.lmcl.contrastive_backward(
        d_loss, *ctx.saved_tensors, *ctx.scalars
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
