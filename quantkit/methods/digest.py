"""One short text for what a quantized weight means, whatever format holds it.

Two QWeights have the same digest when every weight is the same whole number of steps from zero, and
every step has the same size: group sizes, zero points, minimums that stand for zero points and the
bits that a code has room for do not matter.
"""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quantkit.core.qweight import QWeight
from quantkit.methods import fit

# Codes at a time: so many that a thread that launches kernels gets its turns (Python's lock). With
# a quarter of them, four threads left it half of its speed on an H200's host, with these two thirds
# or more, and took no less time themselves.
_PIECE = 1 << 22


def of(q: QWeight) -> str:
    """sha256 of a weight, in hex."""
    if q.minimum is not None and fit.is_product(q):
        q = fit.zero_pointed(q)
    state = hashlib.sha256(f"{tuple(q.shape)} {q.scheme.grid}".encode())
    for tensor in (*_all_levels(q), *_steps(q)):
        state.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()


def of_plain(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, in hex."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def together(digests: Mapping[str, str]) -> str:
    """sha256 of many weights, by their names."""
    state = hashlib.sha256()
    for name in sorted(digests):
        state.update(f"{name} {digests[name]}\n".encode())
    return state.hexdigest()


def _all_levels(q: QWeight) -> Iterator[Tensor]:
    """Distances from the zero point, int8 if all of them fit; a few rows at a time, which stay in
    the caches, where they always do."""
    if q.scheme.grid != "int" or q.minimum is not None:
        yield q.codes
    elif q.zero is not None and q.scheme.bits == 8:
        yield _levels(q)
    else:
        out, width = q.shape
        step = max(1, _PIECE // width)
        for start in range(0, out, step):
            yield _levels(q.rows(start, start + step))


def _levels(q: QWeight) -> Tensor:
    """Distance from the zero point, int8 if all fit."""
    if q.zero is None:
        return (q.codes - q.scheme.midpoint).view(torch.int8)  # wraps around to the right number
    zero = q.zero.to(torch.int16)
    if q.group_of is not None:
        levels = q.codes.to(torch.int16) - zero[:, q.group_of.long()]
    else:
        out, groups = zero.shape
        levels = q.codes.reshape(out, groups, -1).to(torch.int16) - zero[..., None]
    small = int(levels.min()) >= -128 and int(levels.max()) < 128
    return (levels.to(torch.int8) if small else levels).reshape(q.shape)


def _steps(q: QWeight) -> tuple[Tensor, Tensor]:
    """The scales (and minimums) of every input, however they are grouped: the different ones
    [groups, out], in the order in which the inputs have them, and for each input its number."""
    held = [t.double() + 0.0 for t in (q.scale, q.minimum) if t is not None]  # no -0
    bits = torch.cat(held).T.contiguous().view(torch.int64)
    different, which = torch.unique(bits, dim=0, return_inverse=True)
    of_input = which[q.group_index()]
    order = list(dict.fromkeys(of_input.tolist()))
    number = torch.empty(len(different), dtype=torch.int32)
    number[order] = torch.arange(len(order), dtype=torch.int32)
    return different[order], number[of_input]
