"""Large matrix products of the solvers, on a GPU's tensor cores with as many digits as they need.

float32 products run at a tenth of the speed of bfloat16's there. ``add`` rounds its factors to 11
bits (TF32): enough to pass rounding errors on, which are a third of a step themselves. A Hessian
takes more: H times a vector of errors that lie where H is small is a difference of large numbers,
and 11 bits of H are as coarse as its damping. Split into two bfloat16 parts it keeps 17 bits:

    H x  =  H1 x1 + H1 x2 + H2 x1       (+ H2 x2, which is below the last bit)

On a CPU both are float32 products.
"""

import torch
from torch import Tensor


def add(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """``sums`` += a b, factors rounded to 11 bits where the device has TF32."""
    if not sums.is_cuda:
        sums.addmm_(a, b)
        return
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        sums.addmm_(a, b)
    finally:
        matmul.allow_tf32 = allowed


class Factor:
    """A matrix as a factor of products; ``matrix`` [n, m] float32 (or float64)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        splits = matrix.is_cuda and matrix.dtype == torch.float32
        self.parts = _split(matrix) if splits else None

    def update(self, rows: slice, change: Tensor) -> None:
        """Add ``change`` to some rows."""
        self.matrix[rows] += change
        if self.parts:
            for whole, part in zip(self.parts, _split(self.matrix[rows])):
                whole[rows] = part


def times(a: Factor, b: Factor, rows: slice = slice(None)) -> Tensor:
    """``a.matrix[rows] @ b.matrix``"""
    if not (a.parts and b.parts):
        return a.matrix[rows] @ b.matrix
    high, low = a.parts[0][rows], a.parts[1][rows]
    result = _mm(high, b.parts[0])
    result += _mm(low, b.parts[0])
    result += _mm(high, b.parts[1])
    return result


def times_whole(a: Factor, columns: slice, rows: slice, whole: Tensor) -> Tensor:
    """``a.matrix[rows, columns] @ whole`` for whole numbers of up to 8 bits."""
    if not a.parts:
        return a.matrix[rows, columns] @ whole
    exact = whole.bfloat16()
    result = _mm(a.parts[0][rows, columns], exact)
    result += _mm(a.parts[1][rows, columns], exact)
    return result


def energy(hessian: Factor, rows: Tensor) -> float:
    """The sum of r H r^T over the rows r of a matrix [out, in]."""
    return float(times(hessian, Factor(rows.T)).mul_(rows.T).sum())


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)
