"""The narrow waist: every method produces, and every format stores, a ``QWeight``.

Methods and formats never meet. A method turns tensors into a QWeight and knows nothing of files; a
format moves the QWeight's bits into named tensors and knows nothing of mathematics.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from quantkit.core import pinned
from quantkit.errors import UsageError

BITS = (2, 3, 4, 5, 6, 8)
Grid = Literal["int", "nf4", "fp4"]
# What a code means before it is scaled. NF4: Dettmers et al., QLoRA (arXiv:2305.14314), appendix E,
# in the float32 values that bitsandbytes stores; FP4: bitsandbytes' own order of its E2M1 values.
LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": tuple(
        sign * value / 12.0 + 0.0  # bitsandbytes has two zeros, both positive
        for sign in (1, -1)
        for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}


@dataclass(frozen=True)
class Scheme:
    """How a weight is divided into groups and how many levels it has.

    bits        2, 3, 4, 5, 6 or 8
    group_size  neighbouring inputs that share one scale: 16 to 1024, or -1 for the whole row
    symmetric   the zero point is the middle of the codes, and is not kept here
    grid        int: levels are evenly spaced; nf4, fp4: they come from a table (4 bits, no zero)
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    grid: Grid = "int"

    def __post_init__(self) -> None:
        if self.bits not in BITS or not isinstance(self.bits, int):
            raise UsageError(f"{self.bits} bits are not supported", "use 2, 3, 4 or 8")
        if self.group_size != -1 and not 16 <= self.group_size <= 1024:
            raise UsageError(
                f"group size {self.group_size} is not supported",
                "use 16 to 1024 (128 is usual), or -1 for one scale a row",
            )
        if self.grid not in get_args(Grid):
            raise ValueError(f"there is no grid {self.grid!r}")
        if self.grid != "int" and (self.bits != 4 or not self.symmetric):
            raise ValueError(f"{self.grid} has 4 bits and no zero point")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric weight, in code units."""
        return 1 << (self.bits - 1)

    def width(self, in_features: int) -> int:
        """Inputs in one group of a linear with ``in_features`` inputs."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Number of groups in a row; raises UsageError when the group does not divide the row."""
        width = self.width(in_features)
        if in_features % width:
            raise UsageError(
                f"group size {width} does not divide an input width of {in_features}",
                "choose a --group that divides it, or -1",
            )
        return in_features // width

    def __str__(self) -> str:
        group = "one scale a row" if self.group_size == -1 else f"groups of {self.group_size}"
        if self.grid != "int":
            return f"{self.grid}, {group}"
        return f"{self.bits} bits, {group}, {'' if self.symmetric else 'a'}symmetric"


@dataclass(frozen=True)
class QWeight:
    """A quantized weight matrix, one of

        w = scale * (code - zero)         zero None: scheme.midpoint everywhere
        w = scale * code + minimum        the way of ggml and MLX
        w = scale * LEVELS[grid][code]

    codes     uint8 [out, in], 0 <= code <= scheme.max_code, columns in the model's own order
    scale     [out, groups], floating point, in the dtype that a file will hold; may be negative
    zero      uint8 [out, groups] in code units, or None
    group_of  int32 [in], which group each input belongs to, or None: ``input // group_size``
    minimum   [out, groups], floating point, or None; not together with ``zero``
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    group_of: Tensor | None = None
    minimum: Tensor | None = None

    def __post_init__(self) -> None:
        out, width = self.codes.shape
        groups = self.scheme.groups(width)
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes are {self.codes.dtype}, not uint8")
        if self.scale.shape != (out, groups):
            raise ValueError(f"scale is {tuple(self.scale.shape)}, not {(out, groups)}")
        offsets = (self.zero is not None) + (self.minimum is not None)
        if offsets != (0 if self.scheme.symmetric else 1):
            raise ValueError("a symmetric weight has no zero or minimum, an asymmetric one has one")
        for name in ("zero", "minimum"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != (out, groups):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {(out, groups)}")
        if self.group_of is not None and self.group_of.shape != (width,):
            raise ValueError(f"group_of is {tuple(self.group_of.shape)}, not {(width,)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        out, width = self.codes.shape
        return out, width

    def group_index(self) -> Tensor:
        """int64 [in]: the group of every input."""
        if self.group_of is not None:
            return self.group_of.long()
        width = self.codes.shape[1]
        return torch.arange(width, device=self.codes.device) // self.scheme.width(width)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that the codes mean. This is THE definition; all else is tested
        against it. Computed in float32, then cast."""
        index = None if self.group_of is None else self.group_of.long()
        out, groups = self.scale.shape

        def spread(tensor: Tensor) -> Tensor:
            values = tensor.float()
            return values[..., None] if index is None else values[:, index]

        codes = self.codes if index is not None else self.codes.reshape(out, groups, -1)
        if self.scheme.grid != "int":
            table = torch.tensor(LEVELS[self.scheme.grid], device=codes.device)
            weight = table[codes.long()].mul_(spread(self.scale))
        elif self.minimum is not None:
            weight = codes.float().mul_(spread(self.scale)).add_(spread(self.minimum))
        else:
            zero = self.scheme.midpoint if self.zero is None else spread(self.zero)
            weight = codes.float().sub_(zero).mul_(spread(self.scale))
        return weight.to(dtype).reshape(self.codes.shape)

    def _each(self, change: Callable[[Tensor], Tensor], *names: str) -> "QWeight":
        """The same with the named tensors changed, where there are any."""
        found = {name: getattr(self, name) for name in names}
        changed = {name: change(t) for name, t in found.items() if t is not None}
        return replace(self, **changed)  # type: ignore[arg-type]

    def rows(self, start: int, stop: int) -> "QWeight":
        """The outputs start..stop alone (a view)."""
        return self._each(lambda t: t[start:stop], "codes", "scale", "zero", "minimum")

    def reordered(self, rows: Tensor) -> "QWeight":
        """Outputs in another order: row i is the old row ``rows[i]``."""
        return self._each(lambda t: t[rows], "codes", "scale", "zero", "minimum")

    def to(self, device: torch.device | str) -> "QWeight":
        """The same on another device."""
        names = ("codes", "scale", "zero", "group_of", "minimum")
        return self._each(lambda t: pinned.carried(t, torch.device(device)), *names)

    def regrouped(self, size: int) -> "QWeight | None":
        """The same weight in contiguous groups of ``size`` (-1: one a row), exactly; None when it
        cannot be written so. Groups are divided, joined where they are equal, and a ``group_of``
        that keeps such groups together is given up."""
        width = self.codes.shape[1]
        wanted = width if size == -1 else size
        if width % wanted:
            return None
        scheme = replace(self.scheme, group_size=size)
        index = self.group_index().reshape(-1, wanted)
        first = index[:, 0]
        named = ("scale", "zero", "minimum")
        if not torch.equal(index, first[:, None].expand_as(index)):
            for name in named:
                tensor = getattr(self, name)
                if tensor is not None and not _alike(tensor, index):
                    return None
        held = {name: getattr(self, name) for name in named}
        parts = {name: None if t is None else t[:, first] for name, t in held.items()}
        return QWeight(scheme, self.codes, group_of=None, **parts)  # type: ignore[arg-type]

    def identical(self, other: "QWeight") -> bool:
        """Same scheme and bit for bit the same numbers."""
        if self.scheme != other.scheme or self.scale.dtype != other.scale.dtype:
            return False
        pairs = [
            (self.codes, other.codes),
            (self.scale, other.scale),
            (self.zero, other.zero),
            (self.minimum, other.minimum),
            (self.group_index(), other.group_index()),
        ]
        return all(a is b or (a is not None and b is not None and _equal(a, b)) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    """torch.equal; of codes as of larger numbers, which a CPU compares eight times as fast."""
    if all(x.dtype == torch.uint8 and x.is_contiguous() and _in_words(x) for x in (a, b)):
        a, b = a.view(torch.int64), b.view(torch.int64)
    return torch.equal(a, b)


def _in_words(x: Tensor) -> bool:
    # a single row may have any stride
    places = x.shape[-1], x.storage_offset(), *x.stride()[:-1]
    return all(place % 8 == 0 for place in places)


def stacked(parts: Iterable[QWeight], rows: int) -> QWeight:
    """One weight of ``rows`` outputs: those of ``parts``, which are of one kind, below each other.
    Parts are taken one by one, none is kept."""
    whole: dict[str, Tensor | None] = {}
    at = 0
    for part in parts:
        held = {name: getattr(part, name) for name in ("codes", "scale", "zero", "minimum")}
        if not at:
            whole = {
                n: None if t is None else t.new_empty(rows, t.shape[1]) for n, t in held.items()
            }
        for name, tensor in held.items():
            into = whole[name]
            if into is not None:
                into[at : at + len(tensor)] = tensor
        at += part.shape[0]
    return replace(part, **whole)  # type: ignore[arg-type]


def _alike(tensor: Tensor, index: Tensor) -> bool:
    """Whether all columns that a row of ``index`` names are equal in ``tensor`` [out, groups]."""
    return all(
        torch.equal(tensor[:, index[:, k]], tensor[:, index[:, 0]])
        for k in range(1, index.shape[1])
        if not torch.equal(index[:, k], index[:, k - 1])
    )
