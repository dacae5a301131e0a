"""Codes of 2, 3, 4 or 8 bits, packed into int32 words as one stream, least significant bit first.

4 bits    word 0:  c7 c6 c5 c4 c3 c2 c1 c0            (c0 in bits 0-3)
3 bits    word 0:  low 2 of c10 | c9 ... c0            32 codes fill 3 words; two codes
          word 1:  low 1 of c21 | c20 ... c11 | high 1 of c10      straddle a boundary
          word 2:  c31 ... c22 | high 2 of c21
"""

from math import gcd

import torch
from torch import Tensor

WORD = 32


def block_codes(bits: int) -> int:
    """How many codes fill a whole number of words: 8 for 4 bits, 32 for 3 bits."""
    return WORD // gcd(WORD, bits)


def words(count: int, bits: int) -> int:
    """int32 words that hold ``count`` codes; raises ValueError when they do not fill them."""
    if count % block_codes(bits):
        raise ValueError(f"{count} codes of {bits} bits do not fill whole 32-bit words")
    return count * bits // WORD


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [count, m] -> int32 [count * bits / 32, m], packed along dim 0. Quick where ``codes``
    is the transpose of a contiguous tensor."""
    count, m = codes.shape
    total = words(count, bits)
    if bits in _IN_BYTES:
        packed = _squeezed(codes.T.contiguous().reshape(-1), bits).view(torch.int32)
        return packed.reshape(m, total).T.contiguous()
    block = block_codes(bits)
    per_block = block * bits // WORD
    source = codes.reshape(count // block, block, m)
    packed = torch.zeros(count // block, per_block, m, dtype=torch.int32, device=codes.device)
    for k in range(block):
        word, shift = divmod(k * bits, WORD)
        code = source[:, k].to(torch.int32)
        packed[:, word] |= code << shift
        if shift + bits > WORD:
            packed[:, word + 1] |= code >> (WORD - shift)
    return packed.reshape(total, m)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 [w, m] -> uint8 [w * 32 / bits, m]; the inverse of :func:`pack`. Its transpose is
    contiguous for 2, 4 and 8 bits."""
    total, m = packed.shape
    block = block_codes(bits)
    per_block = block * bits // WORD
    if total % per_block:
        raise ValueError(f"{total} words are not whole blocks of {bits}-bit codes")
    if bits in _IN_BYTES:
        spread = _spread(packed.T.contiguous().reshape(-1).view(torch.uint8), bits)
        return spread.reshape(m, -1).T
    source = packed.reshape(total // per_block, per_block, m)
    codes = torch.empty(total // per_block, block, m, dtype=torch.uint8, device=packed.device)
    mask = 2**bits - 1
    for k in range(block):
        word, shift = divmod(k * bits, WORD)
        # the shift is arithmetic: everything above the code is masked away below
        value = source[:, word] >> shift
        missing = shift + bits - WORD
        if missing > 0:
            low = bits - missing
            value = (value & (2**low - 1)) | (source[:, word + 1] << low)
        codes[:, k] = (value & mask).to(torch.uint8)
    return codes.reshape(-1, m)


# Codes that do not straddle bytes: all codes of a byte are moved at once, as the bytes of a wider
# integer, and a piece at a time, so that everything stays in a CPU's caches, and takes few launches
# and little memory of a GPU.
_IN_BYTES = {2: torch.int32, 4: torch.int16, 8: torch.int8}
_PIECE, _GPU_PIECE = 1 << 20, 1 << 23


def _squeezed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n], a code a byte -> uint8 [n * bits / 8]"""
    if bits == 8:
        return codes
    wide = codes.view(_IN_BYTES[bits])
    packed = torch.empty(len(wide), dtype=torch.uint8, device=codes.device)
    step = _GPU_PIECE if codes.is_cuda else _PIECE
    for start in range(0, len(wide), step):
        x = wide[start : start + step]
        both = x | (x >> 4) if bits == 4 else x | (x >> 6) | (x >> 12) | (x >> 18)
        packed[start : start + step] = both.bitwise_and_(0xFF)
    return packed


def _spread(packed: Tensor, bits: int) -> Tensor:
    """uint8 [n] -> uint8 [n * 8 / bits]; the inverse of :func:`_squeezed`"""
    if bits == 8:
        return packed
    codes = torch.empty(len(packed), dtype=_IN_BYTES[bits], device=packed.device)
    step = _GPU_PIECE if packed.is_cuda else _PIECE
    for start in range(0, len(packed), step):
        x = packed[start : start + step].to(codes.dtype)
        if bits == 4:
            spread = (x | (x << 4)).bitwise_and_(0x0F0F)
        else:
            spread = (x | (x << 6) | (x << 12) | (x << 18)).bitwise_and_(0x03030303)
        codes[start : start + step] = spread
    return codes.view(torch.uint8)
