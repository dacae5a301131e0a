"""Symmetric matrices of which one half is known. On a GPU one kernel (mirror_kernel.py) turns tiles
over: torch copies what is transposed at an eighth of the memory's speed (measured on an H200)."""

from torch import Tensor

from quantkit.core.launch import compiles, launch, on_its_device

_STRIP = 1024  # rows or columns at a time
_TILE, _WARPS = 64, 4


def mirror(matrix: Tensor, lower: bool) -> None:
    """Copy what is below the diagonal of ``matrix`` [n, n] to above it (``lower``), or the other
    way round. Rows are contiguous."""
    if compiles(matrix):
        _at_once(matrix, lower)
        return
    target = matrix if lower else matrix.T
    for start in range(0, len(matrix), _STRIP):
        own, behind = slice(start, start + _STRIP), slice(start + _STRIP, None)
        block = target[own, own]
        block.copy_(block.tril() + block.tril(-1).T)
        target[own, behind] = target[behind, own].T


@on_its_device
def _at_once(matrix: Tensor, lower: bool) -> None:
    from quantkit.core import mirror_kernel

    if matrix.stride(1) != 1:
        raise ValueError("rows of a matrix that is mirrored are contiguous")
    width = len(matrix)
    tiles = -(-width // _TILE)
    launch(
        mirror_kernel.mirrored,
        (tiles, tiles),
        matrix,
        width,
        matrix.stride(0),
        LOWER=lower,
        TILE=_TILE,
        num_warps=_WARPS,
    )
