"""Round to nearest: every weight to the closest level of its group's range. No calibration.

Symmetric groups have one level more on one side. ``signed`` scales take the sign that gives it to
the weight of the largest magnitude, as ggml's Q4_0 does: steps are smaller, but a weight at the
other end may be a whole step away. Without, the range lies evenly around zero and nothing is
further away than half a step. Measured at 4 bits in groups of 128 on the demo model: a mean KL of
0.159 with signed scales, 0.191 without.
"""

import torch
from torch import Tensor

from quantkit.core.form import Offset
from quantkit.core.qweight import QWeight, Scheme
from quantkit.methods import scales
from quantkit.methods.scales import Grid

_AT_ONCE = 1 << 22  # weights that are rounded at a time


def quantize(
    weight: Tensor,
    scheme: Scheme,
    zero_min: int = 0,
    offset: Offset = "zero",
    signed: bool = False,
) -> QWeight:
    """``weight`` [out, in] -> QWeight with fp16 scales. An asymmetric one has whole zero points, or
    minimums (fp16) where ``offset`` says so. Raises UsageError when the group does not divide the
    input width."""
    width = weight.shape[1]
    scheme.groups(width)
    rows = max(1, _AT_ONCE // width)
    parts = [
        _quantize(part, scheme, zero_min, offset, signed) for part in torch.split(weight, rows)
    ]
    return parts[0] if len(parts) == 1 else _stacked(parts)


def _quantize(
    weight: Tensor, scheme: Scheme, zero_min: int, offset: Offset, signed: bool
) -> QWeight:
    out, width = weight.shape
    if not scheme.symmetric and offset == "minimum":
        return _with_minimum(weight.float().reshape(out, scheme.groups(width), -1), scheme)
    columns = weight.float().T.reshape(scheme.groups(width), scheme.width(width), out)
    grids = [
        _signed(part, scheme)
        if signed and scheme.symmetric
        else scales.from_range(part, scheme, zero_min)
        for part in columns
    ]
    levels = torch.cat([scales.nearest(part, grid) for part, grid in zip(columns, grids)])
    return scales.quantized(levels, scales.together(grids, torch.stack), scheme)


def _signed(target: Tensor, scheme: Scheme) -> Grid:
    """The grid of one group of columns, [group, out], whose first level is the largest weight."""
    largest = target.gather(0, target.abs().argmax(0, keepdim=True))[0]
    middle = float(scheme.midpoint)
    return Grid(scales.stored(largest / -middle), -middle, middle - 1)


def _with_minimum(weight: Tensor, scheme: Scheme) -> QWeight:
    """``weight`` [out, groups, group]; levels are counted from the minimum, as it is stored."""
    low, high = weight.amin(-1), weight.amax(-1)
    minimum = low.to(scales.SCALE_DTYPE)
    scale = scales.stored((high - low) / scheme.max_code)
    codes = ((weight - minimum.float()[..., None]) / scale[..., None]).round_()
    codes = codes.clamp_(0, scheme.max_code).to(torch.uint8).flatten(1)
    return QWeight(scheme, codes, scale.to(scales.SCALE_DTYPE), minimum=minimum)


def _stacked(parts: list[QWeight]) -> QWeight:
    """Rows under rows."""

    def together(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    codes, scale = (torch.cat([getattr(p, name) for p in parts]) for name in ("codes", "scale"))
    zero, minimum = together("zero"), together("minimum")
    return QWeight(parts[0].scheme, codes, scale, zero, minimum=minimum)
