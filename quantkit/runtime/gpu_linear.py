"""A linear layer on a GPU that computes from packed codes; ``kernels.choose`` knows how."""

import torch
from torch import Tensor

from quantkit.core.qweight import QWeight
from quantkit.runtime.kernels import choose, dense
from quantkit.runtime.kernels.fragments import Fragments, arrange
from quantkit.runtime.linear import QuantLinear


class GpuLinear(QuantLinear):
    """4 or 8 bits on a GPU, laid out for its tensor cores; ``kernels.choose`` knows the way."""

    words: Tensor
    offset: Tensor | None
    arrived: Tensor

    def keep(self, q: QWeight, device: torch.device) -> None:
        held = arrange(q.to(device), blocked=choose.blocked(q, device))
        self.scaled, self.blocked = held.scaled, held.blocked
        self.register_buffer("words", held.words)
        self.register_buffer("scale", held.scale)
        self.register_buffer("offset", held.offset)
        arrived = torch.zeros(choose.counters(held), dtype=torch.int32, device=device)
        self.register_buffer("arrived", arrived)

    @property
    def fragments(self) -> Fragments:
        """The weight as the kernels know it."""
        return Fragments(
            self.scheme,
            self.out_features,
            self.in_features,
            self.words,
            self.scale,
            self.offset,
            self.scaled,
            self.blocked,
        )

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        with torch.cuda.device_of(self.words):
            return dense.dequantize(self.fragments, dtype)

    def product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        with torch.cuda.device_of(rows):  # Triton launches on the current device
            result = choose.product(rows, self.fragments, self.bias, self.arrived)
        return result.reshape(*x.shape[:-1], self.out_features)
