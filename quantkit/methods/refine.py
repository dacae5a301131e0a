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
    groups, out = scale.shape
    width = levels.shape[0] // groups

    def by_group(x: Tensor) -> Tensor:
        return (x * levels).reshape(groups, width, out).sum(1)

    system = torch.stack(
        [
            by_group(hessian[:, g * width : (g + 1) * width] @ levels[g * width : (g + 1) * width])
            for g in range(groups)
        ]
    ).permute(2, 0, 1)
    wanted = by_group(hessian @ columns).T
    ridge = system.diagonal(dim1=1, dim2=2).mean(1) * _RIDGE + torch.finfo(torch.float32).tiny
    damped = system + torch.diag_embed(ridge[:, None].expand(out, groups))
    solution, _ = torch.linalg.solve_ex(damped, wanted)
    fitted = stored(torch.nan_to_num(solution).T)

    def cost(candidate: Tensor) -> Tensor:
        s = candidate.T
        return ((system @ s[:, :, None]).squeeze(2) * s).sum(1) - 2 * (wanted * s).sum(1)

    return torch.where(cost(fitted) < cost(scale), fitted, scale)


def polish(columns: Tensor, hessian: Tensor, levels: Tensor, grid: Grid) -> None:
    """One sweep of coordinate descent: each level in turn becomes the best one given all others.
    Changes ``levels`` in place."""
    width, out = levels.shape
    groups = grid.scale.shape[0]
    inverse = 1 / grid.scale
    rounded = levels.reshape(groups, -1, out) * grid.scale[:, None]
    errors = columns - rounded.reshape(width, out)
    gradient = hessian @ errors
    for first in range(0, width, _TILE):
        last = min(first + _TILE, width)
        own = hessian[first:last, first:last]
        changes = torch.zeros_like(levels[first:last])
        for j in range(last - first):
            i = first + j
            group = i * groups // width
            here = grid.of_group(group)
            pull = gradient[i]
            if j:
                pull = torch.addmv(pull, changes[:j].T, own[j, :j])
            # without this column's own error, the others ask it to be:
            wanted = torch.addcdiv(columns[i] - errors[i], pull, own[j, j])
            level = here.clamp(wanted.mul_(inverse[group]).round_())
            error = torch.addcmul(columns[i], level, here.scale, value=-1)
            torch.sub(error, errors[i], out=changes[j])
            errors[i], levels[i] = error, level
        gradient.addmm_(hessian[:, first:last], changes)
