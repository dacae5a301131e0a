"""The factor of a Hessian, in the memory of the Hessian itself.

    H + damping = U diag(D) U^T          U unit upper triangular

A Hessian is symmetric: half of its numbers say nothing new. While :func:`factored` is open, U lies
above the diagonal; below it and on it is the Hessian, as it was. For a linear of a 10B model with
19,456 inputs that is one matrix of 1.5 GB, where copies in order, flipped and factored would be
four.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from quantkit.core import pinned
from quantkit.core.mirror import mirror
from quantkit.core.profile import phase
from quantkit.errors import QuantkitError
from quantkit.methods import products

MAX_DAMP = 1.0
_BLOCK = 512  # columns that are factored at a time on a CPU
# A GPU takes as long for a small block as for one of thousands of columns: Hessians up to this
# width are factored at once, larger ones in blocks of so many.
_WHOLE, _GPU_BLOCK = 8192, 1024
_SMALL = 128  # width of triangles that are inverted as they are
_STRIP = 1024  # rows or columns that are moved at a time


class Team(Protocol):
    """``size`` processes that factor one matrix together, the ``rank``-th of them: each has all of
    it, and computes some rows of every step."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def stacked(self, rows: Tensor) -> Tensor:
        """As many rows [n, ...] of each: [size n, ...], the same for all."""


class _Itself:
    rank, size = 0, 1

    def stacked(self, rows: Tensor) -> Tensor:
        return rows


BY_ITSELF = _Itself()


@contextmanager
def factored(
    hessian: Tensor, damp: float, team: Team = BY_ITSELF
) -> Iterator[tuple[Tensor, float]]:
    """Factor ``hessian`` [in, in] in place, and give it back whole when this ends. Gives D [in] and
    the damping that it took, a fraction of the mean of the diagonal: where there is no factor it
    grows tenfold, up to that mean itself. Raises QuantkitError when not even that is enough."""
    mean = hessian.diagonal().mean()
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)  # of inputs that are always zero
    with phase("factor"):
        while (energy := _factor(hessian, hessian.diagonal() + damp * mean, team)) is None:
            mirror(hessian, lower=True)
            damp = _more(damp)
    yield energy, damp
    mirror(hessian, lower=True)


def _more(damp: float) -> float:
    if damp >= MAX_DAMP:
        raise QuantkitError(
            "the Hessian has no factorisation, even with heavy damping",
            "calibrate with more or more varied text (--calib, --calib-rows)",
        )
    return min(MAX_DAMP, damp * 10)


def roots(hessian: Tensor, size: int) -> Tensor:
    """R with R^T R = the part of the Hessian [in, in] that each group of so many inputs has:
    [groups, size, size]. A part may have no factor; each is damped by 1e-4 of its mean, or by more
    where one needs it. Raises QuantkitError when not even much is enough."""
    parts, damp = diagonal_blocks(hessian, size), 1e-4
    mean = parts.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)  # of inputs that are always zero
    while True:
        damped = parts.clone()
        damped.diagonal(dim1=1, dim2=2).add_(damp * mean[:, None])
        upper, failures = torch.linalg.cholesky_ex(damped, upper=True)
        if not bool(failures.any()):
            found: Tensor = upper.contiguous()
            return found
        damp = _more(damp)


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The square blocks along the diagonal of a matrix [n, n], in its own memory: [n / size, size,
    size]."""
    down, across = matrix.stride()
    return matrix.as_strided(
        (len(matrix) // size, size, size),
        (size * (down + across), down, across),
        matrix.storage_offset(),
    )


def _factor(matrix: Tensor, diagonal: Tensor, team: Team) -> Tensor | None:
    """D of the symmetric ``matrix`` with another diagonal; above it goes U, and below it stays as
    it is. None when the matrix is not positive definite.

    From the last block of columns to the first: what the blocks behind explain is taken off, a
    small Cholesky factor is that of the block itself (flipped along both axes, so that it is
    upper), and a triangular solve gives what is above.
    """
    width = len(matrix)
    step = _BLOCK
    if matrix.is_cuda:
        step = width if width <= _WHOLE else _GPU_BLOCK
    energy, failures = torch.empty_like(diagonal), []
    for start in reversed(range(0, width, step)):
        stop = min(start + step, width)
        own, behind = slice(start, stop), slice(stop, width)
        weighed = matrix[own, behind] * energy[behind]
        block = matrix[own, own]
        square = block.tril(-1)
        square += square.T.clone()
        square.diagonal().copy_(diagonal[own])
        products.subtract(square, matrix[own, behind], weighed.T)
        lower, failed = torch.linalg.cholesky_ex(square.flip(0, 1))
        upper = lower.flip(0, 1)
        root = upper.diagonal().clone()
        energy[own] = root.square()
        failures.append(failed)
        if start:
            share = -(-start // team.size)
            rows = slice(min(share * team.rank, start), min(share * (team.rank + 1), start))
            above = matrix.new_zeros(share, stop - start)
            mine = above[: rows.stop - rows.start].copy_(matrix[rows, own])
            products.subtract(mine, matrix[rows, behind], weighed.T)
            above = torch.linalg.solve_triangular(upper.T, above, upper=False, left=False)
            matrix[:start, own] = team.stacked(above.div_(root))[:start]
        block.copy_(block.tril().add_(upper.div_(root).triu(1)))
    sound = ~torch.stack(failures).any() & energy.isfinite().all()
    return energy if pinned.numbers(team.stacked(sound[None].byte()).all()) else None


def solved(unit: Tensor, energy: Tensor, right: Tensor) -> Tensor:
    """Z [in, n] with U diag(D) U^T Z = ``right``, while the Hessian is :func:`factored`.

    On a GPU in blocks of rows, and those by the inverses of what is on the diagonal, so that nearly
    all of it is products: a triangular solve in float32 runs at a sixteenth of their speed. They
    keep 17 bits (products.py). Against float64, 2e-4 of a correction of targets (align.py) changes
    under a usual Hessian, 2e-3 under one whose eigenvalues span ten powers of ten (both with a
    damping of 0.01), and the square of that is lost of what it gains.
    """
    if not products.splits(right):
        step = torch.linalg.solve_triangular(unit, right, upper=True, unitriangular=True)
        step.div_(energy[:, None])
        whole: Tensor = torch.linalg.solve_triangular(unit.T, step, upper=False, unitriangular=True)
        return whole
    starts = range(0, len(unit), _GPU_BLOCK)
    blocks = [slice(start, min(start + _GPU_BLOCK, len(unit))) for start in starts]
    inverses = _inverses(unit, blocks)
    found = products.Factor(right.clone(memory_format=torch.contiguous_format))
    for own, inverse in zip(reversed(blocks), reversed(inverses)):
        _substitute(unit, found, own, slice(own.stop, None), inverse)
    found = products.Factor(found.matrix.div_(energy[:, None]))
    for own, inverse in zip(blocks, inverses):
        _substitute(unit.T, found, own, slice(own.start), inverse.T)
    return found.matrix


def _substitute(
    triangle: Tensor, found: products.Factor, own: slice, done: slice, inverse: Tensor
) -> None:
    """Solve for the rows ``own``, where the rows ``done`` are solved for already."""
    rest = found.matrix[own]
    if len(found.matrix[done]):
        rest = rest - products.times(triangle[own, done], found.of_rows(done))
    found.put(own, products.times(inverse, products.Factor(rest)))


def _inverses(unit: Tensor, blocks: list[slice]) -> list[Tensor]:
    """Those of the blocks on a unit triangle's diagonal, all at once."""
    size = blocks[0].stop
    parts = unit.new_zeros(len(blocks), size, size)
    parts.diagonal(dim1=1, dim2=2).fill_(1)  # and so it stays behind the last block's end
    for part, own in zip(parts, blocks):
        width = own.stop - own.start
        part[:width, :width] += unit[own, own].triu(1)
    return [
        found[: own.stop - own.start, : own.stop - own.start]
        for found, own in zip(_inverted(parts), blocks)
    ]


def _inverted(upper: Tensor) -> Tensor:
    """The inverses of unit triangles [n, size, size]: of halves, from those of their halves."""
    size = upper.shape[1]
    if size <= _SMALL or size % 2:
        one = torch.eye(size, dtype=upper.dtype, device=upper.device)
        found: Tensor = torch.linalg.solve_triangular(upper, one, upper=True, unitriangular=True)
        return found
    half = size // 2
    corner = upper[:, :half, half:]
    first, last = _inverted(torch.cat([upper[:, :half, :half], upper[:, half:, half:]])).chunk(2)
    found = upper.clone()
    found[:, :half, :half], found[:, half:, half:] = first, last
    found[:, :half, half:] = -(first @ corner @ last)
    return found


def permute(matrix: Tensor, order: Tensor) -> None:
    """Bring rows and columns [n, n] into ``order``, in place."""
    for part in torch.split(matrix, _STRIP):
        part.copy_(part[:, order])
    for part in torch.split(matrix, _STRIP, 1):
        part.copy_(part[order])
