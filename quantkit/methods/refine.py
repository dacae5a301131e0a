"""Two steps that lower the GPTQ objective after rounding, each of which can only improve it.

Same conventions as gptq.py: everything transposed and in visiting order, ``columns`` [in, out] what
the weight should be, ``hessian`` [in, in] with its damping, ``levels`` [in, out], ``grid`` of
[groups, out].
"""

import torch
from torch import Tensor

from quantkit.methods.scales import Grid, stored

_TILE = 128
_SYSTEM_BYTES = 256 << 20  # how large the batch of normal equations may grow
_RIDGE = 1e-6


def refit(columns: Tensor, hessian: Tensor, levels: Tensor, grid: Grid) -> Grid:
    """The best scales for the levels as they are: per row, the least-squares solution over all
    groups at once (a groups x groups system). A row keeps its old scales where rounding the new
    ones to their stored form would make it worse."""
    groups = grid.scale.shape[0]
    rows = max(1, _SYSTEM_BYTES // (4 * groups * groups))
    parts = [
        _refit_rows(columns[:, part], hessian, levels[:, part], grid.scale[:, part])
        for start in range(0, levels.shape[1], rows)
        for part in [slice(start, start + rows)]
    ]
    return grid._replace(scale=torch.cat(parts, 1))


def _refit_rows(columns: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    system, wanted = _normal_equations(columns, hessian, levels, scale.shape[0])
    ridge = system.diagonal(dim1=1, dim2=2).mean(1) * _RIDGE + torch.finfo(torch.float32).tiny
    damped = system + torch.diag_embed(ridge[:, None].expand(wanted.shape))
    solution, _ = torch.linalg.solve_ex(damped, wanted)
    fitted = stored(torch.nan_to_num(solution).T)

    def cost(candidate: Tensor) -> Tensor:
        s = candidate.T
        return ((system @ s[:, :, None]).squeeze(2) * s).sum(1) - 2 * (wanted * s).sum(1)

    return torch.where(cost(fitted) < cost(scale), fitted, scale)


def _normal_equations(
    columns: Tensor, hessian: Tensor, levels: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Per row, with L_g the levels of group g and w the row: L_g^T H L_h [out, groups, groups] and
    L_g^T H w [out, groups]."""
    out = levels.shape[1]
    width = levels.shape[0] // groups
    system = levels.new_empty(groups, groups, out)
    wanted = levels.new_empty(groups, out)
    for g in range(groups):
        own = slice(g * width, (g + 1) * width)
        stop = own.stop
        # symmetric: only the groups up to this one
        pull = (hessian[:stop, own] @ levels[own]).mul_(levels[:stop])
        system[g, : g + 1] = system[: g + 1, g] = pull.reshape(g + 1, width, out).sum(1)
        wanted[g] = (hessian[own] @ columns).mul_(levels[own]).sum(0)
    return system.permute(2, 0, 1), wanted.T


def polish(columns: Tensor, hessian: Tensor, levels: Tensor, grid: Grid) -> None:
    """One sweep of coordinate descent: each level in turn becomes the best one given all others.
    Changes ``levels`` in place."""
    width, out = levels.shape
    groups = grid.scale.shape[0]
    rounded = levels.reshape(groups, -1, out) * grid.scale[:, None]
    errors = columns - rounded.reshape(width, out)
    inverse = 1 / grid.scale
    for first in range(0, width, _TILE):
        part = slice(first, min(first + _TILE, width))
        group_of = [i * groups // width for i in range(part.start, part.stop)]
        errors[part] += _polish_tile(
            hessian[part] @ errors,
            hessian[part, part],
            levels[part],
            [grid.of_group(g) for g in group_of],
            [inverse[g] for g in group_of],
        )


def _polish_tile(
    pulls: Tensor, own: Tensor, levels: Tensor, grids: list[Grid], inverses: list[Tensor]
) -> Tensor:
    """One tile of columns: changes ``levels`` [tile, out], returns the change of the errors.

    ``pulls``: the Hessian's rows times all errors, before any change in the tile; ``own``: the
    tile's own part of the Hessian. Given all others, column j is best at a distance of
    pull_j / own_jj from where it is.
    """
    changes = torch.empty_like(pulls)
    stiffness = own.diagonal().tolist()
    for j, (grid, inverse) in enumerate(zip(grids, inverses)):
        pull = pulls[j]
        if j:
            pull = torch.addmv(pull, changes[:j].T, own[j, :j])
        level = torch.addcmul(levels[j], pull, inverse, value=1 / stiffness[j])
        grid.clamp(level.round_())
        torch.sub(levels[j], level, out=changes[j]).mul_(grid.scale)
        levels[j] = level
    return changes
