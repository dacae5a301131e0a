"""Writing GGUF files (gguf_file.py says what they look like)."""

import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantkit.core.gguf_values import (
    KINDS,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_NAME,
    TYPES,
    VERSION,
    GgufTensor,
    Value,
    aligned,
    alignment_of,
    nbytes,
    quoted,
)
from quantkit.core.placed_file import PlacedFile
from quantkit.errors import QuantkitError


class GgufWriter:
    """Writes a planned set of tensors into one GGUF file, in any order, each to its final offset.

    ``tensors`` fixes names, types and shapes (torch's order), and the order in the file. Opening it
    over the file of an interrupted run with the same plan keeps what it holds; ``complete`` says
    whether it was all there, as far as its size tells.

    Raises QuantkitError for names, types and shapes that readers would refuse.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Value],
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> None:
        self.path = Path(path)
        alignment = alignment_of(self.path, metadata)
        for name, (type, shape) in tensors.items():
            _check_plan(name, type, shape)
        header, self.nbytes = _plan(metadata, tensors, alignment)
        self.tensors: dict[str, GgufTensor] = {}
        at = len(header)
        for name, (type, shape) in tensors.items():
            self.tensors[name] = GgufTensor(name, tuple(shape), type, at, nbytes(shape, type))
            at = aligned(at + self.tensors[name].nbytes, alignment)
        self._file = PlacedFile(self.path, header, self.nbytes)
        self.complete = self._file.kept

    def write(self, name: str, raw: Tensor) -> None:
        """Put the bytes of a tensor, uint8 [rows, bytes of a row], where the plan wants them."""
        tensor = self.tensors[name]
        planned = (tensor.rows, tensor.row_bytes)
        if raw.dtype != torch.uint8 or raw.shape != planned:
            raise ValueError(f"{name} is {raw.dtype} {tuple(raw.shape)}, planned was {planned}")
        self._file.write(tensor.offset, raw)

    def read(self, name: str) -> Tensor:
        """What the file now holds under ``name``: to check it, or to continue from it."""
        tensor = self.tensors[name]
        raw = self._file.read(tensor.offset, tensor.nbytes)
        return raw.reshape(tensor.rows, tensor.row_bytes)

    def sync(self) -> None:
        """Make everything written so far survive a crash of the machine."""
        self._file.sync()

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        self.abandon()

    def abandon(self) -> None:
        """Close the file and leave it as it is."""
        self._file.close()


def size(metadata: Mapping[str, Value], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of a file with these. Raises QuantkitError for metadata that are none."""
    return _plan(metadata, tensors, alignment_of(Path(), metadata))[1]


def _check_plan(name: str, type: str, shape: tuple[int, ...]) -> None:
    length = len(name.encode())
    if not 0 < length <= MAX_NAME:
        raise QuantkitError(
            f"the tensor name {quoted(name)} has {length} bytes, and GGUF readers take 1 to "
            f"{MAX_NAME}"
        )
    if type not in TYPES:
        raise QuantkitError(f"{name} cannot be written as {type}, which is no type of GGUF")
    if not 0 < len(shape) <= MAX_DIMENSIONS or 0 in shape:
        raise QuantkitError(f"{name} has the shape {tuple(shape)}, which GGUF cannot hold")
    try:
        nbytes(shape, type)
    except ValueError as error:
        raise QuantkitError(f"{name} cannot be written as {type}: {error}") from error


def _plan(
    metadata: Mapping[str, Value],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    alignment: int,
) -> tuple[bytes, int]:
    """The bytes before the data, and the size of the whole file."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        try:
            parts += [_text(key), struct.pack("<I", KINDS[value.kind][0]), _encoded(value)]
        except (struct.error, OverflowError) as error:
            raise ValueError(f"{key} is no {value.of or value.kind}: {error}") from error
    offset = 0
    for name, (type, shape) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_text(name), sizes, struct.pack("<IQ", TYPES[type].id, offset)]
        offset = aligned(offset + nbytes(shape, type), alignment)
    header = b"".join(parts)
    header += bytes(-len(header) % alignment)
    return header, len(header) + offset


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encoded(value: Value) -> bytes:
    """A value without its kind."""
    if value.kind == "str":
        return _text(value.value)
    if value.kind != "array" or value.of is None:
        return struct.pack("<" + KINDS[value.kind][1], value.value)
    number, letter = KINDS[value.of]
    head = struct.pack("<IQ", number, len(value.value))
    if letter:
        return head + struct.pack(f"<{len(value.value)}{letter}", *value.value)
    if value.of == "str":
        return head + b"".join(map(_text, value.value))
    return head + b"".join(map(_encoded, value.value))
