"""What can be wrong with the arguments, one sentence each, before anything is computed."""

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_UNIT_TOLERANCE = 0.02
_MOST_ELEMENTS = 2**31


def check_arguments(
    rows: Tensor,
    hubs: Tensor,
    group: Tensor,
    *,
    temperature: float | Tensor,
    coldest: float = 0.0,
    intra_weight: float | str,
    overlap: Tensor | None,
    keys: Tensor | None,
) -> None:
    """Refuse what can be refused without reading a tensor's values.

    Raises:
        ValueError: Sizes, options or a temperature outside their range.
        TypeError: Wrong element types, or tensors on different devices.
    """
    _check_shapes(rows, hubs, group, keys)
    _check_types(rows, hubs, group, overlap, keys)
    if overlap is not None and (overlap.ndim != 2 or overlap.shape[0] != rows.shape[0]):
        raise ValueError(
            f"overlap: asked for one row per row of the batch, [{rows.shape[0]}, c], got "
            f"{list(overlap.shape)}; pass the IoU of each crop with every crop of its image"
        )
    if overlap is not None:
        check_table(overlap.shape[0], overlap.shape[1])
    _check_temperature(temperature)
    _check_intra_weight(intra_weight)
    _check_number("coldest", coldest)
    if not 0 <= coldest < math.inf:
        raise ValueError(
            f"coldest: asked for a number of at least 0, got {coldest}; 0 states no bound"
        )
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        _check_device("temperature", temperature, rows)


def check_table(rows: int, most: int) -> None:
    """Refuse a table of pairs inside images that 32-bit indices cannot address."""
    if rows * most >= _MOST_ELEMENTS:
        raise ValueError(
            f"group: the table of pairs inside images has {rows} x {most} elements, the limit is "
            f"2^31 - 1; take fewer crops of an image or fewer images per rank"
        )


def check_transforms(name: str, backend: str, *tensors: object) -> None:
    """Refuse tensors inside torch.func's transforms and forward-mode derivatives.

    Some of them would be answered with zeros: a tangent is dropped where an operation knows none.

    Args:
        name: Of the operation.
        backend: As the caller gave it; "dense" is plain torch and takes them.
        tensors: The differentiable arguments; what is no tensor passes.

    Raises:
        RuntimeError: If a tensor is inside `vmap`, `grad`, `jvp` or the like.
    """
    if backend == "dense" or torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if isinstance(tensor, Tensor) and _is_transformed(tensor):
            raise RuntimeError(
                f"{name}: asked for a transform (vmap, grad, jvp or the like of torch.func, or "
                "forward-mode AD), got backend="
                f"{backend!r}, which has one backward pass and nothing else; call .backward() or "
                "torch.autograd.grad, or pass backend='dense' and validate=False"
            )


def _is_transformed(tensor: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    dual = torch.autograd.forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return dual.tangent is not None


def check_values(
    rows: Tensor, hubs: Tensor, keys: Tensor | None, overlap: Tensor | None, *, normalize: bool
) -> None:
    """Refuse overlaps outside [0, 1], and rows not of unit length although `normalize=False`.

    NaN passes: it makes the loss NaN, which the caller is to see.

    Raises:
        ValueError: If an overlap is no share of pixels, or a row's length is further from 1 than
            the rounding of bfloat16 explains.
    """
    if overlap is not None:
        _check_overlap_values(overlap)
    if normalize:
        return
    for name, tensor in (("rows", rows), ("hubs", hubs), ("keys", keys)):
        if tensor is None or tensor.numel() == 0:
            continue
        length = torch.linalg.vector_norm(tensor.detach(), dim=1, dtype=_at_least_float32(tensor))
        off = (length - 1).abs() > _UNIT_TOLERANCE
        if bool(off.any()):
            worst = int(off.float().argmax())
            raise ValueError(
                f"{name}: asked for rows of unit length (normalize=False), got length "
                f"{float(length[worst]):.4g} in row {worst}; pass normalize=True or divide by "
                "the length first"
            )


def check_overlap_width(overlap: Tensor | None, most: int) -> None:
    """Refuse an overlap table that has fewer columns than an image has crops."""
    if overlap is not None and overlap.shape[1] < most:
        raise ValueError(
            f"overlap: asked for a column per crop of an image, {most} here, got "
            f"{overlap.shape[1]}; pad the table with 0"
        )


def check_grouped(
    q: Tensor,
    k: Tensor | None,
    temperature: float | Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    group_weight: float | Tensor,
) -> None:
    """Refuse arguments of `grouped_logsumexp` without reading a tensor's values.

    Raises:
        ValueError: Sizes, groups of one side only, numbers outside their range.
        TypeError: Wrong element types, or tensors on different devices.
    """
    check_tables(("q", q), ("k", k))
    if k is not None and (q_group is None) != (k_group is None):
        has, lacks = ("q", "k") if k_group is None else ("k", "q")
        raise ValueError(
            f"{lacks}_group: asked for groups of both sides, got only {has}_group; pass "
            f"{lacks}_group too, or neither"
        )
    if k is None and k_group is not None:
        raise ValueError(
            "k_group: got groups of columns without columns; pass q_group, for rows that are "
            "compared with one another have one group each"
        )
    for name, group, table in (("q_group", q_group, q), ("k_group", k_group, k)):
        if group is None or table is None:
            continue
        check_group(name, group, name[0], table)
    _check_group_weight(group_weight, q, q_group)
    _check_temperature(temperature)
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        _check_device("temperature", temperature, q, "q")


def check_tables(first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    """Refuse what is no table [count, width] of numbers, or of another kind than the first.

    Args:
        first: Name and table that the others are compared with.
        others: Names and tables; None passes.
    """
    of, like = first
    for name, table in (first, *others):
        if table is None:
            continue
        if table.ndim != 2:
            raise ValueError(
                f"{name}: asked for a table [count, width], got shape {list(table.shape)}; "
                "flatten everything but the last axis"
            )
        _check_elements(name, table)
        if table.shape[1] != like.shape[1]:
            raise ValueError(
                f"{name}: asked for the width of {of}, {like.shape[1]}, got {table.shape[1]}; "
                "take both from the same space"
            )
        _check_same_type(name, table, of, like)
        _check_device(name, table, like, of)


def check_group(name: str, group: Tensor, of: str, table: Tensor) -> None:
    """Refuse what is not one whole number per row of a table."""
    if group.shape != table.shape[:1]:
        raise ValueError(
            f"{name}: asked for one whole number per row of {of}, [{table.shape[0]}], got "
            f"{list(group.shape)}; pass equal numbers where rows belong together"
        )
    _check_group_type(name, group)
    _check_device(name, group, table, of)


def check_same_shape(name: str, table: Tensor, other: str, like: Tensor) -> None:
    """Refuse two tables whose rows do not belong together one by one, or of two types."""
    if table.shape != like.shape or table.ndim != 2:
        raise ValueError(
            f"{name}: asked for the shape of {other}, [count, width], got {list(table.shape)} "
            f"beside {list(like.shape)}; row i of one belongs to row i of the other"
        )
    check_tables((other, like), (name, table))


def check_queue(queue: Any, image: Tensor) -> None:
    """Refuse a queue that is no pair of tables like `image`; each may be of any length.

    Raises:
        TypeError: No pair of tensors, another element type or device.
        ValueError: Another width.
    """
    is_pair = isinstance(queue, tuple | list) and len(queue) == 2
    if not is_pair or not all(isinstance(table, Tensor) for table in queue):
        parts = queue if isinstance(queue, tuple | list) else [queue]
        found = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(
            f"queue: asked for two tensors, (images, texts), got {type(queue).__name__} ({found}); "
            "pass a table [0, width] for a side that has none, or leave queue out"
        )
    check_tables(("image", image), ("queue[0]", queue[0]), ("queue[1]", queue[1]))


def check_names(given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse an option that there is not."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise TypeError(
                f"{name}: there is no such option, asked for any of {', '.join(known)}"
                + (f"; did you mean {close[0]!r}?" if close else "; leave it out")
            )


def check_weights(weights: Tensor) -> None:
    """Refuse negative and infinite weights; reads values. NaN passes and makes the result NaN."""
    outside = (weights < 0) | weights.isposinf()
    if bool(outside.any()):
        raise ValueError(
            f"group_weight: asked for numbers of at least 0, got {float(weights[outside][0]):.4g}; "
            "0 leaves a column out"
        )


def check_weight_width(weights: Tensor, most: int) -> None:
    """Refuse a table of weights that has fewer columns than a group has members."""
    if weights.shape[1] < most:
        raise ValueError(
            f"group_weight: asked for a column per member of a row's group, {most} here, got "
            f"{weights.shape[1]}; pad the table with 0"
        )


def _check_group_weight(group_weight: float | Tensor, q: Tensor, q_group: Tensor | None) -> None:
    if isinstance(group_weight, Tensor):
        if group_weight.ndim != 2 or group_weight.shape[0] != q.shape[0]:
            raise ValueError(
                f"group_weight: asked for a number or one row of weights per row of q, "
                f"[{q.shape[0]}, c], got {list(group_weight.shape)}; entry (i, c) is of the c-th "
                "column of row i's group"
            )
        check_table(*group_weight.shape)
        _check_device("group_weight", group_weight, q, "q")
    else:
        _check_number("group_weight", group_weight)
        if not 0 <= group_weight < math.inf:
            raise ValueError(
                f"group_weight: asked for a number of at least 0, got {group_weight}; "
                "0 leaves the own group out"
            )
    if q_group is None and (isinstance(group_weight, Tensor) or group_weight != 1.0):
        raise ValueError(
            "group_weight: got weights without groups; pass q_group (and k_group), or leave "
            "group_weight at 1"
        )


def _check_group_type(name: str, group: Tensor) -> None:
    if group.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name}: asked for int64 indices, got {group.dtype}; convert with {name}.long()"
        )


def _check_overlap_values(overlap: Tensor) -> None:
    outside = (overlap < 0) | (overlap > 1 + torch.finfo(overlap.dtype).eps)
    if bool(outside.any()):
        worst = float(overlap[outside][0])
        raise ValueError(
            f"overlap: asked for intersection over union in [0, 1], got {worst:.4g}; divide the "
            "shared area by the area of the union, and pad with 0"
        )


def _check_shapes(rows: Tensor, hubs: Tensor, group: Tensor, keys: Tensor | None) -> None:
    for name, tensor in (("rows", rows), ("hubs", hubs)):
        if tensor.ndim != 2:
            raise ValueError(
                f"{name}: asked for a table [count, width], got shape {list(tensor.shape)}; "
                "flatten images and crops into one axis, images first"
            )
    if hubs.shape[1] != rows.shape[1]:
        raise ValueError(
            f"hubs: asked for the width of rows, {rows.shape[1]}, got {hubs.shape[1]}; "
            "take both from the same model"
        )
    if group.shape != rows.shape[:1]:
        raise ValueError(
            f"group: asked for one image index per row, [{rows.shape[0]}], got "
            f"{list(group.shape)}; repeat each image's index once per crop"
        )
    if hubs.shape[0] > rows.shape[0] or (rows.shape[0] and not hubs.shape[0]):
        raise ValueError(
            f"hubs: asked for one row per image in group, got {hubs.shape[0]} hubs for "
            f"{rows.shape[0]} rows; pass the salient crop of each image once, in row order"
        )
    if keys is not None and keys.shape != rows.shape:
        raise ValueError(
            f"keys: asked for the shape of rows, {list(rows.shape)}, got {list(keys.shape)}; "
            "embed the same crops, in the same order, with the teacher"
        )


def _check_types(
    rows: Tensor, hubs: Tensor, group: Tensor, overlap: Tensor | None, keys: Tensor | None
) -> None:
    for name, tensor in (("rows", rows), ("hubs", hubs), ("keys", keys)):
        if tensor is not None:
            _check_elements(name, tensor)
            _check_same_type(name, tensor, "rows", rows)
    _check_group_type("group", group)
    if overlap is not None and not overlap.is_floating_point():
        raise TypeError(
            f"overlap: asked for floating-point IoU, got {overlap.dtype}; pass "
            "intersection over union as float32"
        )
    named = (("hubs", hubs), ("group", group), ("overlap", overlap), ("keys", keys))
    for name, tensor in named:
        if tensor is not None:
            _check_device(name, tensor, rows)


def _check_elements(name: str, table: Tensor) -> None:
    if table.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: asked for float16, bfloat16, float32 or float64, got {table.dtype}; "
            "convert it first"
        )
    if table.layout != torch.strided:
        raise TypeError(
            f"{name}: asked for a dense tensor, got layout {table.layout}; convert with "
            f"{name}.to_dense()"
        )


def _check_same_type(name: str, table: Tensor, of: str, like: Tensor) -> None:
    if table.dtype != like.dtype:
        raise TypeError(
            f"{name}: asked for the dtype of {of}, {like.dtype}, got {table.dtype}; "
            f"convert with {name}.to({of}.dtype)"
        )


def _check_number(name: str, value: object) -> None:
    # numpy's numbers are no floats of Python's, and compare like them.
    if not (isinstance(value, int | float) or hasattr(value, "__float__")):
        raise TypeError(
            f"{name}: asked for a number, got {value!r} ({type(value).__name__}); convert it with "
            "float()"
        )


def _check_device(name: str, tensor: Tensor, rows: Tensor, of: str = "rows") -> None:
    if tensor.device != rows.device:
        raise TypeError(
            f"{name}: asked for the device of {of}, {rows.device}, got {tensor.device}; "
            f"move it with {name}.to({of}.device)"
        )


def _check_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise ValueError(
                f"temperature: asked for one floating-point number, got {temperature.dtype} of "
                f"shape {list(temperature.shape)}; pass a float or a 0-d tensor"
            )
        return
    _check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature: asked for a number above 0, got {temperature}; the usual one is 0.1"
        )


def _check_intra_weight(intra_weight: float | str) -> None:
    if isinstance(intra_weight, str):
        if intra_weight != "balanced":
            raise ValueError(
                f"intra_weight: asked for a number or 'balanced', got {intra_weight!r}; "
                "did you mean 'balanced'?"
            )
        return
    _check_number("intra_weight", intra_weight)
    if not 0 <= intra_weight < math.inf:
        raise ValueError(
            f"intra_weight: asked for a number of at least 0, got {intra_weight}; "
            "0 leaves the crops of an image out"
        )


def check_temperature_value(value: float, *, coldest: float = 0.0) -> None:
    """Refuse the value of a temperature that came as a tensor."""
    if not value > 0 and not math.isnan(value):
        raise ValueError(
            f"temperature: asked for a number above 0, got {value}; learn its logarithm and pass "
            "log_temperature.exp()"
        )
    # The same number in float32 may be a little less.
    if value < coldest * (1 - 1e-6):
        raise ValueError(
            f"temperature: asked for at least coldest, {coldest}, got {value}; clamp it, or pass a "
            "lower bound"
        )


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
