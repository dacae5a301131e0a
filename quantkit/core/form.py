"""What a format can hold, as far as converting numbers into it needs to know."""

from dataclasses import dataclass
from typing import Literal

import torch

Offset = Literal["symmetric", "zero", "minimum"]


@dataclass(frozen=True)
class Form:
    """bits     code sizes that the format has, smallest first
    offset   how the zero of a group is stored: not at all, as a zero point, as a minimum
    scales   dtypes of scales, the usual one first
    groups   group sizes that it has; empty: any
    ordered  whether inputs may belong to groups out of order (g_idx)
    zero_min smallest zero point
    mixed    whether linears of one checkpoint may have schemes of their own
    """

    bits: tuple[int, ...]
    offset: Offset
    scales: tuple[torch.dtype, ...] = (torch.float16,)
    groups: tuple[int, ...] = ()
    ordered: bool = False
    zero_min: int = 0
    mixed: bool = False
