"""A step of a transformers model with fewer launches, while it is captured.

Nothing of the model is changed: during the capture, torch's layer norm and the model's rotary
function are answered by kernels that do the same in one launch, and the cache writes keys and
values in one. The rotary function is tried on numbers first, since models differ in which columns
they pair.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer

from quantkit.runtime.kernels import small

_ROTARY = "apply_rotary_pos_emb"  # what transformers' models call it
_WIDEST = 16384


class _Norms(TorchFunctionMode):
    """Answers ``layer_norm`` for the last dimension."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.layer_norm:
            found = _norm(*args, **kwargs)
            if found is not None:
                return found
        return function(*args, **kwargs)


def _norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    plain = weight is not None and len(normalized_shape) == 1 and x.is_contiguous()
    if not plain or not x.is_cuda or x.shape[-1] > _WIDEST:
        return None
    return small.layer_norm(x, weight, bias, eps)


@contextmanager
def fewer_launches(model: PreTrainedModel) -> Iterator[None]:
    """What is captured inside takes the kernels of ``small``."""
    source = sys.modules[type(model).__module__]
    theirs = getattr(source, _ROTARY, None)
    ours = theirs is not None and _agree(theirs, model.device, model.dtype)

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        one = q.shape[2] == 1 and not more and not named
        if one and cos.ndim == 3 and q.stride(-1) == k.stride(-1) == cos.stride(-1) == 1:
            return small.rotary(q, k, cos, sin)
        return theirs(q, k, cos, sin, *more, **named)

    try:
        if ours:
            setattr(source, _ROTARY, rotary)
        with _Norms():
            yield
    finally:
        if ours:
            setattr(source, _ROTARY, theirs)


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


class FixedLayer(StaticLayer):
    """transformers' layer of a cache of fixed size, which writes one token in one launch. All
    layers of a cache share ``cumulative_length``; who runs the model counts it on."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            place = self.cumulative_length
            self.lazy_initialization(key_states, value_states)
            self.cumulative_length = place
        tokens = key_states.shape[2]
        if tokens == 1 and key_states.stride(-1) == value_states.stride(-1) == 1:
            small.keep(key_states, value_states, self.keys, self.values, self.cumulative_length)
            return self.keys, self.values
        places = torch.arange(tokens, device=self.keys.device) + self.cumulative_length
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values

    def enlarge(self, room: int, used: int) -> None:
        """Have places for ``room`` tokens; the first ``used`` stay."""
        self.max_cache_len = room
        if self.is_initialized:
            self.keys = _enlarged(self.keys, room, used)
            self.values = _enlarged(self.values, room, used)

    def reset(self) -> None:
        """What is there is masked out until it is written again; the counter is not ours."""


def _enlarged(old: Tensor, room: int, used: int) -> Tensor:
    texts, heads, _, width = old.shape
    new = old.new_zeros(texts, heads, room, width)
    new[:, :, :used] = old[:, :, :used]
    return new
