"""The small things of a step, one launch each (Triton).

For a single token a launch costs more than the arithmetic: what torch does in five or ten launches
(rotary positions, writing the cache) or in one that leaves the GPU idle (a norm of one row) takes
as long as a linear layer. These are for few rows; for many, torch is as good.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm(x, weight, bias, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    real = column < WIDTH
    values = tl.load(x + row * WIDTH + column, mask=real, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / WIDTH
    apart = tl.where(real, values - mean, 0.0)
    found = apart * tl.rsqrt(tl.sum(apart * apart, 0) / WIDTH + eps) * scale
    if BIAS:
        found += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
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
        num_warps=8,
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
        num_warps=1,
    )
    return found, found_key


@triton.jit
def _keep(
    key,
    value,
    keys,
    values,
    place,
    key_text,
    key_head,
    value_text,
    value_head,
    room,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    both, column = tl.program_id(0), tl.arange(0, BLOCK)
    text, head = both // HEADS, both % HEADS
    at = both.to(tl.int64) * room + tl.load(place)
    own = tl.load(key + text * key_text + head * key_head + column, mask=column < WIDTH)
    tl.store(keys + at * WIDTH + column, own, mask=column < WIDTH)
    own = tl.load(value + text * value_text + head * value_head + column, mask=column < DEEP)
    tl.store(values + at * DEEP + column, own, mask=column < DEEP)


def keep(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, place: Tensor) -> None:
    """Write key and value [texts, heads, 1, width] into keys and values [texts, heads, room,
    width] at ``place``, an integer on the GPU."""
    texts, heads, room, width = keys.shape
    deep = values.shape[-1]
    _keep[(texts * heads,)](
        key,
        value,
        keys,
        values,
        place,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        room,
        HEADS=heads,
        WIDTH=width,
        DEEP=deep,
        BLOCK=triton.next_power_of_2(max(width, deep)),
        num_warps=1,
    )
