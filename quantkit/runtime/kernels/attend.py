"""Attention of one new token of each text to everything before it (Triton).

A token reads all keys and values of its text once: a matter of bandwidth, as with weights. torch
gives a head to one program, which leaves most of a GPU idle for a single text; here the positions
of a head are divided among ``SHARES`` programs, and the last one to finish puts their results
together, in order (Dao et al., "Flash-Decoding", 2023). Query heads that share keys are computed
together. Keys of all texts lie in one tensor, where each text has a stretch of its own (``Texts``),
and nothing outside of it is read, so texts of all lengths run together.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

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
_WIDEST = 256  # numbers of a head
_BLOCK = 64  # positions at a time
_BLOCK_FLOAT = 32  # in float32, whose tiles are twice as large
_STAGES = 1  # a block is not loaded before it is its turn


@dataclass
class Texts:
    """Texts whose next token is computed; their keys and values are in tensors [heads, places,
    width], each text's in a stretch of its own.

    first    int64 [texts], the place where each begins
    length   int64 [texts], the places before the new token's own
    longest  what none of them can be longer than
    arrived  int32, all 0, one for each text (or more) and head of keys; for one launch at a time
    taken    how many attentions were computed here
    """

    first: Tensor
    length: Tensor
    longest: int
    arrived: Tensor
    taken: int = 0


class Unfit(ValueError):
    """An attention that is not computed here."""


# in the thread, or the task, that runs a model
_texts: ContextVar[Texts | None] = ContextVar("texts", default=None)


@contextmanager
def computing(texts: Texts) -> Iterator[None]:
    """What is attended to inside are ``texts``: the model's cache gives out whole tensors of keys
    and values, for each text the same. Raises Unfit, where that is more than is computed here."""
    before = _texts.set(texts)
    try:
        yield
    finally:
        _texts.reset(before)


@triton.jit
def attention_step(
    query,
    keys,
    values,
    first,
    length,
    out,
    shares,
    arrived,
    scaling,
    query_stride,
    query_head,
    key_head,
    key_place,
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
    """query [texts, heads, WIDTH], keys [HEADS, places, WIDTH], values the same with DEEP; first,
    length int64 [texts] -> out [texts, heads, DEEP].

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
    begin, count = tl.load(first + text), (tl.load(length + text) + 1).to(tl.int32)
    active = tl.minimum(tl.cdiv(count, BLOCK), SHARES)  # a short text is a matter of few
    if share >= active:
        return
    row, column, place = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    heads = head * GROUP + row
    own = query + text * query_stride + heads[:, None] * query_head + column[None, :]
    real = row[:, None] < GROUP
    asked = tl.load(own, mask=real & (column[None, :] < WIDTH), other=0.0)
    text_keys = keys + head.to(tl.int64) * key_head + begin * key_place
    text_values = values + head.to(tl.int64) * value_head + begin * value_place

    highest = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(share * BLOCK, count, SHARES * BLOCK):
        at = start + place
        seen = at < count
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
    if tl.atomic_add(arrived + both, 1, sem="acq_rel") < active - 1:
        return
    tl.store(arrived + both, 0)
    # what every share counts for is known before its sums arrive: those are all read at once
    first_share = shares + both * (SHARES * SIZE)
    every = tl.arange(0, SHARES)[:, None] * SIZE + ROWS * COLUMNS + row[None, :]
    there = (tl.arange(0, SHARES)[:, None] < active) & own_row[None, :]
    each_highest = tl.load(first_share + every + ROWS, there, -1e30, cache_modifier=".cg")
    each_weight = tl.load(first_share + every, there, 0.0, cache_modifier=".cg")
    highest = tl.max(each_highest, 0)
    weight = tl.sum(each_weight * tl.exp(each_highest - highest[None, :]), 0)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for other in tl.static_range(SHARES):
        its = first_share + other * SIZE
        its_sums = tl.load(its + rows, real & (other < active), 0.0, cache_modifier=".cg")
        its_highest = tl.load(
            its + ROWS * COLUMNS + ROWS + row,
            own_row & (other < active),
            -1e30,
            cache_modifier=".cg",
        )
        sums += its_sums * tl.exp(its_highest - highest)[:, None]
    sums = sums / tl.where(own_row, weight, 1.0)[:, None]
    whole = out + (text * HEADS * GROUP + heads[:, None]) * DEEP + column[None, :]
    tl.store(whole, sums.to(out.dtype.element_ty), mask=real & (column[None, :] < DEEP))


def use(model: PreTrainedModel) -> bool:
    """Let ``model`` ask here for its attention, where it otherwise would ask torch; all but what is
    ``computing`` goes on to torch. False, where it does not ask."""
    if model.config._attn_implementation == "sdpa" and runs_on(model.device):
        ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)


def runs_on(device: torch.device) -> bool:
    """Whether the kernel does: in Triton's interpreter it would everywhere, but slowly."""
    return device.type == "cuda"


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
    texts = _texts.get()
    if texts is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    more = [name for name in _MORE if others.get(name) is not None]
    if dropout or more:
        raise Unfit(f"attention with {', '.join(more) or 'dropout'} is another one")
    texts.taken += 1
    with torch.cuda.device_of(query):  # Triton launches on the current device
        return attend(query, key[0], value[0], texts, scaling), None


def attend(
    query: Tensor, keys: Tensor, values: Tensor, texts: Texts, scaling: float | None
) -> Tensor:
    """query [texts, heads, 1, width], keys and values [key heads, places, width] -> [texts, 1,
    heads, width]. Raises Unfit for other shapes and dtypes than the kernel computes."""
    count, heads, tokens, width = query.shape
    key_heads, deep = len(keys), values.shape[-1]
    _check(query, keys, values, texts)
    group = heads // key_heads
    rows = max(16, triton.next_power_of_2(group))
    columns = max(16, triton.next_power_of_2(max(width, deep)))
    block = _BLOCK_FLOAT if query.dtype == torch.float32 else _BLOCK
    split = shares(count * key_heads, triton.cdiv(texts.longest, block), query.device)
    out = torch.empty(count, tokens, heads, deep, dtype=query.dtype, device=query.device)
    size = rows * (columns + 2)
    space = torch.empty(count * key_heads * split * size, device=query.device)
    early = support.early(query.device)
    interpreted = isinstance(attention_step, InterpretedFunction)
    more = {} if interpreted else {"num_warps": 4, "num_stages": _STAGES, "launch_pdl": early}
    attention_step[(count * key_heads, split)](
        query,
        keys,
        values,
        texts.first,
        texts.length,
        out,
        space,
        texts.arrived,
        1 / math.sqrt(width) if scaling is None else scaling,
        query.stride(0),
        query.stride(1),
        *keys.stride()[:2],
        *values.stride()[:2],
        HEADS=key_heads,
        WIDTH=width,
        DEEP=deep,
        SHARES=split,
        GROUP=group,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK=block,
        PDL=early,
        **more,
    )
    return out


def _check(query: Tensor, keys: Tensor, values: Tensor, texts: Texts) -> None:
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise Unfit(f"attention in {query.dtype}")
    if not query.dtype == keys.dtype == values.dtype:
        raise Unfit("attention in several dtypes")
    if max(keys.shape[-1], values.shape[-1]) > _WIDEST:
        raise Unfit(f"attention with heads wider than {_WIDEST}")
    if not query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1:
        raise Unfit("attention to numbers that lie apart")
    if query.shape[2] != 1 or len(texts.arrived) < len(query) * len(keys):
        raise Unfit("attention of more tokens or to more heads than the cache has")


def shares(heads: int, blocks: int, device: torch.device) -> int:
    """Among how many programs the ``blocks`` of positions of a head are divided: a few programs to
    every processor of the GPU, a power of two."""
    if device.type != "cuda":
        return 2
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, min(5 * processors // heads, blocks, 32))
    return 1 << (wanted.bit_length() - 1)
