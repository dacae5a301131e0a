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
    levels = torch.cat([scales.nearest(part, grid) for part, grid in zip(columns, grids)])
    return scales.quantized(levels, scales.together(grids, torch.stack), scheme)
