"""What calibration gathers about the inputs of a linear: sums over tokens, nothing else.

For the inputs x [tokens, in] that a group of linears shares:

    gram    sum of x x^T    [in, in]     the Hessian of the squared output error, up to a factor
    total   sum of x        [in]
    cross   sum of d x^T    [out, in]    d: what the output should have been, minus what it is
    drift   sum of d        [out]

Sums are float32 whatever the activations' dtype.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.core.mirror import mirror
from quantkit.core.profile import phase
from quantkit.core.shifting import column_sums, shifted

# Only blocks of columns on or above the diagonal are multiplied; 8 strips do 36/64 of the work. On
# a GPU strips of 1,024 were the fastest, for 4,864 columns and for 19,456.
_STRIPS = 8
_MIN_STRIP = 128
_GPU_STRIP = 1024
_AVERAGED = 16  # calls from which on rounding errors average out


class InputStats:
    """Accumulates the moments of one shared input, ``width`` features wide.

    ``out_features`` asks for ``cross`` and ``drift`` too; ``calls`` is how often ``add`` will be
    called. ``every``: use one token in so many, evenly spaced, at other places in each call.

    Several of them may see the tokens of one input in parts (runtime/ranks.py): ``calls`` are then
    those of all, and ``first`` is how many of them come before this one's.
    """

    def __init__(
        self,
        width: int,
        device: torch.device | str = "cpu",
        out_features: int | None = None,
        calls: int = 1,
        every: int = 1,
        first: int = 0,
    ) -> None:
        self.width = width
        self._every, self._offset = every, (first - 1) % every
        self._exact = calls < _AVERAGED
        self.count = 0
        self._upper = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._total = torch.zeros(width, dtype=torch.float32, device=device)
        self._shift: Tensor | None = None
        self._cross = self._drift = None
        if out_features is not None:
            self._cross = torch.zeros(out_features, width, dtype=torch.float32, device=device)
            self._drift = torch.zeros(out_features, dtype=torch.float32, device=device)

    def add(self, x: Tensor, delta: Tensor | None = None) -> None:
        """Add inputs [..., width] and, where ``cross`` is asked for, the output differences
        ``delta`` [..., out] that go with them."""
        with phase("hessian"):
            self._add(x, delta)

    def _add(self, x: Tensor, delta: Tensor | None) -> None:
        self._offset = (self._offset + 1) % self._every
        x, total = self._shifted(x)
        for strip in _strips(self._upper):
            into = self._upper[strip, strip.start :]
            _add_product(into, x[:, strip], x[:, strip.start :], self._exact)
        self._total += total
        self.count += x.shape[0]
        if delta is not None:
            assert self._cross is not None and self._drift is not None
            delta = self._picked(delta)
            _add_product(self._cross, delta, x, self._exact)
            self._drift += column_sums(delta)

    def _picked(self, x: Tensor) -> Tensor:
        """The tokens that are used: [tokens, features]."""
        return x.reshape(-1, x.shape[-1])[self._offset :: self._every]

    def _shifted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [tokens, width] about the mean of the first batch, and their sums. What a mean
        adds to the gram is thousands of times larger than what the spread does; subtracted only at
        the end, it would leave its own rounding errors (tensor cores': 1e-5) in their place."""
        x = self._picked(x)
        if self._shift is None:
            self._shift = (column_sums(x) / x.shape[0]).to(x.dtype)
        return shifted(x, self._shift)

    @property
    def shift(self) -> Tensor | None:
        """What all sums are about, float32 [width]; None before the first ``add``."""
        return None if self._shift is None else self._shift.float()

    def move(self, shift: Tensor) -> None:
        """Make all sums those about another ``shift``, float32 [width]: with y = x - old and
        by = old - new, the sum of (y + by) (y + by)^T, and so on. Both are means of a batch, so
        what is added is small and no digits are lost."""
        if self._shift is not None:
            by = self._shift.float() - shift
            moved = self._total.add(by, alpha=self.count)
            # in one product: of a wide input this is all about reading and writing the sums
            self._upper.addmm_(torch.stack([self._total, by], 1), torch.stack([by, moved]))
            self._total.copy_(moved)
            if self._cross is not None and self._drift is not None:
                self._cross.addr_(self._drift, by)
        self._shift = shift

    @property
    def sums(self) -> list[Tensor]:
        """Everything that is summed over tokens, in parts: to be added, in place, to what others
        have found about the same shift."""
        upper = [self._upper[strip, strip.start :] for strip in _strips(self._upper)]
        others = [self._total, self._cross, self._drift]
        return [*upper, *[tensor for tensor in others if tensor is not None]]

    @property
    def finite(self) -> Tensor:
        """Whether all inputs were: one bool, where the sums are."""
        return self._upper.diagonal().isfinite().all()

    def moments(self, centred: bool) -> "Moments":
        """Means over tokens, about zero or about the mean. Uses the accumulator up (no second copy
        of the gram is made)."""
        assert self._shift is not None
        gram = self._upper.div_(self.count)
        shift, rest = self._shift.float(), self._total / self.count
        mean = shift + rest
        gram.addr_(rest, rest, alpha=-1)
        if not centred:
            gram.addr_(mean, mean)
        mirror(gram, lower=False)
        if self._cross is None or self._drift is None:
            return Moments(gram, mean, None, None, centred)
        drift = self._drift / self.count
        cross, self._cross = self._cross.div_(self.count), None
        if centred:
            cross.addr_(drift, rest, alpha=-1)
        else:
            cross.addr_(drift, shift)
        return Moments(gram, mean, cross, drift, centred)


@dataclass(frozen=True)
class Moments:
    """Means over tokens: ``gram`` [in, in], ``mean`` [in], and, if asked for, ``cross`` [out, in]
    and ``drift`` [out] (see the module's text). All float32.

    ``centred``: ``gram`` and ``cross`` are about the means: what is left to minimise when a bias
    takes up the mean error.
    """

    gram: Tensor
    mean: Tensor
    cross: Tensor | None = None
    drift: Tensor | None = None
    centred: bool = False

    def of_rows(self, rows: slice) -> "Moments":
        """Those that concern some outputs."""
        cross = None if self.cross is None else self.cross[rows]
        return replace(self, cross=cross, drift=None if self.drift is None else self.drift[rows])


def _strips(square: Tensor) -> list[slice]:
    """Rows, or columns, that are treated at a time."""
    width = len(square)
    size = _GPU_STRIP if square.is_cuda else max(_MIN_STRIP, -(-width // _STRIPS))
    return [slice(start, min(width, start + size)) for start in range(0, width, size)]


def _add_product(into: Tensor, a: Tensor, b: Tensor, exact: bool) -> None:
    """into += a^T b, with float32 sums over the tokens of this call where the hardware offers it.

    On a CPU a bf16 product comes back rounded to bf16: a relative error of 2^-9 an entry and call,
    independent between calls, so that over many calls it averages out well below the damping.
    (Measured: the same KL as float32 products, at twice the speed.) ``exact`` is for few calls,
    which are quick in float32. A fp16 product would overflow there.
    """
    if not a.is_cuda and (exact or a.dtype == torch.float16):
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        into.addmm_(a.T, b)
    elif a.is_cuda:
        torch.addmm(into, a.T, b, out_dtype=torch.float32, out=into)
    else:
        into += a.T @ b
