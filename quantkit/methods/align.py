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
from quantkit.methods.factor import solved


class Lost:
    """P [out, in] and the ``fraction`` a of what it says was lost that a target is to make up for.
    It is as large as the weight and used once: then its memory is let go of."""

    def __init__(self, cross: Tensor, fraction: float) -> None:
        self._cross: Tensor | None = cross
        self.fraction = fraction

    def taken(self) -> Tensor:
        cross, self._cross = self._cross, None
        assert cross is not None
        return cross


def correction(lost: Lost, hessian: Tensor, energy: Tensor, order: Tensor) -> Tensor:
    """(T - W)^T [in, out], inputs in the ``order`` [in] that the factored ``hessian`` (factor.py)
    has them in."""
    return solved(hessian, energy, lost.taken().T[order]).mul_(lost.fraction)


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
