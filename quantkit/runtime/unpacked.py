"""A checkpoint of any format as plain tensors, so that it can be walked block by block.

    walk = Walk(unpacked_skeleton(open_checkpoint(source), device, dtype))

Quantized linears are multiplied out when their block is filled, and forgotten with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from quantkit.core.checkpoint import TensorSpec
from quantkit.runtime.activation import scale_activations
from quantkit.runtime.skeleton import Skeleton

if TYPE_CHECKING:
    from quantkit.runtime.opened import Opened

_WEIGHT = ".weight"


@dataclass
class Unpacked:
    """The tensors of ``opened``, with a float weight in ``dtype`` for every quantized linear;
    those in ``transposed`` (prefixes) are [in, out], as GPT-2 wants them."""

    opened: "Opened"
    dtype: torch.dtype
    transposed: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.opened.dense or self._is_packed(name)

    def __iter__(self) -> Iterator[str]:
        yield from self.opened.dense
        yield from (f"{prefix}{_WEIGHT}" for prefix in self.opened.linears)

    def spec(self, name: str) -> TensorSpec:
        if not self._is_packed(name):
            return self.opened.dense.spec(name)
        prefix = name.removesuffix(_WEIGHT)
        packed = self.opened.linears[prefix]
        shape = (packed.out, packed.width)
        return TensorSpec(self.dtype, shape[::-1] if prefix in self.transposed else shape)

    def get(self, name: str) -> Tensor:
        if not self._is_packed(name):
            return self.opened.dense.get(name)
        prefix = name.removesuffix(_WEIGHT)
        weight = self.opened.qweight(prefix).dequantize(self.dtype)
        return weight.T.contiguous() if prefix in self.transposed else weight

    def _is_packed(self, name: str) -> bool:
        return name.endswith(_WEIGHT) and name.removesuffix(_WEIGHT) in self.opened.linears


def unpacked_skeleton(opened: "Opened", device: torch.device, dtype: torch.dtype) -> Skeleton:
    """A skeleton that is filled from ``opened``, whatever its format. Raises QuantkitError when it
    is not a model that can be run."""
    described = opened.model_config if opened.format == "gguf" else None
    tensors = Unpacked(opened, dtype)
    skeleton = Skeleton(opened.source, tensors, device, dtype, described)
    scale_activations(skeleton, opened)
    modules = dict(skeleton.model.named_modules())
    for prefix in opened.linears:
        name = skeleton.live_name(f"{prefix}{_WEIGHT}").removesuffix(_WEIGHT)
        if isinstance(modules.get(name), Conv1D):
            tensors.transposed.add(prefix)
    return skeleton
