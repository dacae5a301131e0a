"""What is decided, and what can be refused, before the first byte is written."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from quantkit import __version__, formats
from quantkit.core import footprint, provenance
from quantkit.core.calibration import BUNDLED, Calibration
from quantkit.core.checkpoint import Checkpoint, TensorSpec
from quantkit.core.counted import counted
from quantkit.core.footprint import Mode, Phase, Place, Room, Run, Shapes
from quantkit.core.qweight import Scheme
from quantkit.core.rules import Rule
from quantkit.core.source import Source
from quantkit.errors import UsageError
from quantkit.formats import Format
from quantkit.methods import gptq
from quantkit.runtime.outline import outlined
from quantkit.runtime.skeleton import Skeleton
from quantkit.workflows import check
from quantkit.workflows.gptq_block import Gptq
from quantkit.workflows.layout import Layout
from quantkit.workflows.method import Method

FORMATS = ("auto", "gptq", "gptq_v2", "awq", "compressed-tensors")
BOOKKEEPING = ("g_idx", "weight_shape")  # packed tensors that say nothing of the numbers
# Tokens per feature of the widest input. Instead of all (32 on neox, 85 on the demo), 10 cost 2 to
# 3 % in KL and save a fifth of the time.
FAST_TOKENS = 10


@dataclass(frozen=True)
class Plan:
    """A quantization that can be carried out.

    scheme     that of linears in general; each job has its own
    rules      that the user gave
    chosen     those that a target in bits or bytes has added to them
    method     how blocks are solved
    specs      every tensor of the output, by its name on disk
    shard      most bytes in one file
    lm_head    how the output head is solved, None: it stays dense
    mode       where activations are, None: not decided yet, the fastest
    ranks      processes that share the rows
    """

    source: Source
    skeleton: Skeleton
    layout: Layout
    scheme: Scheme
    method: Method
    specs: dict[str, TensorSpec]
    shard: int
    rules: tuple[Rule, ...] = ()
    chosen: tuple[Rule, ...] = ()
    lm_head: Gptq | None = None
    mode: Mode | None = None
    ranks: int = 1

    @property
    def packer(self) -> Format:
        return formats.by_name(self.layout.format)

    @property
    def checkpoint(self) -> Checkpoint:
        """The original's tensors, in their files."""
        return cast(Checkpoint, self.skeleton.checkpoint)

    @property
    def cuda(self) -> bool:
        return self.skeleton.device.type == "cuda"

    @property
    def threaded(self) -> bool:
        """Whether blocks are read and written beside the computation: on a CPU threads would only
        take cores and memory from it."""
        return self.cuda and self.way.ahead

    @property
    def way(self) -> Mode:
        return self.mode or self._modes[0]

    @property
    def _modes(self) -> tuple[Mode, ...]:
        return footprint.modes(self.cuda, self.method.aligned)

    @property
    def tokens_compared(self) -> int:
        """Tokens of the rows whose predictions are in memory at once: 0, a row, on a CPU."""
        return footprint.COMPARED if self.cuda else 0

    @property
    def output_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of all packed tensors per quantized weight: codes, scales, zeros."""
        jobs = self.layout.all_jobs()
        packed = sum(
            spec.nbytes
            for job in jobs
            for suffix, spec in self.layout.packed(job).items()
            if suffix not in BOOKKEEPING
        )
        return 8 * packed / sum(job.out * job.width for job in jobs)

    def disk_name(self, index: int, inner: str) -> str:
        """The name on disk of a parameter of block ``index``."""
        return self.skeleton.disk_names[f"{self.layout.prefix}.{index}.{inner}"]

    def configuration(self) -> dict[str, Any]:
        """What the format says in config.json."""
        resolved = self.method.resolved()
        return self.packer.configuration(
            self.scheme,
            self._left_dense(),
            f"quantkit:{__version__}",
            own=self.layout.own_schemes(),
            act_order=resolved.get("act_order"),
            damp=resolved.get("damp"),
            lm_head=self.layout.head is not None,
        )

    def _left_dense(self) -> list[str]:
        """Linears that are not quantized. GPTQ has a key of its own for the head."""
        kept = self.layout.kept + self.layout.skipped + self.layout.routers
        if self.layout.format in ("gptq", "gptq_v2"):
            return kept
        heads = {"embed_out", "lm_head"}
        found = {name.removesuffix(".weight") for name in self.layout.dense} & heads
        return list(dict.fromkeys([*kept, *sorted(found | {"lm_head"} if found else found)]))

    @cached_property
    def shapes(self) -> Shapes:
        """What the memory of a run follows from."""
        return outlined(self.skeleton)

    def run(self, tokens: int, row: int, cuda: bool) -> Run:
        """Calibrating with ``tokens`` tokens, in rows of ``row`` at most, on a GPU or not, in the
        dtype of the skeleton."""
        dtype = self.skeleton.dtype
        stored = {self.skeleton.checkpoint.spec(name).dtype for name in self.skeleton.live_names}
        return Run(
            tokens=tokens,
            row=row,
            aside=len(BUNDLED) * check.ROWS * check.TOKENS,
            item=dtype.itemsize,
            mapped=stored == {dtype},
            aligned=self.method.aligned,
            copies=self.method.copies,
            rounds=self.method.rounds,
            group=self.scheme.group_size,
            cuda=cuda,
            head=self.layout.head is not None,
        )

    def _run(self, rows: Calibration) -> Run:
        tokens, row = sum(len(row) for row in rows.rows), max(len(row) for row in rows.rows)
        return self.run(-(-tokens // self.ranks), row, self.cuda)

    def memory(self, rows: Calibration) -> list[Phase]:
        """What is in memory when, in calibration with ``rows``."""
        return footprint.quantizing(self.shapes, self._run(rows), self.way)

    def within(self, room: Room, rows: Calibration, tokens: int | None = None) -> "Plan":
        """The same in the fastest mode that fits, with ``tokens`` at once if any does; in the
        smallest mode when none fits."""
        run = self._run(rows)
        found = tokens and footprint.choose(self.shapes, run, room, tokens)
        mode = found or footprint.choose(self.shapes, run, room)
        return replace(self, mode=mode or self._modes[-1])

    def smaller(self, rows: Calibration, place: Place) -> "Plan | None":
        """The same in the next mode that takes less there, if there is one."""
        mode = footprint.smaller(self.shapes, self._run(rows), self.way, place)
        return replace(self, mode=mode) if mode else None

    def resolved(self) -> dict[str, Any]:
        """The settings as they were resolved, for reports."""
        return {
            "bits": self.scheme.bits,
            "group": self.scheme.group_size,
            "sym": self.scheme.symmetric,
            **({"rules": [str(rule) for rule in self.rules]} if self.rules else {}),
            **self.method.resolved(),
            **({"lm_head": True} if self.lm_head else {}),
            "format": shown(self.layout.format),
            "dtype": str(self.skeleton.dtype).removeprefix("torch."),
            "device": self.skeleton.device.type,
        }

    def fingerprint(self, calibration: str) -> dict[str, Any]:
        """Everything that decides the output's bytes, flat and readable."""
        versions = provenance.versions()
        files = {
            f"source file {path.name}": provenance.identity(path, self.checkpoint.remote)
            for path in source_files(self.source, self.checkpoint)
        }
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "method": self.method.name,
            **self.resolved(),
            **({"schemes": self._digest()} if self.chosen else {}),
            "max_shard_size": self.shard,
            "calibration": calibration,
            **{f"{name} version": versions[name] for name in ("torch", "transformers")},
            "quantkit version": __version__,
            **files,
        }

    def _digest(self) -> str:
        text = "\n".join(str(rule) for rule in self.chosen)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_files(source: Source, checkpoint: Checkpoint) -> list[Path]:
    """The files of the original that decide the result."""
    names = ["config.json", *checkpoint.files]
    return [source.folder / name for name in names]


def gptq_method(
    *,
    act_order: str,
    damp: float,
    fast: bool,
    align: float | None,
    refine: int | None,
    scale_search: bool,
    bias_correction: bool,
    tokens_per_input: int | None,
    zero_min: int,
) -> Gptq:
    """The method from options. ``fast`` leaves out alignment and refinement and thins the
    statistics out, unless they are given."""
    if tokens_per_input is None and fast:
        tokens_per_input = FAST_TOKENS
    if tokens_per_input is not None and tokens_per_input < 1:
        raise UsageError("tokens-per-input must be at least 1", "10 is few, 50 are many")
    align = (0.0 if fast else 0.5) if align is None else align
    refine = (0 if fast else 2) if refine is None else refine
    if not 0 <= align <= 1:
        raise UsageError(f"align {align} is out of range", "use 0 (off) to 1")
    options = gptq.Options(
        act_order=act_order,  # type: ignore[arg-type]  # Options checks it
        damp=damp,
        search=scale_search,
        rounds=refine,
        zero_min=zero_min,
    )
    return Gptq(options, align, bias_correction, tokens_per_input)


def format_name(wanted: str, scheme: Scheme, usual: str = "gptq", ordered: bool = False) -> str:
    """The format called ``wanted``, as formats.by_name knows it. ``auto`` is ``usual``, but only
    gptq_v2 has all bits and all zero points: v1, which everything reads, for symmetric weights.
    Raises UsageError for a format that has no place for the scheme, or for inputs that belong to
    groups out of order (``ordered``)."""
    if wanted not in FORMATS:
        raise UsageError(f"format '{wanted}' is unknown", f"use {', '.join(FORMATS)}")
    name = wanted.replace("-", "_")
    if wanted == "auto":
        other = usual != "gptq" and scheme.bits in formats.by_name(usual).FORM.bits
        name = usual if other else "gptq" if scheme.symmetric else "gptq_v2"
    form = formats.by_name(name).FORM
    if scheme.bits not in form.bits:
        known = [str(bits) for bits in form.bits]
        raise UsageError(
            f"{scheme.bits} bits are not supported in the format {shown(name)}",
            f"use {' or '.join(filter(None, [', '.join(known[:-1]), known[-1]]))}",
        )
    if ordered and not form.ordered:
        raise UsageError(
            f"the format {shown(name)} has no groups that follow the activations (g_idx)",
            "use --act-order static, or --format gptq",
        )
    return name


def shown(format: str) -> str:
    """A format's name as users write it."""
    return format.replace("compressed_tensors", "compressed-tensors")


def default_out(source: Source, method: str, scheme: Scheme, target: object = None) -> Path:
    """``weblab-10b-gptq-4bit-128g`` in the current folder, ``-gptq-4.25bit`` for a ``target``."""
    if target is not None:
        return Path(f"{source.short_name}-{method}-{target}")
    group = "row" if scheme.group_size == -1 else f"{scheme.group_size}g"
    return Path(f"{source.name.rpartition('/')[2]}-{method}-{scheme.bits}bit-{group}")


def stored_dtype(plan: Plan) -> torch.dtype:
    """The dtype that config.json names: that of the dense tensors."""
    counts: dict[torch.dtype, int] = {}
    for name in plan.layout.dense:
        spec = plan.specs[name]
        if spec.dtype.is_floating_point:
            counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.nbytes
    return max(counts, key=lambda dtype: counts[dtype])


def describe(plan: Plan, rows: Calibration) -> list[str]:
    """The plan in a few lines, for people."""
    scheme, jobs = plan.scheme, plan.layout.all_jobs()
    weights = sum(job.out * job.width for job in jobs)
    tokens = sum(len(row) for row in rows.rows)
    labels = ", ".join(f"{label} {count:,}" for label, count in rows.tokens.items())
    group = "the whole row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    kind = f"to {scheme.bits} bits, {group}, {'' if scheme.symmetric else 'a'}symmetric"
    if plan.layout.own_schemes():
        kind = "to several kinds of codes"
    lines = [
        f"{plan.source.name}: {counted(len(plan.layout.jobs), 'block')}, "
        f"{counted(len(jobs), 'linear')}, "
        f"{weights / 1e6:,.1f} M weights {kind}",
        f"calibration: {counted(len(rows.rows), 'row')}, {counted(tokens, 'token')} ({labels}); "
        f"{counted(rows.used, 'document')} used, {rows.left:,} left over",
        f"output: {plan.output_bytes / 1e6:,.1f} MB, from "
        f"{plan.checkpoint.nbytes / 1e6:,.1f} MB; "
        f"{plan.bits_per_weight:.2f} bits per quantized weight",
        f"running on {plan.skeleton.device} in {str(plan.skeleton.dtype).removeprefix('torch.')}, "
        f"{plan.way}: {_memory(plan, rows)}",
    ]
    lines += rows.notes
    lines += _exceptions(plan)
    if plan.layout.dropped:
        lines.append(
            f"{len(plan.layout.dropped)} tensors that the model has no use for are left out"
        )
    return lines


def _memory(plan: Plan, rows: Calibration) -> str:
    phases = plan.memory(rows)
    about = "about" if plan.shapes.exact else "guessing"
    ram = footprint.peak(phases, "ram").bytes("ram") / 1e9
    if not plan.cuda:
        return f"{about} {ram:.1f} GB of memory at most"
    device = footprint.peak(phases, "device").bytes("device") / 1e9
    return f"{about} {device:.1f} GB of GPU memory at most, and {ram:.1f} GB of RAM"


def _exceptions(plan: Plan) -> list[str]:
    """What rules made of some linears, a line for each kind."""
    kinds = Counter(
        f"{job.scheme}{', rounded to nearest' if job.rtn else ''}" for job in plan.layout.all_jobs()
    )
    lines = []
    if len(kinds) > 1:
        lines += [f"{count} linears have {kind}" for kind, count in kinds.most_common()]
    if plan.layout.head:
        lines.append(f"one of them is the output head ({plan.layout.head.scheme})")
    if plan.layout.skipped:
        lines.append(f"{len(plan.layout.skipped)} linears stay as they are, by rule")
    return lines
