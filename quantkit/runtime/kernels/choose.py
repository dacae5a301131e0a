"""Which kernel computes a product, by scheme, device and number of tokens: the one place.

    up to 4 bits, on Hopper, unless groups have minimums or the shape is odd (hopper.fits)
                             hopper      CUDA, compiled at the first use
    4 or 8 bits in memory, evenly spaced, groups of a multiple of 32
        up to FEW tokens     skinny      codes go to the tensor cores as they are read (Triton)
        more                 dense       the weight is multiplied out, then cuBLAS
    anything else            none        ``QuantLinear`` dequantizes with torch

FEW is measured on an H200 (benchmarks/kernels_gpu.py); into how many shares ``skinny``
divides the inputs, ``tune`` measures on each GPU.
"""

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.core.qweight import QWeight
from quantkit.runtime.kernels import dense, hopper, skinny, support, tune
from quantkit.runtime.kernels.fragments import Fragments
from quantkit.runtime.kernels.skinny import Config

FEW = 192


def blocked(q: QWeight, device: torch.device) -> bool:
    """Whether the kernels that will compute with ``q`` want it in blocks."""
    fits = hopper.fits(q.scheme, *q.shape, q.minimum is not None)
    return fits and hopper.why_not(support.of(device)) is None


def counters(weight: Fragments) -> int:
    """How many numbers ``arrived`` has for the kernels that compute with ``weight``: ``skinny``
    counts there who has come."""
    return 0 if weight.blocked else weight.tiles * -(-FEW // 8)


def product(x: Tensor, weight: Fragments, bias: Tensor | None, arrived: Tensor) -> Tensor:
    """x [tokens, in] -> [tokens, out] in the dtype of x. ``arrived`` int32 [counters], all 0."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    if half and weight.blocked:
        return hopper.product(x, weight, bias)
    if half and not weight.blocked and len(x) <= FEW:
        here = support.of(x.device)
        early = support.early(x.device)

        def run(config: Config) -> Tensor:
            return skinny.matmul(x, weight, bias, arrived, config, early=early)

        found = ways(weight, len(x), here.processors)
        return run(tune.tuned(weight, found, x.dtype, here.name, run))
    return functional.linear(x, dense.dequantize(weight, x.dtype), bias)


def ways(weight: Fragments, tokens: int, processors: int) -> list[Config]:
    """How the work of a product with few tokens may be divided, the likeliest first."""
    tiles, largest = len(weight.words), weight.group & -weight.group
    found = []
    for step in [step for step in (128, 64) if step <= largest] or [largest]:
        most = weight.width // step
        if tokens > 16 and tiles % 4 == 0:
            count = 32 if tokens <= 32 else 64
            programs = tiles // 4 * -(-tokens // count)
            wanted = processors * (4 if tokens <= 32 else 2)  # programs that fit at once
            found.append(Config(1, _split(programs, wanted, most), step, 1, 4, count))
        elif tokens > 8:
            programs = tiles * -(-tokens // 16)
            found.append(Config(1, _split(programs, 14 * processors, most), step, 1, 1, 16))
        else:
            split = _split(tiles, 20 * processors, most)
            found.append(Config(1, split, step, 1, 1, 8, registers=96))
    return found


def _split(programs: int, wanted: int, most: int) -> int:
    """Shares of the inputs, so that nearly ``wanted`` programs run, and no more: a few that come
    second take as long as all that came first."""
    return max(1, min(most, wanted // programs))
