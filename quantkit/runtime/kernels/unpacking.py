"""From a word of codes to half-precision integers, two at a time (PTX inside Triton).

A number whose exponent makes its lowest mantissa bit worth 1 (1024 in float16, 128 in bfloat16)
takes a code by OR. One ``lop3`` masks and ORs two codes at once; one subtraction takes away what
the exponent stands for, and the code of zero with it. Without PTX, as in Triton's interpreter,
shifts and casts say the same.
"""

import torch
import triton
import triton.language as tl


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


def ptx(bits: int, middle: int, dtype: torch.dtype) -> str:
    """Instructions from one word, the last operand, to its codes less ``middle`` in ``dtype``,
    exactly; in pairs of neighbours, as ``fragments`` packs them. ``bits`` is 4 or 8."""
    if bits == 4:
        return _four_half(middle) if dtype == torch.float16 else _four_bfloat(middle)
    return _eight_half(middle) if dtype == torch.float16 else _eight_bfloat(middle)


def _four_half(middle: int) -> str:
    """A code four bits up counts 16 times: multiplied by 1/16, 1024 + 16 c is 64 + c."""
    low, high = 0x6400 | middle, 0xD400 | middle << 4
    return f"""{{
        .reg .b32 s, p, q, low, high, sixteenth;
        mov.b32 low, {low << 16 | low:#x};
        mov.b32 high, {high << 16 | high:#x};
        mov.b32 sixteenth, 0x2c002c00;
        shr.u32 s, $8, 8;
        lop3.b32 p, $8, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 q, $8, 0x00f000f0, 0x64006400, 0xea;
        sub.f16x2 p, p, low;
        fma.rn.f16x2 q, q, sixteenth, high;
        mov.b32 {{$0, $1}}, p;
        mov.b32 {{$2, $3}}, q;
        lop3.b32 p, s, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 q, s, 0x00f000f0, 0x64006400, 0xea;
        sub.f16x2 p, p, low;
        fma.rn.f16x2 q, q, sixteenth, high;
        mov.b32 {{$4, $5}}, p;
        mov.b32 {{$6, $7}}, q;
    }}"""


def _four_bfloat(middle: int) -> str:
    """There is no room above four bits in bfloat16, so every pair is shifted down."""
    less = 0xC300 | middle
    lines = [
        ".reg .b32 s, p, less, one;",
        f"mov.b32 less, {less << 16 | less:#x};",
        "mov.b32 one, 0x3f803f80;",
    ]
    for pair in range(4):
        lines += [
            f"shr.u32 s, $8, {4 * pair};",
            "lop3.b32 p, s, 0x000f000f, 0x43004300, 0xea;",
            "fma.rn.bf16x2 p, p, one, less;",
            f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, p;",
        ]
    return "{" + "\n".join(lines) + "}"


def _eight_half(middle: int) -> str:
    less = 0x6400 | middle
    lines = [".reg .b32 p, less;", f"mov.b32 less, {less << 16 | less:#x};"]
    for pair, pick in enumerate(("0x4140", "0x4342")):
        lines += [
            f"prmt.b32 p, $4, 0x64646464, {pick};",
            "sub.f16x2 p, p, less;",
            f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, p;",
        ]
    return "{" + "\n".join(lines) + "}"


def _eight_bfloat(middle: int) -> str:
    """Eight bits do not fit into bfloat16's mantissa beside an exponent: through float32, where
    2**23 takes them."""
    lines = [".reg .b32 p, q;", ".reg .f32 f, g;"]
    for pair in range(2):
        lines += [
            f"prmt.b32 p, $4, 0x4b000000, {0x7440 + 2 * pair:#x};",
            f"prmt.b32 q, $4, 0x4b000000, {0x7441 + 2 * pair:#x};",
            "mov.b32 f, p;",
            "mov.b32 g, q;",
            f"sub.f32 f, f, {_float(2**23 + middle)};",
            f"sub.f32 g, g, {_float(2**23 + middle)};",
            "cvt.rn.bf16x2.f32 p, g, f;",
            f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, p;",
        ]
    return "{" + "\n".join(lines) + "}"


def _float(whole: int) -> str:
    """A float32 as PTX writes it."""
    return f"0f{0x4B000000 | (whole - 2**23):08X}"
