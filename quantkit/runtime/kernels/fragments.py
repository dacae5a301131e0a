"""Weights in the order in which a GPU's tensor cores want them.

``mma.m16n8k16`` multiplies 16 outputs x 16 inputs by 16 inputs x 8 tokens. Of the weights, lane
4 g + t of a warp holds those of the outputs g and g + 8, and which inputs it holds is ours to
choose, as long as it holds the same ones of x: here, eight neighbours. A thread's codes are stored
as one vector of four words, and a warp's vectors side by side, so that

    words  int32 [tiles, in / 32, lane, 4]      512 bytes for 32 inputs of one tile

is read 16 bytes a lane, coalesced, once, and not a value ever moves between threads:

    4 bits  a tile is 32 outputs.  word w of lane (g, t): output 8 w + g, inputs 8 t .. 8 t + 7,
            the inputs 0 2 4 6 1 3 5 7 from the lowest four bits up: a shift and a mask leave two
            neighbours in the halves of a word
    8 bits  a tile is 16 outputs.  words 2 w, 2 w + 1: output 8 w + g, four inputs each, in order

Fewer bits are kept in 4, five and six in 8. Scales and offsets [tiles, groups, g, w] lie as a
thread meets them. The last tile is filled up with codes that weigh nothing.

*Blocked*, for the kernels of Hopper (4 bits): its copy engine is told once for four tiles and 128
inputs, and its ``wgmma`` reads x from where it lies, so lane t has to hold the inputs that the
instruction gives it, 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of 16, in the place of 8 t .. 8 t + 7 of 32:

    words  int32 [tiles / 4, in / 128, 4 tiles, 4 times 32 inputs, lane, 4]
    scale  [tiles / 4, groups, 4 tiles, g, w]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.qweight import QWeight, Scheme

INPUTS = 32  # a lane's eight neighbours, for each of the four t
LANES = 32
_NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # which input lies in the n-th four bits of a word
BLOCK = 4  # tiles
STEP = 128  # inputs of a block
# which of 32 inputs lies in the place of the n-th, blocked: the e-th of lane t is number 8 t + e
_SPREAD = [8 * (e // 2) + 2 * t + e % 2 for t in range(4) for e in range(8)]


@dataclass(frozen=True)
class Fragments:
    """A weight [out, in] laid out for the kernels: w = scale * (code - middle) + offset.

    words   int32 [tiles, in / 32, 32, 4]
    scale   [tiles, groups, 8, rows / 8], float16, bfloat16 or float32
    offset  the same shape, or None: either in code units, scale * (middle - zero) without its
            scale (``scaled``), or a minimum as it is
    blocked whether words, scale and offset lie in blocks (see the module)
    """

    scheme: Scheme
    out: int
    width: int
    words: Tensor
    scale: Tensor
    offset: Tensor | None
    scaled: bool
    blocked: bool = False

    @property
    def bits(self) -> int:
        """Bits that a code takes here: 4 or 8."""
        return container(self.scheme)

    @property
    def rows(self) -> int:
        """Outputs of a tile."""
        return 32 if self.bits == 4 else 16

    @property
    def tiles(self) -> int:
        return len(self.words) * (BLOCK if self.blocked else 1)

    @property
    def kind(self) -> str:
        """What ``offset`` is: "" for none, "scaled" or "plain"."""
        return "" if self.offset is None else "scaled" if self.scaled else "plain"

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.scheme.width(self.width)

    @property
    def nbytes(self) -> int:
        """What the kernels read of it."""
        parts = (self.words, self.scale, self.offset)
        return sum(part.nbytes for part in parts if part is not None)


def container(scheme: Scheme) -> int:
    """Bits that a code of this scheme takes in fragments."""
    return 4 if scheme.bits <= 4 else 8


def arrange(q: QWeight, *, blocked: bool = False) -> Fragments:
    """Lay out a weight whose groups are contiguous, on the device where it is. ``blocked`` takes
    codes of at most four bits and a multiple of 128 inputs."""
    out, width = q.shape
    bits = container(q.scheme)
    rows = 32 if bits == 4 else 16
    missing = -out % (rows * BLOCK if blocked else rows)
    middle = q.scheme.midpoint
    codes = torch.nn.functional.pad(q.codes, (0, 0, 0, missing), value=middle)
    offset, scaled = q.minimum, False
    if q.zero is not None:
        offset, scaled = (middle - q.zero.to(torch.int16)).to(torch.float16), True
    elif q.minimum is not None:
        offset = q.minimum.float() + middle * q.scale.float()
    if blocked:
        codes = codes.reshape(-1, width // INPUTS, INPUTS)[..., _SPREAD].reshape(-1, width)
    words, scale = _four(codes) if bits == 4 else _eight(codes), _beside(q.scale, missing, rows)
    offset = None if offset is None else _beside(offset, missing, rows)
    if blocked:
        words = _in_blocks(words.reshape(len(words), -1, STEP // INPUTS, LANES, 4))
        scale, offset = _in_blocks(scale), None if offset is None else _in_blocks(offset)
    return Fragments(q.scheme, out, width, words, scale, offset, scaled, blocked)


def restore(fragments: Fragments) -> QWeight:
    """The weight that was arranged; a minimum comes back with the rounding of one addition."""
    words, scale, offset = fragments.words, fragments.scale, fragments.offset
    if fragments.blocked:
        words, scale = _out_of_blocks(words).flatten(1, 2), _out_of_blocks(scale)
        offset = None if offset is None else _out_of_blocks(offset)
    codes = _four_back(words) if fragments.bits == 4 else _eight_back(words)
    if fragments.blocked:
        spread = codes.reshape(len(codes), -1, INPUTS)
        codes = torch.empty_like(spread)
        codes[..., _SPREAD] = spread
        codes = codes.flatten(1)
    middle, out = fragments.scheme.midpoint, fragments.out
    scale = _apart(scale)[:out]
    zero = minimum = None
    if offset is not None:
        offset = _apart(offset)[:out]
        if fragments.scaled:
            zero = (middle - offset.float()).to(torch.uint8)
        else:
            minimum = offset - middle * scale.float()
    return QWeight(fragments.scheme, codes[:out], scale, zero, minimum=minimum)


def _in_blocks(held: Tensor) -> Tensor:
    """[tiles, n, ...] -> [tiles / BLOCK, n, BLOCK, ...]"""
    return held.reshape(-1, BLOCK, *held.shape[1:]).transpose(1, 2).contiguous()


def _out_of_blocks(held: Tensor) -> Tensor:
    return held.transpose(1, 2).flatten(0, 1)


def _four(codes: Tensor) -> Tensor:
    tiles, steps = codes.shape[0] // 32, codes.shape[1] // INPUTS
    split = codes.reshape(tiles, 4, 8, steps, 4, 8)
    seen = split.permute(0, 3, 2, 4, 1, 5)[..., _NIBBLES]
    packed = (seen[..., 0::2] | (seen[..., 1::2] << 4)).contiguous()
    return packed.view(torch.int32).reshape(tiles, steps, LANES, 4)


def _four_back(words: Tensor) -> Tensor:
    tiles, steps = words.shape[:2]
    packed = words.contiguous().view(torch.uint8).reshape(tiles, steps, 8, 4, 4, 4)
    seen = torch.stack([packed & 15, packed >> 4], -1).reshape(tiles, steps, 8, 4, 4, 8)
    codes = torch.empty_like(seen)
    codes[..., _NIBBLES] = seen
    return codes.permute(0, 4, 2, 1, 3, 5).reshape(tiles * 32, steps * INPUTS)


def _eight(codes: Tensor) -> Tensor:
    tiles, steps = codes.shape[0] // 16, codes.shape[1] // INPUTS
    split = codes.reshape(tiles, 2, 8, steps, 4, 8)
    seen = split.permute(0, 3, 2, 4, 1, 5).contiguous()
    return seen.view(torch.int32).reshape(tiles, steps, LANES, 4)


def _eight_back(words: Tensor) -> Tensor:
    tiles, steps = words.shape[:2]
    seen = words.contiguous().view(torch.uint8).reshape(tiles, steps, 8, 4, 2, 8)
    return seen.permute(0, 4, 2, 1, 3, 5).reshape(tiles * 16, steps * INPUTS)


def _beside(held: Tensor, missing: int, rows: int) -> Tensor:
    """[out, groups] -> [tiles, groups, 8, rows / 8]"""
    whole = torch.nn.functional.pad(held, (0, 0, 0, missing))
    tiles = len(whole) // rows
    return whole.reshape(tiles, rows // 8, 8, -1).permute(0, 3, 2, 1).contiguous()


def _apart(held: Tensor) -> Tensor:
    """The inverse of :func:`_beside`, with the rows that were filled up."""
    tiles, groups, _, blocks = held.shape
    return held.permute(0, 3, 2, 1).reshape(tiles * blocks * 8, groups)
