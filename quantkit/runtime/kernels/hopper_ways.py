"""How a product is divided among Hopper's processors: programs' shapes, clusters, launches.

A program has 128 rows of the weight and up to so many tokens, and goes through the inputs in steps.
Programs of a cluster share the steps of the same rows and tokens. A processor that has nothing to
do while the last programs run is time lost, and so is what every launch, turn and exchange takes
beside multiplying: which shape and which clusters take the least, a few measured numbers say.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from quantkit.runtime.kernels import fragments

INPUTS = fragments.STEP  # of a step, and of a stage
ROWS = 32 * fragments.BLOCK  # of a program
_WARPS = ROWS // 16
_SHARED, _OWN = 228 << 10, 2 << 10  # bytes of a processor; of a program for itself and its barriers


class Kind(NamedTuple):
    """What kernels differ in beside their shape; what the names mean, hopper.cu says."""

    bfloat: bool
    step: int
    scale: int
    zeros: bool
    middle: int


@dataclass(frozen=True)
class Shape:
    """How a product with up to so many ``tokens`` at a time is computed; see hopper.cu.

    few         by warps, or else by warpgroups
    stages      of the ring of codes and inputs, at most
    resident    programs that a processor has room for
    """

    tokens: int
    few: bool
    stages: int
    resident: int

    @property
    def threads(self) -> int:
        return 32 * _WARPS + (32 if self.few else 128)

    def sent(self, cluster: int) -> int:
        """Bytes of the sums that a program gets from the others of a cluster of so many."""
        return -(-_WARPS // cluster) * (cluster - 1) * 64 * self.tokens

    def beside(self, cluster: int) -> int:
        """Bytes beside the ring: for these sums, or, where they come into the ring, for warpgroups
        that turn their results round."""
        return self.sent(cluster) if self.few else 8192

    @property
    def most_beside(self) -> int:
        """In any cluster."""
        return max(map(self.beside, SIZES))

    def ring(self, kind: Kind) -> tuple[int, int]:
        """Stages of the ring and bytes of one."""
        numbers = (4 if kind.scale == 4 else 2) + (2 if kind.zeros else 0)
        scales = ROWS * (INPUTS // kind.step) * numbers
        stage = self.tokens * INPUTS * 2 + ROWS * INPUTS // 2 + scales
        room = _SHARED // self.resident - _OWN - self.most_beside
        return min(self.stages, room // stage), stage

    def cost(self, cluster: int, steps: int, turns: int) -> float:
        """Of so many turns, in each of which as many clusters of so many programs run as fit: in
        microseconds of an H200 where a program fills a processor, else in steps."""
        if self.resident > 1:
            return turns * (8 + steps)
        multiplying = steps * (0.23 + 0.0041 * self.tokens)
        if cluster == 1:  # the next turn's first inputs are there when a turn ends
            return 3.2 + turns * (0.8 + multiplying)
        return turns * (4 + self.tokens / 256 * _EXCHANGE[cluster] + multiplying)


# several programs to a processor; one, which fills it
SMALL = Shape(8, True, 5, 3), Shape(16, True, 5, 3), Shape(32, False, 4, 2), Shape(64, False, 4, 2)
LARGE = tuple(Shape(tokens, False, 5, 1) for tokens in range(96, 257, 16))
SHAPES = SMALL + LARGE
SIZES = (1, 2, 3, 4, 5, 6, 8)  # programs of a cluster; the sums of seven do not fit three times
_EXCHANGE = {2: 3, 3: 5, 4: 5, 5: 6, 6: 6, 8: 6}  # microseconds for the sums of 256 tokens
_SECOND = 0.95  # of the time that a product may take with a second launch, at most


Launch = tuple[int, int]  # clusters, and programs of each


@dataclass(frozen=True)
class Way:
    """How a product is computed: its programs' shape, and the launches that do them all."""

    shape: Shape
    launches: tuple[Launch, ...]


def shapes_for(tokens: int, kind: Kind) -> list[Shape]:
    """Few tokens take the smallest shape that has room for them; others any whose ring does not
    make the copying warp wait."""
    small = [shape for shape in SMALL if tokens <= shape.tokens]
    return small[:1] or [shape for shape in LARGE if shape.ring(kind)[0] >= 3]


def chosen(
    shapes: list[Shape],
    tokens: int,
    blocks: int,
    steps: int,
    at_once: Callable[[Shape, int], int],
) -> Way:
    """The way in which ``blocks`` of 128 rows are done the soonest, where ``at_once(shape, size)``
    clusters of so many programs run at the same time (0: none can)."""
    found = [(shape, *_divided(shape, tokens, blocks, steps, at_once)) for shape in shapes]
    shape, _, launches = min(found, key=lambda one: one[1])
    return Way(shape, launches)


def _divided(
    shape: Shape, tokens: int, blocks: int, steps: int, at_once: Callable[[Shape, int], int]
) -> tuple[float, tuple[Launch, ...]]:
    """The cost of a shape, and its launches: all clusters alike, or as many turns as are full, and
    smaller shares of the work for the rest, if that is worth a second launch."""
    clusters = blocks * -(-tokens // shape.tokens)
    room = {size: count for size in SIZES if size <= steps and (count := at_once(shape, size))}

    def last(count: int, size: int) -> float:
        return shape.cost(size, -(-steps // size), -(-count // room[size]))

    alike = min(room, key=lambda size: last(clusters, size))
    best = last(clusters, alike)
    found: tuple[Launch, ...] = ((clusters, alike),)
    limit = best * _SECOND
    for few, many in combinations(room, 2):
        full = clusters // room[few] * room[few]
        parts = (full, few), (clusters - full, many)
        took = sum(last(*part) for part in parts)
        if full and took < limit:
            best, limit, found = took, took, parts
    return best, found
