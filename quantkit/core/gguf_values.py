"""What GGUF files are made of: types of tensors, and values of the metadata with their kinds."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from quantkit.errors import QuantkitError

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_DIMENSIONS = 4
MAX_NAME = 63  # bytes of a tensor's name that llama.cpp reads (GGML_MAX_NAME counts a zero byte)


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
TYPE_NAMES = {block.id: name for name, block in TYPES.items()}

# kind of a value: its number in files, and the letter that struct and numpy have for it
KINDS = {
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
KIND_NAMES = {number: kind for kind, (number, _) in KINDS.items()}


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


def corrupt(path: Path, problem: str) -> QuantkitError:
    """The error for a file that has this ``problem``."""
    return QuantkitError(f"{path} {problem}", "download or copy it again")


def quoted(name: str) -> str:
    """A name out of a file, fit for a terminal."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def aligned(at: int, alignment: int) -> int:
    """The next multiple."""
    return at + -at % alignment


def alignment_of(path: Path, typed: Mapping[str, Value]) -> int:
    """What ``typed`` metadata say. Raises QuantkitError when it is no power of two."""
    found = typed.get(ALIGNMENT_KEY, u32(ALIGNMENT))
    if found.kind != "u32" or found.value.bit_count() != 1:
        raise corrupt(path, f"has a {ALIGNMENT_KEY} that is not a power of two")
    return int(found.value)
