"""Plain tensors on their way into a file: numbers all of them, in the dtype that is written."""

import torch
from torch import Tensor

from quantkit.errors import QuantkitError


def written(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as ``dtype``. Raises QuantkitError for one that holds infinities or NaN, whose
    numbers do not fit, or that is a code for others (float8 has a scale somewhere else)."""
    if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
        raise QuantkitError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}: it is already quantized",
            "quantize the full-precision original",
        )
    found = tensor.to(dtype)
    if not found.is_floating_point() or bool(found.isfinite().all()):
        return found
    if found is not tensor and bool(tensor.isfinite().all()):
        short = str(dtype).removeprefix("torch.")
        raise QuantkitError(
            f"{name} has values that do not fit into {short}", "save the model in bfloat16 first"
        )
    raise QuantkitError(f"{name} holds infinities or NaN", "the original may be damaged")
