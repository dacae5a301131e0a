"""Words for what numba compiles: vectors of 16, bfloat16, and counters that threads share.

LLVM has vectors of any width and makes of them what the processor has: one register with AVX512,
two with AVX2. Plain loops become vectors only where LLVM can prove that they may; for codes in
bytes it cannot, and these words say it instead. Addresses are plain integers.
"""

import ctypes
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

# whether pairs of bfloat16 are multiplied and added in one instruction, by what numba compiles for
PAIRS = "+avx512bf16" in cpu_target.target_context.codegen().magic_tuple()[2]

_BYTE, _HALF, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_LANES, _FLOATS = ir.VectorType(_INT, 16), ir.VectorType(_FLOAT, 16)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


_PAIRS = ir.VectorType(_BFloat(), 32)


class _Floats(types.Type):
    """16 float32."""


class _Lanes(types.Type):
    """16 times 32 bits."""


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _LANES)


_VECTOR, _BITS = _Floats("floats"), _Lanes("lanes")
_AT, _NUMBER, _COUNT = types.intp, types.float32, types.int64


def _word(result: Any, *parameters: Any) -> Callable[[Any], Any]:
    """A function for numba's code from one that writes LLVM's instructions."""

    def made(write: Any) -> Any:
        def typed(context: Any, *given: Any) -> Any:
            return result(*parameters), lambda _context, builder, _signature, values: write(
                builder, *values
            )

        typed.__name__, typed.__doc__ = write.__name__, write.__doc__
        typed.__signature__ = signature(write)
        return intrinsic(typed)

    return made


def _all(number: int) -> ir.Constant:
    return ir.Constant(_LANES, [number] * 16)


def _place(builder: Any, at: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(at, kind.as_pointer())


def _load(builder: Any, at: Any, kind: ir.Type, align: int) -> Any:
    return builder.load(_place(builder, at, kind), align=align)


def _spread(builder: Any, value: Any, kind: ir.VectorType) -> Any:
    empty = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(empty, value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, empty, _all(0))


def _call(builder: Any, name: str, result: ir.Type, *given: Any) -> Any:
    kind = ir.FunctionType(result, [value.type for value in given])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), given)


# Vectors of numbers


@_word(_VECTOR)
def zeros(builder):
    return ir.Constant(_FLOATS, [0.0] * 16)


@_word(_VECTOR, _NUMBER)
def all_of(builder, number):
    return _spread(builder, number, _FLOATS)


@_word(_VECTOR, _AT)
def load(builder, at):
    """16 float32."""
    return _load(builder, at, _FLOATS, 4)


@_word(_VECTOR, _AT)
def load_one(builder, at):
    """One float32, 16 times."""
    return _spread(builder, _load(builder, at, _FLOAT, 4), _FLOATS)


@_word(types.void, _AT, _VECTOR)
def store(builder, at, vector):
    builder.store(vector, _place(builder, at, _FLOATS), align=4)


@_word(_VECTOR, _VECTOR, _VECTOR)
def plus(builder, a, b):
    return builder.fadd(a, b)


@_word(_VECTOR, _VECTOR, _VECTOR, _VECTOR)
def times_plus(builder, a, b, c):
    """a * b + c, rounded once."""
    return _call(builder, "llvm.fma.v16f32", _FLOATS, a, b, c)


def _every_second(builder: Any, at: Any, first: int) -> Any:
    kind = ir.VectorType(_FLOAT, 32)
    places = ir.Constant(_LANES, list(range(first, 32, 2)))
    both = _load(builder, at, kind, 4)
    return builder.shuffle_vector(both, ir.Constant(kind, ir.Undefined), places)


@_word(_VECTOR, _AT)
def load_evens(builder, at):
    """Of 32 float32, the first, the third, ..."""
    return _every_second(builder, at, 0)


@_word(_VECTOR, _AT)
def load_odds(builder, at):
    return _every_second(builder, at, 1)


# Vectors of bits


@_word(_BITS, _AT)
def load_bytes(builder, at):
    """16 bytes, each the lowest of its lane."""
    return builder.zext(_load(builder, at, ir.VectorType(_BYTE, 16), 1), _LANES)


@_word(_BITS, _AT)
def load_pairs(builder, at):
    """16 pairs of bfloat16."""
    return _load(builder, at, _LANES, 2)


@_word(_BITS, _AT)
def load_pair(builder, at):
    """One pair of bfloat16, 16 times."""
    return _spread(builder, _load(builder, at, _INT, 2), _LANES)


@_word(_BITS, _BITS, _BITS)
def paired(builder, first, second):
    """Both in a lane, 16 bits each."""
    return builder.or_(first, builder.shl(second, _all(16)))


@_word(_VECTOR, _BITS)
def firsts(builder, pairs):
    """The first bfloat16 of every pair."""
    return builder.bitcast(builder.shl(pairs, _all(16)), _FLOATS)


@_word(_VECTOR, _BITS)
def seconds(builder, pairs):
    return builder.bitcast(builder.and_(pairs, _all(0xFFFF0000)), _FLOATS)


@_word(_VECTOR, _BITS)
def low_codes(builder, lanes):
    """Of bytes, the lower four bits."""
    return builder.sitofp(builder.and_(lanes, _all(15)), _FLOATS)


@_word(_VECTOR, _BITS)
def high_codes(builder, lanes):
    """Of bytes, the upper four bits."""
    return builder.sitofp(builder.lshr(lanes, _all(4)), _FLOATS)


def _dot(builder: Any, lanes: Any, x: Any, total: Any) -> Any:
    # the bits of 128 in bfloat16, with a code in its lowest four, are 128 + code
    codes = builder.or_(builder.and_(lanes, _all(0x000F000F)), _all(0x43004300))
    codes, x = (builder.bitcast(value, _PAIRS) for value in (codes, x))
    return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, total, codes, x)


@_word(_VECTOR, _BITS, _BITS, _VECTOR)
def low_dot(builder, lanes, x, total):
    """total + (128 + code) * x, for the codes in the lower four bits of both bytes of a lane, and a
    pair of x. The products are exact, the sums float32."""
    return _dot(builder, lanes, x, total)


@_word(_VECTOR, _BITS, _BITS, _VECTOR)
def high_dot(builder, lanes, x, total):
    return _dot(builder, builder.lshr(lanes, _all(4)), x, total)


# Single numbers


@intrinsic
def wide(context, number):
    """float32 from the bits of a bfloat16 (uint16); float32 as it is."""

    def write(_context, builder, _signature, values):
        if number == _NUMBER:
            return values[0]
        bits = builder.shl(builder.zext(values[0], _INT), ir.Constant(_INT, 16))
        return builder.bitcast(bits, _FLOAT)

    return _NUMBER(number), write


@intrinsic
def narrow(context, number, like):
    """float32 as the array ``like`` keeps it: as it is, or the bits of the nearest bfloat16; of two
    that are as near, the even one."""

    def write(_context, builder, _signature, values):
        if like.dtype == _NUMBER:
            return values[0]
        bits, sixteen = builder.bitcast(values[0], _INT), ir.Constant(_INT, 16)
        odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(_INT, 1))
        bits = builder.add(builder.add(bits, ir.Constant(_INT, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(bits, sixteen), _HALF)

    return like.dtype(number, like), write


@_word(_NUMBER, types.int32)
def power_of_two(builder, exponent):
    """For exponents from -126 to 127."""
    shifted = builder.add(exponent, ir.Constant(_INT, 127))
    return builder.bitcast(builder.shl(shifted, ir.Constant(_INT, 23)), _FLOAT)


# Memory and threads


@_word(types.CPointer(types.uint16), _AT)
def halves_at(builder, at):
    return _place(builder, at, _HALF)


@_word(types.CPointer(_NUMBER), _AT)
def floats_at(builder, at):
    return _place(builder, at, _FLOAT)


@_word(types.void, _AT)
def soon(builder, at):
    """What is at this address will be read."""
    numbers = (ir.Constant(_INT, number) for number in (0, 3, 1))  # reading, all caches, data
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), _place(builder, at, _BYTE), *numbers)


@_word(_COUNT, _AT, _COUNT)
def count_up(builder, at, number):
    """The int64 there, before it becomes so much more."""
    return builder.atomic_rmw("add", _place(builder, at, _LONG), number, "acq_rel")


@_word(_COUNT, _AT)
def counted(builder, at):
    return builder.load_atomic(_place(builder, at, _LONG), "acquire", 8)


def _yielding() -> Any:
    """The system's function that lets another thread have this processor."""
    if sys.platform == "win32":
        return ctypes.windll.kernel32.SwitchToThread
    return ctypes.CDLL(None).sched_yield


_let_others = ctypes.cast(_yielding(), ctypes.c_void_p).value
llvmlite.binding.add_symbol("quantkit_let_others", _let_others)
let_others = types.ExternalFunction("quantkit_let_others", types.int32())
