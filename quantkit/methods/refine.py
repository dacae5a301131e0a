"""Two steps that lower the GPTQ objective after rounding, each of which can only improve it.

Same conventions as gptq.py: everything transposed and in visiting order, ``columns`` [in, out] what
the weight should be, ``hessian`` [in, in] with its damping, ``levels`` [in, out], ``grid`` of
[groups, out].
"""

import torch
from torch import Tensor

from quantkit.core.profile import phase
from quantkit.methods import fused
from quantkit.methods.products import Factor, splits, times, times_whole
from quantkit.methods.scales import Grid, stored

TILE, BLOCK = 128, 512  # columns whose changes are passed on one by one, and in small products
_SYSTEM_BYTES, _GPU_SYSTEM_BYTES = 128 << 20, 256 << 20  # of normal equations at a time, at most
_RIDGE = 1e-6


def refined(columns: Tensor, hessian: Tensor, levels: Tensor, grid: Grid, rounds: int) -> Grid:
    """``rounds`` times both steps. Changes ``levels`` in place, returns the new grid."""
    wanted = times(hessian, Factor(columns))
    for _ in range(rounds):
        with phase("refit"):
            grid = refit(wanted, hessian, levels, grid)
        with phase("polish"):
            polish(columns, hessian, levels, grid)
    return grid


def refit(wanted: Tensor, hessian: Tensor, levels: Tensor, grid: Grid) -> Grid:
    """The best scales for the levels as they are: per row, the least-squares solution over all
    groups at once (a groups x groups system). A row keeps its old scales where rounding the new
    ones to their stored form would make it worse. ``wanted`` [in, out] is the Hessian times the
    columns."""
    groups = grid.scale.shape[0]
    most = _GPU_SYSTEM_BYTES if levels.is_cuda else _SYSTEM_BYTES
    out = levels.shape[1]
    rows = -(-out // -(-out // max(1, most // (4 * groups * groups))))  # of parts of one size
    parts = [
        _refit_rows(wanted[:, part], hessian, levels[:, part], grid.scale[:, part])
        for start in range(0, out, rows)
        for part in [slice(start, start + rows)]
    ]
    return grid._replace(scale=torch.cat(parts, 1))


def _refit_rows(wanted: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    with phase("refit equations"):
        system, right = _normal_equations(wanted, hessian, levels, scale.shape[0])
    ridge = system.diagonal(dim1=1, dim2=2).mean(1) * _RIDGE + torch.finfo(torch.float32).tiny
    diagonal = system.diagonal(dim1=1, dim2=2)
    undamped = diagonal.clone()
    diagonal += ridge[:, None]
    solution = (_by_cholesky if system.is_cuda else _by_elimination)(system, right)
    diagonal.copy_(undamped)
    fitted = stored(torch.nan_to_num(solution).T)

    def cost(candidate: Tensor) -> Tensor:
        s = candidate.T
        return ((system @ s[:, :, None]).squeeze(2) * s).sum(1) - 2 * (right * s).sum(1)

    return torch.where(cost(fitted) < cost(scale), fitted, scale)


def _by_elimination(system: Tensor, right: Tensor) -> Tensor:
    """Solutions [out, groups]; no numbers, or any, where there is none."""
    solution: Tensor = torch.linalg.solve_ex(system, right)[0]
    return solution


def _by_cholesky(system: Tensor, right: Tensor) -> Tensor:
    """The same of symmetric, positive definite systems: half of the work, and on a GPU none of the
    waiting for it and for its memory that batches of other systems come with (torch asks MAGMA)."""
    lower, _ = torch.linalg.cholesky_ex(system.mT)  # the same, and columns lie as is asked for
    half = torch.linalg.solve_triangular(lower, right[:, :, None], upper=False)
    solution: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return solution.squeeze(2)


def _normal_equations(
    wanted: Tensor, hessian: Tensor, levels: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Per row, with L_g the levels of group g and w the row: L_g^T H L_h [out, groups, groups] and
    L_g^T H w [out, groups]."""
    out = levels.shape[1]
    width = levels.shape[0] // groups
    right = (wanted * levels).reshape(groups, width, out).sum(1).T
    if splits(hessian) and fused.groupable(levels, width):
        # turned once here, and not by everything that works on it
        return fused.equations(hessian, levels, groups).permute(2, 0, 1).contiguous(), right
    system = levels.new_empty(groups, groups, out)
    for g in range(groups):
        own = slice(g * width, (g + 1) * width)
        stop = own.stop
        # symmetric: only the groups up to this one
        pull = times_whole(hessian[:stop, own], levels[own]).mul_(levels[:stop])
        system[g, : g + 1] = system[: g + 1, g] = pull.reshape(g + 1, width, out).sum(1)
    return system.permute(2, 0, 1), right


def polish(columns: Tensor, hessian: Tensor, levels: Tensor, grid: Grid) -> None:
    """One sweep of coordinate descent: each level in turn becomes the best one given all others.
    Changes ``levels`` in place."""
    width, out = levels.shape
    group = width // len(grid.scale)
    rounded = (levels.reshape(-1, group, out) * grid.scale[:, None]).reshape(width, out)
    errors = Factor(torch.sub(columns, rounded, out=rounded))
    for first in range(0, width, BLOCK):
        block = slice(first, min(first + BLOCK, width))
        pulls = times(hessian[block], errors)
        errors.update(block, _polish_block(pulls, hessian, levels, grid, block))


def _polish_block(
    pulls: Tensor, hessian: Tensor, levels: Tensor, grid: Grid, block: slice
) -> Tensor:
    """Some columns: changes their ``levels``, returns the changes of their errors [n, out].
    ``pulls`` [n, out]: their rows of the Hessian times all errors, before any change."""
    if fused.usable(levels):
        return fused.polish_block(pulls, hessian, levels, grid, block)
    own, levels = hessian[block, block], levels[block]
    group = len(hessian) // len(grid.scale)
    changes = torch.empty_like(pulls)
    for start in range(0, len(pulls), TILE):
        tile, behind = slice(start, start + TILE), slice(start + TILE, None)
        changes[tile] = _polish_tile(
            pulls[tile], own[tile, tile], levels[tile], grid, block.start + start, group
        )
        if len(pulls[behind]):
            pulls[behind].addmm_(own[behind, tile], changes[tile])
    return changes


def _polish_tile(
    pulls: Tensor, own: Tensor, levels: Tensor, grid: Grid, first: int, width: int
) -> Tensor:
    """The columns from ``first`` on: changes ``levels`` [tile, out], returns the change of the
    errors. Groups are ``width`` columns wide.

    ``pulls``: the Hessian's rows times all errors, before any change in the tile; ``own``: the
    tile's own part of the Hessian. Given all others, column j is best at a distance of
    pull_j / own_jj from where it is.
    """
    changes = torch.empty_like(pulls)
    stiffness = own.diagonal().tolist()
    inverse = 1 / grid.scale
    for j in range(len(levels)):
        group = (first + j) // width
        bounds, pull = grid.of_group(group), pulls[j]
        if j:
            pull = torch.addmv(pull, changes[:j].T, own[j, :j])
        level = torch.addcmul(levels[j], pull, inverse[group], value=1 / stiffness[j])
        bounds.clamp(level.round_())
        torch.sub(levels[j], level, out=changes[j]).mul_(bounds.scale)
        levels[j] = level
    return changes
