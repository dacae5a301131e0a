"""Large matrix products of the solvers, on a GPU's tensor cores with as many digits as they need.

float32 products run at a tenth of the speed of bfloat16's there. ``add`` rounds its factors to 11
bits (TF32): enough to pass rounding errors on, which are a third of a step themselves. A Hessian
takes more: H times a vector of errors that lie where H is small is a difference of large numbers,
and 11 bits of H are as coarse as its damping. Split into two bfloat16 parts it keeps 17 bits:

    H x  =  H1 x1 + H1 x2 + H2 x1       (+ H2 x2, which is below the last bit)

On a CPU, and on GPUs before Ampere, both are float32 products.

What is only told (:func:`energy`) takes less: r H r^T is r (H1 + H2) r1^T, r rounded on one side.
Those rounding errors have nothing to do with r and come with either sign, so that little is left of
their sum: 2e-4 of the energy at most, over all linears of the demo model; without H2, which is
enough of what something else is only set against, 1e-3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor

from quantkit.core.launch import compiles, launch, on_its_device, tensor_cores

_STRIP = 2048  # rows that are split at a time
_SPLIT_ROWS, _SPLIT_COLUMNS = 8, 512  # of a program


def add(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """``sums`` += a b, factors rounded to 11 bits where the device has TF32."""
    with _tf32():
        sums.addmm_(a, b)


@contextmanager
def _tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = allowed


def subtract(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """``sums`` -= a b with 21 bits of each factor, on a GPU in three products of 11: what a factor
    of a Hessian takes, whose smallest numbers are a hundredth of its mean."""
    if not b.numel():
        return
    if not splits(sums):
        sums.addmm_(a, b, alpha=-1)
        return
    b_parts = split(b, kept=torch.float32)
    for into, strip in zip(torch.split(sums, _STRIP), torch.split(a, _STRIP)):
        a_parts = split(strip, kept=torch.float32)
        with _tf32():
            for i, j in ((0, 0), (0, 1), (1, 0)):
                into.addmm_(a_parts[i], b_parts[j], alpha=-1)


class Factor:
    """A matrix that others are multiplied by from the left; ``matrix`` [n, m] float32 (or float64).
    ``parts`` are the two that it is split into, where it is."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.parts = split(matrix) if splits(matrix) else None

    def update(self, rows: slice, change: Tensor) -> None:
        """Add ``change`` to some rows."""
        self.matrix[rows] += change
        self._split(rows)

    def put(self, rows: slice, values: Tensor) -> None:
        """Let some rows be these."""
        self.matrix[rows] = values
        self._split(rows)

    def _split(self, rows: slice) -> None:
        if self.parts:
            high, low = self.parts
            split(self.matrix[rows], (high[rows], low[rows]))

    def of_rows(self, rows: slice) -> "Factor":
        """Some of its rows, in the same memory."""
        some = copy(self)
        some.matrix = self.matrix[rows]
        if self.parts:
            high, low = self.parts
            some.parts = high[rows], low[rows]
        return some


def times(a: Tensor, b: Factor) -> Tensor:
    """``a @ b.matrix``. ``a`` is split in strips, so that it is never in memory twice."""
    if not b.parts:
        return a @ b.matrix
    b_high, b_low = b.parts
    result = b.matrix.new_empty(len(a), b.matrix.shape[1])
    for into, strip in zip(torch.split(result, _STRIP), torch.split(a, _STRIP)):
        high, low = split(strip)
        _mm(high, b_high, into)
        _add(into, low, b_high)
        _add(into, high, b_low)
    return result


def times_whole(a: Tensor, whole: Tensor) -> Tensor:
    """``a @ whole`` for whole numbers of up to 8 bits."""
    if not splits(a):
        return a @ whole
    high, low = split(a)
    exact = whole.bfloat16()
    return _add(_mm(high, exact), low, exact)


def energy(hessian: Tensor, rows: Tensor, coarse: bool = False) -> Tensor:
    """The sum of r H r^T over the rows r of a matrix [out, in]: one float64, where the matrix is.
    ``coarse``: where products are of two parts, without the second one. H is symmetric: of its rows
    only what is on or behind the diagonal is multiplied, some rows at a time, and what is behind
    counts twice."""
    rounded = rows.bfloat16() if splits(rows) else rows
    sums = []
    for start in range(0, len(hessian), _STRIP):
        own, behind = slice(start, start + _STRIP), slice(start + _STRIP, None)
        pulls = _times_transposed(rounded[:, own], hessian[own, own], coarse)
        if start + _STRIP < len(hessian):
            rest = _times_transposed(rounded[:, behind], hessian[own, behind], coarse)
            pulls.add_(rest, alpha=2)
        sums.append(pulls.mul_(rows[:, own]).sum().double())
    return torch.stack(sums).sum()


def _times_transposed(a: Tensor, b: Tensor, coarse: bool) -> Tensor:
    """``a @ b.T``, in both parts of ``b`` where ``a`` is rounded already."""
    if a.dtype == b.dtype:
        return a @ b.T
    if coarse:
        return _mm(a, b.bfloat16().T)
    high, low = split(b)
    return _add(_mm(a, high.T), a, low.T)


Parts = tuple[Tensor, Tensor]


def split(x: Tensor, into: Parts | None = None, kept: torch.dtype = torch.bfloat16) -> Parts:
    """A float32 matrix as a sum of two parts, but for its last bits: bfloat16 (``into`` these, if
    they are given), or float32, the first of which TF32 holds."""
    if x.stride(1) != 1 and x.stride(0) == 1 and into is None:
        high, low = split(x.T, kept=kept)
        return high.T, low.T
    x = x if x.stride(1) == 1 else x.contiguous()
    contiguous = torch.contiguous_format
    high, low = into or [
        torch.empty_like(x, dtype=kept, memory_format=contiguous) for _ in range(2)
    ]
    plain = high.stride() == low.stride() and high.stride(1) == 1
    if plain and compiles(x):
        _split_at_once(x, high, low)
    else:
        high.copy_(_cut(x) if kept == torch.float32 else x)
        low.copy_(x - high)
    return high, low


def _cut(x: Tensor) -> Tensor:
    """What TF32 holds of float32 numbers."""
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)


@on_its_device
def _split_at_once(x: Tensor, high: Tensor, low: Tensor) -> None:
    """In one kernel, which reads x once."""
    from quantkit.methods import fused_kernels as kernels

    rows, columns = x.shape
    grid = (-(-columns // _SPLIT_COLUMNS), -(-rows // _SPLIT_ROWS))
    launch(
        kernels.split,
        grid,
        x,
        high,
        low,
        rows,
        columns,
        x.stride(0),
        high.stride(0),
        ROWS=_SPLIT_ROWS,
        COLUMNS=_SPLIT_COLUMNS,
    )


def splits(matrix: Tensor) -> bool:
    """Whether products with it are made of two parts."""
    return matrix.dtype == torch.float32 and tensor_cores(matrix)


def _mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add(sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``sums`` += a b"""
    return torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
