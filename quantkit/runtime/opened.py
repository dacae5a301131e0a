"""Any checkpoint as two things: quantized weights, and tensors that are what they are.

    opened = open_checkpoint(source)
    opened.linears["model.layers.0.mlp.up_proj"]     (out, in, scheme), from headers alone
    opened.qweight("model.layers.0.mlp.up_proj")     QWeight
    opened.dense                                     everything else, a Checkpoint

Which format it is, is seen from the tensors; the configuration is only asked for what they cannot
show. The loader, convert, inspect and verify all look at checkpoints through this.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from quantkit import formats
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.errors import QuantkitError
from quantkit.formats import Tensors
from quantkit.runtime.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Packed:
    """A quantized linear before its data is read: out, width, and the scheme as declared."""

    out: int
    width: int
    scheme: Scheme


class Opened(Protocol):
    """A checkpoint that was looked at. ``format`` is the name of a file in formats/, or ``dense``;
    ``config`` what it says of its quantization; ``dense`` all tensors that are no part of a
    quantized linear; ``files`` what decides what the model is."""

    source: Source
    format: str

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def model_config(self) -> dict[str, Any]:
        """config.json, or what it would be."""

    @property
    def linears(self) -> dict[str, Packed]:
        """Every quantized linear, by its prefix in files."""

    @property
    def dense(self) -> Tensors: ...
    @property
    def files(self) -> list[Path]: ...

    def names(self, prefix: str) -> list[str]:
        """The tensors in files that a quantized linear is made of (its bias is not one)."""

    def qweight(self, prefix: str) -> QWeight:
        """A quantized linear."""

    def survey(self, prefix: str) -> QWeight:
        """Like ``qweight``, but maybe with codes of 0: what is needed to plan."""

    def tokenizer(self) -> Any:
        """Raises QuantkitError when there is none."""


@dataclass
class Folder:
    """A folder of safetensors (or .bin) files. ``format`` is the name of a file in formats/, or
    ``dense``; ``config`` what the folder says of its quantization."""

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

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """config.json"""
        return self.source.read_json("config.json") or {}

    @property
    def files(self) -> list[Path]:
        """The files that decide what the model is."""
        return [self.source.folder / name for name in ("config.json", *self.tensors.files)]

    def tokenizer(self) -> Any:
        """Raises QuantkitError when there is none."""
        return load_tokenizer(self.source)

    def survey(self, prefix: str) -> QWeight:
        """Like ``qweight``, with codes of 0: what is needed to plan."""
        reader = formats.by_name(self.format)
        return reader.read(self.tensors, prefix, self.config, codes=False)

    def qweight(self, prefix: str) -> QWeight:
        return formats.by_name(self.format).read(self.tensors, prefix, self.config)

    @cached_property
    def dense(self) -> Checkpoint:
        """The checkpoint without the tensors of quantized linears."""
        return self.tensors.without(
            {name for prefix in self.linears for name in self.names(prefix)}
        )


def open_checkpoint(source: Source, basename: str | None = None) -> Opened:
    """Look at the weights of ``source``, in the file called ``basename`` (without its ending) where
    it is given. Raises QuantkitError when there are none, when two formats lie in one folder, or
    when the files speak of a quantization that is not in the tensors."""
    gguf = _gguf_file(source)
    if gguf is not None:
        from quantkit.runtime.gguf_opened import GgufOpened

        return GgufOpened(gguf, source)
    named = [source.file] if source.file else None
    tensors = Checkpoint(source.folder, named, basename)
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
    return Folder(source, found[0] if found else "dense", tensors, config)


def _gguf_file(source: Source) -> Path | None:
    """The GGUF file that ``source`` is, if it is one."""
    if source.file:
        return source.folder / source.file if source.file.endswith(".gguf") else None
    if (source.folder / "config.json").exists():
        return None
    found = sorted(source.folder.glob("*.gguf"))
    if len(found) > 1:
        raise QuantkitError(
            f"{source.folder} has {len(found)} GGUF files: {', '.join(f.name for f in found)}",
            "name one of them",
        )
    return found[0] if found else None
