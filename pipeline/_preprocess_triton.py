"""Device code that turns crops into a network's input: mirror, normalise, round, lay out; one pass.

What a newcomer gets wrong: jaxtyping's import hook must not touch this file (it breaks compilation
on a GPU), so pyproject.toml names the other modules of the package one by one.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def preprocess(
    # pointers
    p_crops, p_flip, p_out,
    # sizes
    SIZE,
    # scalars
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    # constexpr
    HAS_FLIP: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of values of one crop; a value is (pixel * scale + shift) of its channel."""
    i_crop = tl.program_id(0).to(tl.int64)
    values = SIZE * SIZE * 3
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < values
    o_channel = o % 3
    o_x = o // 3 % SIZE
    o_y = o // (3 * SIZE)
    o_from = o
    if HAS_FLIP:
        is_flipped = tl.load(p_flip + i_crop) != 0
        o_from = tl.where(is_flipped, (o_y * SIZE + SIZE - 1 - o_x) * 3 + o_channel, o)
    b_pixel = tl.load(p_crops + i_crop * values + o_from, mask=m, other=0).to(tl.float32)
    b_scale = tl.where(o_channel == 0, scale_r, tl.where(o_channel == 1, scale_g, scale_b))
    b_shift = tl.where(o_channel == 0, shift_r, tl.where(o_channel == 1, shift_g, shift_b))
    b_out = b_pixel * b_scale + b_shift
    o_to = o if CHANNELS_LAST else (o_channel * SIZE + o_y) * SIZE + o_x
    tl.store(p_out + i_crop * values + o_to, b_out.to(p_out.dtype.element_ty), mask=m)
