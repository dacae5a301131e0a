"""Two steps that lower the GPTQ objective after rounding, each of which can only improve it.

Same conventions as gptq.py: everything transposed and in visiting order, ``columns`` [in, out] what
the weight should be, ``hessian`` [in, in] with its damping, ``codes`` [in, out] float32, ``scale``
[groups, out], ``zero`` [groups, out] or one number.
"""

import torch
from torch import Tensor

from quantkit.core.qweight import Scheme
from quantkit.methods.scales import stored

_TILE = 128
_SYSTEM_BYTES = 256 << 20  # how large the batch of normal equations may grow
_RIDGE = 1e-6


def refit(
    columns: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    scheme: Scheme,
) -> Tensor:
    """The best scales for the codes as they are: per row, the least-squares solution over all
    groups at once (a groups x groups system). A row keeps its old scales where rounding the new
    ones to their stored form would make it worse."""
    groups = scale.shape[0]
    rows = max(1, _SYSTEM_BYTES // (4 * groups * groups))
    parts = []
    for start in range(0, codes.shape[1], rows):
        part = slice(start, start + rows)
        offset = zero if isinstance(zero, float) else zero[:, part]
        levels = _levels(codes[:, part], offset, groups)
        parts.append(_refit_rows(columns[:, part], hessian, levels, scale[:, part]))
    return torch.cat(parts, 1)


def _levels(codes: Tensor, zero: Tensor | float, groups: int) -> Tensor:
    """codes - zero, [in, out]."""
    if isinstance(zero, float):
        return codes - zero
    grouped = codes.reshape(groups, -1, codes.shape[1])
    return (grouped - zero[:, None]).reshape(codes.shape)


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


def polish(
    columns: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    scheme: Scheme,
) -> None:
    """One sweep of coordinate descent: each code in turn becomes the best one given all others.
    Changes ``codes`` in place."""
    width, groups = codes.shape[0], scale.shape[0]
    group = width // groups
    symmetric = isinstance(zero, float)
    spread = scale.repeat_interleave(group, 0)
    offset = zero if symmetric else zero.repeat_interleave(group, 0)  # type: ignore[union-attr]
    errors = torch.addcmul(columns, codes - offset, spread, value=-1)
    gradient = hessian @ errors
    inverse = 1 / spread
    for first in range(0, width, _TILE):
        last = min(first + _TILE, width)
        own = hessian[first:last, first:last]
        changes = torch.zeros_like(codes[first:last])
        for j in range(last - first):
            i = first + j
            pull = gradient[i]
            if j:
                pull = torch.addmv(pull, changes[:j].T, own[j, :j])
            shift = offset if symmetric else offset[i]  # type: ignore[index]
            # without this column's own error, the others ask it to be:
            wanted = columns[i] - errors[i] + pull / own[j, j]
            code = wanted.mul_(inverse[i]).add_(shift).round_().clamp_(0, scheme.max_code)
            error = columns[i] - (code - shift) * spread[i]
            torch.sub(error, errors[i], out=changes[j])
            errors[i], codes[i] = error, code
        gradient.addmm_(hessian[:, first:last], changes)
