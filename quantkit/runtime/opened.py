"""Any checkpoint as two things: quantized weights, and tensors that are what they are.

    opened = open_checkpoint(source)
    opened.linears["model.layers.0.mlp.up_proj"]     (out, in, scheme), from headers alone
    opened.qweight("model.layers.0.mlp.up_proj")     QWeight
    opened.dense                                     everything else, a Checkpoint

Which format it is, is seen from the tensors; the configuration is only asked for what they cannot
show. The loader, convert, inspect and verify all look at checkpoints through this.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from quantkit import formats
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.errors import QuantkitError


@dataclass(frozen=True)
class Packed:
    """A quantized linear before its data is read: out, width, and the scheme as declared."""

    out: int
    width: int
    scheme: Scheme


@dataclass
class Opened:
    """format is the name of a file in formats/, or ``dense``."""

    source: Source
    format: str
    tensors: Checkpoint
    config: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def linears(self) -> dict[str, Packed]:
        """Every quantized linear, by its prefix in files."""
        if self.format == "dense":
            return {}
        reader = formats.by_name(self.format)
        return {
            prefix: Packed(*reader.describe(self.tensors, prefix, self.config))
            for prefix in reader.linears(self.tensors, self.config)
        }

    def names(self, prefix: str) -> list[str]:
        """The tensors in files that a quantized linear is made of (its bias is not one)."""
        return formats.by_name(self.format).names(self.tensors, prefix)

    def qweight(self, prefix: str) -> QWeight:
        return formats.by_name(self.format).read(self.tensors, prefix, self.config)

    @cached_property
    def dense(self) -> Checkpoint:
        """The checkpoint without the tensors of quantized linears."""
        return self.tensors.without(
            {name for prefix in self.linears for name in self.names(prefix)}
        )


def open_checkpoint(source: Source, files: Iterable[str] | None = None) -> Opened:
    """Look at the weights of ``source``. Raises QuantkitError when there are none, when two formats
    lie in one folder, or when the files speak of a quantization that is not in the tensors."""
    tensors = Checkpoint(source.folder, files)
    config = formats.declared(source.read_json)
    found = [name for name in formats.SAFETENSORS if formats.by_name(name).linears(tensors, config)]
    if len(found) > 1:
        raise QuantkitError(
            f"{source.name} holds linears in the formats {' and '.join(found)}",
            "remove the files that do not belong to this model",
        )
    if not found and config:
        method = config.get("quant_method", "an unknown method")
        raise QuantkitError(
            f"{source.name} says that it is quantized with {method}, and none of its tensors are "
            "in a format that quantkit reads",
            f"quantkit reads {', '.join(formats.SAFETENSORS)} and gguf",
        )
    return Opened(source, found[0] if found else "dense", tensors, config)
