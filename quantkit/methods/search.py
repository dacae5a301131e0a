"""The search for the scales of a group under its part of the Hessian.

Conventions as in scales.py: ``target`` is float [group, out].
"""

import torch
from torch import Tensor

from quantkit.core.qweight import Scheme
from quantkit.methods import fused
from quantkit.methods.scales import COARSE, FINE, SHRINK, STEP, Grid, Range, together

_AT_ONCE = 1024  # rows of the weight searched at once on a CPU, to stay in its caches


def search(target: Tensor, root: Tensor, scheme: Scheme, zero_min: int = 0) -> Grid:
    """The grid with the least ``|R e|^2`` per row, e = target - rounded target.

    ``root`` R is [group, group], R^T R the curvature of the loss. For GPTQ that is the group's
    Hessian given that the columns still to come will make up for the error as well as they can. A
    coarse pass over range factors (and, when symmetric, both signs of the scale), then a finer one
    around each row's best.

    A sum of squares needs few digits of its terms, where the same number as e^T (R^T R e) is a
    difference of large ones: the kernel (fused.py) multiplies with 11 bits.
    """
    if target.is_cuda or target.shape[1] <= _AT_ONCE:
        return _search(target, root, scheme, zero_min)
    parts = [
        _search(part.contiguous(), root, scheme, zero_min)
        for part in torch.split(target, _AT_ONCE, 1)
    ]
    return together(parts, torch.cat)


def search_all(columns: Tensor, roots: Tensor, scheme: Scheme, zero_min: int = 0) -> Grid:
    """The same for every group of ``columns`` [in, out] by itself: a grid of [groups, out], from
    ``roots`` [groups, group, group]."""
    if fused.groupable(columns, roots.shape[1]):
        return fused.search(columns, roots, scheme, zero_min)
    parts = torch.split(columns, roots.shape[1])
    grids = [search(part, root, scheme, zero_min) for part, root in zip(parts, roots)]
    return together(grids, torch.stack)


def _search(target: Tensor, root: Tensor, scheme: Scheme, zero_min: int) -> Grid:
    span = Range(target, scheme, zero_min)
    best = torch.full_like(target[0], float("inf"))
    shrink, sign = torch.ones_like(best), torch.ones_like(best)
    opposite = -target
    level, error, pull = (torch.empty_like(target) for _ in range(3))

    def consider(factor: float | Tensor, direction: float | Tensor) -> None:
        grid = span.grid(factor, direction)
        torch.mul(target, 1 / grid.scale, out=level)
        grid.clamp(level.round_())
        torch.addcmul(opposite, level, grid.scale, out=error)
        cost = torch.mm(root, error, out=pull).square_().sum(0)
        better = cost < best
        torch.where(better, cost, best, out=best)
        torch.where(better, torch.as_tensor(factor, dtype=best.dtype), shrink, out=shrink)
        torch.where(better, torch.as_tensor(direction, dtype=best.dtype), sign, out=sign)

    for index in range(COARSE):
        for direction in span.signs:
            consider(SHRINK[0] + index * STEP, direction)
    centre, side = shrink.clone(), sign.clone()
    for offset in FINE:
        consider(centre + offset * STEP, side)
    return span.grid(shrink, sign)
