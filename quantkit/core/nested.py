"""Scales that are quantized themselves: the second level beside a QWeight.

A ``QWeight`` always has its scales as numbers. Where a file holds codes for them (bitsandbytes'
double quantization), a ``Nested`` of the same scales goes along.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Nested:
    """Scales of blocks that are quantized themselves, block after block.

    codes      uint8 [blocks]
    absmax     float32 [blocks / blocksize], rounded up
    map        float32 [256]: what the codes mean
    offset     is added to all of them
    blocksize  scales in a block of scales
    """

    codes: Tensor
    absmax: Tensor
    map: Tensor
    offset: float
    blocksize: int = 256

    def dequantize(self) -> Tensor:
        """float32 [blocks]: the scales, with the roundings of bitsandbytes."""
        block = torch.arange(self.codes.numel()) // self.blocksize
        return self.map[self.codes.long()] * self.absmax[block] + torch.tensor(self.offset)
