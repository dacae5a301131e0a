"""A step of a transformers model with fewer launches, while it is captured.

Nothing of the model is changed: during the capture, norms, the rotary function, activations, sums
and products are answered by kernels that do the same in one launch. RMS norms and the rotary
function are tried on numbers first, since models differ in what they multiply with and which
columns they pair.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from quantkit.runtime.kernels import small

_ROTARY = "apply_rotary_pos_emb"  # what transformers' models call it
_WIDEST = 16384  # numbers of a row that a norm takes
_MOST = 1 << 20  # numbers in all, for what is computed one by one
_HEAD = 16384  # outputs from which on a plain linear is read faster by ours
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _Ours(TorchFunctionMode):
    """Answers what ``small`` computes, for tensors on ``device`` that it takes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = None
        here = bool(args) and isinstance(args[0], Tensor) and args[0].device == self._device
        if here and function is functional.layer_norm:
            found = _norm(*args, **kwargs)
        elif here and function in _WHAT and not (set(kwargs) - {"inplace", "approximate"}):
            found = _elementwise(_WHAT[function], args, kwargs)
        elif here and function is functional.linear:
            found = _head(*args, **kwargs)
        return function(*args, **kwargs) if found is None else found


_WHAT = {functional.gelu: "gelu", functional.silu: "silu"}
_WHAT |= dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), "add")
_WHAT |= dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__), "multiply")


def _norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if weight is None or len(normalized_shape) > 1 or not x.is_contiguous():
        return None
    if x.shape[-1] > _WIDEST:
        return None
    return small.layer_norm(x, weight, bias, eps)


def _head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    rows, width = weight.shape
    one = x.numel() == width <= _WIDEST and rows >= _HEAD and bias is None
    if not one or not x.is_contiguous() or not weight.is_contiguous() or x.dtype != weight.dtype:
        return None
    return small.row_sums(x, weight)


def _elementwise(what: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Tensor | None:
    first = args[0]
    fits = len(args) == (2 if what in ("add", "multiply") else 1) and all(
        isinstance(x, Tensor)
        and x.device == first.device
        and x.dtype in _DTYPES
        and x.dtype == first.dtype
        and x.shape == first.shape
        and x.is_contiguous()
        and 0 < x.numel() <= _MOST
        for x in args
    )
    if not fits or settings.get("inplace") or settings.get("approximate", "none") != "none":
        return None
    return small.elementwise(what, *args)


@contextmanager
def fewer_launches(model: PreTrainedModel) -> Iterator[None]:
    """What is captured inside takes the kernels of ``small``."""
    source = sys.modules[type(model).__module__]
    theirs: Any = getattr(source, _ROTARY, None)
    ours = theirs is not None and _agree(theirs, model.device, model.dtype)

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        one = q.shape[2] == 1 and not more and not named
        if one and cos.ndim == 3 and q.stride(-1) == k.stride(-1) == cos.stride(-1) == 1:
            return small.rotary(q, k, cos, sin)
        return theirs(q, k, cos, sin, *more, **named)

    norms = _rms_norms(model)
    try:
        if ours:
            setattr(source, _ROTARY, rotary)
        for module, norm in norms.items():
            module.forward = norm
        with _Ours(model.device):
            yield
    finally:
        for module in norms:
            del module.forward  # that of its class is behind it
        if ours:
            setattr(source, _ROTARY, theirs)


def _rms_norms(model: PreTrainedModel) -> "dict[nn.Module, Callable[[Tensor], Tensor]]":
    """The model's RMS norms that ours computes too, tried on numbers; transformers has a class of
    its own for each architecture."""
    found: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    kinds: dict[tuple[type, torch.dtype, int], bool | None] = {}
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), _eps(module)
        if not isinstance(weight, nn.Parameter) or eps is None or weight.ndim != 1:
            continue
        if "forward" in vars(module) or len(weight) > _WIDEST or weight.dtype not in _DTYPES:
            continue
        kind = type(module), weight.dtype, len(weight)
        if kind not in kinds:
            kinds[kind] = _offset(module, weight, eps)
        offset = kinds[kind]
        if offset is not None:
            found[module] = _rms_norm(module.forward, weight, eps, offset)
    return found


def _eps(module: nn.Module) -> float | None:
    named = type(module).__name__.endswith("RMSNorm")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if named and isinstance(eps, float) else None


def _offset(module: nn.Module, weight: Tensor, eps: float) -> bool | None:
    """Whether a module multiplies with 1 + weight; None, when it does something else."""
    x = torch.randn(3, len(weight), device=weight.device, dtype=weight.dtype)
    try:
        wanted = module(x)
    except (TypeError, ValueError, RuntimeError):  # it wants more than an input
        return None
    for offset in (False, True):
        found = small.rms_norm(x, weight, eps, offset=offset)
        if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0.02, atol=0.02):
            return offset
    return None


def _rms_norm(
    theirs: Callable[[Tensor], Tensor], weight: Tensor, eps: float, offset: bool
) -> Callable[[Tensor], Tensor]:
    def norm(x: Tensor) -> Tensor:
        if x.is_contiguous() and x.dtype == weight.dtype:
            return small.rms_norm(x, weight, eps, offset=offset)
        return theirs(x)

    return norm


def _agree(theirs: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the model's rotary function pairs columns as ours does."""
    q, k = (torch.randn(1, heads, 1, 64, device=device, dtype=dtype) for heads in (4, 2))
    cos, sin = (torch.randn(1, 1, 32, device=device, dtype=dtype).tile(2) for _ in range(2))
    try:
        wanted = theirs(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # another signature, or another shape of angles
        return False
    found = small.rotary(q, k, cos, sin)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0.02, atol=0.05)
        for a, b in zip(found, wanted)
    )
