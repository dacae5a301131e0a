"""Linear layers that compute with a quantized weight.

``QuantLinear`` holds codes in few bits and dequantizes them for every call: right for every scheme
and device, and the reference for everything faster. ``CpuInt4Linear`` uses torch's int4 kernel
where few rows come at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.core import packbits
from quantkit.core.qweight import QWeight
from quantkit.runtime.kernels import cpu_int4, support

# From this many rows on, dequantizing once and multiplying is faster than the int4 kernel
# (measured on two AVX512 cores with 512 to 4096 inputs: they meet between 100 and 250 rows).
DENSE_ROWS = 128
# The kernel is only fast in bfloat16. In float32 and float16 it works off one row after the other,
# at half the price of dequantizing (4096 x 1024, one core: 11 ms a row, 24 ms).
DENSE_ROWS_PLAIN = 2
_ROWS = 128  # dequantized at a time on a CPU, to stay in its caches; a multiple of kernel blocks


def quantized_linear(
    q: QWeight, bias: bool, device: torch.device, dtype: torch.dtype
) -> "QuantLinear":
    """The fastest layer there is for this weight on this device. Its bias, if it has one, is still
    empty."""
    out, width = q.shape
    if device.type == "cuda" and support.why_not(width, q.scheme, device) is None:
        from quantkit.runtime.gpu_linear import GpuLinear  # Triton

        return GpuLinear(q, bias, device, dtype)
    small = q.scheme.bits == 4 and q.scheme.grid == "int"
    small = small and cpu_int4.fits(out, width, q.scheme.width(width))
    kind = CpuInt4Linear if small and device.type == "cpu" else QuantLinear
    return kind(q, bias, device, dtype)


class QuantLinear(nn.Module):
    """y = x W^T + bias, W dequantized from packed codes at every call."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    minimum: Tensor | None
    order: Tensor | None

    def __init__(self, q: QWeight, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.scheme, self.dtype = q.scheme, dtype
        self.kept: dict[torch.dtype, Tensor] | None = None  # see multiplied_out
        self.bias = None
        if bias:
            empty = torch.empty(self.out_features, dtype=dtype, device="meta")
            self.bias = nn.Parameter(empty, requires_grad=False)
        if q.group_of is not None:
            # with its groups side by side the weight is an ordinary one; inputs follow
            order = torch.argsort(q.group_of, stable=True)
            self.register_buffer("order", order.to(device))
            q = replace(q, codes=q.codes[:, order], group_of=None)
        else:
            self.order = None
        self.keep(q, device)

    def keep(self, q: QWeight, device: torch.device) -> None:
        """Hold the weight, whose groups are contiguous, in this layer's own form."""
        self.register_buffer("scale", q.scale.to(device))
        for name in ("zero", "minimum"):
            held = getattr(q, name)
            self.register_buffer(name, None if held is None else held.to(device))
        self.register_buffer("packed", self.pack(q.codes).to(device))

    def pack(self, codes: Tensor) -> Tensor:
        """How this layer keeps its codes (uint8 [out, in])."""
        return packbits.pack(codes.T.contiguous(), self.scheme.bits)

    def unpack(self, start: int, stop: int) -> Tensor:
        """The codes of some rows, uint8 [stop - start, in], in the order of the layer's inputs."""
        return packbits.unpack(self.packed[:, start:stop], self.scheme.bits).T

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], columns in the order of ``self.order``."""
        device = self.scale.device
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        step = self.out_features if device.type == "cuda" else _ROWS
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            weight[start:stop] = self.rows(start, stop).dequantize(dtype)
        return weight

    def rows(self, start: int, stop: int) -> QWeight:
        """Some rows of the weight, columns in the order of ``self.order``."""
        zero, minimum = (
            None if held is None else held[start:stop] for held in (self.zero, self.minimum)
        )
        codes, scale = self.unpack(start, stop), self.scale[start:stop]
        return QWeight(self.scheme, codes, scale, zero, minimum=minimum)

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x[..., self.order]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """The layer's output for inputs in its own order."""
        return functional.linear(x, self._dense(x.dtype), self.bias)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        if self.kept is None:
            return self.weight_as(dtype)
        if dtype not in self.kept:
            self.kept[dtype] = self.weight_as(dtype)
        return self.kept[dtype]

    def extra_repr(self) -> str:
        scheme = self.scheme
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={scheme.bits}, group_size={scheme.group_size}, bias={self.bias is not None}"
        )


@contextmanager
def multiplied_out(module: nn.Module) -> Iterator[None]:
    """While open, linears of ``module`` that dequantize for every call do it for the first alone.
    What they compute stays the same, bit for bit; the weights that they keep take memory."""
    linears = [part for part in module.modules() if isinstance(part, QuantLinear)]
    for linear in linears:
        linear.kept = {}
    try:
        yield
    finally:
        for linear in linears:
            linear.kept = None


class CpuInt4Linear(QuantLinear):
    """4 bits on a CPU: torch's int4 kernel for few rows, a dequantized weight for many."""

    kernel_scales: Tensor

    def __init__(self, q: QWeight, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(q, bias, device, dtype)
        self.group = q.scheme.width(self.in_features)
        scales = cpu_int4.scales_and_offsets(q.scale, q.zero, q.minimum, dtype)
        self.register_buffer("kernel_scales", scales)

    def pack(self, codes: Tensor) -> Tensor:
        return cpu_int4.pack(codes)

    def unpack(self, start: int, stop: int) -> Tensor:
        return cpu_int4.unpack(self.packed[start:stop])

    def product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        most = DENSE_ROWS if x.dtype == torch.bfloat16 else DENSE_ROWS_PLAIN
        if len(rows) >= most or x.dtype != self.kernel_scales.dtype:
            return super().product(x)
        result = cpu_int4.matmul(rows.contiguous(), self.packed, self.group, self.kernel_scales)
        if self.bias is not None:
            result += self.bias
        return result.reshape(*x.shape[:-1], self.out_features)
