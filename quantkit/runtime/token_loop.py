"""The compiled token of kernels/cpu_token.py: what it works on, and its threads."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import QuantkitWarning
from quantkit.runtime.joined import Dense, Int4
from quantkit.runtime.kernels import cpu_int4

_DTYPES = (torch.bfloat16, torch.float32)
_NUMBA = (0, 62)  # whose LLVM has bfloat in its instructions


def why_not() -> str | None:
    """Why no token is compiled here."""
    try:
        found = version("numba")
    except PackageNotFoundError:
        return "numba is not installed (pip install 'quantkit[cpu]')"
    if tuple(int(part) for part in found.split(".")[:2]) < _NUMBA:
        return f"numba {found} is too old (pip install --upgrade 'quantkit[cpu]')"
    try:
        import numba
    except ImportError as error:  # it takes not every numpy
        return f"numba {found} does not load: {error}"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else None


def fits(linears: Sequence[Int4 | Dense], dtype: torch.dtype) -> bool:
    """Whether all of a model in ``dtype`` can be compiled."""
    weights = [_weight(one) for one in linears]
    return dtype in _DTYPES and all(w.dtype == dtype and w.is_contiguous() for w in weights)


class TokenLoop:
    """Tokens through ``linears`` (four of every block, and the head) and ``norms`` (two of every
    block, and the last one), by as many threads as torch has now.

    heads   of queries, of keys, and how wide they are
    """

    def __init__(
        self,
        linears: Sequence[Int4 | Dense],
        norms: Sequence[Tensor],
        heads: tuple[int, int, int],
        eps: float,
    ) -> None:
        from quantkit.runtime.kernels import cpu_token  # numba

        self._code: Any = cpu_token
        self._linears = linears  # whose memory must not go
        self._biases = [None if one.bias is None else one.bias.detach().float() for one in linears]
        self._products = np.array([self._row(*one) for one in zip(linears, self._biases)])
        self._norms = torch.stack([norm.detach().float() for norm in norms]).numpy()
        layers, threads = len(norms) // 2, torch.get_num_threads()
        block = cpu_int4.block_rows() or cpu_token.PART
        self._shape = cpu_token.Shape(layers, *heads, block, eps, threads)
        self._helpers = ThreadPoolExecutor(max(threads - 1, 1), "quantkit-token")
        self._compiled = False

    def hold(self, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Go on with these: [layers, kv_heads, places, width] in the model's dtype, and float32
        [places, width]."""
        self._keys, self._values = _bits(keys), _bits(values)
        self._cos, self._sin = cos.numpy(), sin.numpy()

    def compute(self, embedded: Tensor, place: int) -> Tensor:
        """Logits [vocab], float32, behind a token at ``place``."""
        code, sizes = self._code, self._products
        logits = np.empty(sizes[-1, code.OUT], np.float32)
        turns = np.zeros(
            (code.TURNS * self._shape.layers + 1, 1 + self._shape.threads, 8), np.int64
        )
        given: tuple[Any, ...] = (
            turns,
            self._shape,
            self._products,
            self._norms,
            self._keys,
            self._values,
            place,
            self._cos[place],
            self._sin[place],
            embedded.detach().to(torch.float32, copy=True).numpy(),
            np.empty(sizes[:-1, code.OUT].max(), np.float32),
            np.empty(self._shape.heads * self._shape.width, np.float32),
            logits,
        )
        if not self._compiled:
            self._compile(given)
        try:
            for _ in range(1, self._shape.threads):
                self._helpers.submit(code.token, *given)
            code.token(*given)
        finally:  # nobody works on this any more when it is given out, or interrupted
            code.end(turns)
        return torch.from_numpy(logits)

    def _compile(self, given: tuple[Any, ...]) -> None:
        """In this thread, which Ctrl-C interrupts: the helpers would go on for seconds."""
        from numba import typeof

        kinds = tuple(map(typeof, given))
        for function, wanted in ((self._code.token, kinds), (self._code.end, kinds[:1])):
            try:
                function.compile(wanted)
            except OSError as error:  # it is compiled, but there is no room to keep it
                warnings.warn(
                    f"what numba compiled is not kept for the next time: {error}",
                    QuantkitWarning,
                    stacklevel=2,
                )
        self._compiled = True

    def _row(self, linear: Int4 | Dense, bias: Tensor | None) -> list[int]:
        """A product as kernels/cpu_token.py describes it."""
        code = self._code
        end = 0 if bias is None else bias.data_ptr()
        half = _weight(linear).dtype == torch.bfloat16
        if isinstance(linear, Dense):
            kind = code.DENSE_HALVES if half else code.DENSE_FLOATS
            out, width = linear.weight.shape
            return [kind, out, width, 0, linear.weight.data_ptr(), 0, end]
        kind = code.INT4_HALVES if half else code.INT4_FLOATS
        out, pairs = linear.packed.shape
        places = linear.packed.data_ptr(), linear.scales.data_ptr()
        return [kind, out, 2 * pairs, linear.group, *places, end]


def _weight(linear: Int4 | Dense) -> Tensor:
    """What has the model's dtype."""
    return linear.weight if isinstance(linear, Dense) else linear.scales


def _bits(tensor: Tensor) -> Any:
    """For numba, which has no bfloat16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
