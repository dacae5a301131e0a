"""What every linear of a model does to the original's inputs of it."""

from collections.abc import Callable, Mapping
from math import log10, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.core.qweight import QWeight
from quantkit.runtime.block import Block, is_linear
from quantkit.workflows.units import Units

_EXACT = 200.0  # dB; what is closer counts as this close


class LayerErrors:
    """Compares the outputs of a block's linears with those of ``other``, the same block of another
    model that computes in ``units``, given the original's inputs. Linears with the very same weight
    are left out. ``tops``: the first rows of quantized weights, by their names in the block."""

    def __init__(
        self, block: Block, other: Block, units: Units, tops: Mapping[str, QWeight]
    ) -> None:
        self._block, self._units, self._tops = block, units, tops
        self._sums: dict[str, Tensor] = {}
        self._others: dict[str, nn.Module] = {}
        for name, module in block.module.named_modules():
            if not is_linear(module):
                continue
            found: Any = other.linear(name)
            if not (is_linear(found) and torch.equal(found.weight, module.weight)):
                self._others[name] = found

    def measuring(self) -> Any:
        """While open, every linear's output is compared."""
        return self._block.watching(
            {name: self._hook(name, other) for name, other in self._others.items()}, outputs=True
        )

    def _hook(self, name: str, other: nn.Module) -> Callable[[Tensor, Tensor], None]:
        units = self._units

        def see(x: Tensor, y: Tensor) -> None:
            y, z = y.float(), units.answer(name, other(units.given(name, x)).float())
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
                "offset": self._offset(name),
            }
            for name, sums in self._sums.items()
        }

    def _offset(self, name: str) -> float | None:
        """How far the weights of a group lie beside the original's as a whole, in steps: the median
        over groups of the mean of (w' - w) / scale. Rounding leaves it near 0, whatever rounded;
        zero points that are one off make it 1 or -1. None for what is not on an even grid."""
        q = self._tops.get(name)
        if q is None or q.scheme.grid != "int":
            return None
        linear = self._block.linear(name)
        weight: Any = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        wanted = self._units.weight(name, weight[: len(q.codes)].float()).cpu()
        index = q.group_index()
        steps = (q.dequantize() - wanted) / q.scale.float()[:, index]
        groups = torch.zeros_like(q.scale, dtype=torch.float32).index_add_(1, index, steps)
        return float((groups / torch.bincount(index)).median())


def _numbers(lost: float, had: float, found: float, both: float) -> dict[str, float]:
    error = lost / had if had else float("nan")
    size = sqrt(had) * sqrt(found)
    return {
        "error": error,
        "sqnr": _EXACT if error < 10 ** (-_EXACT / 10) else -10 * log10(error),
        "cosine": both / size if size else float("nan"),
    }
