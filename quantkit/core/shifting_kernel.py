"""The kernel of shifting.py."""

import triton
import triton.language as tl


@triton.jit
def shifted(
    x, shift, moved, sums,
    tokens, width, stride,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Some columns of TURNS times TOKENS tokens: x [tokens, width], rows ``stride`` apart; ``sums``
    [programs, width] of what is ``moved`` [tokens, width], as it was rounded."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    by = tl.load(shift + columns, inside, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for turn in range(TURNS):
        token = (tl.program_id(1) * TURNS + turn) * TOKENS + tl.arange(0, TOKENS)
        there = (token < tokens)[:, None] & inside[None, :]
        row = token.to(tl.int64)[:, None]
        given = tl.load(x + row * stride + columns[None, :], there, other=0.0).to(tl.float32)
        rounded = (given - by[None, :]).to(moved.dtype.element_ty)
        tl.store(moved + row * width + columns[None, :], rounded, there)
        total += tl.sum(tl.where(there, rounded.to(tl.float32), 0.0), 0)
    tl.store(sums + tl.program_id(1) * width + columns, total, inside)
