"""Targets that make up for what went wrong before, and biases that take up the mean error.

Upstream of a linear the model is already quantized, so its input is off. Rounding towards the
original weight then reproduces the original function on wrong inputs. Better is a target that, on
the inputs as they are, gives part of the output that should have been:

    T = W + a P (H + damping)^-1,      P = E[d x^T],  d = wanted output - W x

the regularised least-squares correction, taken a fraction ``a`` of the way (all of it overfits the
calibration text: measured, KL on held-out text is lowest near a half).
"""

from torch import Tensor

from quantkit.core.stats import Moments
from quantkit.methods.factor import factored, solved


def aligned_target(weight: Tensor, moments: Moments, fraction: float, damp: float) -> Tensor:
    """``weight`` [out, in] float32 -> T, same shape. ``moments`` must carry ``cross``."""
    assert moments.cross is not None
    with factored(moments.gram, damp) as (energy, _):
        correction = solved(moments.gram, energy, moments.cross.T)
    return weight.add(correction.T, alpha=fraction)


def corrected_bias(
    bias: Tensor, weight: Tensor, quantized: Tensor, moments: Moments, fraction: float
) -> Tensor:
    """The bias [out] that makes the mean output right: what the rounded weight gets wrong on the
    mean input, plus ``fraction`` of the mean difference that alignment asks for (Nagel et al.,
    arXiv:1906.04721, section 4.2, for the first part). Float32."""
    result = bias.float() + (weight - quantized) @ moments.mean
    if moments.drift is not None:
        result += fraction * moments.drift
    return result
