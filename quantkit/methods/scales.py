"""Scales and zero points of groups: from the range of the weights, or searched under a Hessian.

Everything here works on one group of columns at a time, transposed: ``target`` is float32
[group, out], one column of it per row of the weight, so that a step over all rows is one
contiguous operation. A grid is ``scale`` [out] float32 (already rounded to what the file will hold)
and ``zero`` [out] float32 in code units, or the scheme's midpoint.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.core.qweight import Scheme

SCALE_DTYPE = torch.float16
# Shrinking the range below 0.6 of the largest weight, or stretching it past 1.1, never won.
_SHRINK = (0.6, 1.1)
_COARSE = 9
_FINE = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)


class Grid(NamedTuple):
    scale: Tensor
    zero: Tensor | float


def stored(scale: Tensor) -> Tensor:
    """The scale as the file will hold it, in its own dtype; never zero and never infinite."""
    limit = torch.finfo(SCALE_DTYPE)
    rounded = scale.clamp(-limit.max, limit.max).to(SCALE_DTYPE).to(scale.dtype)
    return torch.where(rounded == 0, torch.full_like(rounded, limit.tiny), rounded)


def encode(target: Tensor, grid: Grid, max_code: int) -> Tensor:
    """The nearest codes, as float32 (they stay floats until a QWeight is made)."""
    return (target / grid.scale).add_(grid.zero).round_().clamp_(0, max_code)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    return (codes - grid.zero).mul_(grid.scale)


def from_range(target: Tensor, scheme: Scheme, zero_min: int = 0) -> Grid:
    """The smallest grid that holds every weight of the group: what round-to-nearest uses."""
    return _Range(target, scheme, zero_min).grid(1.0, 1)


class _Range:
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
        # codes of a symmetric weight run from -8 to 7: the sign of the scale chooses the end that
        # gets the extra level
        return (1, -1) if self.scheme.symmetric else (1,)

    def grid(self, shrink: float | Tensor, sign: float | Tensor) -> Grid:
        if self.scheme.symmetric:
            return Grid(
                stored(self.high * shrink * sign / (self.scheme.midpoint - 0.5)),
                float(self.scheme.midpoint),
            )
        scale = stored((self.high - self.low) * shrink / self.scheme.max_code)
        zero = (-self.low * shrink / scale).round_().clamp_(self.zero_min, self.scheme.max_code)
        return Grid(scale, zero)


def search(target: Tensor, curvature: Tensor, scheme: Scheme, zero_min: int = 0) -> Grid:
    """The grid with the least ``e^T K e`` per row, e = target - rounded target.

    ``curvature`` K is float32 [group, group], positive definite. For GPTQ it is the group's
    Hessian given that the columns still to come will make up for the error as well as they can.
    A coarse pass over range factors (and, when symmetric, both signs of the scale), then a finer
    one around each row's best.
    """
    span = _Range(target, scheme, zero_min)
    step = (_SHRINK[1] - _SHRINK[0]) / (_COARSE - 1)
    best = torch.full_like(target[0], float("inf"))
    shrink, sign = torch.ones_like(best), torch.ones_like(best)

    def consider(factor: float | Tensor, direction: float | Tensor) -> None:
        grid = span.grid(factor, direction)
        error = decode(encode(target, grid, scheme.max_code), grid).sub_(target)
        cost = (curvature @ error).mul_(error).sum(0)
        better = cost < best
        torch.where(better, cost, best, out=best)
        torch.where(better, torch.as_tensor(factor, dtype=best.dtype), shrink, out=shrink)
        torch.where(better, torch.as_tensor(direction, dtype=best.dtype), sign, out=sign)

    for index in range(_COARSE):
        for direction in span.signs:
            consider(_SHRINK[0] + index * step, direction)
    centre, side = shrink.clone(), sign.clone()
    for offset in _FINE:
        consider(centre + offset * step, side)
    return span.grid(shrink, sign)
