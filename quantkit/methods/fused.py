"""The column loops of gptq.py and refine.py, and the scale search of scales.py, as Triton kernels.

A loop over 128 columns is 128 steps that each depend on the one before, and a handful of launches a
step when written in torch. Here a program takes some rows of the weight and keeps all columns of a
tile in registers; a step picks its column out of them and passes its error on to those behind it:

    running [tile, rows]      .  .  .  .        step j:  level_j = round(running_j / scale)
                              j  j  j  j                 error_j = column_j - level_j * scale
                              +  +  +  +                 running += lower[:, j] * error_j

Rows do not depend on each other and every sum has a fixed order, so results are deterministic.
Conventions as in gptq.py: [in, out], float32. Where Triton cannot be had, on GPUs before Ampere, or
for other dtypes, the torch functions do the same.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from quantkit.core.qweight import Scheme
from quantkit.methods import products, scales
from quantkit.methods.scales import Grid

_ROWS, _WARPS = 32, 1  # of a program of the column loops
_SEARCH_ROWS, _SEARCH_WARPS = 64, 8
_SYSTEM_ROWS, _SYSTEM_WARPS = 128, 8
_SYSTEM_GROUPS = 16  # whose part of H is split at a time
_GROUPS = (32, 64, 128)  # inputs of a group that programs can hold


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def usable(tensor: Tensor) -> bool:
    """Whether the kernels take this tensor."""
    return tensor.dtype == torch.float32 and products.tensor_cores(tensor) and _installed()


def groupable(columns: Tensor, group: int) -> bool:
    """Whether :func:`search` and :func:`equations` take groups so wide."""
    return usable(columns) and group in _GROUPS


def round_tile(
    running: Tensor, columns: Tensor, lower: Tensor, grid: Grid, levels: Tensor, errors: Tensor
) -> None:
    """What gptq._round_tile does."""
    from quantkit.methods import fused_kernels as kernels

    tile, out = columns.shape
    low, high, ranged = _range(grid, columns)
    kernels.round_tile[(-(-out // _ROWS),)](
        running,
        columns,
        lower,
        grid.scale,
        low,
        high,
        levels,
        errors,
        out,
        tile=tile,
        RANGED=ranged,
        TILE=_power(tile),
        ROWS=_ROWS,
        num_warps=_WARPS,
    )


def polish_tile(
    pulls: Tensor, own: Tensor, levels: Tensor, grid: Grid, first: int, width: int
) -> Tensor:
    """What refine._polish_tile does, for the columns from ``first`` on; ``grid`` is that of all
    groups, each ``width`` columns wide."""
    from quantkit.methods import fused_kernels as kernels

    tile, out = levels.shape
    low, high, ranged = _range(grid, levels)
    changes = torch.empty_like(levels)
    kernels.polish_tile[(-(-out // _ROWS),)](
        pulls,
        own.contiguous(),
        1 / own.diagonal(),
        grid.scale,
        low,
        high,
        levels,
        changes,
        out,
        first,
        width,
        tile=tile,
        RANGED=ranged,
        TILE=_power(tile),
        ROWS=_ROWS,
        num_warps=_WARPS,
    )
    return changes


def search(target: Tensor, curvature: Tensor, scheme: Scheme, zero_min: int) -> Grid:
    """What search._search does."""
    from quantkit.methods import fused_kernels as kernels

    group, out = target.shape
    scale, low = torch.empty_like(target[0]), torch.empty_like(target[0])
    kernels.search[(-(-out // _SEARCH_ROWS),)](
        target.contiguous(),
        curvature.contiguous(),
        scale,
        low,
        out,
        float(scheme.midpoint),
        float(scheme.max_code),
        float(zero_min),
        scales.SHRINK[0],
        scales.STEP,
        *scales.FINE,
        COARSE=scales.COARSE,
        SYMMETRIC=scheme.symmetric,
        GROUP=group,
        ROWS=_SEARCH_ROWS,
        num_warps=_SEARCH_WARPS,
    )
    if scheme.symmetric:
        return Grid(scale, -float(scheme.midpoint), float(scheme.midpoint - 1))
    return Grid(scale, low, low + scheme.max_code)


def equations(hessian: Tensor, levels: Tensor, groups: int) -> Tensor:
    """L_g^T H L_h for all pairs of groups and all rows: [groups, groups, out]. H is split into two
    bfloat16 parts (products.py), some groups at a time."""
    from quantkit.methods import fused_kernels as kernels

    width, out = levels.shape
    size = width // groups
    system = levels.new_empty(groups, groups, out)
    exact = levels.bfloat16()
    for first in range(0, groups, _SYSTEM_GROUPS):
        stop = min(first + _SYSTEM_GROUPS, groups)
        high, low = products.split(hessian[: stop * size, first * size : stop * size])
        kernels.equations[(-(-out // _SYSTEM_ROWS), stop - first)](
            high,
            low,
            exact,
            system,
            out,
            high.stride(0),
            first,
            GROUPS=groups,
            GROUP=size,
            ROWS=_SYSTEM_ROWS,
            num_warps=_SYSTEM_WARPS,
        )
    return system


def _range(grid: Grid, like: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The bounds of levels as tensors, and whether they are more than a number each."""
    if isinstance(grid.low, Tensor) and isinstance(grid.high, Tensor):
        return grid.low.contiguous(), grid.high.contiguous(), True
    low, high = (_number(float(x), like.device) for x in (grid.low, grid.high))
    return low, high, False


@cache
def _number(value: float, device: torch.device) -> Tensor:
    """On the device, once for all launches: there are two for each of some hundred groups."""
    return torch.full((1,), value, device=device)


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
