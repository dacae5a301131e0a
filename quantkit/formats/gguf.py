"""GGUF's block types: the bytes of a row of a tensor, for ggml and llama.cpp.

A row [in] is cut into blocks, and a block holds its own scales: there are no further tensors. ``d``
and ``m`` are float16, little-endian, ``q`` codes; a row of numbers under the bytes are elements.

    Q4_0   d d | q x 16                  18 bytes for 32       w = d * (q - 8)
    Q4_1   d d | m m | q x 16            20 bytes for 32       w = d * q + m
    Q5_0   d d | h x 4 | q x 16          22 bytes for 32       w = d * (q - 16)
    Q5_1   d d | m m | h x 4 | q x 16    24 bytes for 32       w = d * q + m
    Q8_0   d d | q x 32                  34 bytes for 32       w = d * q, q signed

    16 bytes of q       byte 0           byte 1                 byte 15
    bits  7..4  3..0    q16   q0         q17   q1      ...      q31   q15
    4 bytes of h        byte 0: bit 4 of q7 ... q0              byte 3: bit 4 of q31 ... q24

The K types have blocks of 256 with a scale for every 16 or 32 elements, itself a code of 4 to 8
bits (``s``, ``t``) that a float16 of the block multiplies: scale = d * s and minimum = -m * t, both
exact in float32. They are read, and never written: that would take scales of two levels.

    Q2_K   st x 16 | q x 64 | d d | m m               84 bytes    groups of 16   w = d s q - m t
    Q3_K   h x 32 | q x 64 | s x 12 | d d            110 bytes    groups of 16   w = d s (q - 4)
    Q4_K   d d | m m | st x 12 | q x 128             144 bytes    groups of 32   w = d s q - m t
    Q5_K   d d | m m | st x 12 | h x 32 | q x 128    176 bytes    groups of 32   w = d s q - m t
    Q6_K   q x 128 | h x 64 | s x 16 | d d           210 bytes    groups of 16   w = d s (q - 32)

All codes are laid in runs: the lowest bits of the bytes of a run are its first elements, the next
bits the next ones. A run of Q4_0's q is 16 bytes of two 4-bit fields, one of Q5_0's h a byte of
eight bits:

    type           bits  bytes of a run          type           bits  bytes of a run
    Q4_0 .. Q5_1   q 4   16                      Q4_K, Q5_K     q 4   32
    Q5_0, Q5_1     h 1   1                       Q5_K           h 1   32
    Q2_K, Q3_K     q 2   32                      Q6_K           q 4   64
    Q3_K           h 1   32                      Q6_K           h 2   32

Facts: ggml/src/ggml-common.h and ggml-quants.c (dequantize_row_*) of llama.cpp.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.core.form import Form
from quantkit.core.gguf_values import TYPES as TYPES
from quantkit.core.gguf_values import nbytes as nbytes
from quantkit.core.qweight import QWeight, Scheme, stacked
from quantkit.errors import QuantkitError

SCALES = (torch.float16,)
DENSE = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class _Simple(NamedTuple):
    """A type of 32 elements with one scale: d | m, if there is one | h, if there is one | q."""

    bits: int
    symmetric: bool


_SIMPLE = {
    "Q4_0": _Simple(4, True),
    "Q4_1": _Simple(4, False),
    "Q5_0": _Simple(5, True),
    "Q5_1": _Simple(5, False),
    "Q8_0": _Simple(8, True),
}
_GROUP = 32
_PIECE = 1 << 20
WRITTEN = tuple(_SIMPLE)
FORMS = {
    name: Form((bits,), "symmetric" if symmetric else "minimum", SCALES, (_GROUP,))
    for name, (bits, symmetric) in _SIMPLE.items()
}


def scheme_of(type: str) -> Scheme:
    """What a weight in a type of :data:`WRITTEN` is."""
    bits, symmetric = _SIMPLE[type]
    return Scheme(bits, _GROUP, symmetric)


def unpack(raw: Tensor, type: str, shape: tuple[int, ...], name: str = "a tensor") -> QWeight:
    """The quantized weight in ``raw``, uint8 [rows, bytes of a row]. A tensor of more dimensions
    (experts) becomes a weight of all its rows. Raises QuantkitError, naming ``name``, for types
    that quantkit does not read."""
    if type not in QUANTIZED:
        raise QuantkitError(
            f"{name} has the type {type}, which quantkit does not read as a quantized weight",
            f"use a model in one of {', '.join(QUANTIZED)}",
        )
    blocks = _checked(raw, type, shape, name).reshape(raw.shape[0], -1, TYPES[type].nbytes)
    read = _K.get(type) or partial(_unpack_simple, type=type)
    return stacked((read(blocks[at]) for at in _pieces(*raw.shape)), len(blocks))


def dense(raw: Tensor, type: str, shape: tuple[int, ...], name: str = "a tensor") -> Tensor:
    """The tensor of a type that is not quantized; the bytes are shared, not copied."""
    if type not in DENSE:
        raise QuantkitError(f"{name} has the type {type}, which is not a plain one")
    return _checked(raw, type, shape, name).view(DENSE[type]).reshape(shape)


def _checked(raw: Tensor, type: str, shape: tuple[int, ...], name: str) -> Tensor:
    """``raw``, when it is what a tensor of this type and shape has."""
    try:
        row = nbytes(shape[-1:], type)
    except ValueError as error:
        raise QuantkitError(f"{name} is no {type}: {error}") from error
    if raw.dtype != torch.uint8 or raw.shape[1:] != (row,) or raw.nbytes != nbytes(shape, type):
        raise QuantkitError(
            f"{name} has {tuple(raw.shape)} bytes, and {type} of {tuple(shape)} needs "
            f"{nbytes(shape, type)} in rows of {row}"
        )
    return raw


def refusal(out: int, width: int, scheme: Scheme, type: str) -> str | None:
    """Why such a weight cannot be stored in blocks of ``type``, as the end of a sentence; None if
    it can, in groups of 32 (``q.regrouped(32)``)."""
    if type not in _SIMPLE:
        return f"quantkit does not write {type}"
    bits, symmetric = _SIMPLE[type]
    if scheme.grid != "int":
        return f"{type} has evenly spaced levels, not those of {scheme.grid}"
    if scheme.bits != bits:
        return f"{type} has {bits} bits, not {scheme.bits}"
    if symmetric and not scheme.symmetric:
        return f"{type} has no zero points"
    if width % _GROUP:
        return f"rows of {width} are not whole blocks of {_GROUP}"
    if scheme.width(width) % _GROUP:
        return f"groups of {scheme.group_size} are not whole blocks of {_GROUP}"
    return None


def pack(q: QWeight, type: str) -> Tensor:
    """uint8 [out, bytes of a row]. Never rounds: raises ValueError, with the reason, for numbers
    that the type cannot hold."""
    reason = refusal(*q.shape, q.scheme, type)
    if reason:
        raise ValueError(reason)
    if q.scheme.group_size != _GROUP or q.group_of is not None:
        raise ValueError(f"{type} has groups of {_GROUP} neighbours")
    if q.scale.dtype != torch.float16:
        raise ValueError(f"{type} stores float16 scales, not {q.scale.dtype}")
    row = nbytes(q.shape[-1:], type)
    raw = torch.empty(q.shape[0], row, dtype=torch.uint8, device=q.codes.device)
    for at in _pieces(q.shape[0], row):
        raw[at] = _pack_rows(q.rows(at.start, at.stop), type)
    return raw


def _pack_rows(q: QWeight, type: str) -> Tensor:
    bits, symmetric = _SIMPLE[type]
    parts = [_bytes_of(q.scale)]
    if not symmetric:
        parts.append(_bytes_of(_minimum(q, type)))
    codes = q.codes.reshape(q.shape[0], -1, _GROUP)
    if bits == 8:
        return _joined([*parts, codes ^ 0x80])
    if bits == 5:
        parts.append(_packed(codes >> 4, 1, 1))
    return _joined([*parts, _packed(codes & 15 if bits == 5 else codes, 4, 16)])


def pack_dense(tensor: Tensor, type: str) -> Tensor:
    """uint8 [rows, bytes of a row] of a plain tensor. Never rounds: raises ValueError for a dtype
    that the type cannot hold."""
    wanted = DENSE[type]
    if tensor.dtype != wanted and not (
        tensor.is_floating_point() and torch.promote_types(tensor.dtype, wanted) == wanted
    ):
        raise ValueError(f"{tensor.dtype} does not fit into {type}")
    rows = tensor.to(wanted).contiguous().reshape(-1, tensor.shape[-1])
    return rows.view(torch.uint8)


def _minimum(q: QWeight, type: str) -> Tensor:
    """float16 [out, groups]"""
    if q.minimum is not None and q.minimum.dtype == torch.float16:
        return q.minimum
    exact = _float32_minimum(q)
    minimum = exact.half()
    if not torch.equal(minimum.float(), exact):
        raise ValueError(f"{type} stores float16 minimums, and these would have to be rounded")
    return minimum


def _float32_minimum(q: QWeight) -> Tensor:
    if q.minimum is not None:
        return q.minimum.float()
    zero = q.scheme.midpoint if q.zero is None else q.zero.float()
    # a difference and not a negation, so that a zero point of 0 gives 0 and not -0
    return 0 - q.scale.float() * zero


def _pieces(rows: int, row_bytes: int) -> Iterator[slice]:
    """So many rows at a time that they stay in the caches."""
    step = max(1, _PIECE // row_bytes)
    for start in range(0, rows, step):
        yield slice(start, start + step)


# bytes and fields


def _fields(part: Tensor, bits: int, run: int) -> Tensor:
    """uint8 [..., runs * run] -> [..., runs * run * 8 / bits]: the fields of every byte, those in
    the lowest bits of a run first."""
    whole, unit = _widest(part, run)
    source = whole.reshape(*part.shape[:-1], -1, run // unit)
    mask = int.from_bytes(bytes([2**bits - 1] * unit), "little")
    fields = source.new_empty(*source.shape[:-1], 8 // bits, run // unit)
    for k in range(8 // bits):
        fields[..., k, :] = (source >> (bits * k)).bitwise_and_(mask)
    return fields.view(torch.uint8).flatten(-3)


def _packed(fields: Tensor, bits: int, run: int) -> Tensor:
    """The inverse of :func:`_fields`."""
    whole, unit = _widest(fields, run)
    source = whole.reshape(*fields.shape[:-1], -1, 8 // bits, run // unit)
    packed = source[..., 0, :].clone()
    for k in range(1, 8 // bits):
        packed |= source[..., k, :] << (bits * k)
    return packed.view(torch.uint8).flatten(-2)


def _widest(part: Tensor, run: int) -> tuple[Tensor, int]:
    """The bytes, flat, as the widest numbers that fill a run, and how many bytes those have: shifts
    and masks treat eight bytes at once; what crosses a byte is masked away or was 0."""
    flat = part.contiguous().reshape(-1)
    if run % 8:
        return flat, 1
    return (flat.clone() if flat.storage_offset() % 8 else flat).view(torch.int64), 8


def _halves(part: Tensor) -> Tensor:
    """uint8 [..., 2] -> float16 [...]"""
    return part.contiguous().view(torch.float16).squeeze(-1)


def _bytes_of(halves: Tensor) -> Tensor:
    """float16 [...] -> uint8 [..., 2]"""
    return halves.contiguous().unsqueeze(-1).view(torch.uint8)


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts of blocks, uint8 [out, blocks, bytes], as rows of bytes."""
    return torch.cat(parts, dim=-1).flatten(1)


# reading blocks, uint8 [out, blocks, bytes of a block]


def _unpack_simple(blocks: Tensor, type: str) -> QWeight:
    bits, symmetric = _SIMPLE[type]
    scale, rest = _halves(blocks[..., :2]), blocks[..., 2:]
    minimum = None
    if not symmetric:
        minimum, rest = _halves(rest[..., :2]), rest[..., 2:]
    if bits == 8:
        codes = rest ^ 0x80
    elif bits == 5:
        codes = _fields(rest[..., 4:], 4, 16)
        codes |= _fields(rest[..., :4], 1, 1) << 4
    else:
        codes = _fields(rest, 4, 16)
    return QWeight(Scheme(bits, _GROUP, symmetric), codes.flatten(1), scale, minimum=minimum)


def _two_level(
    bits: int,
    codes: Tensor,
    scale: tuple[Tensor, Tensor],
    minimum: tuple[Tensor, Tensor] | None = None,
) -> QWeight:
    """A weight from codes [out, blocks, 256] and (d, s) of its scales, (m, t) of its minimums: d
    float16 [out, blocks], s [out, blocks, groups of a block]."""

    def product(d: Tensor, s: Tensor) -> Tensor:
        return d.float()[..., None].mul(s).flatten(1)

    group = codes.shape[-1] // scale[1].shape[-1]
    low = None if minimum is None else product(*minimum).neg_()
    scheme = Scheme(bits, group, minimum is None)
    return QWeight(scheme, codes.flatten(1), product(*scale), minimum=low)


def _q2_k(blocks: Tensor) -> QWeight:
    st = blocks[..., :16]
    codes = _fields(blocks[..., 16:80], 2, 32)
    d, m = _halves(blocks[..., 80:82]), _halves(blocks[..., 82:84])
    return _two_level(2, codes, (d, st & 15), (m, st >> 4))


def _q3_k(blocks: Tensor) -> QWeight:
    """The 12 bytes of 16 scales, 6 bits each with 32 for 0: s0 .. s7 in the low halves of 8 bytes
    and s8 .. s15 in the high ones, then 4 bytes with the upper two bits of s0 .. s3, s4 .. s7, ...
    """
    codes = _fields(blocks[..., :32], 1, 32) << 2
    codes |= _fields(blocks[..., 32:96], 2, 32)
    low, high = _fields(blocks[..., 96:104], 4, 8), _fields(blocks[..., 104:108], 2, 4)
    s = (low | high << 4).to(torch.int8) - 32
    return _two_level(3, codes, (_halves(blocks[..., 108:]), s))


def _q4_k(blocks: Tensor) -> QWeight:
    d, m, s, t = _scales_of_32(blocks)
    return _two_level(4, _fields(blocks[..., 16:], 4, 32), (d, s), (m, t))


def _q5_k(blocks: Tensor) -> QWeight:
    d, m, s, t = _scales_of_32(blocks)
    codes = _fields(blocks[..., 48:], 4, 32)
    codes |= _fields(blocks[..., 16:48], 1, 32) << 4
    return _two_level(5, codes, (d, s), (m, t))


def _q6_k(blocks: Tensor) -> QWeight:
    codes = _fields(blocks[..., :128], 4, 64)
    codes |= _fields(blocks[..., 128:192], 2, 32) << 4
    s = blocks[..., 192:208].contiguous().view(torch.int8)
    return _two_level(6, codes, (_halves(blocks[..., 208:]), s))


def _scales_of_32(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d, m, s, t of Q4_K and Q5_K. s and t have 6 bits in 12 bytes:

    bytes 0-3     upper two bits of s4 .. s7 | s0 .. s3
    bytes 4-7     upper two bits of t4 .. t7 | t0 .. t3
    bytes 8-11    lower four bits of t4 .. t7 | of s4 .. s7
    """
    first, second, third = (blocks[..., at : at + 4] for at in (4, 8, 12))
    s = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], dim=-1)
    t = torch.cat([second & 63, (third >> 4) | (second >> 6) << 4], dim=-1)
    return _halves(blocks[..., 0:2]), _halves(blocks[..., 2:4]), s, t


_K: dict[str, Callable[[Tensor], QWeight]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
QUANTIZED = (*_SIMPLE, *_K)
