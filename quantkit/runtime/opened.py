"""Any checkpoint as two things: quantized weights, and tensors that are what they are.

    opened = open_checkpoint(source)
    opened.linears["model.layers.0.mlp.up_proj"]     (out, in, scheme), from headers alone
    opened.qweight("model.layers.0.mlp.up_proj")     QWeight
    opened.dense                                     everything else, a Checkpoint

Which format it is, is seen from the tensors; the configuration is only asked for what they cannot
show. Embeddings and heads that are quantized (MLX, gptq --lm-head) are dense here: transformers
looks rows up in the ones, and most formats have no place for either. The loader, convert, inspect
and verify all look at checkpoints through this.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit import formats
from quantkit.core import provenance
from quantkit.core.checkpoint import Checkpoint, TensorSpec
from quantkit.core.gguf_file import looks_like_one
from quantkit.core.names import in_block
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, QuantkitWarning
from quantkit.formats import Tensors, awq, gptq
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
    quantized linear; ``files`` what decides what the model is, also what is still on the Hub."""

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

    def release(self) -> None:
        """Let go of what was read and is not in use any more."""


@dataclass
class Folder:
    """A folder of safetensors (or .bin) files. ``format`` is the name of a file in formats/, or
    ``dense``; ``config`` what the folder says of its quantization."""

    source: Source
    format: str
    tensors: Checkpoint
    config: dict[str, Any] = field(default_factory=dict)
    _warned: bool = field(default=False, init=False, repr=False, compare=False)

    @cached_property
    def _packed(self) -> dict[str, Packed]:
        """Everything that is quantized."""
        if self.format == "dense":
            return {}
        reader = formats.by_name(self.format)
        return {
            prefix: Packed(*reader.describe(self.tensors, prefix, self.config))
            for prefix in reader.linears(self.tensors, self.config)
        }

    @cached_property
    def linears(self) -> dict[str, Packed]:
        """Every quantized linear of a decoder block, by its prefix in files."""
        return {prefix: packed for prefix, packed in self._packed.items() if in_block(prefix)}

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
        names = ("config.json", gptq.CONFIG_FILE, "quant_config.json", *self.tensors.files)
        paths = [self.source.folder / name for name in names]
        return [path for path in paths if path.exists() or path.name in self.source.remote]

    def release(self) -> None:
        self.tensors.release()

    def tokenizer(self) -> Any:
        """Raises QuantkitError when there is none."""
        return load_tokenizer(self.source)

    def survey(self, prefix: str) -> QWeight:
        """Like ``qweight``, with codes of 0: what is needed to plan."""
        reader = formats.by_name(self.format)
        return reader.read(self.tensors, prefix, self.config, codes=False)

    def qweight(self, prefix: str) -> QWeight:
        """A quantized linear. Warns, once, when GPTQ's zero points are not stored as declared."""
        if self.format != "gptq":
            return formats.by_name(self.format).read(self.tensors, prefix, self.config)
        q, convention = gptq.read_with_convention(self.tensors, prefix, self.config)
        self._compare(convention)
        return q

    def _compare(self, convention: gptq.Convention) -> None:
        said = gptq.declared_convention(self.config)
        if convention == said or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{self.source.name} says that its zero points are stored in GPTQ's way {said}, and "
            f"they are those of {convention}; the tensors are believed (see "
            "'quantkit inspect --repair')",
            QuantkitWarning,
            stacklevel=3,
        )

    @cached_property
    def outside(self) -> list[str]:
        """What is quantized outside of the decoder blocks, and dense here: embeddings and heads."""
        return sorted(self._packed.keys() - self.linears.keys())

    @cached_property
    def dense(self) -> Tensors:
        """The checkpoint without the tensors of quantized linears."""
        plain = self.tensors.without(
            {name for prefix in self._packed for name in self.names(prefix)}
        )
        return _Unpacked(plain, self, {f"{prefix}.weight": prefix for prefix in self.outside})


@dataclass(frozen=True)
class _Unpacked:
    """Plain tensors, and quantized ones that are made so when they are asked for."""

    plain: Checkpoint
    folder: Folder
    quantized: dict[str, str]

    def __contains__(self, name: str) -> bool:
        return name in self.plain or name in self.quantized

    def __iter__(self) -> Iterator[str]:
        yield from self.plain
        yield from self.quantized

    def spec(self, name: str) -> TensorSpec:
        if name not in self.quantized:
            return self.plain.spec(name)
        packed = self.folder._packed[self.quantized[name]]
        return TensorSpec(torch.float32, (packed.out, packed.width))

    def get(self, name: str) -> Tensor:
        if name not in self.quantized:
            return self.plain.get(name)
        return self.folder.qweight(self.quantized[name]).dequantize()


def open_checkpoint(source: Source, basename: str | None = None) -> Opened:
    """Look at the weights of ``source``, in the file called ``basename`` (without its ending) where
    it is given. Raises QuantkitError when there are none, when two formats lie in one folder, or
    when the files speak of a quantization that is not in the tensors."""
    gguf = gguf_file(source, basename)
    if gguf is not None:
        from quantkit.runtime.gguf_opened import GgufOpened

        return GgufOpened(gguf, source)
    named = [source.file] if source.file else None
    return recognised(source, Checkpoint(source.folder, named, basename, source.remote))


def recognised(source: Source, tensors: Checkpoint) -> "Folder":
    """What the tensors are. Raises QuantkitError as :func:`open_checkpoint` does."""
    config = formats.declared(source.read_json)
    linears = {n: formats.by_name(n).linears(tensors, config) for n in formats.SAFETENSORS}
    found = [name for name in linears if linears[name]]
    if len(found) > 1:
        examples = " and ".join(f"{name} ({linears[name][0]})" for name in found)
        raise QuantkitError(
            f"{source.name} holds linears in the formats {examples}",
            "remove the files that do not belong to this model, or download it again",
        )
    if not found and config:
        method = config.get("quant_method", "an unknown method")
        raise QuantkitError(
            f"{source.name} says that it is quantized with {method}, and none of its tensors are "
            "in a format that quantkit reads",
            f"quantkit reads {', '.join(formats.SAFETENSORS)} and gguf",
        )
    return Folder(source, found[0] if found else "dense", tensors, config)


def refuse_scaled_activations(opened: Opened) -> list[str]:
    """AWQ may divide the output of an activation function by a tensor of the checkpoint
    (activation.py), for which other formats have no place. The names of such tensors that are ones
    and do nothing; raises QuantkitError for others."""
    found = awq.activation_scale_names(opened.dense)
    for name in found:
        if not bool((opened.dense.get(name) == 1).all()):
            raise QuantkitError(
                f"{name} scales an activation, and no other format has a place for that",
                "quantize the original model instead",
            )
    return found


_PARTS = "source settings size versions conversion measured verified calibration layers card budget"


def recorded(opened: Opened, *, checked: bool = True) -> dict[str, Any]:
    """quantkit.json of the source. A GGUF file may lie in the folder of another model. Raises
    QuantkitError, if it is to be ``checked``, for one that quantkit cannot have written."""
    record = opened.source.read_json(provenance.FILE) or {}
    if opened.format == "gguf" and not _of_a_gguf(record):
        return {}
    if checked:
        wrong = [p for p in _PARTS.split() if not isinstance(record.get(p) or {}, dict)]
        if not wrong and not isinstance((record.get("source") or {}).get("name", ""), str):
            wrong = ["source.name"]
        if wrong:
            raise QuantkitError(
                f"{opened.source.name} has a {provenance.FILE} that quantkit did not write "
                f"({wrong[0]} is {'no text' if '.' in wrong[0] else 'no object'})",
                f"remove {provenance.FILE} there",
            )
    return record


def _of_a_gguf(record: dict[str, Any]) -> bool:
    for part, key in (("conversion", "to"), ("settings", "format")):
        said = record.get(part)
        target = said.get(key) if isinstance(said, dict) else None
        if isinstance(target, str) and target.startswith("gguf"):
            return True
    return False


def gguf_file(source: Source, basename: str | None) -> Path | None:
    """The GGUF file that ``source`` is, if it is one."""
    if source.file:
        path = source.folder / source.file
        return path if path.suffix == ".gguf" or looks_like_one(path) else None
    if (source.folder / "config.json").exists():
        return None
    found = sorted(source.folder.glob("*.gguf"))
    if basename is not None:
        found = [path for path in found if path.stem == basename]
    if len(found) > 1:
        raise QuantkitError(
            f"{source.folder} has {len(found)} GGUF files: {', '.join(f.name for f in found)}",
            "name one of them",
        )
    return found[0] if found else None
