"""Activation-aware scaling: inputs that carry much are made larger before weights are rounded.

A linear computes the same with its inputs divided by s and its weight's columns multiplied by s,
but the rounded one does not: what rounding loses,

    tr (W s - Q(W s)) (H / s s^T) (W s - Q(W s))^T            H = E[x x^T],

weighs a column's error by H_jj / s_j^2, while a group's step grows with its largest |W_ij| s_j.
So s should be large where inputs are, and small where weights are (Lin et al., AWQ,
arXiv:2306.00978, section 3.2). As there, one family of scales is searched, here

    s_j = energy_j^a / peak_j^b,      energy_j = sqrt(H_jj),   peak_j = rms of column j of W

from the identity, (0, 0), along a, along b and along a again. Unlike there, every candidate is
rounded the way it will be rounded in the end, with its own search for the range of every group
(clipping): the two depend on each other. And the loss is the whole Hessian's, not the diagonal's.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.core.qweight import QWeight, Scheme
from quantkit.methods import factor, scales, search

# (weight [rows, in], its Hessian [in, in]) -> the weight after rounding
Rounding = Callable[[Tensor, Tensor], Tensor]
EXPONENTS = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8)
_ROWS = 512  # of the weight, evenly spaced, are enough to tell candidates apart
_SPAN = 1e4  # between the largest and the smallest scale of a linear


class Choice(NamedTuple):
    """``scale`` float32 [in], None for the identity; ``energy`` and ``peak``, the exponents;
    ``loss``, what rounding loses relative to what it loses without scales."""

    scale: Tensor | None
    energy: float
    peak: float
    loss: float


def choose(
    weight: Tensor,
    hessian: Tensor,
    source: Tensor,
    rounding: Rounding,
    stored: Callable[[Tensor], Tensor],
) -> Choice:
    """The best scales for linears that share an input, ``weight`` [out, in] float32 being all of
    them, under ``hessian`` [in, in].

    source    int64 [in]: inputs with the same number get the same scale
    stored    scales [in] -> those that are had once the inverse is rounded to how it is stored
    """
    some = weight[:: max(1, len(weight) // _ROWS)].contiguous()
    plain = loss(some, torch.ones_like(hessian[0]), hessian, rounding)
    best = Choice(None, 0.0, 0.0, 1.0)
    scales_of = family(weight, hessian, source)
    tried = {(0.0, 0.0)}
    for along in ("energy", "peak", "energy"):
        for exponent in EXPONENTS:
            pair = (exponent, best.peak) if along == "energy" else (best.energy, exponent)
            if pair in tried:
                continue
            tried.add(pair)
            scale = stored(scales_of(*pair))
            found = loss(some, scale, hessian, rounding) / plain if plain else 1.0
            if found < best.loss:
                best = Choice(scale, *pair, found)
    return best


def family(weight: Tensor, hessian: Tensor, source: Tensor) -> Callable[[float, float], Tensor]:
    """(a, b) -> scales [in]."""
    energy = _logarithm(hessian.diagonal().sqrt(), source)
    peak = _logarithm(weight.square().mean(0).sqrt(), source)
    return lambda a, b: (a * energy - b * peak).exp()


def _logarithm(size: Tensor, source: Tensor) -> Tensor:
    """log of sizes [in] about their mean, the same for inputs of the same ``source``. Inputs or
    columns that are always zero count as the smallest that are not."""
    largest = size.max()
    alive = size[size > largest / _SPAN]
    if not len(alive):
        return torch.zeros_like(size)
    logs = size.clamp(min=float(alive.min())).log()
    count = int(source.max()) + 1
    sums = torch.zeros(count).to(logs).index_add(0, source, logs)
    many = torch.zeros(count).to(logs).index_add(0, source, torch.ones_like(logs))
    logs = (sums / many.clamp(min=1))[source]
    return logs - logs.mean()


def loss(weight: Tensor, scale: Tensor, hessian: Tensor, rounding: Rounding) -> float:
    """E|x W^T - (x / s) Q(W s)^T|^2, summed over the rows of ``weight``."""
    scaled, curved = weight * scale, scaled_hessian(hessian, scale)
    error = scaled - rounding(scaled, curved)
    return float((error @ curved).mul_(error).sum())


def scaled_hessian(hessian: Tensor, scale: Tensor) -> Tensor:
    """E[x x^T] of the inputs divided by ``scale``."""
    return hessian / scale / scale[:, None]


def rounded(weight: Tensor, hessian: Tensor, scheme: Scheme, zero_min: int = 0) -> QWeight:
    """``weight`` [out, in] rounded to nearest, in the range of every group that loses least under
    its part of the Hessian (clipping as in AWQ, section 3.2, but under all of the part)."""
    columns = weight.T.contiguous()
    roots = factor.roots(hessian, scheme.width(len(columns)))
    grid = search.search_all(columns, roots, scheme, zero_min)
    grouped = columns.reshape(len(roots), -1, columns.shape[1])
    levels = scales.nearest(grouped, grid.spread())
    return scales.quantized(levels.reshape(columns.shape), grid, scheme)
