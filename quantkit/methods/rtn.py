"""Round to nearest: every weight to the closest level of its group's range. No calibration."""

import torch
from torch import Tensor

from quantkit.core.qweight import QWeight, Scheme
from quantkit.methods import scales


def quantize(weight: Tensor, scheme: Scheme, zero_min: int = 0) -> QWeight:
    """``weight`` [out, in] -> QWeight with fp16 scales. Raises UsageError when the group does not
    divide the input width."""
    out, width = weight.shape
    group = scheme.width(width)
    columns = weight.float().T.reshape(scheme.groups(width), group, out)
    grids = [scales.from_range(part, scheme, zero_min) for part in columns]
    codes = torch.cat(
        [scales.encode(part, grid, scheme.max_code) for part, grid in zip(columns, grids)]
    )
    zero = None
    if not scheme.symmetric:
        zero = torch.stack([torch.as_tensor(g.zero) for g in grids], 1).to(torch.uint8)
    scale = torch.stack([grid.scale for grid in grids], 1).to(scales.SCALE_DTYPE)
    return QWeight(scheme, codes.T.contiguous().to(torch.uint8), scale, zero)
