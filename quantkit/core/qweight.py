"""The narrow waist: every method produces, and every format stores, a ``QWeight``.

Methods and formats never meet. A method turns tensors into a QWeight and knows nothing of files; a
format moves the QWeight's bits into named tensors and knows nothing of mathematics.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.errors import UsageError

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Scheme:
    """How a weight is divided into groups and how many levels it has.

    bits        2, 3, 4 or 8
    group_size  neighbouring inputs that share one scale: 16 to 1024, or -1 for the whole row
    symmetric   the zero point is the middle of the codes and is not stored
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"{self.bits} bits are not supported", "use 2, 3, 4 or 8")
        if self.group_size != -1 and not 16 <= self.group_size <= 1024:
            raise UsageError(
                f"group size {self.group_size} is not supported",
                "use 16 to 1024 (128 is usual), or -1 for one scale a row",
            )

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


@dataclass(frozen=True)
class QWeight:
    """A quantized weight matrix: ``w = scale * (code - zero)``.

    codes     uint8 [out, in], 0 <= code <= scheme.max_code, columns in the model's own order
    scale     [out, groups], in the dtype that a file will hold; may be negative
    zero      uint8 [out, groups] in code units, or None: scheme.midpoint everywhere
    group_of  int32 [in], which group each input belongs to, or None: ``input // group_size``
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    group_of: Tensor | None = None

    def __post_init__(self) -> None:
        out, width = self.codes.shape
        groups = self.scheme.groups(width)
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes are {self.codes.dtype}, not uint8")
        if self.scale.shape != (out, groups):
            raise ValueError(f"scale is {tuple(self.scale.shape)}, not {(out, groups)}")
        if (self.zero is None) != self.scheme.symmetric:
            raise ValueError("a symmetric weight has no zero, an asymmetric one has")
        if self.zero is not None and self.zero.shape != (out, groups):
            raise ValueError(f"zero is {tuple(self.zero.shape)}, not {(out, groups)}")
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
        if self.group_of is not None:
            index = self.group_of.long()
            levels, scale = self.codes.float(), self.scale.float()[:, index]
            zero = self.scheme.midpoint if self.zero is None else self.zero.float()[:, index]
        else:
            out, groups = self.scale.shape
            levels, scale = (
                self.codes.reshape(out, groups, -1).float(),
                self.scale.float()[..., None],
            )
            zero = self.scheme.midpoint if self.zero is None else self.zero.float()[..., None]
        return levels.sub_(zero).mul_(scale).to(dtype).reshape(self.codes.shape)

    def rows(self, start: int, stop: int) -> "QWeight":
        """The outputs start..stop alone (a view)."""
        zero = None if self.zero is None else self.zero[start:stop]
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero=zero)

    def to(self, device: torch.device | str) -> "QWeight":
        """The same on another device."""
        moved = {
            name: None if tensor is None else tensor.to(device)
            for name, tensor in (
                ("codes", self.codes),
                ("scale", self.scale),
                ("zero", self.zero),
                ("group_of", self.group_of),
            )
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    def identical(self, other: "QWeight") -> bool:
        """Same scheme and bit for bit the same numbers."""
        return (
            self.scheme == other.scheme
            and torch.equal(self.codes, other.codes)
            and self.scale.dtype == other.scale.dtype
            and torch.equal(self.scale, other.scale)
            and (self.zero is None or torch.equal(self.zero, other.zero))  # type: ignore[arg-type]
            and torch.equal(self.group_index(), other.group_index())
        )
