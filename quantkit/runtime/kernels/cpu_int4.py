"""torch's int4 matrix product for CPUs, and the way back from its packed weights.

torch packs codes for its own kernel in blocks of rows, two codes a byte:

    byte (block, k, i)  =  code[block * B + i + B / 2, k] << 4  |  code[block * B + i, k]

where B depends on the processor (64 with AVX512, 32 with AVX2). Large batches are faster with a
dequantized weight and an ordinary product, so the codes must be readable too, without a second copy
of them: B is found by packing a probe and looking at it.
"""

from functools import cache

import torch
from torch import Tensor

GROUPS = (32, 64, 128, 256)
ZERO = 8  # the kernel computes scale * (code - 8) + offset


@cache
def block_rows() -> int | None:
    """Rows in a block of this processor's layout; None when it has another layout altogether."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (128, 64), generator=generator, dtype=torch.uint8)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    for rows in (64, 32, 16):
        if torch.equal(_unpack(packed, rows), codes):
            return rows
    return None


def fits(out: int, width: int, group: int) -> bool:
    """Whether the kernel can take a weight of this shape."""
    rows = block_rows()
    return rows is not None and out % rows == 0 and width % group == 0 and group in GROUPS


def pack(codes: Tensor) -> Tensor:
    """uint8 [out, in] -> uint8 [out, in / 2] in the kernel's layout."""
    return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack`."""
    rows = block_rows()
    assert rows is not None
    return _unpack(packed, rows)


def _unpack(packed: Tensor, rows: int) -> Tensor:
    out, half = packed.shape
    blocks = packed.reshape(out // rows, half * 2, rows // 2)
    both = torch.cat([blocks & 15, blocks >> 4], dim=2)
    return both.transpose(1, 2).reshape(out, half * 2)


def scales_and_offsets(
    scale: Tensor, zero: Tensor | None, minimum: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[in / group, out, 2] for the kernel, from ``scale`` and either ``zero`` or ``minimum`` (or
    none), all [out, groups]."""
    scale = scale.float()
    offset = torch.zeros_like(scale) if zero is None else scale * (ZERO - zero.float())
    if minimum is not None:
        offset = minimum.float() + ZERO * scale
    return torch.stack([scale.T, offset.T], 2).to(dtype).contiguous()


def matmul(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    """[rows, in] times the packed weight -> [rows, out], in the dtype of ``x`` and ``scales``."""
    return torch._weight_int4pack_mm_for_cpu(x, packed, group, scales)
