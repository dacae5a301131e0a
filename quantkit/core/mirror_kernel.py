"""The kernel of mirror.py."""

import triton
import triton.language as tl


@triton.jit
def mirrored(matrix, width, stride, LOWER: tl.constexpr, TILE: tl.constexpr):
    """One tile below the diagonal of ``matrix`` [width, width], rows ``stride`` apart: it goes to
    the place above that is opposite (LOWER), or gets what is there."""
    if tl.program_id(0) > tl.program_id(1):
        return
    low = tl.program_id(1) * TILE + tl.arange(0, TILE)
    high = tl.program_id(0) * TILE + tl.arange(0, TILE)
    below = matrix + low.to(tl.int64)[:, None] * stride + high[None, :]
    above = matrix + high.to(tl.int64)[:, None] * stride + low[None, :]
    inside = (low[:, None] < width) & (low[:, None] > high[None, :])
    across = (low[None, :] < width) & (low[None, :] > high[:, None])
    if LOWER:
        tl.store(above, tl.trans(tl.load(below, inside)), across)
    else:
        tl.store(below, tl.trans(tl.load(above, across)), inside)
