"""NF4, FP4 and LLM.int8(), bit for bit as bitsandbytes 0.50 rounds on a CPU. No calibration.

4 bits: every block of neighbouring inputs is divided by its largest magnitude and rounded to the
nearest of 16 levels (QLoRA, Dettmers et al., arXiv:2305.14314, section 3). What has to be as
bitsandbytes has it (backends/default/ops.py):

    scaled   w * (1 / absmax), a product and not a quotient, cut to -1 .. 1
    code     how many midpoints between neighbouring levels are below ``scaled``: a tie goes to the
             lower level. FP4 has two zeros: code 8 for what is above zero, else code 0

Double quantization stores the scales in 8 bits (8-bit Approximations for Parallelism in Deep
Learning, Dettmers, arXiv:1511.04561): their mean is taken off, and the rest is rounded in blocks of
256 to the numbers of :func:`dynamic_map`. bitsandbytes finds those in a table of 65536 equal steps
from -1 to 1, so that they are the nearest ones to the middle of a step, not to the scale.

8 bits: a row, in float16, is multiplied by 127 / its largest magnitude and rounded, half to even.
"""

from functools import cache

import torch
from torch import Tensor

from quantkit.core.nested import Nested
from quantkit.core.qweight import LEVELS, QWeight, Scheme
from quantkit.errors import QuantkitError

BLOCK = 64
NESTED_BLOCK = 256
_TINY = 1e-38  # stands for the absmax of a block of zeros
_STEPS = 65536
_INT8_MAX = 127


def quantize(weight: Tensor, scheme: Scheme) -> QWeight:
    """``weight`` [out, in], of any floating-point dtype -> QWeight on the grid of ``scheme`` (nf4
    or fp4), scales float32. Raises UsageError when the group does not divide the input width."""
    blocks = _blocks(weight, scheme)
    scale = blocks.abs().amax(-1)
    scaled = (blocks * (1 / scale.clamp(min=_TINY))[..., None]).clamp_(-1, 1)
    bounds, order = _bounds(scheme.grid)
    codes = order[torch.bucketize(scaled, bounds, out_int32=True)]
    return QWeight(scheme, codes.reshape(weight.shape), scale)


def quantize_int8(weight: Tensor) -> QWeight:
    """``weight`` [out, in] -> 8 bits, one scale a row, float64 (bitsandbytes stores 127 times the
    scale). Raises QuantkitError for weights that are too large for float16."""
    half = weight.to(torch.float16)
    largest = half.abs().amax(1, keepdim=True).float()
    if not bool(largest.isfinite().all()):
        raise QuantkitError("it has values that do not fit into float16, in which int8 is rounded")
    levels = (half * (_INT8_MAX / largest)).round_().nan_to_num_(0)  # 0 / 0: a row of zeros
    codes = (levels + 128).to(torch.uint8)
    return QWeight(Scheme(8, -1), codes, largest.double() / _INT8_MAX)


def offset(weight: Tensor, scheme: Scheme) -> float:
    """What :func:`nest` will take off the scales of this weight, without quantizing it."""
    return float(_blocks(weight, scheme).abs().amax(-1).reshape(-1).mean())


def nest(scale: Tensor) -> Nested:
    """Scales float32 [out, groups] in 8 bits."""
    flat = scale.reshape(-1)
    mean = flat.mean()
    rest = torch.nn.functional.pad(flat - mean, (0, -len(flat) % NESTED_BLOCK))
    blocks = rest.reshape(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1 / absmax)[:, None]).nan_to_num_(-1)  # 0 / 0: equal scales
    step = ((scaled + 1) * (_STEPS - 1) / 2 + 0.5).clamp_(0, _STEPS - 1).long()
    codes = _table()[step].reshape(-1)[: len(flat)]
    return Nested(codes, absmax, dynamic_map(), float(mean), NESTED_BLOCK)


@cache
def dynamic_map() -> Tensor:
    """float32 [256], rising: 7 decades of both signs; the larger the numbers of a decade, the more
    of them there are. (``create_dynamic_map`` of bitsandbytes functional.py.)"""
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        numbers += (10 ** (decade - 6) * means).tolist()
        numbers += (-(10 ** (decade - 6)) * means).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32)


@cache
def _table() -> Tensor:
    """uint8 [_STEPS]: the nearest number of the map to each step."""
    levels = dynamic_map().double()
    steps = torch.arange(_STEPS, dtype=torch.float64) * 2 / (_STEPS - 1) - 1
    return torch.bucketize(steps, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


def _blocks(weight: Tensor, scheme: Scheme) -> Tensor:
    """float32 [out, groups, group]"""
    out, width = weight.shape
    return weight.float().reshape(out, scheme.groups(width), -1)


@cache
def _bounds(grid: str) -> tuple[Tensor, Tensor]:
    """Midpoints between the levels in rising order, and the code of each level in that order."""
    levels = torch.tensor(LEVELS[grid])
    order = levels.argsort(stable=True)
    rising = levels[order]
    return (rising[:-1] + rising[1:]) / 2, order.to(torch.uint8)
