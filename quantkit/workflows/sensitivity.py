"""What it costs the whole model when a part of it is rounded, measured in one pass.

A part is the linears of a block that share an input: they share a Hessian, and kernels that fuse
them want one scheme for all. Two things are measured about each:

    its error        E|x (W - Q)|^2 at every scheme that may be chosen, from a quick GPTQ solve
    what that means  with this part alone rounded (to ``PROBE`` bits), how far the model's
                     predictions move: the KL divergence on a few calibration rows

Rounding errors are small enough for both to grow together, so the loss at another scheme is the
measured KL times the ratio of the errors; and losses of parts add up (see methods/allocate.py).

Every rounded part is a stream of hidden states that runs through the rest of the model beside the
original's, so that the model is read once, however many parts it has.
"""

from dataclasses import dataclass

PROBE = 3
PROBE_ROWS = 8


@dataclass(frozen=True)
class Part:
    """Linears that will get one scheme.

    names   of the linears in the model
    weights how many they have
    kl      of the model with only this part rounded to the probe's scheme
    errors  output error at each scheme, relative to the output
    losses  the KL that each scheme is expected to cost
    """

    names: tuple[str, ...]
    kl: float
    errors: tuple[float, ...]
    losses: tuple[float, ...]
