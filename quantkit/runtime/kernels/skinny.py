"""y = x W^T for few tokens: tensor cores fed straight from packed codes (Triton).

One warp owns some tiles of outputs and a share of the inputs. For every group it reads its codes in
the order of ``fragments``, makes them half-precision integers two at a time, multiplies them with
all tokens at once, and scales the *sums*: the products are exact, and a scale costs one
multiplication for a whole group. Threads share nothing, so nothing passes through shared memory.

The inputs are divided among several warps so that the memory always has enough to do; the last
warp that finishes an output adds the shares up, in their order: results do not depend on timing.

The weight's tile is the left operand, so that 8 tokens are enough to fill an instruction.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.runtime.interpreter import InterpretedFunction

from quantkit.runtime.kernels.fragments import Fragments
from quantkit.runtime.kernels.unpacking import ptx, unpacked


@triton.jit
def product(
    left,
    right,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    N: tl.constexpr,
):
    """[PARTS, ROWS, STEP] x [PARTS, STEP, N] -> float32 [PARTS, ROWS, N], each part in a warp."""
    if PARTS == 1:
        found = tl.dot(left.reshape(ROWS, STEP), right.reshape(STEP, N)).reshape(1, ROWS, N)
    else:
        found = tl.dot(left.reshape(PARTS, ROWS, STEP), right.reshape(PARTS, STEP, N))
    return found


@triton.jit
def kernel(
    x,
    words,
    scale,
    offset,
    bias,
    out,
    shares,
    arrived,
    M,
    OUT,
    stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    SHARED: tl.constexpr,
    PARTS: tl.constexpr,
    WARPS: tl.constexpr,
    TILES: tl.constexpr,
    N: tl.constexpr,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    PTX: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [M, K]; words, scale and offset as in ``Fragments``; out [M, OUT]. The grid is programs for
    all tiles, shares of the inputs, and N tokens each.

    STEP    inputs at a time, a divisor of GROUP
    SHARED  whether there are several shares; then shares float32 [programs, of these, ...] and
            arrived int32 [programs], all 0, are where they meet
    PARTS   steps that a program computes side by side, one in each of its warps, or
    WARPS   warps that share a step: four or eight make a warp group of Hopper's; one of them is 1
    TILES   tiles of outputs in every warp
    OFFSET  "", "scaled" or "plain": see ``Fragments``
    PTX     how to unpack a word, or "" for plain Triton
    AHEAD   read the next codes before computing with these
    PDL     start while the kernel before this one still runs
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    W: tl.constexpr = 4 if BITS == 4 else 2  # a lane's outputs in a tile
    PAIRS: tl.constexpr = W // 2
    ROWS: tl.constexpr = WARPS * TILES * W * 8
    KS: tl.constexpr = STEP // 32
    NT: tl.constexpr = N // 8

    program, share, split = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(2) * N
    first, last = share * (K // STEP) // split, (share + 1) * (K // STEP) // split
    tile = program * (WARPS * TILES)

    # lanes first, then warps: Triton deals them out from the left, once the last dimension fills a
    # load. codes [t, g, parts, warps, steps of 32, tiles, words]
    t = tl.arange(0, 4)[:, None, None, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None, None, None]
    part = tl.arange(0, PARTS)[None, None, :, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, None, :, None, None, None]
    ks = tl.arange(0, KS)[None, None, None, None, :, None, None]
    rt = tl.arange(0, TILES)[None, None, None, None, None, :, None]
    v = tl.arange(0, 4)[None, None, None, None, None, None, :]
    mine = (tile + rt * WARPS + warp) * (K // 32)
    here = words + (mine + part * KS + ks) * 128 + g * 16 + t * 4 + v

    # x [t, g, parts, steps of 32, eights of tokens, inputs]
    tx = tl.arange(0, 4)[:, None, None, None, None, None]
    gx = tl.arange(0, 8)[None, :, None, None, None, None]
    px = tl.arange(0, PARTS)[None, None, :, None, None, None]
    kx = tl.arange(0, KS)[None, None, None, :, None, None]
    nx = tl.arange(0, NT)[None, None, None, None, :, None]
    ex = tl.arange(0, 8)[None, None, None, None, None, :]
    token = column + nx * 8 + gx
    inputs = x + token * stride + (px * KS + kx) * 32 + tx * 8 + ex

    # scales [t, g, parts, warps, tiles, outputs]: every t sees the same
    ts = tl.arange(0, 4)[:, None, None, None, None, None]
    gs = tl.arange(0, 8)[None, :, None, None, None, None]
    ps = tl.arange(0, PARTS)[None, None, :, None, None, None]
    us = tl.arange(0, WARPS)[None, None, None, :, None, None]
    rs = tl.arange(0, TILES)[None, None, None, None, :, None]
    ws = tl.arange(0, W)[None, None, None, None, None, :]
    scales = (tile + rs * WARPS + us) * (K // GROUP * 8 * W) + gs * W + ws + ts * 0

    if PARTS == 1:
        now = tl.load(here + first * (KS * 128))
    else:
        now = tl.load(here + first * (KS * 128), mask=first + part < last, other=0)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    sums = tl.zeros([4, 8, PARTS, WARPS, TILES, NT, 2, W], tl.float32)
    for step in range(first, last, PARTS):
        if AHEAD:
            after = step + PARTS
            following = tl.load(here + after * (KS * 128), mask=after + part < last, other=0)
        elif step > first:
            now = tl.load(here + step * (KS * 128), mask=step + part < last, other=0)
        # parts behind the last step read it again, and count with a scale of 0
        behind = tl.maximum(step + px - last + 1, 0) if PARTS > 1 else 0
        seen = tl.load(inputs + (step - behind) * STEP, mask=token < M, other=0.0)
        group = ((step + ps) * STEP // GROUP) * (8 * W)
        real = step + ps < last if PARTS > 1 else None
        none = 0.0 if PARTS > 1 else None
        factor = tl.load(scale + scales + group, mask=real, other=none).to(tl.float32)
        factor = factor[:, :, :, :, :, None, None]

        # outputs are tile, pair, warp, one of it, g; inputs: step, 4 of 8, t, 3 of 4. That is how
        # the instructions deal them to lanes and warps, so nothing has to move
        codes = unpacked(now, BITS, MIDDLE, DTYPE, PTX)
        codes = codes.reshape(4, 8, PARTS, WARPS, KS, TILES, PAIRS, 2, 2, 2, 2)
        seen = seen.reshape(4, 8, PARTS, KS, NT, 2, 2, 2)
        if WARPS == 1:
            left = codes.permute(2, 5, 6, 3, 7, 1, 4, 8, 0, 9, 10)
            right = seen.permute(2, 3, 5, 0, 6, 7, 4, 1)
        else:
            left = codes.permute(2, 5, 6, 3, 7, 1, 4, 8, 9, 0, 10)
            right = seen.permute(2, 3, 5, 6, 0, 7, 4, 1)
        found = product(left, right, PARTS, ROWS, STEP, N)
        found = found.reshape(PARTS, TILES, PAIRS, WARPS, 2, 8, NT, 4, 2)
        found = found.permute(7, 5, 0, 3, 1, 6, 8, 2, 4)
        found = found.reshape(4, 8, PARTS, WARPS, TILES, NT, 2, W)
        if OFFSET != "":
            # the sum of x, from the tensor cores: every row of the result is the same
            ones = tl.full([PARTS, 16 * WARPS, STEP], 1.0, tl.float32).to(DTYPE)
            total = product(ones, right, PARTS, 16 * WARPS, STEP, N)
            total = total.reshape(PARTS, 1, WARPS, 2, 8, NT, 4, 2).permute(6, 4, 0, 2, 1, 5, 7, 3)
            total = tl.sum(total, 7, keep_dims=True) * 0.5
            moved = tl.load(offset + scales + group, mask=real, other=none).to(tl.float32)
            moved = moved[:, :, :, :, :, None, None]
            if OFFSET == "scaled":
                sums += (found + moved * total) * factor
            else:
                sums += found * factor + moved * total
        else:
            sums += found * factor
        if AHEAD:
            now = following
    sums = tl.sum(sums, 2)

    # [t, g, warps, tiles, eights of tokens, pair, outputs]
    t = tl.arange(0, 4)[:, None, None, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None, None, None]
    rt = tl.arange(0, TILES)[None, None, None, :, None, None, None]
    nt = tl.arange(0, NT)[None, None, None, None, :, None, None]
    pair = tl.arange(0, 2)[None, None, None, None, None, :, None]
    w = tl.arange(0, W)[None, None, None, None, None, None, :]
    if SHARED:
        SIZE: tl.constexpr = ROWS * N
        meeting = tl.program_id(2) * tl.num_programs(0) + program
        at = ((((rt * NT + nt) * 2 + pair) * WARPS + warp) * 32 + g * 4 + t) * W + w
        ours = shares + meeting * (split * SIZE) + at
        tl.store(ours + share * SIZE, sums)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + meeting, 1, sem="acq_rel")
        if before < split - 1:
            return
        tl.store(arrived + meeting, 0)
        sums = tl.zeros([4, 8, WARPS, TILES, NT, 2, W], tl.float32)
        for other in range(split):
            sums += tl.load(ours + other * SIZE, cache_modifier=".cg")
    token = column + nt * 8 + t * 2 + pair
    row = ((tile + rt * WARPS + warp) * W + w) * 8 + g
    if BIAS:
        sums += tl.load(bias + row, mask=row < OUT, other=0.0).to(tl.float32)
    tl.store(out + token * OUT + row, sums.to(DTYPE), mask=(token < M) & (row < OUT))


@dataclass(frozen=True)
class Config:
    """How the work is divided; see :func:`kernel`. ``registers`` is the most that a thread may
    take, 0 for no limit."""

    tiles: int = 1
    split: int = 1
    step: int = 128
    parts: int = 1
    warps: int = 1
    tokens: int = 8
    ahead: bool = True
    registers: int = 0

    def fits(self, weight: Fragments) -> bool:
        """Whether the weight can be divided so."""
        return (
            weight.group % self.step == 0
            and weight.words.shape[0] % (self.tiles * self.warps) == 0
            and self.split * self.parts <= weight.width // self.step
        )


def matmul(
    x: Tensor,
    weight: Fragments,
    bias: Tensor | None,
    arrived: Tensor,
    config: Config,
    *,
    early: bool = False,
) -> Tensor:
    """x [tokens, in] in float16 or bfloat16 -> [tokens, out] in the same.

    arrived  int32, as many as there are tiles for every ``config.tokens`` tokens, all 0 before and
             after. Two launches that may run at the same time need two of them.

    ``early`` lets the kernel begin before the one in front of it has ended (Hopper and later).
    """
    tokens = len(x)
    programs = weight.words.shape[0] // (config.tiles * config.warps)
    columns = triton.cdiv(tokens, config.tokens)
    size = config.tiles * config.warps * weight.rows * config.tokens
    room = programs * columns * config.split * size if config.split > 1 else 0
    shares = torch.empty(room, dtype=torch.float32, device=x.device)
    out = torch.empty(tokens, weight.out, dtype=x.dtype, device=x.device)
    middle = weight.scheme.midpoint
    interpreted = isinstance(kernel, InterpretedFunction)
    more: dict[str, Any] = {}
    if not interpreted:
        warps = config.warps * config.parts
        more = {"num_warps": warps, "num_stages": 1, "launch_pdl": early}
        if config.registers:
            more["maxnreg"] = config.registers
    kernel[(programs, config.split, columns)](
        x,
        weight.words,
        weight.scale,
        weight.offset,
        bias,
        out,
        shares,
        arrived,
        tokens,
        weight.out,
        x.stride(0),
        K=weight.width,
        GROUP=weight.group,
        STEP=config.step,
        SHARED=config.split > 1,
        PARTS=config.parts,
        WARPS=config.warps,
        TILES=config.tiles,
        N=config.tokens,
        BITS=weight.bits,
        MIDDLE=middle,
        OFFSET=weight.kind,
        BIAS=bias is not None,
        PTX="" if interpreted else ptx(weight.bits, middle, x.dtype),
        AHEAD=config.ahead,
        PDL=early,
        **more,
    )
    return out
