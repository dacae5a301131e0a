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
    """uint8 [count, m] -> int32 [count * bits / 32, m], packed along dim 0."""
    count, m = codes.shape
    total = words(count, bits)
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
    """int32 [w, m] -> uint8 [w * 32 / bits, m]; the inverse of :func:`pack`."""
    total, m = packed.shape
    block = block_codes(bits)
    per_block = block * bits // WORD
    if total % per_block:
        raise ValueError(f"{total} words are not whole blocks of {bits}-bit codes")
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
