"""In which units the linears of a block compute whose scales were folded (AWQ).

AWQ multiplies the columns of a linear's weight by s and divides whatever makes its inputs by it: a
norm, or the rows of the linear in front. So, for an input x of the original, such a linear

    is given    x / inputs
    answers     y / outputs        y: what the original answers, but for rounding

and only then can the two be compared. Both follow from the file: a norm shows what it was divided
by, and the rows of a linear by what they have to be multiplied to fit the original's best (errors
of rounding average out over a row). Nothing else is fitted: a linear whose own columns are wrong
stays wrong.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.runtime import folding
from quantkit.runtime.block import Block, is_linear
from quantkit.runtime.linear import QuantLinear


@dataclass
class Units:
    """``inputs`` [in] and ``outputs`` [out], float32, of linears by their names in the block; those
    that are not in it compute in the original's."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def given(self, name: str, x: Tensor) -> Tensor:
        """What the linear gets where the original's gets ``x``."""
        return (x / self.inputs[name]).to(x.dtype) if name in self.inputs else x

    def answer(self, name: str, y: Tensor) -> Tensor:
        """What the linear's float32 answer is in the original's units."""
        return y * self.outputs[name] if name in self.outputs else y

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """What the first rows of the original's weight [rows, in], float32, are in the linear's
        units."""
        if name in self.inputs:
            weight = weight * self.inputs[name]
        return weight / self.outputs[name][: len(weight), None] if name in self.outputs else weight


def units(block: Block, other: Block, sample: Tensor) -> Units:
    """Of ``other``, a block that was made from ``block`` by folding scales. ``sample``: any hidden
    state of the original in front of it."""
    found = Units()
    for fold in folding.find(block, block.trace(sample, ends=False), sample):
        producer, now = block.linear(fold.producer), other.linear(fold.producer)
        if is_linear(producer):
            wanted = found.weight(fold.producer, _weight(producer))
            scale = _fit(wanted, _weight(now))
        else:
            offset = fold.offset or 0.0
            scale = (_weight(producer) + offset) / (_weight(now) + offset)
        scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)[fold.source]
        if is_linear(producer):
            found.outputs[fold.producer] = fold.per_output(scale, len(wanted))
        found.inputs |= dict.fromkeys(fold.consumers, scale)
    return found


def _weight(module: nn.Module) -> Tensor:
    """float32 [out, in] of a linear, [features] of a norm."""
    if not isinstance(module, QuantLinear):
        weight: Tensor = module.weight.float()  # type: ignore[assignment]
        return weight.T if isinstance(module, Conv1D) else weight
    weight = module.weight_as(torch.float32)
    return weight if module.order is None else weight[:, module.order.argsort()]


def _fit(wanted: Tensor, weight: Tensor) -> Tensor:
    """By what each row [out] of ``weight`` has to be multiplied to fit ``wanted`` best."""
    return (wanted * wanted).sum(1) / (wanted * weight).sum(1)
