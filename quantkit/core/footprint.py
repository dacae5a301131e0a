"""How much memory a model takes while it is quantized, measured or run: pure arithmetic.

Everything follows from the shapes of a model (:class:`Shapes`) and a few numbers about the run. The
answer is a list of :class:`Phase`, one for each time in a run at which other things are in memory,
with what they are and their bytes; the largest one is what has to fit. docs/plan.md says how far
these figures were from measured ones.

    phases = quantizing(shapes, run, mode)
    peak(phases, "device")                    bytes on the GPU
    choose(shapes, run, room)                 the fastest mode that fits, or None
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Place = Literal["device", "ram"]
Home = Literal["device", "ram", "disk"]  # of hidden states

# Python, torch and transformers with a model's classes (430 MB, measured) and what the C library
# keeps of freed memory (110 MB, measured); what the CUDA runtime adds to that, and what its context
# takes on the GPU (usual values).
PROCESS = 540_000_000
CUDA_RAM, CUDA_CONTEXT = 1 << 30, 500 << 20
_CUBLAS = 128 << 20  # its workspaces, about
# Share of a GPU's memory that torch's allocator holds and cannot use, in pieces between tensors (10
# to 19 % were measured where it had more than it needed, on an H200).
FRAGMENTS = 0.1
_SYSTEM_BYTES, _GPU_SYSTEM_BYTES, _SYSTEM_COPIES = 128 << 20, 256 << 20, 3  # of refine.py
_STRIPS = 8  # of stats.py
_SLOTS = 2  # micro-batches of a stream on their way to the device (states.py)
# Bytes a weight of a block that is packed on a GPU, and what goes to and from there through pinned
# memory: a piece for each of three threads (pinned.py).
_PACKED, _PINNED = 1, 3 * (16 << 20)
# Bytes a weight while what is in the output is compared with what was solved, and how many linears
# are at once beside a GPU (stored.py).
_CHECKED, CHECKS = 3, 4
_AWAY = 16  # micro-batches from which on stats.py multiplies in the activations' dtype
_COMPARED = 6  # float32 copies of the logits of a row while metrics.py compares two models
COMPARED = 4096  # tokens whose predictions a GPU makes at once


@dataclass(frozen=True)
class Group:
    """Linears of a block that share an input of ``width`` features; ``writes``: its output is
    added to the residual stream, and ``keepable``: its input can be kept (InputGroup.exit);
    ``share``: of the tokens that go there, fewer than all where it is an expert's."""

    names: tuple[str, ...]
    width: int
    outs: tuple[int, ...]
    writes: bool = False
    share: float = 1.0
    keepable: bool = False

    @property
    def numbers(self) -> int:
        return self.width * sum(self.outs)


@dataclass(frozen=True)
class Block:
    """``numbers``: parameters; ``working``: values a token that are alive at once while it runs."""

    numbers: int
    groups: tuple[Group, ...]
    working: float

    @property
    def linears(self) -> int:
        """Weights of its linears."""
        return sum(group.numbers for group in self.groups)

    @property
    def active(self) -> float:
        """Those that a token meets."""
        return sum(group.numbers * group.share for group in self.groups)


@dataclass(frozen=True)
class Shapes:
    """A model. ``outside``: parameters outside of the blocks, a tied head once; ``cache``: values
    that a block keeps of a token (keys and values); ``exact``: no block had to be guessed at."""

    hidden: int
    vocabulary: int
    outside: int
    tied: bool
    cache: int
    blocks: tuple[Block, ...]
    exact: bool = True

    @property
    def embedding(self) -> int:
        """Parameters outside of the blocks without the head."""
        return self.outside - (0 if self.tied else self.hidden * self.vocabulary)

    @property
    def numbers(self) -> int:
        return self.outside + sum(block.numbers for block in self.blocks)

    @property
    def widest(self) -> int:
        """Inputs of the widest linears that are quantized."""
        return max((group.width for block in self.kinds for group in block.groups), default=0)

    @property
    def kinds(self) -> tuple[Block, ...]:
        """The blocks that differ."""
        return tuple(dict.fromkeys(self.blocks))


@dataclass(frozen=True)
class Mode:
    """A way to quantize: where the activations of all calibration rows are, and how many tokens are
    run at once (at least a row). ``keeps``: some linears' inputs in the quantized model are there
    as well, so that they are computed once and not twice."""

    states: Home
    tokens: int
    keeps: bool = False

    def __str__(self) -> str:
        where = {"device": "on the device", "ram": "in RAM", "disk": "on disk"}[self.states]
        what = "activations and linears' inputs" if self.keeps else "activations"
        return f"{what} {where}, {self.tokens:,} tokens at once"

    @property
    def ahead(self) -> bool:
        """Whether a GPU has room for the block to come, and for the packing of the one before."""
        return self.states == "device"


# The fastest first.
GPU_MODES = (
    Mode("device", 16384, keeps=True),
    Mode("device", 16384),
    Mode("ram", 16384),
    Mode("ram", 4096),
    Mode("ram", 2048),
    Mode("disk", 16384),
    Mode("disk", 4096),
    Mode("disk", 2048),
)
CPU_MODES = (Mode("device", 2048), Mode("disk", 2048))


def modes(cuda: bool, aligned: bool) -> tuple[Mode, ...]:
    """Those that there are; only where the quantized model's activations are carried along is there
    anything to keep."""
    return tuple(m for m in (GPU_MODES if cuda else CPU_MODES) if aligned or not m.keeps)


@dataclass(frozen=True)
class Room:
    """Bytes that may be used of the GPU's memory and of RAM; None: as many as it takes."""

    device: int | None
    ram: int | None


@dataclass(frozen=True)
class Run:
    """A quantization by calibration.

    tokens, row  all calibration tokens, and those of the longest row
    aside        tokens of the held-out rows that ride along
    item         bytes of an activation, and of a weight in the running model
    mapped       weights need no copy in RAM: they are run in the dtype that they are stored in
    aligned      the quantized model's activations are carried along too (see gptq_block.py)
    copies       the method holds a block twice and all its statistics at once (AWQ)
    rounds       of refinement
    group        inputs that share one scale, -1 for a whole row
    cuda         on a GPU
    head         the output head is quantized too
    """

    tokens: int
    row: int
    aside: int
    item: int
    mapped: bool
    aligned: bool
    copies: bool
    rounds: int
    group: int
    cuda: bool
    head: bool = False


@dataclass(frozen=True)
class Phase:
    """A time in a run: bytes on the device that computes, in RAM, and in files beside the output,
    by what they are. On a CPU the device is the RAM, and everything is in ``ram``."""

    name: str
    device: dict[str, int]
    ram: dict[str, int]
    disk: int = 0

    def bytes(self, place: Place) -> int:
        return sum((self.device if place == "device" else self.ram).values())


def peak(phases: Iterable[Phase], place: Place) -> Phase:
    """The phase with the most bytes there."""
    return max(phases, key=lambda phase: phase.bytes(place))


def fits(phases: Sequence[Phase], room: Room) -> bool:
    """Whether all phases do."""
    limits: list[tuple[Place, int | None]] = [("device", room.device), ("ram", room.ram)]
    return all(
        limit is None or peak(phases, place).bytes(place) <= limit for place, limit in limits
    )


def choose(shapes: Shapes, run: Run, room: Room, tokens: int | None = None) -> Mode | None:
    """The fastest mode that fits, of those that run ``tokens`` at once if it is given; None when
    not even the smallest does."""
    found = (m for m in modes(run.cuda, run.aligned) if tokens in (None, m.tokens))
    return next((m for m in found if fits(quantizing(shapes, run, m), room)), None)


def smaller(shapes: Shapes, run: Run, mode: Mode, place: Place) -> Mode | None:
    """The fastest mode behind ``mode`` that takes less there or, of a GPU's memory, as much at most
    and has fewer tokens at once. None when there is none."""

    def taken(some: Mode) -> tuple[int, int]:
        most = peak(quantizing(shapes, run, some), place).bytes(place)
        return most, some.tokens if place == "device" else 0

    known = modes(run.cuda, run.aligned)
    return next((m for m in known[known.index(mode) + 1 :] if taken(m) < taken(mode)), None)


def quantizing(shapes: Shapes, run: Run, mode: Mode) -> list[Phase]:
    """The phases of a quantization by calibration (workflows/quantize.py)."""
    stream = run.tokens * shapes.hidden * run.item
    aside = 2 * run.aside * shapes.hidden * run.item
    found = [
        _phase(
            run,
            mode,
            "embed",
            stream * (2 if run.aligned else 1),
            {"embedding": shapes.embedding * run.item},
        ),
        _phase(
            run,
            mode,
            "check",
            stream * (2 if run.aligned else 1),
            {
                "held-out rows": aside,
                "embedding": shapes.embedding * run.item,
                "head": shapes.hidden * shapes.vocabulary * run.item,
                "logits": logits(shapes, min(run.row, 512), run.item)
                + (2 * COMPARED * shapes.vocabulary * run.item if run.cuda else 0),
            },
        ),
    ]
    for block in shapes.kinds:
        # of writers, all but the last one's wanted outputs are kept beside the two streams
        writers = [group for group in block.groups if group.writes]
        streams = 1 + run.aligned * (1 + max(0, len(writers) - 1))
        weights = {"held-out rows": aside, "block": block.numbers * run.item}
        if run.copies:
            weights["block in float32"] = 4 * block.numbers
        if run.cuda and mode.ahead:
            weights["blocks before and behind"] = block.numbers * run.item + block.linears
            weights["packing"] = _PACKED * block.linears
        if run.cuda:
            sizes = sorted(group.width * out for group in block.groups for out in group.outs)
            weights["read back"] = _CHECKED * sum(sizes[-CHECKS:])
        slots = 0
        if mode.states != "device":
            slots = _SLOTS * streams * _at_once(run, mode) * shapes.hidden * run.item
        for name, parts in _of_block(block, run, mode, slots):
            found.append(_phase(run, mode, name, streams * stream, weights | parts))
    if run.head:
        pieces = _solving(
            Group(("head",), shapes.hidden, (min(8192, shapes.vocabulary),)), run, False
        )
        for name, parts in pieces:
            found.append(_phase(run, mode, name, stream * (2 if run.aligned else 1), parts))
    return found


def _phase(run: Run, mode: Mode, name: str, streams: int, parts: dict[str, int]) -> Phase:
    """Put the parts where they are; ``streams``: bytes of activations of all rows."""
    if not run.cuda:
        if run.mapped:  # a page for each token that occurs
            parts = {key: size for key, size in parts.items() if key != "embedding"}
        if mode.states == "disk":
            streams += parts.pop("held-out rows", 0)
            return Phase(name, {}, {"program": PROCESS, **parts}, streams)
        return Phase(name, {}, {"program": PROCESS, "activations": streams, **parts})
    ram = {"program": PROCESS + CUDA_RAM, "weights on their way": parts.get("block", 0)}
    device = dict(parts)
    ram |= {"pinned pieces": _PINNED, "read back": device.pop("read back", 0)}
    if mode.states == "device":
        device["activations"] = streams
    else:
        aside = device.pop("held-out rows", 0)
        if mode.states == "ram":
            ram |= {"activations": streams, "held-out rows": aside}
        streams += aside
    device["pieces between tensors"] = int(FRAGMENTS * sum(device.values()))
    return Phase(
        name,
        {"CUDA": CUDA_CONTEXT, **device},
        ram,
        streams if mode.states == "disk" else 0,
    )


def _of_block(block: Block, run: Run, mode: Mode, slots: int) -> list[tuple[str, dict[str, int]]]:
    """What is in memory beside weights and activations while statistics are gathered (``slots``:
    bytes of micro-batches on their way to the device), and while each group is solved. With
    alignment readers and writers have their turns one after another."""
    # codes, and weights made of them; where nothing is read ahead these take the place of others
    result = 1 if run.cuda and not mode.ahead else 1 + run.item
    readers = [group for group in block.groups if not group.writes]
    writers = [group for group in block.groups if group.writes]
    turns = [(readers, False), (writers, True)] if run.aligned else [(block.groups, False)]
    found = []
    solved = 0
    for groups, drift in turns:
        if not groups:
            continue
        held = [_statistics(group, drift) for group in groups]
        results = {"results": solved * result}
        if drift and mode.keeps:
            inputs = sum(group.width for group in groups if group.keepable)
            results["linears' inputs"] = run.tokens * inputs * run.item
        widest = max(groups, key=lambda group: group.width)
        passing = _passing(block, widest, run, mode, drift) | {"on their way": slots}
        found.append(("statistics", results | {"statistics": sum(held)} | passing))
        for index, group in reversed(list(enumerate(groups))):  # the last one is taken first
            others = sum(held) if run.copies else sum(held[:index])
            solved += group.numbers
            results["results"] = solved * result
            for name, parts in _solving(group, run, drift):
                found.append((name, results | {"statistics": others} | parts))
    return found


def _statistics(group: Group, drift: bool) -> int:
    """Bytes of stats.InputStats."""
    return 4 * group.width**2 + (4 * group.numbers if drift else 0)


def _at_once(run: Run, mode: Mode) -> int:
    """Tokens of a micro-batch."""
    return min(run.tokens, max(run.row, mode.tokens))


def _passing(block: Block, widest: Group, run: Run, mode: Mode, drift: bool) -> dict[str, int]:
    """A micro-batch on its way through the block, and in the statistics of its widest input."""
    tokens = _at_once(run, mode)
    inputs = tokens * widest.width
    exact = not run.cuda and run.item < 4 and run.tokens < _AWAY * tokens
    # a GPU adds products up where it computes them
    product = 0 if run.cuda else max(widest.width**2 // _STRIPS, widest.numbers if drift else 0)
    return {
        "micro-batch": int(tokens * block.working * run.item),
        "sums": inputs * run.item + 4 * product + (8 * inputs if exact else 0),
        "workspaces": _CUBLAS if run.cuda else 0,
    }


# What is alive at each step of methods/gptq.py, align.py and refine.py beside one matrix [in, in]:
# so many matrices [out, in], float32. The Hessian and its factor share one (factor.py).
_STEPS = {"align": 4, "factor": 2, "round": 4, "refit": 4, "polish": 5, "assemble": 5, "error": 4}


def _solving(group: Group, run: Run, drift: bool) -> list[tuple[str, dict[str, int]]]:
    """The steps of solving one group."""
    found = []
    for step, wide in _STEPS.items():
        if (step == "align" and not drift) or (step in ("refit", "polish") and not run.rounds):
            continue
        split = run.cuda and step == "polish"  # into two parts of half the size (products.py)
        parts = {
            "matrix in x in": 4 * group.width**2,
            "matrices out x in": 4 * (wide + split) * group.numbers,
        }
        if step == "refit":
            width = group.width if run.group == -1 else run.group
            systems = 4 * sum(group.outs) * (group.width // width) ** 2
            most = _GPU_SYSTEM_BYTES if run.cuda else _SYSTEM_BYTES
            parts["scale systems"] = _SYSTEM_COPIES * min(most, systems)
        found.append((f"{step}, {group.width} inputs", parts))
    return found


def logits(shapes: Shapes, tokens: int, item: int) -> int:
    """Of one row by two models, and their comparison."""
    return tokens * shapes.vocabulary * (2 * item + 4 * _COMPARED)


def rounding(shapes: Shapes) -> list[Phase]:
    """Quantizing without calibration: tensor by tensor, several at once (workflows/ahead.py)."""
    largest = max(group.numbers for block in shapes.blocks for group in block.groups)
    outside = shapes.hidden * shapes.vocabulary
    return [Phase("round", {}, {"program": PROCESS, "tensors": 9 * max(largest, outside)})]
