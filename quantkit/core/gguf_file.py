"""GGUF files: a header that describes everything, then the bytes of tensors. The container only;
what the bytes of a block mean is in formats/gguf.py.

    "GGUF"  u32 version = 3  u64 tensors  u64 keys          all numbers are little-endian
    keys     string key | u32 kind | value                  string: u64 bytes, then UTF-8
                                                            array:  u32 kind, u64 count, the values
    tensors  string name | u32 dimensions | u64 size ... | u32 type | u64 offset
    zeros    up to a multiple of general.alignment (32)     offsets count from here
    data     every tensor, and zeros up to the next multiple of the alignment

The first size is the innermost one: torch's shape backwards. A row is made of whole blocks, and a
block of a type always has the same bytes, so every length is known before the data is touched.

A header is data from strangers: each count, length and offset is compared with the bytes that are
left before anything is made of it (llama.cpp's reader, ggml/src/gguf.cpp, is the model for what is
refused). What cannot be is a QuantkitError.
"""

import mmap
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quantkit.core.placed_file import PlacedFile
from quantkit.errors import QuantkitError

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_DIMENSIONS = 4
MAX_NAME = 63  # bytes of a tensor's name that llama.cpp reads (GGML_MAX_NAME counts a zero byte)
# Far above any real model (a vocabulary of 262144 tokens with its merges is 1.3 million elements),
# and low enough that a hostile header is done with in a second.
_MAX_HEADER = 1 << 27
_MAX_ELEMENTS = 1 << 22
_MAX_ENTRIES = 1 << 16
_MAX_STRINGS = {"key": 65535, "name": 4096}
_MAX_DEPTH = 4
_NESTED = 64  # elements that an array inside of an array counts for
# GGML, GGMF and GGJT: one after the other until August 2023
OLD = (b"lmgg", b"fmgg", b"tjgg")
_OTHERS = {
    b"vers": "is a Git LFS pointer and not the model itself",
}


class BlockType(NamedTuple):
    """A type of tensor: its number in files, and the elements and bytes of a block."""

    id: int
    elements: int
    nbytes: int


# enum ggml_type and the sizes of its blocks: llama.cpp, gguf-py/gguf/constants.py (but Q8_1, which
# no file should have, as in ggml/src/ggml-common.h)
TYPES = {
    "F32": BlockType(0, 1, 4),
    "F16": BlockType(1, 1, 2),
    "Q4_0": BlockType(2, 32, 18),
    "Q4_1": BlockType(3, 32, 20),
    "Q5_0": BlockType(6, 32, 22),
    "Q5_1": BlockType(7, 32, 24),
    "Q8_0": BlockType(8, 32, 34),
    "Q8_1": BlockType(9, 32, 36),
    "Q2_K": BlockType(10, 256, 84),
    "Q3_K": BlockType(11, 256, 110),
    "Q4_K": BlockType(12, 256, 144),
    "Q5_K": BlockType(13, 256, 176),
    "Q6_K": BlockType(14, 256, 210),
    "Q8_K": BlockType(15, 256, 292),
    "IQ2_XXS": BlockType(16, 256, 66),
    "IQ2_XS": BlockType(17, 256, 74),
    "IQ3_XXS": BlockType(18, 256, 98),
    "IQ1_S": BlockType(19, 256, 50),
    "IQ4_NL": BlockType(20, 32, 18),
    "IQ3_S": BlockType(21, 256, 110),
    "IQ2_S": BlockType(22, 256, 82),
    "IQ4_XS": BlockType(23, 256, 136),
    "I8": BlockType(24, 1, 1),
    "I16": BlockType(25, 1, 2),
    "I32": BlockType(26, 1, 4),
    "I64": BlockType(27, 1, 8),
    "F64": BlockType(28, 1, 8),
    "IQ1_M": BlockType(29, 256, 56),
    "BF16": BlockType(30, 1, 2),
    "TQ1_0": BlockType(34, 256, 54),
    "TQ2_0": BlockType(35, 256, 66),
    "MXFP4": BlockType(39, 32, 17),
    "NVFP4": BlockType(40, 64, 36),
    "Q1_0": BlockType(41, 128, 18),
}
_TYPE_NAMES = {block.id: name for name, block in TYPES.items()}

# kind of a value: its number in files, and the letter that struct and numpy have for it
_KINDS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "str": (8, ""),
    "array": (9, ""),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
_KIND_NAMES = {number: kind for kind, (number, _) in _KINDS.items()}


@dataclass(frozen=True)
class Value:
    """A value of the metadata with its kind on disk. The items of an array are plain values of the
    kind ``of``; where they are arrays themselves, they are Values."""

    kind: str
    value: Any
    of: str | None = None

    def plain(self) -> Any:
        """The value without its kinds; arrays as lists."""
        if self.of == "array":
            return [item.plain() for item in self.value]
        return self.value


def u32(value: int) -> Value:
    return Value("u32", value)


def i32(value: int) -> Value:
    return Value("i32", value)


def f32(value: float) -> Value:
    return Value("f32", value)


def boolean(value: bool) -> Value:
    return Value("bool", value)


def string(value: str) -> Value:
    return Value("str", value)


def array(of: str, items: list[Any]) -> Value:
    """An array of items of the kind ``of``."""
    return Value("array", items, of)


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. ``shape`` is in torch's order, ``offset`` counts from the start of the
    file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows


def nbytes(shape: tuple[int, ...], type: str) -> int:
    """Bytes of a tensor. Raises ValueError where its rows are no whole blocks."""
    _, elements, size = TYPES[type]
    if shape[-1] % elements:
        raise ValueError(f"rows of {shape[-1]} are not whole blocks of {elements}")
    return prod(shape) // elements * size


def looks_like_one(path: Path) -> bool:
    """Whether ``path`` begins as a GGUF file does, or as one of its predecessors; the name of
    older files often ends in .bin."""
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) in (MAGIC, *OLD)
    except OSError:
        return False


class GgufFile:
    """A GGUF file, version 2 or 3. Its header is read and checked at once, its data never before
    :meth:`raw` is asked for it. ``metadata`` has the plain values of its keys, ``typed`` the same
    with their kinds; ``tensors`` what there is, by name.

    Raises QuantkitError, naming the file, when it is no such file, truncated or corrupt.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise QuantkitError(f"{path} is not a regular file", "name a .gguf file")
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24:
                    raise _corrupt(self.path, "is too short for a GGUF file")
                with mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ) as data:
                    self._parse(_Header(self.path, data, self.size))
        except OSError as error:
            raise QuantkitError(f"{path} cannot be read ({error.strerror})") from error

    def _parse(self, header: "_Header") -> None:
        self.version = header.version()
        tensors, keys = header.count("tensors", 32), header.count("keys", 13)
        self.typed: dict[str, Value] = {}
        for _ in range(keys):
            key, value = header.pair()
            if key in self.typed:
                raise header.error(f"has the key {_quoted(key)} twice")
            self.typed[key] = value
        self.metadata: dict[str, Any] = {key: value.plain() for key, value in self.typed.items()}
        self.alignment = _alignment(self.path, self.typed)
        found = [header.tensor() for _ in range(tensors)]
        start = _aligned(header.at, self.alignment)
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, type, offset in found:
            if name in self.tensors:
                raise header.error(f"has the tensor {_quoted(name)} twice")
            self.tensors[name] = self._placed(name, shape, type, start + offset, start)
        self._check_overlaps()

    def _placed(
        self, name: str, shape: tuple[int, ...], type: str, offset: int, start: int
    ) -> GgufTensor:
        try:
            size = nbytes(shape, type)
        except ValueError as error:
            raise _corrupt(self.path, f"has a tensor {_quoted(name)} of {type}: {error}") from error
        if (offset - start) % self.alignment:
            raise _corrupt(self.path, f"has the tensor {_quoted(name)} at an unaligned offset")
        if offset + size > self.size:
            raise _corrupt(self.path, f"ends before the data of the tensor {_quoted(name)}")
        return GgufTensor(name, shape, type, offset, size)

    def _check_overlaps(self) -> None:
        order = sorted(self.tensors.values(), key=lambda t: t.offset)
        for before, after in pairwise(order):
            if before.offset + before.nbytes > after.offset:
                names = f"{_quoted(before.name)} and {_quoted(after.name)}"
                raise _corrupt(self.path, f"has the tensors {names} in one place")

    def raw(self, name: str) -> Tensor:
        """uint8 [rows, bytes of a row]: the tensor as it lies in the file, mapped and not copied.
        Writing into it does not change the file."""
        tensor = self.tensors[name]
        shape = (tensor.rows, tensor.row_bytes)
        # copy-on-write, since torch has no tensors that are read-only; one map for each tensor,
        # since a system may refuse such a map that is larger than its memory
        try:
            mapped = np.memmap(self.path, np.uint8, "c", tensor.offset, shape)
        except (OSError, ValueError) as error:
            raise QuantkitError(f"{self.path} cannot be read at {name}: {error}") from error
        return torch.from_numpy(mapped)


class _Header:
    """A place in a header that moves forward, and never past ``end``."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.at, self.end = 0, min(size, _MAX_HEADER)
        self.elements = _MAX_ELEMENTS
        self.inside = "its header"

    def error(self, problem: str) -> QuantkitError:
        return _corrupt(self.path, problem)

    def ended(self) -> QuantkitError:
        if self.end < self.size:
            return self.error(f"has a header that is too large, inside {self.inside}")
        return self.error(f"ends inside {self.inside}")

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise self.ended()
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def version(self) -> int:
        magic = self.take(4)
        if magic in OLD:
            raise QuantkitError(
                f"{self.path} is an old GGML file, from before GGUF",
                "download the model as GGUF, or convert it with llama.cpp's "
                "convert_llama_ggml_to_gguf.py",
            )
        if magic != MAGIC:
            raise self.error(_OTHERS.get(magic, "is not a GGUF file"))
        version = int(self.number("I"))
        if version and not version & 0xFFFF:
            raise self.error("is a big-endian GGUF file, which quantkit does not read")
        if version not in (2, VERSION):
            raise self.error(f"is GGUF version {version}; quantkit reads 2 and 3")
        return version

    def count(self, what: str, smallest: int) -> int:
        """How many entries follow, of at least ``smallest`` bytes each."""
        count = int(self.number("Q"))
        if count > _MAX_ENTRIES or count * smallest > self.end:
            raise self.error(f"claims to have {count} {what}")
        return count

    def text(self, what: str) -> str:
        """A key or the name of a tensor."""
        length = int(self.number("Q"))
        if not 0 < length <= _MAX_STRINGS[what]:
            raise self.error(f"has a {what} of {length} bytes")
        return self.decoded(self.take(length))

    def decoded(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"has text that is not UTF-8 in {self.inside}") from error

    def pair(self) -> tuple[str, Value]:
        self.inside = "its metadata"
        key = self.text("key")
        self.inside = f"the value of {_quoted(key)}"
        return key, self.value(self.kind(), 0)

    def kind(self) -> str:
        number = self.number("I")
        if number not in _KIND_NAMES:
            raise self.error(f"has the unknown kind {number} in {self.inside}")
        return _KIND_NAMES[number]

    def value(self, kind: str, depth: int) -> Value:
        if kind == "array":
            return self.array(depth + 1)
        if kind == "str":
            return Value(kind, self.decoded(self.take(int(self.number("Q")))))
        return Value(kind, self.numbers(kind, 1)[0])

    def numbers(self, kind: str, count: int) -> list[Any]:
        """``count`` numbers or flags."""
        dtype = np.dtype("<" + _KINDS[kind][1])
        raw = self.take(count * dtype.itemsize)
        if kind == "bool" and raw.strip(b"\0\1"):
            raise self.error(f"has a flag that is neither 0 nor 1 in {self.inside}")
        return list(np.frombuffer(raw, dtype).tolist())

    def array(self, depth: int) -> Value:
        of, count = self.kind(), int(self.number("Q"))
        if depth > _MAX_DEPTH:
            raise self.error(f"has too many arrays inside of each other in {self.inside}")
        self.elements -= count * (_NESTED if of == "array" else 1)
        if self.elements < 0:
            raise self.error(f"has too many elements in {self.inside}")
        if of == "str":
            return Value("array", self.texts(count), of)
        if of == "array":
            return Value("array", [self.array(depth + 1) for _ in range(count)], of)
        return Value("array", self.numbers(of, count), of)

    def texts(self, count: int) -> list[str]:
        """``count`` strings: the vocabularies. The one loop that has to be quick."""
        data, end, at = self.data, self.end, self.at
        length_at = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            start = at + 8
            if start > end:
                raise self.ended()
            at = start + length_at(data, at)[0]
            if at > end:
                raise self.ended()
            found.append(self.decoded(data[start:at]))
        self.at = at
        return found

    def tensor(self) -> tuple[str, tuple[int, ...], str, int]:
        """Name, shape, type and offset of the next tensor."""
        self.inside = "its list of tensors"
        name = self.text("name")
        self.inside = f"the description of the tensor {_quoted(name)}"
        dimensions = self.number("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise self.error(f"has a tensor {_quoted(name)} of {dimensions} dimensions")
        shape = tuple(reversed([int(self.number("Q")) for _ in range(dimensions)]))
        if 0 in shape:
            raise self.error(f"has a tensor {_quoted(name)} without elements")
        number = self.number("I")
        if number not in _TYPE_NAMES:
            raise self.error(
                f"has a tensor {_quoted(name)} of the type number {number}, which quantkit does "
                "not know"
            )
        return name, shape, _TYPE_NAMES[number], int(self.number("Q"))


def _corrupt(path: Path, problem: str) -> QuantkitError:
    return QuantkitError(f"{path} {problem}", "download or copy it again")


def _quoted(name: str) -> str:
    """A name out of a file, fit for a terminal."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _aligned(at: int, alignment: int) -> int:
    return at + -at % alignment


def _alignment(path: Path, typed: Mapping[str, Value]) -> int:
    found = typed.get(ALIGNMENT_KEY, u32(ALIGNMENT))
    if found.kind != "u32" or found.value.bit_count() != 1:
        raise _corrupt(path, f"has a {ALIGNMENT_KEY} that is not a power of two")
    return int(found.value)


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
        alignment = _alignment(self.path, metadata)
        for name, (type, shape) in tensors.items():
            _check_plan(name, type, shape)
        header, self.nbytes = _plan(metadata, tensors, alignment)
        self.tensors: dict[str, GgufTensor] = {}
        at = len(header)
        for name, (type, shape) in tensors.items():
            self.tensors[name] = GgufTensor(name, tuple(shape), type, at, nbytes(shape, type))
            at = _aligned(at + self.tensors[name].nbytes, alignment)
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


def _check_plan(name: str, type: str, shape: tuple[int, ...]) -> None:
    length = len(name.encode())
    if not 0 < length <= MAX_NAME:
        raise QuantkitError(
            f"the tensor name {_quoted(name)} has {length} bytes, and GGUF readers take 1 to "
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
            parts += [_text(key), struct.pack("<I", _KINDS[value.kind][0]), _encoded(value)]
        except (struct.error, OverflowError) as error:
            raise ValueError(f"{key} is no {value.of or value.kind}: {error}") from error
    offset = 0
    for name, (type, shape) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_text(name), sizes, struct.pack("<IQ", TYPES[type].id, offset)]
        offset = _aligned(offset + nbytes(shape, type), alignment)
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
        return struct.pack("<" + _KINDS[value.kind][1], value.value)
    number, letter = _KINDS[value.of]
    head = struct.pack("<IQ", number, len(value.value))
    if letter:
        return head + struct.pack(f"<{len(value.value)}{letter}", *value.value)
    if value.of == "str":
        return head + b"".join(map(_text, value.value))
    return head + b"".join(map(_encoded, value.value))
