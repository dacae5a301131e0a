"""GGUF files: a header that describes everything, then the bytes of tensors. The container only,
read here and written in gguf_writer.py; what the bytes of a block mean is in formats/gguf.py.

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
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.core.gguf_values import (
    KIND_NAMES,
    KINDS,
    MAGIC,
    MAX_DIMENSIONS,
    TYPE_NAMES,
    VERSION,
    GgufTensor,
    Value,
    aligned,
    alignment_of,
    corrupt,
    nbytes,
    quoted,
)
from quantkit.errors import QuantkitError

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
                    raise corrupt(self.path, "is too short for a GGUF file")
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
                raise header.error(f"has the key {quoted(key)} twice")
            self.typed[key] = value
        self.metadata: dict[str, Any] = {key: value.plain() for key, value in self.typed.items()}
        self.alignment = alignment_of(self.path, self.typed)
        found = [header.tensor() for _ in range(tensors)]
        start = aligned(header.at, self.alignment)
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, type, offset in found:
            if name in self.tensors:
                raise header.error(f"has the tensor {quoted(name)} twice")
            self.tensors[name] = self._placed(name, shape, type, start + offset, start)
        self._check_overlaps()

    def _placed(
        self, name: str, shape: tuple[int, ...], type: str, offset: int, start: int
    ) -> GgufTensor:
        try:
            size = nbytes(shape, type)
        except ValueError as error:
            raise corrupt(self.path, f"has a tensor {quoted(name)} of {type}: {error}") from error
        if (offset - start) % self.alignment:
            raise corrupt(self.path, f"has the tensor {quoted(name)} at an unaligned offset")
        if offset + size > self.size:
            raise corrupt(self.path, f"ends before the data of the tensor {quoted(name)}")
        return GgufTensor(name, shape, type, offset, size)

    def _check_overlaps(self) -> None:
        order = sorted(self.tensors.values(), key=lambda t: t.offset)
        for before, after in pairwise(order):
            if before.offset + before.nbytes > after.offset:
                names = f"{quoted(before.name)} and {quoted(after.name)}"
                raise corrupt(self.path, f"has the tensors {names} in one place")

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
        return corrupt(self.path, problem)

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
        self.inside = f"the value of {quoted(key)}"
        return key, self.value(self.kind(), 0)

    def kind(self) -> str:
        number = self.number("I")
        if number not in KIND_NAMES:
            raise self.error(f"has the unknown kind {number} in {self.inside}")
        return KIND_NAMES[number]

    def value(self, kind: str, depth: int) -> Value:
        if kind == "array":
            return self.array(depth + 1)
        if kind == "str":
            return Value(kind, self.decoded(self.take(int(self.number("Q")))))
        return Value(kind, self.numbers(kind, 1)[0])

    def numbers(self, kind: str, count: int) -> list[Any]:
        """``count`` numbers or flags."""
        dtype = np.dtype("<" + KINDS[kind][1])
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
        self.inside = f"the description of the tensor {quoted(name)}"
        dimensions = self.number("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise self.error(f"has a tensor {quoted(name)} of {dimensions} dimensions")
        shape = tuple(reversed([int(self.number("Q")) for _ in range(dimensions)]))
        if 0 in shape:
            raise self.error(f"has a tensor {quoted(name)} without elements")
        number = self.number("I")
        if number not in TYPE_NAMES:
            raise self.error(
                f"has a tensor {quoted(name)} of the type number {number}, which quantkit does "
                "not know"
            )
        return name, shape, TYPE_NAMES[number], int(self.number("Q"))
