"""Scales and zero points of groups, and candidates for them (search.py chooses).

Everything here works on one group of columns at a time, transposed: ``target`` is float
[group, out], one column of it per row of the weight, so that a step over all rows is one
contiguous operation.

Inside the solvers a code is held as its *level*, code - zero, a whole number in the target's dtype:
``w = scale * level``. Zero points only appear as the range of levels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.core.qweight import QWeight, Scheme

SCALE_DTYPE = torch.float16
# Factors on the range, and steps between them around the best. Three times as many factors over a
# wider span lower the objective by 0.3 %.
SHRINK = (0.65, 1.05)
COARSE = 7
STEP = (SHRINK[1] - SHRINK[0]) / (COARSE - 1)
FINE = (-0.67, -0.33, 0.33, 0.67)


class Grid(NamedTuple):
    """``scale`` [..., out], already rounded to what the file will hold; levels run from ``low`` to
    ``high``: numbers when symmetric, else [..., out]. The zero point is ``-low``."""

    scale: Tensor
    low: Tensor | float
    high: Tensor | float

    def clamp(self, levels: Tensor) -> Tensor:
        """Bring ``levels`` into the range, in place."""
        return levels.clamp_(self.low, self.high)  # type: ignore[arg-type]

    def of_group(self, index: int) -> "Grid":
        """One group's grid out of a grid of [groups, out]."""
        if isinstance(self.low, float) or isinstance(self.high, float):
            return Grid(self.scale[index], self.low, self.high)
        return Grid(self.scale[index], self.low[index], self.high[index])

    def spread(self) -> "Grid":
        """A grid of [groups, out] for levels [groups, group, out]."""
        if isinstance(self.low, float) or isinstance(self.high, float):
            return Grid(self.scale[:, None], self.low, self.high)
        return Grid(self.scale[:, None], self.low[:, None], self.high[:, None])


def stored(scale: Tensor) -> Tensor:
    """The scale as the file will hold it, in its own dtype; never zero and never infinite."""
    limit = torch.finfo(SCALE_DTYPE)
    rounded = scale.clamp(-limit.max, limit.max).to(SCALE_DTYPE).to(scale.dtype)
    return torch.where(rounded == 0, torch.full_like(rounded, limit.tiny), rounded)


def nearest(target: Tensor, grid: Grid) -> Tensor:
    """The nearest levels."""
    return grid.clamp((target / grid.scale).round_())


def from_range(target: Tensor, scheme: Scheme, zero_min: int = 0) -> Grid:
    """The smallest grid that holds every weight of the group: what round-to-nearest uses."""
    return Range(target, scheme, zero_min).grid(1.0, 1)


class Range:
    """The range of a group's weights, from which candidate grids are cut."""

    def __init__(self, target: Tensor, scheme: Scheme, zero_min: int) -> None:
        self.scheme, self.zero_min = scheme, zero_min
        if scheme.symmetric:
            self.high = target.abs().amax(0)
        else:
            self.low = target.amin(0).clamp_(max=0)
            self.high = target.amax(0).clamp_(min=0)

    @property
    def signs(self) -> tuple[int, ...]:
        # levels of a symmetric weight run from -8 to 7: the sign of the scale chooses the end that
        # gets the extra one
        return (1, -1) if self.scheme.symmetric else (1,)

    def grid(self, shrink: float | Tensor, sign: float | Tensor) -> Grid:
        middle, top = float(self.scheme.midpoint), self.scheme.max_code
        if self.scheme.symmetric:
            scale = stored(self.high * shrink * sign / (middle - 0.5))
            return Grid(scale, -middle, middle - 1)
        scale = stored((self.high - self.low) * shrink / top)
        low = (self.low * shrink / scale).round_().clamp_(-top, -self.zero_min)
        return Grid(scale, low, low + top)


def together(grids: list[Grid], how: Callable[[list[Tensor]], Tensor]) -> Grid:
    """Several grids as one; ``how`` is torch.stack for groups, torch.cat for rows."""
    scales, lows, highs = zip(*grids)
    if isinstance(lows[0], Tensor):
        return Grid(how(list(scales)), how(list(lows)), how(list(highs)))
    return Grid(how(list(scales)), lows[0], highs[0])


def quantized(
    levels: Tensor, grid: Grid, scheme: Scheme, back: Tensor | None = None, **fields: Tensor
) -> QWeight:
    """A QWeight of levels [in, out] and a grid of [groups, out]. ``back`` is where each input of
    the model is found among the levels' inputs."""
    zero = None
    if isinstance(grid.low, Tensor):
        grouped = levels.reshape(len(grid.low), -1, levels.shape[1])
        levels = (grouped - grid.low[:, None]).reshape(levels.shape)
        zero = (-grid.low).T.contiguous().to(torch.uint8)
    else:
        levels = levels - grid.low
    if back is not None:
        levels = levels[back]
    codes = levels.T.contiguous().to(torch.uint8)
    return QWeight(scheme, codes, grid.scale.T.contiguous().to(SCALE_DTYPE), zero, **fields)
