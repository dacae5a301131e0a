"""The small things of a step, one launch each (Triton).

For a single token a launch costs more than the arithmetic: what torch does in five or ten launches
(rotary positions, RMS norms, writing the cache) or in one that leaves the GPU idle (a norm of one
row) takes as long as a linear layer. These are for few rows; for many, torch is as good.

On Hopper and later every kernel is launched while the one before it still runs, and waits for its
end before it reads what that one writes (``PDL``): a launch then costs nothing in between.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.runtime.interpreter import InterpretedFunction

from quantkit.runtime.kernels import support

_PIECE = 512  # numbers that a program of ``elementwise`` computes


def _how(kernel: Any, like: Tensor, warps: int) -> dict[str, Any]:
    """Settings of a launch."""
    early = support.early(like.device)
    if isinstance(kernel, InterpretedFunction):
        return {"PDL": False}
    return {"PDL": early, "launch_pdl": early, "num_warps": warps}


@triton.jit
def _norm(
    x,
    weight,
    bias,
    out,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    real = column < WIDTH
    scale = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    if BIAS:
        shift = tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    values = tl.load(x + row * WIDTH + column, mask=real, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / WIDTH
    apart = tl.where(real, values - mean, 0.0)
    found = apart * tl.rsqrt(tl.sum(apart * apart, 0) / WIDTH + eps) * scale
    if BIAS:
        found += shift
    tl.store(out + row * WIDTH + column, found.to(out.dtype.element_ty), mask=real)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """torch's layer_norm over the last dimension of ``x``, which is contiguous."""
    width = x.shape[-1]
    out = torch.empty_like(x)
    _norm[(x.numel() // width,)](
        x,
        weight,
        bias,
        out,
        eps,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        BIAS=bias is not None,
        **_how(_norm, x, 16),
    )
    return out


@triton.jit
def _rms_norm(
    x,
    weight,
    out,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    real = column < WIDTH
    scale = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    values = tl.load(x + row * WIDTH + column, mask=real, other=0.0).to(tl.float32)
    found = values * tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps)
    if OFFSET:
        found *= 1.0 + scale
    else:
        found = found.to(out.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + row * WIDTH + column, found.to(out.dtype.element_ty), mask=real)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: bool) -> Tensor:
    """x / rms(x) * weight over the last dimension of ``x``, which is contiguous; with ``offset``
    times 1 + weight."""
    width = x.shape[-1]
    out = torch.empty_like(x)
    _rms_norm[(x.numel() // width,)](
        x,
        weight,
        out,
        eps,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        OFFSET=offset,
        **_how(_rms_norm, x, 16),
    )
    return out


@triton.jit
def _elementwise(a, b, out, count, WHAT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    x = tl.load(a + at, mask=real, other=0.0).to(tl.float32)
    if WHAT == "add":
        found = x + tl.load(b + at, mask=real, other=0.0).to(tl.float32)
    elif WHAT == "multiply":
        found = x * tl.load(b + at, mask=real, other=0.0).to(tl.float32)
    elif WHAT == "silu":
        found = x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(WHAT == "gelu")
        found = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(out + at, found.to(out.dtype.element_ty), mask=real)


def elementwise(what: str, a: Tensor, b: Tensor | None = None) -> Tensor:
    """ "add" or "multiply" a and b, or the "silu" or (exact) "gelu" of a; all contiguous, of one
    shape and dtype."""
    out = torch.empty_like(a)
    _elementwise[(triton.cdiv(a.numel(), _PIECE),)](
        a, b, out, a.numel(), WHAT=what, BLOCK=_PIECE, **_how(_elementwise, a, 4)
    )
    return out


@triton.jit
def _row_sums(
    x,
    weight,
    out,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = row[:, None] < rows
    here = weight + row[:, None].to(tl.int64) * WIDTH
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):  # unrolled: all loads are on their way at once
        at = start + column[None, :]
        own = tl.load(here + at, mask=real & (at < WIDTH), other=0.0).to(tl.float32)
        sums += own * tl.load(x + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(sums, 1).to(out.dtype.element_ty), mask=row < rows)


def row_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] of one token times the transpose of weight [out, in], both contiguous: the output
    head of a single text, which is a matter of reading it."""
    rows, width = weight.shape
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    _row_sums[(triton.cdiv(rows, 4),)](
        x, weight, out, rows, WIDTH=width, ROWS=4, BLOCK=1024, **_how(_row_sums, x, 4)
    )
    return out


@triton.jit
def _rotary(
    query,
    key,
    cos,
    sin,
    out_query,
    out_key,
    query_text,
    query_head,
    key_text,
    key_head,
    angle_text,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    both, column = tl.program_id(0), tl.arange(0, BLOCK)
    text, head = both // (HEADS + KEYS), both % (HEADS + KEYS)
    if head < HEADS:
        here = query + text * query_text + head * query_head
        there = out_query + (text * HEADS + head) * WIDTH
    else:
        here = key + text * key_text + (head - HEADS) * key_head
        there = out_key + (text * KEYS + head - HEADS) * WIDTH
    real, turned = column < WIDTH, column < TURNED
    half: tl.constexpr = TURNED // 2
    other = tl.where(column < half, column + half, column - half)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    value = tl.load(here + column, mask=real, other=0.0).to(tl.float32)
    beside = tl.load(here + other, mask=turned, other=0.0).to(tl.float32)
    c = tl.load(cos + text * angle_text + column, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + text * angle_text + column, mask=turned, other=0.0).to(tl.float32)
    found = value * c + tl.where(column < half, -beside, beside) * s
    tl.store(there + column, found.to(out_query.dtype.element_ty), mask=real)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query and key [texts, heads, 1, width] turned by the angles cos and sin [1 or texts, 1, n],
    the first n of their columns, whose halves belong together."""
    texts, heads, _, width = query.shape
    keys = key.shape[1]
    found = torch.empty(texts, heads, 1, width, dtype=query.dtype, device=query.device)
    found_key = torch.empty(texts, keys, 1, width, dtype=query.dtype, device=query.device)
    _rotary[(texts * (heads + keys),)](
        query,
        key,
        cos,
        sin,
        found,
        found_key,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        cos.stride(0) if len(cos) > 1 else 0,
        HEADS=heads,
        KEYS=keys,
        WIDTH=width,
        TURNED=cos.shape[-1],
        BLOCK=triton.next_power_of_2(width),
        **_how(_rotary, query, 1),
    )
    return found, found_key


@triton.jit
def _keep(
    key,
    value,
    keys,
    values,
    at,
    key_text,
    key_head,
    value_text,
    value_head,
    places,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    both, column = tl.program_id(0), tl.arange(0, BLOCK)
    text, head = both // HEADS, both % HEADS
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    there = head.to(tl.int64) * places + tl.load(at + text)
    own = tl.load(key + text * key_text + head * key_head + column, mask=column < WIDTH)
    tl.store(keys + there * WIDTH + column, own, mask=column < WIDTH)
    own = tl.load(value + text * value_text + head * value_head + column, mask=column < DEEP)
    tl.store(values + there * DEEP + column, own, mask=column < DEEP)


def keep(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> None:
    """Write key and value [texts, heads, 1, width] into keys and values [heads, places, width],
    those of each text at the place that ``at`` has for it, int64 [texts]."""
    heads, places, width = keys.shape
    deep = values.shape[-1]
    _keep[(len(at) * heads,)](
        key,
        value,
        keys,
        values,
        at,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        places,
        HEADS=heads,
        WIDTH=width,
        DEEP=deep,
        BLOCK=triton.next_power_of_2(max(width, deep)),
        **_how(_keep, key, 1),
    )
