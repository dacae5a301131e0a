"""What every linear of a model does to the original's inputs of it."""

from collections.abc import Callable
from math import log10, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.walk import Block, is_linear

_ROWS = 64  # of a weight are enough to see where it lies
_EXACT = 200.0  # dB; what is closer counts as this close


class LayerErrors:
    """Compares the outputs of a block's linears with those of ``other``, the same block of another
    model, given the original's inputs. Linears with the very same weight are left out."""

    def __init__(self, block: Block, other: Block) -> None:
        self._block = block
        self._sums: dict[str, Tensor] = {}
        self._others: dict[str, nn.Module] = {}
        for name, module in block.module.named_modules():
            if not is_linear(module):
                continue
            found = other.linear(name)
            if not (is_linear(found) and torch.equal(found.weight, module.weight)):
                self._others[name] = found

    def measuring(self) -> Any:
        """While open, every linear's output is compared."""
        return self._block.watching(
            {name: self._hook(name, other) for name, other in self._others.items()}, outputs=True
        )

    def _hook(self, name: str, other: nn.Module) -> Callable[[Tensor, Tensor], None]:
        def see(x: Tensor, y: Tensor) -> None:
            y, z = y.float(), other(x).float()
            found = [(z - y).square(), y.square(), z.square(), y * z]
            sums = torch.stack([part.sum(dtype=torch.float64) for part in found])
            self._sums[name] = self._sums.get(name, 0) + sums

        return see

    def described(self) -> dict[str, dict[str, float | None]]:
        """By linear: ``error`` |y - y'|^2 / |y|^2; ``sqnr``, the same in dB, of signal over noise;
        ``cosine`` between y and y', all outputs of all tokens as one vector; ``offset`` of the
        weights in steps of their grid (see _offset)."""
        return {
            f"{self._block.name}.{name}": {
                **_numbers(*sums.tolist()),
                "offset": _offset(self._others[name], self._block.linear(name)),
            }
            for name, sums in self._sums.items()
        }


def _offset(other: nn.Module, linear: nn.Module) -> float | None:
    """How far the weights of a group lie beside the original's as a whole, in steps: the median
    over groups of the mean of (w' - w) / scale. Rounding leaves it near 0, whatever rounded; zero
    points that are one off make it 1 or -1. None for what is not on an even grid."""
    if not isinstance(other, QuantLinear) or other.scheme.grid != "int":
        return None
    q = other.rows(0, min(_ROWS, other.out_features))
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    rows = weight[: len(q.codes)].float()
    if other.order is not None:
        rows = rows[:, other.order]
    steps = (q.dequantize() - rows) / q.scale.float()[:, q.group_index()]
    groups = steps.split(q.scheme.width(other.in_features), dim=1)
    return float(torch.stack([group.mean(1) for group in groups]).median())


def _numbers(lost: float, had: float, found: float, both: float) -> dict[str, float]:
    error = lost / had if had else float("nan")
    size = sqrt(had) * sqrt(found)
    return {
        "error": error,
        "sqnr": _EXACT if error < 10 ** (-_EXACT / 10) else -10 * log10(error),
        "cosine": both / size if size else float("nan"),
    }
