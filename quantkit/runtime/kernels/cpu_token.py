"""One token through a model built like Llama, compiled by numba: no call of torch in between.

At a single token all that counts is to read the weights at the speed of the memory. Every thread
runs :func:`token`. What can be done at once is a turn: the rows of a product, or the heads of
attention. Each thread has a share of a turn in one piece, since memory is fastest where it is read
on and on, and who is ready takes over parts of others' shares. So threads need not be equally fast,
and who comes late, the processor being needed for something else, finds nothing left to do.

Codes are read in the layout of torch's int4 kernel (cpu_int4.py), which prompts are multiplied
with: there is one copy of them. Sums are float32, and so are activations, but for this: in a model
in bfloat16 the inputs of a 4-bit product are rounded to it, as torch does, where the processor can
multiply that (``PAIRS``).

Measured on two cores of an EPYC (Zen 5, 44 GB/s), 310M parameters, groups of 32: 5.5 ms a token, of
which 4.6 are products of 4 bits at 42 GB/s. torch's kernel takes 5.2 ms, and its calls around it as
much again. What was worth most: each thread's rows in one piece (8.6 -> 5.9 ms), and asking for
scales two groups ahead, which lie a page apart (29 -> 41 GB/s).
"""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit
from numpy import float32

from quantkit.runtime.kernels import vectors
from quantkit.runtime.kernels.vectors import (
    PAIRS,
    all_of,
    count_up,
    counted,
    firsts,
    floats_at,
    halves_at,
    high_codes,
    high_dot,
    let_others,
    load,
    load_bytes,
    load_evens,
    load_odds,
    load_one,
    load_pair,
    load_pairs,
    low_codes,
    low_dot,
    narrow,
    paired,
    plus,
    power_of_two,
    seconds,
    soon,
    store,
    times_plus,
    wide,
    zeros,
)

# A product is a row of int64: its kind, its sizes, and the addresses of what it consists of (the
# bias, float32, may be 0). Codes and their scales and offsets as in cpu_int4.py.
KIND, OUT, WIDTH, GROUP, WEIGHT, SCALES, BIAS = range(7)
DENSE_FLOATS, DENSE_HALVES, INT4_FLOATS, INT4_HALVES = range(4)

PART = 64  # rows that a thread takes at a time; a multiple of the blocks of int4
TURNS = 5  # of a decoder block
_LOOKS = 200  # at a counter, before others may have the processor
_NOBODY = 1 << 32  # more than there are threads


class Shape(NamedTuple):
    """layers    decoder blocks
    heads     of queries; ``kv_heads`` of keys and values, each ``width`` wide
    block     rows in a block of int4
    eps       of the norms
    threads   that have a share
    """

    layers: int
    heads: int
    kv_heads: int
    width: int
    block: int
    eps: float
    threads: int


class Own(NamedTuple):
    """What a thread has for itself.

    input     of a product, ``rounded`` to bfloat16, the ``sums`` of its groups
    output    PART rows of a product
    query     and ``key`` of this place; ``scores`` of all places
    number    of the thread
    """

    input: Any
    rounded: Any
    sums: Any
    output: Any
    query: Any
    key: Any
    scores: Any
    number: Any


_how = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
_part = njit(**_how)


def _whole(function: Any) -> Any:
    """The function compiled for all that it calls, once on a machine: kept in a folder, if numba
    finds one that it can write to.

    numba notices changes of this file alone, so that what is kept has those of the words in its
    name: an update would go on with the machine code of before."""
    words = hashlib.sha256(Path(vectors.__file__).read_bytes()).hexdigest()
    function.__qualname__ = f"{function.__name__}-{words[:16]}"
    try:
        return njit(cache=True, **_how)(function)
    except RuntimeError:
        return njit(**_how)(function)


@_part
def _claimed(turn, owner, threads, parts):
    """The next part of a thread's share, or -1."""
    first, end = parts * owner // threads, parts * (owner + 1) // threads
    taken = turn[1 + owner].ctypes.data
    if counted(taken) >= end - first:  # reading first: counting up takes the line from the others
        return -1
    part = first + count_up(taken, 1)
    return part if part < end else -1


@_part
def _meet(turn, mine, parts):
    """So many parts are done here; wait until all are."""
    count_up(turn[0].ctypes.data, mine)
    _wait(turn[0], parts)


@_part
def _wait(counter, number):
    """Until so many are counted."""
    looks = 0
    while counted(counter.ctypes.data) < number:
        looks += 1
        if looks > _LOOKS:
            let_others()


@_part
def _exp(x):
    """Of float32, to 1e-7 of the result (the polynomial is that of Cephes' expf)."""
    x = min(max(x, float32(-87)), float32(87))  # in this order NaN stays NaN
    n = math.floor(x * float32(1.44269504) + float32(0.5))
    r = x - n * float32(0.693359375) + n * float32(2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    return (p * r * r + r + float32(1)) * power_of_two(np.int32(n))


@_part
def _pairs(codes, step, x, total, group):
    """sum of (code - 8) * x over a group, for the 16 rows whose codes are the lower four bits of
    bytes, and for those of the upper four. x is bfloat16; ``total`` is its sum."""
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    for _ in range(0, group, 4):
        both, pair = paired(load_bytes(codes), load_bytes(codes + step)), load_pair(x)
        a, b = low_dot(both, pair, a), high_dot(both, pair, b)
        codes += 2 * step
        both, pair = paired(load_bytes(codes), load_bytes(codes + step)), load_pair(x + 4)
        c, d = low_dot(both, pair, c), high_dot(both, pair, d)
        codes += 2 * step
        x += 8
    excess = all_of(float32(-136) * total)  # the words compute 128 + code
    return plus(plus(a, c), excess), plus(plus(b, d), excess)


@_part
def _singles(codes, step, x, total, group):
    """The same for x in float32."""
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    for _ in range(0, group, 2):
        one, number = load_bytes(codes), load_one(x)
        a, b = times_plus(low_codes(one), number, a), times_plus(high_codes(one), number, b)
        one, number = load_bytes(codes + step), load_one(x + 4)
        c, d = times_plus(low_codes(one), number, c), times_plus(high_codes(one), number, d)
        codes += 2 * step
        x += 8
    excess = all_of(float32(-8) * total)
    return plus(plus(a, c), excess), plus(plus(b, d), excess)


# for models in bfloat16: bytes of a number of x, and the product
_SIZE, _quick = (2, _pairs) if PAIRS else (4, _singles)


@_part
def _add(y, dots, total, scales, kind):
    """y += scale * dots + offset * total, for 16 rows."""
    if kind == INT4_HALVES:
        both = load_pairs(scales)
        scale, offset = firsts(both), seconds(both)
    else:
        scale, offset = load_evens(scales), load_odds(scales)
    store(y, times_plus(offset, all_of(total), times_plus(scale, dots, load(y))))


@_part
def _int4(p, block, x, own, start, stop):
    """own.output = rows of the product with x, whole blocks of them."""
    kind, width, out, group = p[KIND], p[WIDTH], p[OUT], p[GROUP]
    size = 4 if kind == INT4_HALVES else 8  # of a scale and an offset
    step = block // 2  # bytes: the codes of a column
    own.output[:] = 0
    for row in range(start, stop, block):
        codes, scales = p[WEIGHT] + row * width // 2, p[SCALES] + row * size
        y, floats = own.output.ctypes.data + 4 * (row - start), x.ctypes.data
        quick = own.rounded.ctypes.data if PAIRS else floats
        for g in range(width // group):
            total = own.sums[g]
            for i in range(0, block * size, 64):
                soon(scales + 2 * out * size + i)
            for i in range(0, step, 16):
                if kind == INT4_HALVES:
                    low, high = _quick(codes + i, step, quick, total, group)
                else:
                    low, high = _singles(codes + i, step, floats, total, group)
                _add(y + 4 * i, low, total, scales + size * i, kind)
                _add(y + 4 * (step + i), high, total, scales + size * (step + i), kind)
            codes += group * step
            scales += out * size
            quick += group * _SIZE
            floats += group * 4


@_part
def _dense(weight, x, y):
    for row in range(len(weight)):
        total, numbers = float32(0), weight[row]
        for k in range(len(numbers)):
            total += wide(numbers[k]) * x[k]
        y[row] = total


@_part
def _rows(p, block, x, own, start, stop):
    """own.output = rows of the product with x."""
    kind, shape = p[KIND], (p[OUT], p[WIDTH])
    if kind == DENSE_FLOATS:
        _dense(carray(floats_at(p[WEIGHT]), shape)[start:stop], x, own.output)
    elif kind == DENSE_HALVES:
        _dense(carray(halves_at(p[WEIGHT]), shape)[start:stop], x, own.output)
    else:
        _int4(p, block, x, own, start, stop)
    if p[BIAS]:
        bias = carray(floats_at(p[BIAS]), (p[OUT],))[start:stop]
        for i in range(len(bias)):
            own.output[i] += bias[i]


@_part
def _prepare(p, x, own):
    """What a product of int4 needs beside x."""
    width, group = p[WIDTH], p[GROUP]
    rounded = PAIRS and p[KIND] == INT4_HALVES
    if rounded:
        for k in range(width):
            own.rounded[k] = narrow(x[k], own.rounded)
    for g in range(width // group):
        total = float32(0)
        for k in range(g * group, g * group + group):
            total += wide(own.rounded[k]) if rounded else x[k]
        own.sums[g] = total


@_part
def _multiply(turn, p, shape, x, own, y, add):
    """y = the product with x, or y += it."""
    if p[KIND] >= INT4_FLOATS:
        _prepare(p, x, own)
    out, mine = p[OUT], 0
    parts = (out + PART - 1) // PART
    for i in range(shape.threads):
        owner = (own.number + i) % shape.threads
        part = _claimed(turn, owner, shape.threads, parts)
        while part >= 0:
            start, stop = part * PART, min(part * PART + PART, out)
            _rows(p, shape.block, x, own, start, stop)
            target = y[start:stop]
            for k in range(len(target)):
                target[k] = own.output[k] + (target[k] if add else float32(0))
            mine += 1
            part = _claimed(turn, owner, shape.threads, parts)
    _meet(turn, mine, parts)


@_part
def _normed(x, weight, eps, out):
    total = float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    scale = float32(1) / math.sqrt(total / float32(len(x)) + float32(eps))
    for i in range(len(x)):
        out[i] = x[i] * scale * weight[i]


@_part
def _gated(both, out):
    """out = silu(first half) * second half."""
    half = len(both) // 2
    gate, up = both[:half], both[half:]
    for i in range(half):
        out[i] = gate[i] / (float32(1) + _exp(-gate[i])) * up[i]


@_part
def _turned(source, cos, sin, out):
    """Rotary positions. The first half of ``sin`` is negative."""
    half = len(out) // 2
    for i in range(half):
        first, second = source[i], source[half + i]
        out[i] = first * cos[i] + second * sin[i]
        out[half + i] = second * cos[half + i] + first * sin[half + i]


@_part
def _look(query, key, value, keys, values, scores, out):
    """out = softmax(query . keys) values, over the places before and this one's key and value."""
    places, width = len(scores) - 1, len(query)
    scale = float32(1) / math.sqrt(float32(width))
    for t in range(places + 1):
        score = float32(0)
        if t < places:
            there = keys[t]
            soon(values[t].ctypes.data)
            for i in range(width):
                score += query[i] * wide(there[i])
        else:
            for i in range(width):
                score += query[i] * key[i]
        scores[t] = score * scale
    top, total = scores.max(), float32(0)
    for t in range(places + 1):
        scores[t] = _exp(scores[t] - top)
        total += scores[t]
    for i in range(width):
        out[i] = scores[places] / total * value[i]
    for t in range(places):
        there, share = values[t], scores[t] / total
        for i in range(width):
            out[i] += share * wide(there[i])


@_part
def _attend(turn, shape, qkv, keys, values, place, cos, sin, own, seen):
    """seen = what every head sees of places up to this one, whose keys and values are kept."""
    width, shared = shape.width, shape.heads // shape.kv_heads
    rows = carray(floats_at(qkv.ctypes.data), (shape.heads + 2 * shape.kv_heads, width))
    mine = 0
    for i in range(shape.threads):
        owner = (own.number + i) % shape.threads
        head = _claimed(turn, owner, shape.threads, shape.heads)
        while head >= 0:
            at = head // shared
            key, value = rows[shape.heads + at], rows[shape.heads + shape.kv_heads + at]
            _turned(rows[head], cos, sin, own.query)
            _turned(key, cos, sin, own.key)
            for k in range(width):
                own.key[k] = wide(narrow(own.key[k], keys))
            if head == at * shared:  # the first of those that share them keeps them
                for k in range(width):
                    keys[at, place, k] = narrow(own.key[k], keys)
                    values[at, place, k] = narrow(value[k], values)
            out = seen[head * width : (head + 1) * width]
            _look(own.query, own.key, value, keys[at], values[at], own.scores, out)
            mine += 1
            head = _claimed(turn, owner, shape.threads, shape.heads)
    _meet(turn, mine, shape.heads)


@_whole
def token(turns, shape, products, norms, keys, values, place, cos, sin, x, found, seen, logits):
    """Logits [vocab] behind a token whose embedding is ``x``. Called by up to ``shape.threads``
    threads with the same arguments; when one returns, the logits are there. Who comes after
    :func:`end` does nothing. All are float32 where nothing else is said.

    turns         int64 [TURNS * layers + 1, 1 + threads, 8], zeros; the first number of every row
                  counts the parts that are done, and those that were taken of a thread's share; two
                  behind the first of all count the threads that began, and that are done
    products      int64 [4 * layers + 1, 7]: qkv, out, gate and up, down; the head
    norms         [2 * layers + 1, hidden]
    keys, values  [layers, kv_heads, places, width], those before ``place`` known; or bfloat16, as
                  uint16
    cos, sin      [width], of this place; the first half of ``sin`` is negative
    found, seen   memory for outputs of qkv, and of gate and up; for what heads see
    """
    width, longest = shape.width, products[:, WIDTH].max()
    own = Own(
        np.empty(longest, float32),
        np.empty(longest, np.uint16),
        np.empty(longest, float32),
        np.empty(PART, float32),
        np.empty(width, float32),
        np.empty(width, float32),
        np.empty(place + 1, float32),
        count_up(turns[0, 0, 1:].ctypes.data, 1),  # the last one: from here on nothing raises
    )
    if own.number >= shape.threads:
        return
    for layer in range(shape.layers):
        p, turn, norm = products[4 * layer :], turns[TURNS * layer :], norms[2 * layer :]
        _normed(x, norm[0], shape.eps, own.input)
        _multiply(turn[0], p[0], shape, own.input, own, found, False)
        qkv = found[: p[0][OUT]]
        _attend(turn[1], shape, qkv, keys[layer], values[layer], place, cos, sin, own, seen)
        _multiply(turn[2], p[1], shape, seen, own, x, True)
        _normed(x, norm[1], shape.eps, own.input)
        _multiply(turn[3], p[2], shape, own.input, own, found, False)
        _gated(found[: p[2][OUT]], own.input)
        _multiply(turn[4], p[3], shape, own.input, own, x, True)
    _normed(x, norms[-1], shape.eps, own.input)
    _multiply(turns[-1], products[-1], shape, own.input, own, logits, False)
    count_up(turns[0, 0, 2:].ctypes.data, 1)


@_whole
def end(turns):
    """When this returns, no thread works on the token of these ``turns``, or ever will."""
    begun = count_up(turns[0, 0, 1:].ctypes.data, _NOBODY)
    _wait(turns[0, 0, 2:], begun)
