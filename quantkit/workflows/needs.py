"""What one task takes on one machine: the planner's figures for quantize, verify, generate, serve.

The plan of a quantization is made as the quantizer makes its own (workflows/plan.py); memory is
core/footprint.py's, time core/durations.py's.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from quantkit import data, formats
from quantkit.core import calibration, durations, footprint, loaded
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.footprint import Phase, Room, Shapes
from quantkit.core.loaded import Loaded
from quantkit.core.qweight import Scheme
from quantkit.core.source import Source
from quantkit.errors import UsageError
from quantkit.runtime.opened import Folder, recognised
from quantkit.runtime.outline import outlined
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.walk import find_blocks
from quantkit.workflows import plan as planning
from quantkit.workflows.awq_block import Awq
from quantkit.workflows.calibrate import SAMPLED_AT_ONCE, longest_row
from quantkit.workflows.layout import lay_out, refuse_unpackable
from quantkit.workflows.machine import Machine
from quantkit.workflows.method import Method
from quantkit.workflows.plan import Plan

METHODS = ("gptq", "awq", "rtn", "none")
_SETS = len(calibration.BUNDLED)
# of the bundled texts as they are stored, at least; most tokenizers take 3 to 4
_BYTES_PER_TOKEN = 2.5
_SHARD = 5 << 30
# the option that says how many tokens a text of a task has
_LENGTH = {
    "quantize": "calib_seqlen",
    "verify": "seqlen",
    "generate": "context",
    "serve": "context",
}
# bytes of a group in a running model: the scale and, asymmetric, the zero point; and on a CPU what
# the 4-bit kernel reads instead
_SCALE, _ZERO, _KERNEL = 2, 1, 2


@dataclass(frozen=True)
class Wish:
    """What is planned; names are those of options, whose commands say what they mean. ``context``:
    tokens of a text, prompt included; ``sequences``: texts that are served at once; ``rows`` and
    ``seqlen``: what verify measures on."""

    method: str = "gptq"
    bits: int = 4
    group: int = 128
    sym: bool = True
    fast: bool = False
    calib: tuple[str, ...] = ("bundled",)
    calib_rows: int = 128
    calib_seqlen: int = 2048
    rows: int = 16
    seqlen: int = 512
    context: int = 2048
    sequences: int = 8

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method '{self.method}' is unknown", f"use {', '.join(METHODS)}")
        for name in ("calib_rows", "rows", "context", "sequences"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
        if min(self.calib_seqlen, self.seqlen) < 2:
            raise UsageError("a row has at least two tokens")


@dataclass(frozen=True)
class Need:
    """What a task takes.

    device, ram, disk  bytes at most; device is None on a CPU
    seconds            about; None where the machine's speed is not known
    rate               tokens a second of one text, where text is made
    phases             what is in memory when
    lacking            what there is too little of: GPU memory, RAM, disk
    changes            options with which it would fit, each of which was tried
    """

    task: str
    device: int | None
    ram: int
    disk: int
    seconds: float | None
    rate: float | None
    phases: list[Phase]
    lacking: tuple[str, ...]
    changes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.lacking

    def described(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}


class Subject:
    """A model whose headers were read."""

    def __init__(self, source: Source, tensors: Checkpoint) -> None:
        self.source, self.tensors = source, tensors
        self.opened: Folder = recognised(source, tensors)
        self._skeletons: dict[torch.dtype, Skeleton] = {}

    @property
    def fetched(self) -> int:
        """Bytes that whatever is done with it will fetch first."""
        return sum(file.size for file in self.source.remote.values())

    @property
    def quantized(self) -> bool:
        return bool(self.opened.linears)

    @cached_property
    def shapes(self) -> Shapes:
        skeleton = self.skeleton(torch.bfloat16)
        prefix, blocks = find_blocks(skeleton.model)
        refuse_unpackable(prefix, blocks.named_parameters())
        return outlined(skeleton)

    def skeleton(self, dtype: torch.dtype) -> Skeleton:
        if dtype not in self._skeletons:
            cpu = torch.device("cpu")
            self._skeletons[dtype] = Skeleton(self.source, self.tensors, cpu, dtype)
        return self._skeletons[dtype]


def calibration_tokens(calib: Sequence[str], rows: int, row: int) -> int:
    """Tokens that ``--calib`` comes to, at most: whole rows, but no more than bundled texts have.
    Raises UsageError for what cannot be read, QuantkitError for files that are not there."""
    parts = [part for text in calib for part in calibration.parse(text)]
    for part in parts:
        calibration.check(part.source)
    open_ended = sum(part.rows is None for part in parts)
    fixed = sum(part.rows or 0 for part in parts)
    cap = max(1, (rows - fixed) // max(1, open_ended))
    found = 0
    for part in parts:
        tokens = (cap if part.rows is None else part.rows) * row
        name, _, label = part.source.partition(":")
        if name == "bundled":
            files = [data.calibration() / f"{n}.jsonl" for n in calibration.BUNDLED]
            size = sum(file.stat().st_size for file in files if label in ("", file.stem))
            tokens = min(tokens, max(row, int(size / _BYTES_PER_TOKEN)))
        found += tokens
    return found


class Needs:
    """The tasks of one subject, as wished, on one machine. Raises what planning raises."""

    def __init__(self, subject: Subject, wish: Wish, machine: Machine) -> None:
        self.subject, self.wish, self.machine = subject, wish, machine
        self.shapes = subject.shapes
        self.quantizes = wish.method != "none"
        self._item = machine.dtype.itemsize

    @cached_property
    def _scheme(self) -> Scheme:
        return Scheme(self.wish.bits, self.wish.group, self.wish.sym)

    @cached_property
    def _method(self) -> Method:
        form = planning.format_name("auto", self._scheme)
        gptq = planning.gptq_method(
            act_order="static",
            damp=0.01,
            fast=self.wish.fast,
            align=None,
            refine=None,
            scale_search=True,
            bias_correction=True,
            tokens_per_input=None,
            zero_min=formats.by_name(form).FORM.zero_min,
        )
        return Awq("gptq", gptq) if self.wish.method == "awq" else gptq

    @cached_property
    def _plan(self) -> Plan:
        """As workflows/quantize.py makes it."""
        skeleton = self.subject.skeleton(self.machine.dtype)
        usual = "awq" if self.wish.method == "awq" else "gptq"
        layout = lay_out(skeleton, self._scheme, planning.format_name("auto", self._scheme, usual))
        settled = (self.subject.source, skeleton, layout, self._scheme, self._method)
        return Plan(*settled, layout.specs(), _SHARD)

    @property
    def result(self) -> int:
        """Bytes of the files that are run."""
        return self._plan.output_bytes if self.quantizes else self.subject.tensors.nbytes

    @property
    def bits_per_weight(self) -> float | None:
        return self._plan.bits_per_weight if self.quantizes else None

    def of(self, task: str) -> Need:
        """``task``: quantize, verify, generate or serve."""
        phases, seconds, rate, disk = getattr(self, f"_{task}")()
        on = self.machine
        device = footprint.peak(phases, "device").bytes("device") if on.cuda else None
        ram = footprint.peak(phases, "ram").bytes("ram")
        taken = (("GPU memory", device, on.device), ("RAM", ram, on.ram), ("disk", disk, on.disk))
        lacking = tuple(
            name
            for name, needed, there in taken
            if needed is not None and there is not None and needed > there
        )
        return Need(task, device, ram, disk, seconds, rate, phases, lacking)

    def _quantize(self) -> tuple[list[Phase], float | None, float | None, int]:
        wish, speed = self.wish, self.machine.speed
        stored = self.subject.tensors.nbytes
        disk = self.result + self.subject.fetched
        if wish.method == "rtn":
            seconds = durations.rounding(self.shapes, stored, speed) if speed else None
            return footprint.rounding(self.shapes), seconds, None, disk
        row = self._at_most(wish.calib_seqlen)
        tokens = calibration_tokens(wish.calib, wish.calib_rows, row)
        run = self._plan.run(tokens, row, self.machine.cuda)
        room = Room(self.machine.device, self.machine.ram)
        mode = (
            footprint.choose(self.shapes, run, room) or footprint.modes(run.cuda, run.aligned)[-1]
        )
        phases = footprint.quantizing(self.shapes, run, mode)
        thinned = planning.FAST_TOKENS if wish.fast else None
        seconds = None
        if speed:
            seconds = durations.quantizing(self.shapes, run, mode, thinned, stored, speed)
        if own := [text for text in wish.calib if calibration.parse(text)[0].source == "self"]:
            whole, written = self._original, calibration_tokens(own, wish.calib_rows, row)
            phases = [*loaded.generating(self.shapes, whole, row, SAMPLED_AT_ONCE), *phases]
            if seconds and speed:
                step = durations.token(self.shapes, whole.weights, 0, speed)
                seconds += durations.loading(whole.weights) + step * written / SAMPLED_AT_ONCE
        return phases, seconds, None, disk + max(phase.disk for phase in phases)

    def _verify(self) -> tuple[list[Phase], float | None, float | None, int]:
        wish, speed, model = self.wish, self.machine.speed, self._loaded
        rows, row = wish.rows * _SETS, self._at_most(wish.seqlen)
        seconds = None
        if speed:
            coded = self._coded
            seconds = durations.verifying(self.shapes, model.weights, coded, rows, row, speed)
        return loaded.verifying(self.shapes, model, rows, row), seconds, None, 0

    def _generate(self) -> tuple[list[Phase], float | None, float | None, int]:
        return self._running(1)

    def _serve(self) -> tuple[list[Phase], float | None, float | None, int]:
        return self._running(self.wish.sequences)

    def _running(self, sequences: int) -> tuple[list[Phase], float | None, float | None, int]:
        """Seconds are until the model is loaded and a prompt of half the context is read."""
        model, speed = self._loaded, self.machine.speed
        context = self._at_most(self.wish.context)
        phases = loaded.generating(self.shapes, model, context, sequences)
        disk = 0 if self.quantizes else self.subject.fetched
        if speed is None:
            return phases, None, None, disk
        seconds = durations.loading(model.weights)
        seconds += durations.prompt(self.shapes, context // 2, speed)
        rate = 1 / durations.token(self.shapes, model.weights, self._coded, speed)
        return phases, seconds, rate, disk

    def notes(self, task: str) -> list[str]:
        """Where the plan of a task is not for what was asked for."""
        name = _LENGTH[task]
        asked = getattr(self.wish, name)
        planned = self._at_most(asked)
        if planned == asked or asked == getattr(Wish, name):
            return []
        option = "--" + name.replace("_", "-")
        return [f"{option} {asked}: the model takes {planned} tokens, and is planned with those"]

    def _at_most(self, tokens: int) -> int:
        """So many tokens, or what the model can take."""
        return min(tokens, longest_row(self.subject.skeleton(self.machine.dtype)) or tokens)

    @cached_property
    def _linears(self) -> list[tuple[int, int, Scheme]]:
        """Out, in and scheme of the quantized linears of the model that is run."""
        if self.quantizes:
            return [(job.out, job.width, job.scheme) for job in self._plan.layout.all_jobs()]
        return [(p.out, p.width, p.scheme) for p in self.subject.opened.linears.values()]

    @property
    def _coded(self) -> int:
        return sum(out * width for out, width, _ in self._linears)

    @cached_property
    def _loaded(self) -> Loaded:
        """The model as runtime/load.py puts it together."""
        dense = (self.shapes.numbers - self._coded) * self._item
        tensors = self._plan.layout.dense.values() if self.quantizes else self._dense_specs()
        mapped = dense if {spec.dtype for spec in tensors} == {self.machine.dtype} else 0
        return Loaded(
            weights=dense + sum(self._in_memory(*linear) for linear in self._linears),
            mapped=mapped,
            largest=max((out * width for out, width, _ in self._linears), default=0),
            item=self._item,
            cuda=self.machine.cuda,
        )

    @property
    def _original(self) -> Loaded:
        """The model that writes its own calibration text."""
        weights = self.shapes.numbers * self._item
        stored = {spec.dtype for spec in self._dense_specs()}
        mapped = weights if stored == {self.machine.dtype} else 0
        return Loaded(weights, mapped, 0, self._item, self.machine.cuda)

    def _dense_specs(self) -> list[Any]:
        return [self.subject.opened.dense.spec(name) for name in self.subject.opened.dense]

    def _in_memory(self, out: int, width: int, scheme: Scheme) -> int:
        """Bytes of a runtime.linear.QuantLinear."""
        groups = out * scheme.groups(width)
        a_group = _SCALE + (0 if scheme.symmetric else _ZERO)
        if not self.machine.cuda and scheme.bits == 4:
            a_group += _KERNEL * self._item
        return out * width * scheme.bits // 8 + groups * a_group
