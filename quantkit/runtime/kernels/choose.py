"""Which kernel computes a product, by scheme, device and number of tokens: the one place.

4 or 8 bits in memory, evenly spaced, groups of 32 or more
    up to FEW tokens     skinny      codes go to the tensor cores as they are read
    more                 dense       the weight is multiplied out, a part at a time
anything else            none        ``QuantLinear`` dequantizes with torch
"""

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.runtime.kernels import dense, skinny, support
from quantkit.runtime.kernels.fragments import Fragments
from quantkit.runtime.kernels.skinny import Config

FEW = 64
PART = 48 << 20  # bytes of a weight that are multiplied out at a time: they stay in the L2 cache
_WARPS = 24  # that a processor shall have in flight


def product(x: Tensor, weight: Fragments, bias: Tensor | None, arrived: Tensor) -> Tensor:
    """x [tokens, in] -> [tokens, out] in the dtype of x."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    if half and len(x) <= FEW:
        here = support.of(x.device)
        config = divided(weight, len(x), here.processors)
        early = here.capability >= (9, 0)
        return skinny.matmul(x, weight, bias, arrived, config, early=early)
    return in_parts(x, weight, bias)


def in_parts(x: Tensor, weight: Fragments, bias: Tensor | None) -> Tensor:
    """The product with the weight multiplied out, so much of it at a time as the cache keeps."""
    tile = weight.rows * weight.width * x.element_size()
    tiles = weight.words.shape[0]
    count = max(1, PART // tile)
    if count >= tiles:
        return functional.linear(x, dense.dequantize(weight, x.dtype), bias)
    result = torch.empty(len(x), weight.out, dtype=x.dtype, device=x.device)
    for first in range(0, tiles, count):
        part = dense.dequantize(weight, x.dtype, first, count)
        start = first * weight.rows
        these = slice(start, start + len(part))
        result[:, these] = functional.linear(x, part, None if bias is None else bias[these])
    return result


def divided(weight: Fragments, tokens: int, processors: int) -> Config:
    """How the work of a product with few tokens is divided."""
    step = min(128, weight.group & -weight.group)
    tiles = weight.words.shape[0]
    if tokens > 16 and tiles % 4 == 0:
        count = 32 if tokens <= 32 else 64
        split = _split(tiles // 4, 2 * processors, weight.width // step)
        return Config(1, split, min(step, 64), 1, 4, count)
    parts = min(4, weight.width // step)
    split = _split(tiles, processors * _WARPS // parts, weight.width // step // parts)
    return Config(1, split, step, parts, 1, max(8, 1 << (tokens - 1).bit_length()))


def _split(programs: int, wanted: int, most: int) -> int:
    """Shares of the inputs, so that about ``wanted`` programs run."""
    return max(1, min(most, round(wanted / programs)))
