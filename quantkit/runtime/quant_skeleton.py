"""A skeleton of any checkpoint, filled with the very layers that compute when the model is used.

    skeleton = QuantSkeleton(open_checkpoint(source), device, dtype)
    skeleton.fill(["model", "lm_head"])   all of it, as runtime/load.py does
    Walk(skeleton)                        or block by block

A packed weight becomes a QuantLinear when its part of the model is filled, and an empty linear
again when that part is emptied. So a walk computes what the loaded model would.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from quantkit.core.qweight import QWeight
from quantkit.errors import QuantkitError
from quantkit.runtime.activation import scale_activations
from quantkit.runtime.block import features, is_linear
from quantkit.runtime.linear import quantized_linear
from quantkit.runtime.skeleton import Skeleton, under

if TYPE_CHECKING:
    from quantkit.runtime.opened import Opened


class QuantSkeleton(Skeleton):
    """``opened``: a checkpoint that was looked at. ``see`` is called with the name in the model of
    every packed weight that is read, and with the weight. Raises QuantkitError when there are
    packed weights that the model has no place for."""

    def __init__(
        self,
        opened: "Opened",
        device: torch.device,
        dtype: torch.dtype,
        see: Callable[[str, QWeight], None] = lambda name, q: None,
        apart: bool = True,
    ) -> None:
        described = opened.model_config if opened.format == "gguf" else None
        super().__init__(
            opened.source, opened.dense, device, dtype, described, apart, opened.linears
        )
        scale_activations(self, opened)
        self._opened, self._see = opened, see
        self._places: dict[str, tuple[str, nn.Module]] = {}  # by name in the model: prefix, linear
        for prefix in opened.linears:
            name = self.live_name(f"{prefix}.weight").removesuffix(".weight")
            try:
                place = self.model.get_submodule(name)
            except AttributeError as error:
                raise QuantkitError(
                    f"{self.source.name} has a packed weight {prefix}, and the model no such layer"
                ) from error
            if not is_linear(place):
                raise QuantkitError(
                    f"{self.source.name} has a packed weight {prefix}, and the model has a "
                    f"{type(place).__name__} there, which needs it in full precision"
                )
            self._places[name] = prefix, place

    def fill(self, prefixes: Iterable[str]) -> None:
        wanted = tuple(prefixes)
        for name, (prefix, empty) in self._places.items():
            if under(name, wanted):
                q = self._opened.qweight(prefix)
                self._see(name, q)
                self._put(name, self._quantized(q, prefix, empty))
        super().fill(wanted)

    def empty(self, module: nn.Module) -> None:
        held = {id(part) for part in module.modules()}
        for name, (_, empty) in self._places.items():
            if id(self.model.get_submodule(name)) in held:
                self._put(name, empty)
        super().empty(module)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)

    def _quantized(self, q: QWeight, prefix: str, empty: nn.Module) -> nn.Module:
        """The layer for a packed weight; its bias, if it has one, is filled in as any other."""
        new = quantized_linear(q, empty.bias is not None, self.device, self.dtype)
        found = (new.out_features, new.in_features)
        if features(empty) != found:
            raise QuantkitError(
                f"{prefix} is a weight of {found}, the model needs {features(empty)}",
                "config.json and the weights do not belong together",
            )
        return new
