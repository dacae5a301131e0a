"""Activations about a shift, and their sums over tokens. On a GPU one kernel (shifting_kernel.py)
does both, and reads them once: torch reads them twice, at less than half of the memory's speed."""

import torch
from torch import Tensor

from quantkit.core.launch import compiles, launch, on_its_device

_SUM_ROWS = 256
_TOKENS, _COLUMNS, _TURNS, _WARPS = 64, 128, 8, 4


def shifted(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """x [tokens, width] - ``shift`` [width], in the dtype of both; and its sums over tokens,
    float32 [width]."""
    if compiles(x):
        return _fused(x, shift)
    moved = x - shift
    return moved, column_sums(moved)


def column_sums(x: Tensor) -> Tensor:
    """Sums over tokens [width], in float32 throughout: an error here grows with the width once the
    mean is taken out of a gram. On a CPU the float32 copies that torch makes stay in its caches."""
    if x.is_cuda:
        return x.sum(0, dtype=torch.float32)
    return sum(part.sum(0, dtype=torch.float32) for part in torch.split(x, _SUM_ROWS))  # type: ignore[return-value]


@on_its_device
def _fused(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    from quantkit.core import shifting_kernel

    tokens, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    parts = -(-tokens // (_TOKENS * _TURNS))
    moved = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = torch.empty(parts, width, device=x.device)
    launch(
        shifting_kernel.shifted,
        (-(-width // _COLUMNS), parts),
        x,
        shift,
        moved,
        sums,
        tokens,
        width,
        x.stride(0),
        TOKENS=_TOKENS,
        COLUMNS=_COLUMNS,
        TURNS=_TURNS,
        num_warps=_WARPS,
    )
    return moved, sums.sum(0)
