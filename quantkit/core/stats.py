"""What calibration gathers about the inputs of a linear: sums over tokens, nothing else.

For the inputs x [tokens, in] that a group of linears shares:

    gram    sum of x x^T    [in, in]     the Hessian of the squared output error, up to a factor
    total   sum of x        [in]
    cross   sum of d x^T    [out, in]    d: what the output should have been, minus what it is
    drift   sum of d        [out]

Sums are float32 whatever the activations' dtype.
"""

import torch
from torch import Tensor

# Only blocks of columns on or above the diagonal are multiplied; 8 strips do 36/64 of the work.
_STRIPS = 8
_MIN_STRIP = 128
_SUM_ROWS = 256


class InputStats:
    """Accumulates the moments of one shared input, ``width`` features wide.

    ``out_features`` asks for ``cross`` and ``drift`` too.
    """

    def __init__(
        self, width: int, device: torch.device | str = "cpu", out_features: int | None = None
    ) -> None:
        self.width = width
        self.count = 0
        self._upper = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._total = torch.zeros(width, dtype=torch.float32, device=device)
        self._cross = self._drift = None
        if out_features is not None:
            self._cross = torch.zeros(out_features, width, dtype=torch.float32, device=device)
            self._drift = torch.zeros(out_features, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs [..., width]."""
        x = x.reshape(-1, self.width)
        strip = max(_MIN_STRIP, -(-self.width // _STRIPS))
        for start in range(0, self.width, strip):
            stop = min(self.width, start + strip)
            _add_product(self._upper[start:stop, start:], x[:, start:stop], x[:, start:])
        self._total += _column_sums(x)
        self.count += x.shape[0]

    def add_drift(self, x: Tensor, delta: Tensor) -> None:
        """Add the output differences ``delta`` [..., out] that went with the inputs ``x``."""
        assert self._cross is not None and self._drift is not None
        x = x.reshape(-1, self.width)
        delta = delta.reshape(x.shape[0], -1)
        _add_product(self._cross, delta, x)
        self._drift += _column_sums(delta)

    def moments(self) -> "Moments":
        """The sums as means over tokens. Uses the accumulator up (no second copy is made)."""
        gram = self._upper.div_(self.count)
        strip = max(_MIN_STRIP, -(-self.width // _STRIPS))
        for start in range(0, self.width, strip):
            stop = min(self.width, start + strip)
            gram[stop:, start:stop] = gram[start:stop, stop:].T
        cross = None if self._cross is None else self._cross.div_(self.count)
        drift = None if self._drift is None else self._drift.div_(self.count)
        return Moments(gram, self._total / self.count, cross, drift, self.count)


class Moments:
    """Means over tokens: ``gram`` [in, in], ``mean`` [in], and, if asked for, ``cross`` [out, in]
    and ``drift`` [out] (see the module's text). All float32."""

    def __init__(
        self, gram: Tensor, mean: Tensor, cross: Tensor | None, drift: Tensor | None, count: int
    ) -> None:
        self.gram, self.mean, self.cross, self.drift, self.count = gram, mean, cross, drift, count

    def centred(self) -> "Moments":
        """The moments about the mean: what is left to minimise when a bias takes up the mean
        error. New tensors."""
        gram = self.gram - torch.outer(self.mean, self.mean)
        cross = self.cross
        if cross is not None and self.drift is not None:
            cross = cross - torch.outer(self.drift, self.mean)
        return Moments(gram, self.mean, cross, self.drift, self.count)


def _column_sums(x: Tensor) -> Tensor:
    """Sums over tokens [width], in float32 throughout: an error here grows with the width once the
    mean is taken out of the gram. On a CPU the float32 copies that torch makes stay in its caches.
    """
    if x.is_cuda:
        return x.sum(0, dtype=torch.float32)
    return sum(part.sum(0, dtype=torch.float32) for part in torch.split(x, _SUM_ROWS))  # type: ignore[return-value]


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a^T b, with float32 sums over the tokens of this call where the hardware offers it.

    On a CPU a bf16 product comes back rounded to bf16: a relative error of 2^-9 an entry and call,
    independent between calls, so that it averages out well below the damping. (Measured: the same
    KL as float32 products, at twice the speed.) A fp16 product would overflow there.
    """
    if a.dtype == torch.float16 and not a.is_cuda:
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        into.addmm_(a.T, b)
    elif a.is_cuda:
        into += torch.mm(a.T, b, out_dtype=torch.float32)
    else:
        into += a.T @ b
