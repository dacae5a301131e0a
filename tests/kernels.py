"""Triton's interpreter for tests: kernels as numpy programs. It knows no inline PTX and no bfloat16
products, so those are checked on GPUs (benchmarks/kernels_gpu.py), and plain Triton in float16
here."""

import pytest
import torch

from quantkit.core.qweight import QWeight, Scheme

pytest.importorskip("triton")

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _with_range(tensor, scope):
    """Loops over numbers that are known only when a kernel runs, with numpy 2.4 too."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _with_range


def random_weight(scheme: Scheme, out: int, width: int, kind: str = "") -> QWeight:
    """A weight of random codes; ``kind`` of an asymmetric one is zero or minimum."""
    rng = torch.Generator().manual_seed(out + width)
    groups, levels = scheme.groups(width), scheme.max_code + 1
    codes = torch.randint(0, levels, (out, width), generator=rng, dtype=torch.uint8)
    scale = (torch.rand(out, groups, generator=rng) + 0.1).half() * 0.01
    zero = minimum = None
    if kind == "zero":
        zero = torch.randint(0, levels, (out, groups), generator=rng, dtype=torch.uint8)
    if kind == "minimum":
        minimum = (torch.randn(out, groups, generator=rng) * 0.05).half()
    return QWeight(scheme, codes, scale, zero, minimum=minimum)
