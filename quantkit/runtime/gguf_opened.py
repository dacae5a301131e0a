"""A GGUF file as quantized weights and dense tensors, under the names that transformers has.

    opened = GgufOpened(path)
    opened.model_config      what config.json would be
    opened.linears, .qweight, .names, .dense      as in runtime/opened.py
    opened.tokenizer()       a real tokenizer of transformers

Linears of decoder blocks stay quantized. Embeddings and heads that are quantized are made dense
when they are asked for: transformers looks rows up in them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.core.checkpoint import TensorSpec
from quantkit.core.gguf_file import GgufFile
from quantkit.core.gguf_values import GgufTensor
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.errors import QuantkitError
from quantkit.formats import gguf, gguf_model, gguf_rotary, gguf_tokenizer_read
from quantkit.formats.gguf_model import Place
from quantkit.runtime.opened import Packed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SLICE = 1 << 24  # elements that are made dense at a time


class GgufOpened:
    """What ``Folder`` is for a folder: here the file ``path`` of ``source`` is the whole model.
    ``dtype`` is that of quantized tensors that are made dense.

    Raises QuantkitError when the file is corrupt, or of an architecture that is not known.
    """

    format = "gguf"

    def __init__(self, path: Path, source: Source, dtype: torch.dtype = torch.float32) -> None:
        self.file = GgufFile(path)
        self.source = source
        self.dtype = dtype
        self.metadata = self.file.metadata
        parts = self.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise QuantkitError(
                f"{path} is one of {parts} parts of a split model",
                "join them first: llama-gguf-split --merge FIRST_PART OUT",
            )
        shapes = {name: tensor.shape for name, tensor in self.file.tensors.items()}
        config = gguf_model.config_of(self.metadata, shapes)
        if gguf_rotary.ROPE_FACTORS in shapes:
            factors = self.file.tensors[gguf_rotary.ROPE_FACTORS]
            config = gguf_rotary.with_factors(config, _plain(self.file, factors))
        self.model_config = config
        self.places = gguf_model.inverse(config, shapes)

    @property
    def config(self) -> dict[str, Any]:
        """What the file says of its quantization."""
        return {"quant_method": "gguf", "file_type": self.metadata.get("general.file_type")}

    @property
    def files(self) -> list[Path]:
        """The files that decide what the model is."""
        return [self.file.path]

    def tensor(self, name: str) -> GgufTensor:
        """The tensor of the file for a name of transformers."""
        return self.file.tensors[self.places[name].source]

    @cached_property
    def linears(self) -> dict[str, Packed]:
        """Every quantized linear, by its prefix."""
        found = {}
        for name in self.places:
            tensor = self.tensor(name)
            if tensor.type in gguf.DENSE or not gguf_model.is_linear(self.model_config, name):
                continue
            if len(tensor.shape) != 2:
                raise QuantkitError(
                    f"{tensor.name} has the shape {tensor.shape}, which is no weight"
                )
            found[name.removesuffix(".weight")] = Packed(*tensor.shape, _scheme(tensor))
        return found

    def names(self, prefix: str) -> list[str]:
        """The tensors that a quantized linear is made of (its bias is not one)."""
        return [f"{prefix}.weight"]

    def release(self) -> None:
        """Nothing: every tensor has a map of its own."""

    def qweight(self, prefix: str) -> QWeight:
        place = self.places[f"{prefix}.weight"]
        tensor = self.file.tensors[place.source]
        raw = self.file.raw(tensor.name)
        return place.packed(gguf.unpack(raw, tensor.type, tensor.shape, tensor.name))

    def survey(self, prefix: str) -> QWeight:
        """What is needed to plan: all of it, since blocks hold scales and codes together."""
        return self.qweight(prefix)

    @cached_property
    def dense(self) -> "GgufDense":
        """All other tensors."""
        linears = {f"{prefix}.weight" for prefix in self.linears}
        places = {name: place for name, place in self.places.items() if name not in linears}
        return GgufDense(self.file, places, self.dtype)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer in the file. Raises QuantkitError when it is of another kind."""
        return load_tokenizer(self.metadata, self.model_config["max_position_embeddings"])


@dataclass(frozen=True)
class GgufDense:
    """Tensors by the names of transformers, as core.checkpoint.Checkpoint has them."""

    file: GgufFile
    places: dict[str, Place]
    dtype: torch.dtype

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def spec(self, name: str) -> TensorSpec:
        tensor = self.file.tensors[self.places[name].source]
        return TensorSpec(gguf.DENSE.get(tensor.type, self.dtype), tensor.shape)

    def get(self, name: str) -> Tensor:
        place = self.places[name]
        tensor = self.file.tensors[place.source]
        if tensor.type in gguf.DENSE:
            return place.dense(_plain(self.file, tensor))
        return place.dense(self._dequantized(tensor))

    def _dequantized(self, tensor: GgufTensor) -> Tensor:
        raw = self.file.raw(tensor.name)
        width = tensor.shape[-1]
        found = torch.empty(tensor.rows, width, dtype=self.dtype)
        step = max(1, _SLICE // width)
        for start in range(0, tensor.rows, step):
            part = raw[start : start + step]
            q = gguf.unpack(part, tensor.type, (len(part), width), tensor.name)
            found[start : start + step] = q.dequantize(self.dtype)
        return found.reshape(tensor.shape)


def _plain(file: GgufFile, tensor: GgufTensor) -> Tensor:
    return gguf.dense(file.raw(tensor.name), tensor.type, tensor.shape, tensor.name)


def _scheme(tensor: GgufTensor) -> Scheme:
    """The scheme of a type is the same for all its blocks, one of zeros too."""
    block = gguf.TYPES[tensor.type]
    zeros = torch.zeros(1, block.nbytes, dtype=torch.uint8)
    return gguf.unpack(zeros, tensor.type, (1, block.elements), tensor.name).scheme


def load_tokenizer(metadata: dict[str, Any], length: int) -> "PreTrainedTokenizerFast":
    """The tokenizer in the plain metadata of a file, for texts of up to ``length`` tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast  # seconds, which only those pay who need it

    found = gguf_tokenizer_read.read(metadata)
    backend = Tokenizer.from_str(json.dumps(found.json))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        chat_template=found.template,
        **{f"{role}_token": text for role, text in found.special.items()},
    )
