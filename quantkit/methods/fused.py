"""The column loops of gptq.py and refine.py, and the scale search of search.py, as Triton kernels.

A loop over 128 columns is 128 steps that each depend on the one before, and a handful of launches a
step when written in torch. Here a program takes some rows of the weight and keeps a few columns of
a tile in registers; a step rounds its column and passes its error on to those behind it:

    wanted [columns, rows]    .  .  .  .        step j:  level_j = round(wanted_j / scale)
                              j  j  j  j                 error_j = column_j - level_j * scale
                              +  +  +  +                 wanted += unit[j, :] * error_j

Rows do not depend on each other and every sum has a fixed order, so results are deterministic.
Conventions as in gptq.py: [in, out], float32. Where Triton cannot be had, on GPUs before Ampere, or
for other dtypes, the torch functions do the same.
"""

from collections.abc import Callable
from functools import cache
from math import gcd

import torch
from torch import Tensor

from quantkit.core.launch import compiles, compiling, launch, on_its_device
from quantkit.core.qweight import Scheme
from quantkit.methods import products, scales
from quantkit.methods.scales import Grid

_ROWS, _STEP, _WARPS = 32, 16, 1  # of a program of the column loops
# columns whose changes are passed on at once, and how many times that is read ahead
_ROUND_TILE, _ROUND_STAGES = 64, 1
_POLISH_TILE, _POLISH_STAGES = 32, 3
_SEARCH_ROWS, _SEARCH_WARPS = 32, 4
_SYSTEM_ROWS, _SYSTEM_WARPS, _SYSTEM_STAGES = 128, 8, 2
_SYSTEM_GROUPS = 16  # whose part of H is split at a time
_GROUPS = (32, 64, 128)  # inputs of a group that programs can hold


def usable(tensor: Tensor) -> bool:
    """Whether the kernels take this tensor."""
    return tensor.dtype == torch.float32 and compiles(tensor)


def groupable(columns: Tensor, group: int) -> bool:
    """Whether the kernels that take whole groups take such wide ones."""
    return usable(columns) and group in _GROUPS


@on_its_device
def round_block(
    passed: Tensor,
    columns: Tensor,
    unit: Tensor,
    inverses: Tensor,
    roots: Tensor,
    scheme: Scheme,
    zero_min: int,
    block: slice,
    levels: Tensor,
    errors: Tensor,
) -> list[Grid]:
    """What gptq._Rounding._round_block does."""
    from quantkit.methods import fused_kernels as kernels

    group, out = roots.shape[1], columns.shape[1]
    first, groups = block.start // group, (block.stop - block.start) // group
    grid = _new_grid(groups, columns, scheme)
    low, high, _ = _range(grid, columns)
    launch(
        kernels.round_block,
        (-(-out // _SEARCH_ROWS),),
        passed,
        columns,
        unit,
        inverses[first:],
        roots[first:],
        grid.scale,
        low,
        high,
        levels,
        errors,
        out,
        _apart(unit),
        block.start,
        groups,
        *_candidates(scheme, zero_min),
        COARSE=scales.COARSE,
        SYMMETRIC=scheme.symmetric,
        GROUP=group,
        ROWS=_SEARCH_ROWS,
        TILE=_ROUND_TILE,
        STAGES=_ROUND_STAGES,
        STEP=_STEP,
        num_warps=_SEARCH_WARPS,
    )
    return [grid.of_group(index) for index in range(groups)]


@on_its_device
def round_tile(
    passed: Tensor,
    at: int,
    columns: Tensor,
    unit: Tensor,
    grid: Grid,
    tile: slice,
    levels: Tensor,
    errors: Tensor,
) -> None:
    """What gptq._round_tile does."""
    from quantkit.methods import fused_kernels as kernels

    out, size = columns.shape[1], tile.stop - tile.start
    low, high, ranged = _range(grid, columns)
    launch(
        kernels.round_tile,
        (-(-out // _ROWS),),
        passed,
        columns,
        unit,
        grid.scale,
        low,
        high,
        levels,
        errors,
        out,
        _apart(unit),
        tile.start,
        at,
        tile=size,
        RANGED=ranged,
        TILE=_ROUND_TILE,
        STAGES=_ROUND_STAGES,
        STEP=_STEP,
        ROWS=_ROWS,
        num_warps=_WARPS,
    )


@on_its_device
def polish_block(
    pulls: Tensor, hessian: Tensor, levels: Tensor, grid: Grid, block: slice
) -> Tensor:
    """What refine._polish_block does."""
    from quantkit.methods import fused_kernels as kernels

    size, out = pulls.shape
    width = len(hessian) // len(grid.scale)
    low, high, ranged = _range(grid, levels)
    changes = torch.empty_like(pulls)
    launch(
        kernels.polish_block,
        (-(-out // _ROWS),),
        pulls,
        hessian,
        grid.scale,
        low,
        high,
        levels,
        changes,
        out,
        _apart(hessian),
        block.start,
        width,
        size,
        SHARED=gcd(width, _STEP),
        RANGED=ranged,
        TILE=_POLISH_TILE,
        STAGES=_POLISH_STAGES,
        STEP=_STEP,
        ROWS=_ROWS,
        num_warps=_WARPS,
    )
    return changes


@on_its_device
def search(columns: Tensor, roots: Tensor, scheme: Scheme, zero_min: int) -> Grid:
    """What search.search_all does."""
    from quantkit.methods import fused_kernels as kernels

    out = columns.shape[1]
    grid = _new_grid(len(roots), columns, scheme)
    low, high, _ = _range(grid, columns)
    launch(
        kernels.search,
        (-(-out // _SEARCH_ROWS), len(roots)),
        columns.contiguous(),
        roots,
        grid.scale,
        low,
        high,
        out,
        *_candidates(scheme, zero_min),
        COARSE=scales.COARSE,
        SYMMETRIC=scheme.symmetric,
        GROUP=roots.shape[1],
        ROWS=_SEARCH_ROWS,
        num_warps=_SEARCH_WARPS,
    )
    return grid


def slow_to_compile(
    scheme: Scheme, refines: bool, device: torch.device
) -> list[Callable[[], object]]:
    """What takes seconds to compile, the first time, of all that linears of such a scheme take:
    each a call that only compiles, for a thread of its own. None where there is nothing."""
    group = scheme.group_size
    like = torch.empty(max(group, 1), _STEP, device=device)  # as weights are divisible
    if not groupable(like, group):
        return []
    square = torch.empty(1, group, group, device=device)
    grid, block = _new_grid(1, like, scheme), slice(0, group)

    def rounding() -> None:
        with compiling():
            round_block(like, like, square[0], square, square, scheme, 0, block, like, like)

    def refining() -> None:
        with compiling():
            polish_block(like, square[0], like, grid, block)
            equations(square[0], like, 1)

    return [rounding, refining] if refines else [rounding]


def _candidates(scheme: Scheme, zero_min: int) -> tuple[float, ...]:
    """What the kernels' candidates are made of."""
    middle, top = float(scheme.midpoint), float(scheme.max_code)
    return middle, top, float(zero_min), scales.SHRINK[0], scales.STEP, *scales.FINE


def _apart(matrix: Tensor) -> int:
    """Numbers from a row to the next one, as kernels are told. Raises ValueError where those of a
    row do not lie together."""
    if matrix.stride(1) != 1:
        raise ValueError(f"a matrix with the strides {matrix.stride()} lies by columns")
    return matrix.stride(0)


def _new_grid(groups: int, columns: Tensor, scheme: Scheme) -> Grid:
    """Room for the grids of so many groups: [groups, out]."""
    scale = columns.new_empty(groups, columns.shape[1])
    if scheme.symmetric:
        return Grid(scale, -float(scheme.midpoint), float(scheme.midpoint - 1))
    return Grid(scale, torch.empty_like(scale), torch.empty_like(scale))


@on_its_device
def equations(hessian: Tensor, levels: Tensor, groups: int) -> Tensor:
    """L_g^T H L_h for all pairs of groups and all rows: [groups, groups, out]. H is split into two
    bfloat16 parts (products.py), some groups at a time."""
    from quantkit.methods import fused_kernels as kernels

    width, out = levels.shape
    size = width // groups
    system = levels.new_empty(groups, groups, out)
    exact = levels.bfloat16().T.contiguous()
    for first in range(0, groups, _SYSTEM_GROUPS):
        stop = min(first + _SYSTEM_GROUPS, groups)
        high, low = products.split(hessian[first * size : stop * size, : stop * size])
        launch(
            kernels.equations,
            (-(-out // _SYSTEM_ROWS), stop - first),
            high,
            low,
            exact,
            system,
            out,
            width,
            high.stride(0),
            first,
            stop - first,
            groups,
            GROUP=size,
            ROWS=_SYSTEM_ROWS,
            STAGES=_SYSTEM_STAGES,
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
