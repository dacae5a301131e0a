"""The weight itself, from fragments (Triton): for so many tokens that arithmetic takes the time,
and an ordinary product is the fastest there is."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from quantkit.runtime.kernels import fragments
from quantkit.runtime.kernels.fragments import INPUTS, Fragments
from quantkit.runtime.kernels.unpacking import ptx, unpacked

_STEPS = 8  # of 32 inputs, in a program
BLOCK = tl.constexpr(fragments.BLOCK)
STEP = tl.constexpr(fragments.STEP // INPUTS)  # the same of a block


@triton.jit
def kernel(
    words,
    scale,
    offset,
    out,
    first,
    OUT,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCKED: tl.constexpr,
    PTX: tl.constexpr,
):
    """words, scale, offset as in ``Fragments`` -> out [OUT, K], of the tiles from ``first`` on."""
    DTYPE: tl.constexpr = tl.bfloat16 if out.dtype.element_ty == tl.bfloat16 else tl.float16
    W: tl.constexpr = 4 if BITS == 4 else 2
    tile, part = tl.program_id(0), tl.program_id(1)
    there = first + tile
    t = tl.arange(0, 4)[:, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None]
    ks = part * STEPS + tl.arange(0, STEPS)[None, None, :, None]
    v = tl.arange(0, 4)[None, None, None, :]
    if BLOCKED:
        before = (there // BLOCK * (K // 32 // STEP) + ks // STEP) * BLOCK + there % BLOCK
        place = before * STEP + ks % STEP
    else:
        place = there * (K // 32) + ks
    here = words + place * 128 + g * 16 + t * 4 + v
    found = tl.load(here, mask=ks < K // 32, other=0)
    codes = unpacked(found, BITS, MIDDLE, DTYPE, PTX)
    # [t, g, steps of 32, outputs, inputs]
    weight = codes.reshape(4, 8, STEPS, W, 8).to(tl.float32)
    t, g, ks = t[:, :, :, :, None], g[:, :, :, :, None], ks[:, :, :, :, None]
    w = tl.arange(0, W)[None, None, None, :, None]
    e = tl.arange(0, 8)[None, None, None, None, :]
    real = ks < K // 32
    group = ks * 32 // GROUP
    if BLOCKED:
        group = (there // BLOCK * (K // GROUP) + group) * BLOCK + there % BLOCK
    else:
        group += there * (K // GROUP)
    at = group * (8 * W) + g * W + w + t * 0
    factor = tl.load(scale + at, mask=real, other=0.0).to(tl.float32)
    if OFFSET == "":
        weight = weight * factor
    else:
        moved = tl.load(offset + at, mask=real, other=0.0).to(tl.float32)
        weight = (weight + moved) * factor if OFFSET == "scaled" else weight * factor + moved
    row = (tile * W + w) * 8 + g
    own = t * 2 + e // 2 * 8 + e % 2 if BLOCKED else t * 8 + e
    place = row.to(tl.int64) * K + ks * 32 + own
    tl.store(out + place, weight.to(out.dtype.element_ty), mask=real & (row < OUT))


def dequantize(weight: Fragments, dtype: torch.dtype, first: int = 0, count: int = -1) -> Tensor:
    """The outputs of ``count`` tiles from ``first`` on (all by default), [outputs, in]."""
    tiles = weight.tiles
    count = tiles - first if count < 0 else min(count, tiles - first)
    rows = min(count * weight.rows, weight.out - first * weight.rows)
    out = torch.empty(rows, weight.width, dtype=dtype, device=weight.words.device)
    middle = weight.scheme.midpoint
    half = dtype if dtype == torch.bfloat16 else torch.float16
    interpreted = isinstance(kernel, InterpretedFunction)
    kernel[(count, triton.cdiv(weight.width // INPUTS, _STEPS))](
        weight.words,
        weight.scale,
        weight.offset,
        out,
        first,
        rows,
        K=weight.width,
        GROUP=weight.group,
        STEPS=_STEPS,
        BITS=weight.bits,
        MIDDLE=middle,
        OFFSET=weight.kind,
        BLOCKED=weight.blocked,
        PTX="" if interpreted else ptx(weight.bits, middle, half),
        **({} if interpreted else {"num_warps": 4}),
    )
    return out
