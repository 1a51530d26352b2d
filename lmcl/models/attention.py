"""Attention recorder: CLS attention of any layer that calls one fused attention."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

SUPPORTED_ATTENTION = (Attention, AttentionRope, EvaAttention)
"""Attention modules whose queries and keys reach one fused call a layer, and no mask with them."""


class ClsAttentionRecorder(TorchFunctionMode):
    """Listens to the attention of every layer: where CLS looks, mean over heads, in float32.

    Queries and keys are taken as the layer hands them over: what it does to them before (rotary
    positions, biases kept apart, norms) differs from model to model.

    Args:
        pooled: In a model without CLS: where its patches look, mean over all of them.
    """

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self._queries = slice(None) if pooled else slice(0, 1)
        self.rows: list[Float[Tensor, "n t"]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Call `func`; where it is attention, keep its first row, or the mean of all rows."""
        if func is functional.scaled_dot_product_attention:
            query, key = args[:2]
            scaled = query[:, :, self._queries].float() * query.shape[-1] ** -0.5
            row = (scaled @ key.float().transpose(-2, -1)).softmax(dim=-1)
            self.rows.append(row.mean(dim=(1, 2)))
        return func(*args, **(kwargs or {}))


@contextmanager
def fused_attention(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Attention in one call, in which it can be listened to, also where it is spelled out."""
    before = [module.fused_attn for module in modules]
    for module in modules:
        module.fused_attn = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.fused_attn = was
