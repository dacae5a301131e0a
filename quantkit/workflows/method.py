"""What a method of quantizing is to workflows/quantize.py: something that solves a block."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.core.qweight import QWeight, Scheme
from quantkit.runtime.block import Block
from quantkit.runtime.gather import Kept
from quantkit.runtime.ranks import ALONE, Ranks
from quantkit.runtime.states import States


@dataclass(frozen=True)
class Solved:
    """A quantized linear.

    bias     float16 [out], or None when the linear has none
    error    |x (T - Q)|^2 / |x T|^2 over the calibration inputs x, T the target: what rounding lost
    energy   |x T|^2, the mean over tokens; both are numbers on the device, so that nobody waits for
             them before the block is done
    damp     the damping that its Hessian took, 0 for none
    dead     inputs that were always zero
    method   what rounded it: rtn where no calibration token reached the linear
    notes    what else the report says about it
    """

    qweight: QWeight
    bias: Tensor | None
    error: Tensor
    energy: Tensor
    damp: float
    dead: int
    method: str
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Originals:
    """The block as the checkpoint has it; names are those inside the block.

    schemes  of every linear that is to be quantized
    plain    those among them that are to be rounded to nearest, whatever the method
    weight   of such a linear: float32 [out, in]
    bias     its bias, float32 [out], if it has one
    other    any other parameter of the block: its value in float32, and the dtype it is stored in
    """

    schemes: Mapping[str, Scheme]
    weight: Callable[[str], Tensor]
    bias: Callable[[str], Tensor | None]
    other: Callable[[str], tuple[Tensor, torch.dtype]]
    plain: Collection[str] = ()


@dataclass(frozen=True)
class Outcome:
    """A solved block.

    linears  every linear of ``Originals.schemes``
    others   parameters that changed beside them (norms, say), in the dtype that is stored
    kept     inputs in the quantized model that need not be computed again (gather.advance)
    """

    linears: dict[str, Solved]
    others: dict[str, Tensor] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)


class Method(Protocol):
    """A way to quantize a block.

    name     as in ``quantkit NAME``
    aligned  whether the hidden states of the quantized model are carried along too
    damp     what is added to Hessians; a linear that needed more is reported
    rounds   of refinement after rounding
    copies   whether it holds a block a second time, in float32, and all its Hessians at once
    """

    @property
    def name(self) -> str: ...
    @property
    def aligned(self) -> bool: ...
    @property
    def damp(self) -> float: ...
    @property
    def rounds(self) -> int: ...
    @property
    def copies(self) -> bool: ...

    def resolved(self) -> dict[str, Any]:
        """Its settings for reports; with the schemes they decide every byte of the result."""

    def look(self, block: Block, sample: Tensor) -> Any:
        """What there is to know of the block before it is solved; ``sample`` is any hidden state.
        One of the ranks looks, for all."""

    def solve(
        self,
        block: Block,
        seen: Any,
        originals: Originals,
        full: States,
        quantized: States | None,
        ranks: Ranks = ALONE,
        keep: bool = False,
    ) -> Outcome:
        """Quantize the block, of which ``seen`` is what :meth:`look` found. ``full``, the hidden
        states of the original model, advance to the original block's outputs; ``quantized``, those
        of the quantized model, None when not ``aligned``, stay. The block is left as its file will
        have it (:func:`put`). All ``ranks`` do this together, each with hidden states of its own,
        and have the same outcome. ``keep``: there is room for inputs of the quantized model's
        linears."""


def put(block: Block, name: str, qweight: QWeight, bias: Tensor | None) -> None:
    """Give a linear of the running block the weight that its file will hold. The old tensors stay
    as they are: they may be the checkpoint's own memory map."""
    put_weight(block, name, qweight.dequantize())
    if bias is not None:
        put_other(block, f"{name}.bias", bias)


def put_weight(block: Block, name: str, weight: Tensor) -> None:
    """Give a linear of the running block the weight [out, in]."""
    linear = block.linear(name)
    cast = weight.to(linear.weight)  # type: ignore[arg-type]
    linear.weight = _parameter(cast.T if isinstance(linear, Conv1D) else cast)


def put_other(block: Block, name: str, tensor: Tensor) -> None:
    """Give any parameter of the running block another value."""
    parent, _, leaf = name.rpartition(".")
    module = block.module.get_submodule(parent)
    setattr(module, leaf, _parameter(tensor.to(getattr(module, leaf))))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
