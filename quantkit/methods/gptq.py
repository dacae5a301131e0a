"""GPTQ in the upper-factor form: one factorisation of the Hessian, one pass over the columns.

Minimised, for every row of a linear's weight W (or of a corrected target, see align.py), is

    (w - q) H (w - q)^T          H = E[x x^T] + damping, x the linear's input

over what the grid can express. With H = U D U^T, U unit upper triangular, D diagonal, the objective
is a sum over columns, sum_j D_j ( (w_j - q_j) + sum_{i<j} (w_i - q_i) U_ij )^2, so going through
the columns in order and rounding

    q_j = round( w_j + sum_{i<j} (w_i - q_i) U_ij )

leaves each column the least it can do. This is the algorithm of Frantar et al. (GPTQ,
arXiv:2210.17323) in the form of LDLQ (Chee et al., QuIP, arXiv:2307.13304, section 3); the two give
the same codes (QuIP, theorem 6), and this one needs no inverse of H.

Matrices are held transposed, [in, out]: a step treats one input column for all rows at once, and
that is then one contiguous stretch of memory. Columns are visited in an order in which every group
is contiguous, whatever ``act_order`` says, so that there is a single code path:

    none     as they come
    static   groups by falling energy, and columns by falling energy inside each; the file's groups
             stay contiguous
    group    columns by falling energy over the whole row, cut into groups afterwards; the file
             then needs to say which group each input belongs to (desc_act with a real g_idx)
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from quantkit.core import pinned
from quantkit.core.profile import phase
from quantkit.core.qweight import QWeight, Scheme
from quantkit.errors import UsageError
from quantkit.methods import align, fused, products, refine, scales, search
from quantkit.methods.factor import BY_ITSELF, MAX_DAMP, Team, diagonal_blocks, factored, permute
from quantkit.methods.scales import Grid

ActOrder = Literal["static", "none", "group"]
TILE, BLOCK = 128, 512


@dataclass(frozen=True)
class Options:
    """How to solve. Changing any of these changes the codes, never the file format.

    act_order  the order in which columns are rounded (see the module's text)
    damp       added to the Hessian's diagonal, as a fraction of its mean
    search     choose scales under the Hessian; off: from the largest weight of the group
    rounds     rounds of scale refit and code polish afterwards
    zero_min   smallest zero point an asymmetric group may use (1 for files in the v1 convention)
    """

    act_order: ActOrder = "static"
    damp: float = 0.01
    search: bool = True
    rounds: int = 2
    zero_min: int = 0

    def __post_init__(self) -> None:
        if self.act_order not in get_args(ActOrder):
            raise UsageError(
                f"act-order '{self.act_order}' is unknown", "use static, none or group"
            )
        if not 0 < self.damp <= MAX_DAMP:
            raise UsageError(f"damp {self.damp} is out of range", "use more than 0, at most 1")
        if self.rounds < 0:
            raise UsageError("refine rounds cannot be negative")


@dataclass(frozen=True)
class Solution:
    """``qweight``; the ``target`` [out, in] that it comes near to; the ``damp`` that the
    factorisation needed; how many inputs were ``dead``."""

    qweight: QWeight
    target: Tensor
    damp: float
    dead: int


def solve(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    options: Options,
    lost: align.Lost | None = None,
    team: Team = BY_ITSELF,
) -> Solution:
    """Round ``weight`` [out, in], or what makes up for ``lost``, under ``hessian`` [in, in], both
    float32 (or both float64: all computation is done in their dtype). The work is done in the
    Hessian's own memory; in the end it is as it was. A ``team`` has the same Hessian, and factors
    it together.

    Raises QuantkitError when the Hessian cannot be factored at any damping, UsageError when the
    group does not divide the input width.
    """
    scheme.groups(weight.shape[1])
    energy = hessian.diagonal().clone()
    alive = energy > 0
    dead = len(alive) - pinned.numbers(alive.sum())
    revived = _revived(energy, alive) if dead else energy
    order = visiting_order(revived, scheme, options.act_order)
    hessian.diagonal().copy_(revived)
    permute(hessian, order)
    with factored(hessian, options.damp, team) as (factors, damp):
        if lost:
            with phase("align"):
                columns = align.correction(lost, hessian, factors, order).contiguous()
                columns += weight.T[order]
        else:
            columns = weight.T[order].contiguous()
        with phase("round"):
            levels, grid = _Rounding(columns, hessian, factors, scheme, options).run()
    if options.rounds:
        hessian.diagonal().add_(damp * revived.mean())
        with phase("refine"):
            grid = refine.refined(columns, hessian, levels, grid, options.rounds)
    back = torch.argsort(order)
    target = columns[back].T if lost else weight
    del columns
    hessian.diagonal().copy_(energy[order])
    permute(hessian, back)
    qweight = _assemble(levels, grid, order, scheme, options.act_order)
    return Solution(qweight, target, damp, dead)


def relative_error(target: Tensor, rounded: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """E|x (T - Q)|^2 / E|x T|^2 for inputs x with E[x x^T] = ``hessian``, and what it is relative
    to: one number each, where the Hessian is."""
    energy = products.energy(hessian, target, coarse=True)
    return share(products.energy(hessian, target - rounded), energy), energy


def share(lost: Tensor, energy: Tensor) -> Tensor:
    """What was lost of an energy; nothing of nothing."""
    return torch.where(energy == 0, torch.zeros_like(lost), lost / energy)


def _revived(energy: Tensor, alive: Tensor) -> Tensor:
    """Inputs that were always zero get an energy of their own, so that they are simply rounded."""
    usual = energy[alive].mean() if bool(alive.any()) else torch.ones_like(energy[0])
    return torch.where(alive, energy, usual)


def visiting_order(energy: Tensor, scheme: Scheme, act_order: ActOrder) -> Tensor:
    """int64 [in]: which column comes when; ``energy`` is the Hessian's diagonal."""
    width = energy.shape[0]
    if act_order == "none":
        return torch.arange(width, device=energy.device)
    if act_order == "group":
        return torch.argsort(energy, descending=True, stable=True)
    group = scheme.width(width)
    grouped = energy.reshape(-1, group)
    inside = torch.argsort(grouped, dim=1, descending=True, stable=True)
    columns = inside + torch.arange(0, width, group, device=energy.device)[:, None]
    return columns[torch.argsort(grouped.mean(1), descending=True, stable=True)].reshape(-1)


class _Rounding:
    """One pass over the columns; all matrices in visiting order and transposed. Of ``unit`` only
    what is above the diagonal is read (see factor.py).

    Errors are passed on in three steps, so that most of the work is in large products: to a block
    of columns from all columns before it, inside the block tile by tile, inside a tile one by one.
    """

    def __init__(
        self, columns: Tensor, unit: Tensor, weight: Tensor, scheme: Scheme, options: Options
    ) -> None:
        self.columns, self.unit, self.weight = columns, unit, weight
        self.scheme, self.options = scheme, options
        self.group = scheme.width(columns.shape[0])
        self._inverses, self._roots = self._of_groups()
        self.errors = torch.empty_like(columns)  # columns - what they became, for the columns done
        self.levels = torch.empty_like(columns)

    def run(self) -> tuple[Tensor, Grid]:
        """Levels [in, out] and the grid of every group, [groups, out]."""
        width, step = self.columns.shape[0], self._step(self.group)
        grids: list[Grid] = []
        for start in range(0, width, step):
            grids += self._round_block(slice(start, min(start + step, width)))
        return self.levels, scales.together(grids, torch.stack)

    def _step(self, group: int) -> int:
        """Columns in a block: whole groups."""
        return max(group, BLOCK // group * group)

    def _round_block(self, block: slice) -> list[Grid]:
        """Round the groups of a block, in order. The kernels pass errors on within it as far as the
        next group needs them, where these steps do as soon as they are there."""
        passed = self._passed(block.start, block.stop)
        if self.options.search and fused.groupable(self.columns, self.group):
            return fused.round_block(
                passed, self.columns, self.unit, self._inverses, self._roots, self.scheme,
                self.options.zero_min, block, self.levels, self.errors,
            )  # fmt: skip
        grids: list[Grid] = []
        for first in range(block.start, block.stop, self.group):
            rest = passed[first - block.start :]
            grids.append(self._choose_grid(first, rest))
            self._round_group(first, rest, grids[-1])
        return grids

    def _passed(self, first: int, last: int) -> Tensor:
        """What the columns first..last are to take up of all errors before them."""
        passed = torch.zeros_like(self.columns[first:last])
        if first:
            products.add(passed, self.unit[:first, first:last].T, self.errors[:first])
        return passed

    def _round_group(self, first: int, passed: Tensor, grid: Grid) -> None:
        """Round the group that begins at column ``first``; ``passed`` [n, out] are errors that it
        and the columns of the block behind it are to take up, and gets those of this group too."""
        for start in range(0, self.group, TILE):
            stop, end = min(start + TILE, self.group), len(passed)
            if self.group > BLOCK:
                end = min(start // BLOCK * BLOCK + BLOCK, end)
                if start and start % BLOCK == 0:
                    done, block = slice(first, first + start), slice(first + start, first + end)
                    products.add(passed[start:end], self.unit[done, block].T, self.errors[done])
            tile = slice(first + start, first + stop)
            _round_tile(
                passed, start, self.columns, self.unit, grid, tile, self.levels, self.errors
            )
            if stop < end:
                behind = slice(first + stop, first + end)
                products.add(passed[stop:end], self.unit[tile, behind].T, self.errors[tile])

    def _choose_grid(self, first: int, passed: Tensor) -> Grid:
        """The grid of the group that begins at column ``first``, where ``passed`` does. The
        published algorithm sees weights that already make up for all earlier errors; with p =
        ``passed`` they are w + p (I + M)^-1."""
        index = first // self.group
        shown = self.columns[first : first + self.group]
        if first:
            shown = torch.addmm(shown, self._inverses[index].T, passed[: self.group])
        if not self.options.search:
            return scales.from_range(shown, self.scheme, self.options.zero_min)
        return search.search(shown, self._roots[index], self.scheme, self.options.zero_min)

    def _of_groups(self) -> tuple[Tensor, Tensor]:
        """For every group [groups, group, group], M its own strictly upper part: (I + M)^-1, and a
        root of the curvature (I + M) D (I + M)^T that its errors have."""
        own = diagonal_blocks(self.unit, self.group).triu(1)
        own.diagonal(dim1=1, dim2=2).fill_(1.0)
        inverses = own[:0]
        if len(own) > 1 or fused.groupable(own, self.group):  # a first one has nothing to take up
            one = torch.eye(self.group, dtype=own.dtype, device=own.device)
            inverses = torch.linalg.solve_triangular(own, one, upper=True, unitriangular=True)
        own.mul_(self.weight.sqrt().reshape(-1, 1, self.group))
        return inverses.contiguous(), own.mT.contiguous()


def _round_tile(
    passed: Tensor,
    at: int,
    columns: Tensor,
    unit: Tensor,
    grid: Grid,
    tile: slice,
    levels: Tensor,
    errors: Tensor,
) -> None:
    """Round the ``columns`` [in, out] of one tile, in order, into ``levels`` and ``errors``. What
    they are to take up of the tiles before is in ``passed`` [n, out] from row ``at`` on."""
    if fused.usable(columns):
        return fused.round_tile(passed, at, columns, unit, grid, tile, levels, errors)
    columns, levels, errors = columns[tile], levels[tile], errors[tile]
    running = columns + passed[at : at + len(columns)]
    inverse, lower = 1 / grid.scale, unit[tile, tile].T.contiguous()
    for j in range(len(columns)):
        wanted = running[j]
        if j:
            wanted = torch.addmv(wanted, errors[:j].T, lower[j, :j])
        level = torch.mul(wanted, inverse, out=levels[j])
        grid.clamp(level.round_())
        torch.addcmul(columns[j], level, grid.scale, value=-1, out=errors[j])


def _assemble(
    levels: Tensor, grid: Grid, order: Tensor, scheme: Scheme, act_order: ActOrder
) -> QWeight:
    """Back into the model's own order of columns, and of groups."""
    group = scheme.width(len(order))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    if act_order == "group":
        group_of = (back // group).to(torch.int32)
        return scales.quantized(levels, grid, scheme, back, group_of=group_of)
    q = scales.quantized(levels, grid, scheme, back)
    groups = torch.argsort(order[::group] // group)
    zero = None if q.zero is None else q.zero[:, groups]
    return replace(q, scale=q.scale[:, groups], zero=zero)
