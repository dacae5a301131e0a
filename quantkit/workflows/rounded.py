"""Rounding without calibration, as a view: a plain checkpoint whose linears look quantized.

    rounded = Rounded(open_checkpoint(source), rounder)
    rounded.qweight("model.layers.0.mlp.up_proj")     rounded when it is asked for

So what carries one quantized checkpoint into another (workflows/convert.py) also quantizes one that
is not: checked before the first byte, tensor by tensor, resumed, read back. The model is only built
without its weights, to see which tensors are linears of decoder blocks and which way round they
lie.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.core import sound
from quantkit.core.checkpoint import TensorSpec
from quantkit.core.nested import Nested
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import Tensors, unread
from quantkit.methods import fit
from quantkit.runtime.opened import Opened, Packed


class Rounding(NamedTuple):
    """What became of a weight; ``nested`` where its scales are quantized themselves."""

    qweight: QWeight
    nested: Nested | None = None


# weight [out, in] in its own dtype -> what it is rounded to
Rounder = Callable[[Tensor], Rounding]


class Rounded:
    """What ``Opened`` is, of a full-precision checkpoint that was opened.

    method     the name of the rounding, for quantkit.json
    settings   and its options
    halve      give float32 tensors that are not quantized as float16, as quantized models are run

    Raises QuantkitError for a checkpoint that is quantized already or keeps its experts fused.
    """

    def __init__(
        self,
        opened: Opened,
        rounder: Rounder,
        method: str,
        settings: dict[str, Any],
        halve: bool = False,
    ) -> None:
        from quantkit.workflows.plain_linears import find  # and transformers

        if opened.linears:
            raise QuantkitError(
                f"{opened.source.name} is already quantized ({opened.format})",
                "quantize the full-precision original, or use 'quantkit convert'",
            )
        self.opened, self.rounder = opened, rounder
        self.method, self.settings = method, settings
        self.source: Source = opened.source
        self.format: str = opened.format
        self._found, dropped = find(opened)
        hidden = {f"{prefix}.weight" for prefix in self._found} | set(dropped)
        self.dense: Tensors = _Rest(opened.dense, hidden, halve)
        self._last = threading.local()  # several linears are rounded at once

    @property
    def config(self) -> dict[str, Any]:
        return {}

    @property
    def model_config(self) -> dict[str, Any]:
        return self.opened.model_config

    @property
    def files(self) -> list[Path]:
        return self.opened.files

    def tokenizer(self) -> Any:
        return self.opened.tokenizer()

    def release(self) -> None:
        self._last.weight = self._last.rounding = None
        self.opened.release()

    def names(self, prefix: str) -> list[str]:
        return [f"{prefix}.weight"]

    @cached_property
    def linears(self) -> dict[str, Packed]:
        """Every linear of a decoder block, by its prefix in files."""
        return {
            prefix: Packed(found.out, found.width, self._scheme(prefix))
            for prefix, found in self._found.items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear of a decoder block, by its prefix in files."""
        return {prefix: (found.out, found.width) for prefix, found in self._found.items()}

    def _scheme(self, prefix: str) -> Scheme:
        try:
            return self._sample(self._found[prefix].width).scheme
        except UsageError as error:
            raise UsageError(f"{prefix}: {error.message}", error.hint) from error

    def _sample(self, width: int) -> QWeight:
        """What one row of zeros is rounded to: in everything but its numbers, what any is."""
        return self.rounder(torch.zeros(1, width)).qweight

    def survey(self, prefix: str) -> QWeight:
        """A weight like the one that ``qweight`` will give, with numbers that mean nothing."""
        found = self._found[prefix]
        row = self._sample(found.width)

        def spread(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.expand(found.out, -1)

        scale = row.scale.expand(found.out, -1)
        codes = unread(found.out, found.width)
        minimum = spread(row.minimum)
        return QWeight(row.scheme, codes, scale, spread(row.zero), minimum=minimum)

    def weight(self, prefix: str) -> Tensor:
        """The original weight [out, in], in its own dtype; the thread's last one is kept until it
        calls ``release``. Raises QuantkitError when it has numbers that are none."""
        last: tuple[str, Tensor] | None = getattr(self._last, "weight", None)
        if last is None or last[0] != prefix:
            last = self._last.weight = prefix, self._read(prefix)
        return last[1]

    def _read(self, prefix: str) -> Tensor:
        weight = self.opened.dense.get(f"{prefix}.weight")
        if not bool(weight.isfinite().all()):
            raise QuantkitError(
                f"{prefix}.weight holds infinities or NaN", "the original may be damaged"
            )
        return weight.T.contiguous() if self._found[prefix].transposed else weight

    def rounding(self, prefix: str) -> Rounding:
        """A linear, rounded; the thread's last one is kept until it calls ``release``."""
        last: tuple[str, Rounding] | None = getattr(self._last, "rounding", None)
        if last is None or last[0] != prefix:
            last = self._last.rounding = prefix, self.rounder(self.weight(prefix))
        return last[1]

    def qweight(self, prefix: str) -> QWeight:
        return self.rounding(prefix).qweight

    def error(self, prefix: str, q: QWeight) -> float:
        """|W - W'|^2 / |W|^2 of a linear that is stored as ``q``."""
        return fit.relative_error(self.weight(prefix).float(), q.dequantize())


@dataclass(frozen=True)
class _Rest:
    """Tensors without the ``hidden`` ones."""

    tensors: Tensors
    hidden: set[str]
    halve: bool

    def __contains__(self, name: str) -> bool:
        return name in self.tensors and name not in self.hidden

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.tensors if name not in self.hidden)

    def spec(self, name: str) -> TensorSpec:
        spec = self.tensors.spec(name)
        halved = self.halve and spec.dtype == torch.float32
        return TensorSpec(torch.float16, spec.shape) if halved else spec

    def get(self, name: str) -> Tensor:
        return sound.written(name, self.tensors.get(name), self.spec(name).dtype)
