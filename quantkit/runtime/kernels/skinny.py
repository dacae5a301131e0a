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

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.runtime.interpreter import InterpretedFunction

from quantkit.runtime.kernels import unpacking
from quantkit.runtime.kernels.fragments import Fragments


@triton.jit
def _eight(words, MIDDLE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """A word of 4-bit codes: int32 [...] -> [..., 2, 2, 2] in DTYPE, code - MIDDLE."""
    if PTX == "":
        a = (((words >> 0) & 15) - MIDDLE).to(DTYPE)
        b = (((words >> 16) & 15) - MIDDLE).to(DTYPE)
        c = (((words >> 4) & 15) - MIDDLE).to(DTYPE)
        d = (((words >> 20) & 15) - MIDDLE).to(DTYPE)
        e = (((words >> 8) & 15) - MIDDLE).to(DTYPE)
        f = (((words >> 24) & 15) - MIDDLE).to(DTYPE)
        g = (((words >> 12) & 15) - MIDDLE).to(DTYPE)
        h = (((words >> 28) & 15) - MIDDLE).to(DTYPE)
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            PTX, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words], (tl.int16,) * 8, is_pure=True, pack=1
        )
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd).to(DTYPE, bitcast=True)


@triton.jit
def _four(words, MIDDLE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """A word of 8-bit codes: int32 [...] -> [..., 2, 2] in DTYPE, code - MIDDLE."""
    if PTX == "":
        a = (((words >> 0) & 255) - MIDDLE).to(DTYPE)
        b = (((words >> 8) & 255) - MIDDLE).to(DTYPE)
        c = (((words >> 16) & 255) - MIDDLE).to(DTYPE)
        d = (((words >> 24) & 255) - MIDDLE).to(DTYPE)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            PTX, "=h,=h,=h,=h,r", [words], (tl.int16,) * 4, is_pure=True, pack=1
        )
    return tl.join(tl.join(a, c), tl.join(b, d)).to(DTYPE, bitcast=True)


@triton.jit
def unpacked(
    words,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """int32 [t, g, n, ..., 4] -> [t, g, n, ..., W, 2, 2, 2] in DTYPE, code - MIDDLE: the outputs of
    a lane, and its eight inputs in their order. PTX says how, or is "" for plain Triton."""
    return _eight(words, MIDDLE, DTYPE, PTX) if BITS == 4 else _four(words, MIDDLE, DTYPE, PTX)


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
    """x [M, K], M <= N; words, scale and offset as in ``Fragments``; out [M, OUT].

    STEP    inputs at a time, a divisor of GROUP
    SHARED  the inputs are divided among the programs of the grid's second dimension; shares
            float32 [programs, of these, ...] and arrived int32 [programs], all 0, are theirs
    TILES   tiles of outputs in a program
    OFFSET  "", "scaled" or "plain": see ``Fragments``
    PTX     how to unpack a word, or "" for plain Triton
    AHEAD   read the next codes before computing with these
    PDL     start while the kernel before this one still runs
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    W: tl.constexpr = 4 if BITS == 4 else 2  # a lane's outputs in a tile
    KS: tl.constexpr = STEP // 32
    NT: tl.constexpr = N // 8

    program, share, split = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, last = share * (K // STEP) // split, (share + 1) * (K // STEP) // split
    tile = program * TILES

    # lanes first: Triton deals them out from the left, once the last dimension fills a load
    # codes [t, g, steps of 32, tiles, words]
    t = tl.arange(0, 4)[:, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None]
    ks = tl.arange(0, KS)[None, None, :, None, None]
    rt = tl.arange(0, TILES)[None, None, None, :, None]
    v = tl.arange(0, 4)[None, None, None, None, :]
    here = words + ((tile + rt) * (K // 32) + ks) * 128 + g * 16 + t * 4 + v

    # x [t, g, steps of 32, eights of tokens, inputs]
    nt = tl.arange(0, NT)[None, None, None, :, None]
    e = tl.arange(0, 8)[None, None, None, None, :]
    token = nt * 8 + g
    inputs = x + token * stride + ks * 32 + t * 8 + e

    # scales [t, g, tiles, outputs]: every t sees the same
    ts = tl.arange(0, 4)[:, None, None, None]
    gs = tl.arange(0, 8)[None, :, None, None]
    rs = tl.arange(0, TILES)[None, None, :, None]
    ws = tl.arange(0, W)[None, None, None, :]
    scales = (tile + rs) * (K // GROUP * 8 * W) + gs * W + ws + ts * 0

    now = tl.load(here + first * (KS * 128))
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    sums = tl.zeros([4, 8, TILES, NT, 2, W], tl.float32)
    for step in range(first, last):
        if AHEAD:
            following = tl.load(here + (step + 1) * (KS * 128), mask=step + 1 < last)
        elif step > first:
            now = tl.load(here + step * (KS * 128))
        seen = tl.load(inputs + step * STEP, mask=token < M, other=0.0)
        group = (step * STEP // GROUP) * (8 * W)
        factor = tl.load(scale + scales + group).to(tl.float32)[:, :, :, None, None]

        # outputs are tile, word, g; inputs: step, 4 of 8, t, 3 of 4
        codes = unpacked(now, BITS, MIDDLE, DTYPE, PTX)
        codes = codes.reshape(4, 8, KS, TILES, W, 2, 2, 2)
        left = codes.permute(3, 4, 1, 2, 5, 0, 6, 7).reshape(TILES * W * 8, STEP)
        seen = seen.reshape(4, 8, KS, NT, 2, 2, 2)
        right = seen.permute(2, 4, 0, 5, 6, 3, 1).reshape(STEP, N)
        found = tl.dot(left, right).reshape(TILES, W, 8, NT, 4, 2).permute(4, 2, 0, 3, 5, 1)
        if OFFSET != "":
            # the sum of x, from the tensor cores: every row of the result is the same
            ones = tl.full([16, STEP], 1.0, tl.float32).to(DTYPE)
            total = tl.dot(ones, right).reshape(1, 2, 8, NT, 4, 2).permute(4, 2, 0, 3, 5, 1)
            total = tl.sum(total, 5, keep_dims=True) * 0.5
            moved = tl.load(offset + scales + group).to(tl.float32)[:, :, :, None, None]
            if OFFSET == "scaled":
                sums += (found + moved * total) * factor
            else:
                sums += found * factor + moved * total
        else:
            sums += found * factor
        if AHEAD:
            now = following

    # [t, g, tiles, eights of tokens, pair, outputs]
    t = tl.arange(0, 4)[:, None, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None, None]
    rt = tl.arange(0, TILES)[None, None, :, None, None, None]
    nt = tl.arange(0, NT)[None, None, None, :, None, None]
    pair = tl.arange(0, 2)[None, None, None, None, :, None]
    w = tl.arange(0, W)[None, None, None, None, None, :]
    if SHARED:
        SIZE: tl.constexpr = TILES * NT * 64 * W
        at = (((rt * NT + nt) * 2 + pair) * 32 + g * 4 + t) * W + w
        mine = shares + program * (split * SIZE) + at
        tl.store(mine + share * SIZE, sums)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + program, 1, sem="acq_rel")
        if before < split - 1:
            return
        tl.store(arrived + program, 0)
        sums = tl.zeros([4, 8, TILES, NT, 2, W], tl.float32)
        for other in range(split):
            sums += tl.load(mine + other * SIZE, cache_modifier=".cg")
    token = nt * 8 + t * 2 + pair
    row = ((tile + rt) * W + w) * 8 + g
    if BIAS:
        sums += tl.load(bias + row, mask=row < OUT, other=0.0).to(tl.float32)
    tl.store(out + token * OUT + row, sums.to(DTYPE), mask=(token < M) & (row < OUT))


@dataclass(frozen=True)
class Config:
    """How the work is divided; see :func:`kernel`."""

    tiles: int = 2
    split: int = 8
    step: int = 128
    ahead: bool = True

    def fits(self, fragments: Fragments) -> bool:
        """Whether the weight can be divided so."""
        steps = fragments.width // self.step
        return (
            fragments.group % self.step == 0
            and fragments.words.shape[0] % self.tiles == 0
            and self.split <= steps
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
    """x [tokens, in] in float16 or bfloat16, at most 64 tokens -> [tokens, out] in the same.

    arrived  int32, as many as there are tiles, all 0 before and after. Two launches that may run at
             the same time need two of them.

    ``early`` lets the kernel begin before the one in front of it has ended (Hopper and later).
    """
    tokens = len(x)
    n = max(8, triton.next_power_of_2(tokens))
    blocks = weight.rows // 8
    programs = weight.words.shape[0] // config.tiles
    size = config.tiles * (n // 8) * 64 * blocks
    room = programs * config.split * size if config.split > 1 else 0
    shares = torch.empty(room, dtype=torch.float32, device=x.device)
    out = torch.empty(tokens, weight.out, dtype=x.dtype, device=x.device)
    middle = weight.scheme.midpoint
    interpreted = isinstance(kernel, InterpretedFunction)
    more = {} if interpreted else {"num_warps": 1, "num_stages": 1, "launch_pdl": early}
    kernel[(programs, config.split)](
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
        TILES=config.tiles,
        N=n,
        BITS=weight.bits,
        MIDDLE=middle,
        OFFSET=weight.kind,
        BIAS=bias is not None,
        PTX="" if interpreted else unpacking.ptx(weight.bits, middle, x.dtype),
        AHEAD=config.ahead,
        PDL=early,
        **more,
    )
    return out
