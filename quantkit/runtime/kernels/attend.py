"""Attention of one new token to everything before it (Triton).

A token reads all keys and values of its text once: a matter of bandwidth, as with weights. torch
gives a head to one program, which leaves most of a GPU idle for a single text; here the positions
of a head are divided among ``SHARES`` programs, and the last one to finish puts their results
together, in order (Dao et al., "Flash-Decoding", 2023). Query heads that share keys are computed
together. Blocks of positions that the mask leaves out are not read, so a cache may be much longer
than the text in it.
"""

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from triton.language.extra import cuda
from triton.runtime.interpreter import InterpretedFunction

from quantkit.runtime.kernels import support

NAME = "quantkit_gpu"
_MORE = ("position_bias", "cache", "softcap", "s_aux")  # attention with one of these is another
BLOCK = 64  # positions at a time
_arrived: "WeakKeyDictionary[nn.Module, Tensor]" = WeakKeyDictionary()


@triton.jit
def attention_step(
    query,
    keys,
    values,
    mask,
    out,
    shares,
    arrived,
    scaling,
    length,
    mask_stride,
    query_stride,
    query_head,
    key_stride,
    key_head,
    key_place,
    value_stride,
    value_head,
    value_place,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEEP: tl.constexpr,
    SHARES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """query [texts, heads, WIDTH], keys [texts, HEADS, length, WIDTH], values the same with DEEP,
    mask bool [texts, length] -> out [texts, heads, DEEP].

    HEADS, GROUP   heads of keys, and heads of queries to each
    ROWS, COLUMNS  GROUP, and the wider of WIDTH and DEEP, as powers of two
    shares         float32 [texts * HEADS, SHARES, ROWS, COLUMNS + 2]: sums, their weight, maximum
    arrived        int32 [texts * HEADS], all 0
    PDL            start while the kernel before this one still runs
    """
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    both, share = tl.program_id(0), tl.program_id(1)
    text, head = both // HEADS, both % HEADS
    row, column, place = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    heads = head * GROUP + row
    own = query + text * query_stride + heads[:, None] * query_head + column[None, :]
    real = row[:, None] < GROUP
    asked = tl.load(own, mask=real & (column[None, :] < WIDTH), other=0.0)
    text_keys = keys + text * key_stride + head * key_head
    text_values = values + text * value_stride + head * value_head

    highest = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(share * BLOCK, length, SHARES * BLOCK):
        at = start + place
        seen = tl.load(mask + text * mask_stride + at, mask=at < length, other=0) != 0
        if tl.max(seen.to(tl.int32), 0) > 0:
            wide = seen[None, :] & (column[:, None] < WIDTH)
            deep = seen[:, None] & (column[None, :] < DEEP)
            key = tl.load(text_keys + at[None, :] * key_place + column[:, None], wide, 0.0)
            value = tl.load(text_values + at[:, None] * value_place + column[None, :], deep, 0.0)
            scores = tl.dot(asked, key, input_precision="ieee") * scaling
            scores = tl.where(seen[None, :], scores, -1e30)
            new = tl.maximum(highest, tl.max(scores, 1))
            less = tl.exp(highest - new)
            each = tl.where(seen[None, :], tl.exp(scores - new[:, None]), 0.0)
            found = tl.dot(each.to(value.dtype), value, input_precision="ieee")
            sums = sums * less[:, None] + found
            weight = weight * less + tl.sum(each, 1)
            highest = new

    SIZE: tl.constexpr = ROWS * (COLUMNS + 2)
    here = shares + (both * SHARES + share) * SIZE
    rows = row[:, None] * COLUMNS + column[None, :]
    own_row = row < GROUP
    tl.store(here + rows, sums, mask=real)
    tl.store(here + ROWS * COLUMNS + row, weight, mask=own_row)
    tl.store(here + ROWS * COLUMNS + ROWS + row, highest, mask=own_row)
    tl.debug_barrier()
    if tl.atomic_add(arrived + both, 1, sem="acq_rel") < SHARES - 1:
        return
    tl.store(arrived + both, 0)
    # what every share counts for is known before its sums arrive: those are all read at once
    first = shares + both * (SHARES * SIZE)
    every = tl.arange(0, SHARES)[:, None] * SIZE + ROWS * COLUMNS + row[None, :]
    each_highest = tl.load(first + every + ROWS, own_row[None, :], -1e30, cache_modifier=".cg")
    each_weight = tl.load(first + every, own_row[None, :], 0.0, cache_modifier=".cg")
    highest = tl.max(each_highest, 0)
    weight = tl.sum(each_weight * tl.exp(each_highest - highest[None, :]), 0)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for other in tl.static_range(SHARES):
        there = first + other * SIZE
        its_sums = tl.load(there + rows, real, 0.0, cache_modifier=".cg")
        its_highest = tl.load(
            there + ROWS * COLUMNS + ROWS + row, own_row, -1e30, cache_modifier=".cg"
        )
        sums += its_sums * tl.exp(its_highest - highest)[:, None]
    sums = sums / tl.where(own_row, weight, 1.0)[:, None]
    whole = out + (text * HEADS * GROUP + heads[:, None]) * DEEP + column[None, :]
    tl.store(whole, sums.to(out.dtype.element_ty), mask=real & (column[None, :] < DEEP))


def use(model: PreTrainedModel) -> None:
    """Let ``model`` compute its steps of one token here, where it otherwise would with torch's
    kernels; all else stays with those."""
    if model.config._attn_implementation != "sdpa":
        return
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [texts, heads, tokens, width], key and value the
    same with as many or fewer heads -> [texts, tokens, heads, width]."""
    plain = not dropout and all(others.get(name) is None for name in _MORE)
    if plain and fits(query, key, value, attention_mask):
        with torch.cuda.device_of(query):  # Triton launches on the current device
            return attend(module, query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(  # type: ignore[no-any-return]
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )


def fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether this is a step of one token that the kernel computes."""
    return (
        query.shape[2] == 1
        and query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and max(key.shape[-1], value.shape[-1]) <= 256
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and (
            mask is None
            or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1) and mask.stride(-1) == 1)
        )
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """query [texts, heads, 1, width], key and value [texts, key heads, length, width], mask bool
    [texts, 1, 1, length] -> [texts, 1, heads, width]. ``module`` is whose attention it is: two
    launches of the same one must not run at the same time."""
    texts, heads, _, width = query.shape
    key_heads, length = key.shape[1:3]
    deep = value.shape[-1]
    if mask is None:
        mask = torch.ones(texts, 1, 1, length, dtype=torch.bool, device=query.device)
    mask = mask.expand(texts, 1, 1, length)
    group = heads // key_heads
    rows = max(16, triton.next_power_of_2(group))
    columns = max(16, triton.next_power_of_2(max(width, deep)))
    split = shares(texts * key_heads, length, query.device)
    out = torch.empty(texts, 1, heads, deep, dtype=query.dtype, device=query.device)
    size = rows * (columns + 2)
    space = torch.empty(texts * key_heads * split * size, device=query.device)
    early = support.early(query.device)
    interpreted = isinstance(attention_step, InterpretedFunction)
    more: dict[str, Any] = {} if interpreted else {"num_warps": 4, "launch_pdl": early}
    attention_step[(texts * key_heads, split)](
        query,
        key,
        value,
        mask,
        out,
        space,
        _counters(module, texts * key_heads, query.device),
        1 / math.sqrt(width) if scaling is None else scaling,
        length,
        mask.stride(0),
        query.stride(0),
        query.stride(1),
        *key.stride()[:3],
        *value.stride()[:3],
        HEADS=key_heads,
        WIDTH=width,
        DEEP=deep,
        SHARES=split,
        GROUP=group,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK=BLOCK,
        PDL=early,
        **more,
    )
    return out


def shares(heads: int, length: int, device: torch.device) -> int:
    """Among how many programs the positions of a head are divided: a few programs to every
    processor of the GPU, a power of two."""
    if device.type != "cuda":
        return 2
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, min(5 * processors // heads, triton.cdiv(length, BLOCK), 32))
    return 1 << (wanted.bit_length() - 1)


def _counters(module: nn.Module, count: int, device: torch.device) -> Tensor:
    held = _arrived.get(module)
    if held is None or len(held) < count or held.device != device:
        held = torch.zeros(count, dtype=torch.int32, device=device)
        _arrived[module] = held
    return held
