"""One short text for what a quantized weight means, whatever format holds it.

Two QWeights have the same digest when every weight is the same whole number of steps from zero, and
every step has the same size: group sizes, zero points, minimums that stand for zero points and the
bits that a code has room for do not matter.
"""

import hashlib
from collections.abc import Mapping

import torch

from quantkit.core.qweight import QWeight
from quantkit.methods import fit

_ORDERED = (1024, 512, 256, 128, 64, 32, 16)


def of(q: QWeight) -> str:
    """sha256 of a weight, in hex."""
    q = _coarsest(fit.zero_pointed(q) if q.minimum is not None and fit.is_product(q) else q)
    state = hashlib.sha256(f"{tuple(q.shape)} {q.scheme.grid}".encode())
    levels = q.codes
    if q.scheme.grid == "int" and q.minimum is None:
        levels = _levels(q)
    state.update(levels.contiguous().view(torch.uint8).numpy().data)
    for tensor in (q.scale, q.minimum):
        if tensor is not None:
            # -0 and 0 are the same step
            state.update((tensor.float() + 0.0).contiguous().view(torch.uint8).numpy().data)
    if q.group_of is not None:
        state.update(q.group_of.to(torch.int32).numpy().data)
    return state.hexdigest()


def together(digests: Mapping[str, str]) -> str:
    """sha256 of many weights, by their names."""
    state = hashlib.sha256()
    for name in sorted(digests):
        state.update(f"{name} {digests[name]}\n".encode())
    return state.hexdigest()


def _levels(q: QWeight) -> torch.Tensor:
    """Distance from the zero point, int8 if all fit."""
    if q.zero is None and q.scheme.midpoint <= 128:
        return (q.codes - q.scheme.midpoint).view(torch.int8)  # wraps around to the right number
    assert q.zero is not None
    zero = q.zero.to(torch.int16)
    if q.group_of is not None:
        levels = q.codes.to(torch.int16) - zero[:, q.group_of.long()]
    else:
        out, groups = zero.shape
        levels = q.codes.reshape(out, groups, -1).to(torch.int16) - zero[..., None]
    small = int(levels.min()) >= -128 and int(levels.max()) < 128
    return (levels.to(torch.int8) if small else levels).reshape(q.shape)


def _coarsest(q: QWeight) -> QWeight:
    """In the longest contiguous groups that mean the same."""
    width = q.shape[1]
    if q.group_of is not None:
        sizes = [size for size in _ORDERED if width % size == 0]
    else:
        own = q.scheme.width(width)
        sizes = [own << k for k in range(1, 24) if width % (own << k) == 0][::-1]
    sizes = [size for size in sizes if size <= 1024]
    for size in (-1, *sizes):
        found = q.regrouped(size)
        if found is not None:
            return found
    return q
