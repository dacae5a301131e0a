"""Linears that share an input, as one product: a call for a few tokens costs as much as its work.

The weights stay the model's own: those of the single linears become views of the joint one, once.
"""

from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.runtime.kernels import cpu_int4
from quantkit.runtime.linear import CpuInt4Linear

_FEW = 16  # rows up to which joined linears are faster than each by itself
_joining = Lock()  # several threads may begin with the same model


class Joined:
    """The outputs of ``linears`` beside each other, for inputs [tokens, in].

    one   the joint weight, or None where the linears are not of one kind
    """

    def __init__(self, linears: list[Any]) -> None:
        self._linears = linears
        # tensors of inference mode could never be trained, or changed in place, again
        with _joining, torch.inference_mode(False), torch.no_grad():
            self.one = _int4(linears) or _dense(linears)

    def __call__(self, x: Tensor) -> Tensor:
        if self.one is not None and self.one.quick and len(x) <= _FEW:
            return self.one(x)
        found: list[Tensor] = [linear(x) for linear in self._linears]
        return found[0] if len(found) == 1 else torch.cat(found, -1)


class Int4:
    """packed and scales as in kernels/cpu_int4.py, and a bias [out] or None."""

    def __init__(self, packed: Tensor, scales: Tensor, group: int, bias: Tensor | None) -> None:
        self.packed, self.scales, self.group, self.bias = packed, scales, group, bias
        self.quick = scales.dtype == torch.bfloat16  # torch's kernel is slow in others

    def __call__(self, x: Tensor) -> Tensor:
        found = cpu_int4.matmul(x, self.packed, self.group, self.scales)
        return found if self.bias is None else found.add_(self.bias)


class Dense:
    """A weight [out, in], and a bias [out] or None."""

    quick = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def _int4(linears: list[Any]) -> Int4 | None:
    if not all(type(one) is CpuInt4Linear and one.order is None for one in linears):
        return None
    group, dtype = linears[0].group, linears[0].kernel_scales.dtype
    if any(one.group != group or one.kernel_scales.dtype != dtype for one in linears):
        return None
    packed = _joint([one.packed for one in linears])
    scales = torch.cat([one.kernel_scales for one in linears], 1)
    for one, part in zip(linears, _parts(packed, linears)):
        one.packed = part
    return Int4(packed, scales, group, _bias(linears))


def _dense(linears: list[Any]) -> Dense | None:
    # a weight of another type is computed anew for every call (pruning), or no plain memory
    if not all(type(one) is nn.Linear and type(one.weight) is nn.Parameter for one in linears):
        return None
    weight = _joint([one.weight for one in linears])
    for one, part in zip(linears, _parts(weight, linears)):
        one.weight.data = part  # the same parameter: an optimizer may have it
    return Dense(weight, _bias(linears))


def _joint(weights: list[Tensor]) -> Tensor:
    """All their rows. Those that lie behind each other already are not copied."""
    first, width = weights[0].detach(), weights[0].shape[1]
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for weight in weights:
        there = weight.untyped_storage().data_ptr(), weight.storage_offset()
        if there != (storage, end) or not weight.is_contiguous():
            return torch.cat(weights)
        end += weight.numel()
    return first.as_strided((sum(map(len, weights)), width), (width, 1))


def _parts(weight: Tensor, linears: list[Any]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = weight.split([one.out_features for one in linears])
    return found


def _bias(linears: list[Any]) -> Tensor | None:
    if all(one.bias is None for one in linears):
        return None
    dtype = next(one.bias.dtype for one in linears if one.bias is not None)
    none = [torch.zeros(one.out_features, dtype=dtype) for one in linears]
    return torch.cat([empty if one.bias is None else one.bias for one, empty in zip(linears, none)])
