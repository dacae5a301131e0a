"""``quantkit gptq``: a full-precision model in, a measured GPTQ checkpoint out.

plan -> read -> walk -> solve -> propagate -> pack -> write -> check -> seal, one decoder block at a
time. A killed run goes on at its first unfinished block when the same call is repeated.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from quantkit.core import provenance
from quantkit.core.calibration import Calibration
from quantkit.core.checkpoint import Checkpoint, ShardWriter
from quantkit.core.ledger import Ledger
from quantkit.core.metrics import Comparison
from quantkit.core.progress import Progress, Step
from quantkit.core.qweight import QWeight
from quantkit.core.sizes import size_in_bytes
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import gptq as gptq_format
from quantkit.runtime import gather
from quantkit.runtime.device import pick_device, pick_dtype
from quantkit.runtime.kernels import cpu_attention
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.tokenizer import load_tokenizer
from quantkit.runtime.walk import Block, Walk
from quantkit.workflows import plan as planning
from quantkit.workflows import seal
from quantkit.workflows.calibrate import batches, calibrate, longest_row
from quantkit.workflows.check import TOKENS, RideAlong, held_out
from quantkit.workflows.gptq_block import Solved, put, solve_block
from quantkit.workflows.layout import Job, lay_out
from quantkit.workflows.output import Output, disk_errors
from quantkit.workflows.plan import Plan

_DENSE = "dense"


@dataclass
class Report:
    """What a quantization did.

    layers     by name on disk: relative output error, damping, dead inputs, method
    fallbacks  every place where something other than the asked-for was done, in words
    measured   the quantized model against the original, on held-out text; None with check=False
    seconds    by phase
    """

    folder: Path
    plan: Plan
    calibration: Calibration
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    measured: Comparison | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    written: bool = False

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Add the time that this takes to ``seconds``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def quantize(
    model: str,
    out: str | Path | None = None,
    *,
    bits: int = 4,
    group: int = 128,
    sym: bool = True,
    act_order: str = "static",
    damp: float = 0.01,
    fast: bool = False,
    align: float | None = None,
    refine: int | None = None,
    scale_search: bool = True,
    bias_correction: bool = True,
    tokens_per_input: int | None = None,
    calib: str | list[str] | tuple[str, ...] = "bundled",
    calib_rows: int = 128,
    calib_seqlen: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    checkpoint_format: str = "auto",
    max_shard_size: str = "5GB",
    check: bool = True,
    strict: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantize ``model`` (``demo``, a folder, or a Hub repository) to GPTQ and write it to ``out``.

    bits             2, 3, 4 or 8
    group            inputs that share a scale: 16 to 1024, or -1 for the whole row
    sym              symmetric: the zero point is the middle of the codes
    act_order        static, none or group (see methods/gptq.py)
    damp             added to the Hessian's diagonal, as a fraction of its mean
    fast             one pass of the original model; no alignment, no refinement, thinned statistics
    align, refine    how far to align (0 to 1; 0.5) and how many rounds to refine (2)
    scale_search     search scales under the Hessian rather than take them from the range
    bias_correction  let biases take up the mean error
    tokens_per_input statistics from so many tokens per feature of a block's widest input (all)
    calib            calibration sources (see core/calibration.py)
    device, dtype    where, and in which precision, the model is run
    check            measure the result on held-out text along the way
    strict           raise where a fallback would be taken
    dry_run          plan and calibrate, write nothing

    Raises UsageError for options that cannot work and QuantkitError for input that cannot be used,
    both before anything is written. An interrupted call goes on when repeated.
    """
    progress = progress or Progress()
    started = time.perf_counter()
    convention = planning.zero_convention(checkpoint_format, sym)
    settings = planning.block_settings(
        bits=bits,
        group=group,
        sym=sym,
        act_order=act_order,
        damp=damp,
        fast=fast,
        align=align,
        refine=refine,
        scale_search=scale_search,
        bias_correction=bias_correction,
        tokens_per_input=tokens_per_input,
        convention=convention,
    )
    shard = size_in_bytes(max_shard_size)
    on = pick_device(device)
    source = resolve(model, revision)
    output = Output(Path(out) if out else planning.default_out(source, settings), overwrite)
    skeleton = Skeleton(source, Checkpoint(source.folder), on, pick_dtype(dtype, on))
    layout = lay_out(skeleton, settings.scheme)
    specs = layout.specs(settings.scheme)
    plan = Plan(source, skeleton, layout, settings, convention, specs, shard)
    output.check_space(plan.output_bytes)

    tokenizer = load_tokenizer(source)
    longest = longest_row(skeleton)
    rows = calibrate(
        source,
        tokenizer,
        [calib] if isinstance(calib, str) else list(calib),
        rows=calib_rows,
        seqlen=calib_seqlen,
        longest=longest,
        seed=seed,
        device=on,
    )
    report = Report(output.folder, plan, rows)
    report.fallbacks += [f"{name} stays dense: its shape cannot be packed" for name in layout.kept]
    report.fallbacks += rows.short
    if strict and report.fallbacks:
        raise QuantkitError(f"--strict: {report.fallbacks[0]}", "leave out --strict to allow it")
    report.seconds["prepare"] = time.perf_counter() - started
    for line in planning.describe(plan, rows):
        progress.note(line)
    for text in report.fallbacks:
        progress.warn(text)
    if dry_run:
        return report

    hashes = provenance.hash_files(planning.source_files(source, skeleton.checkpoint))
    with disk_errors(output.folder):
        writer, ledger = _begin(plan, rows, output)
        try:
            _copy_dense(plan, writer, ledger, report)
            rides = held_out(tokenizer, tokens=min(TOKENS, longest or TOKENS)) if check else {}
            _quantize_blocks(plan, writer, ledger, report, rides, strict, progress)
            with report.timing("seal"):
                seal.seal(report, output, writer, [*_names(calib)], hashes.result())
        finally:
            writer.abandon()
    report.written = True
    return report


def _names(calib: str | list[str] | tuple[str, ...]) -> list[str]:
    return [calib] if isinstance(calib, str) else list(calib)


def _begin(plan: Plan, rows: Calibration, output: Output) -> tuple[ShardWriter, Ledger]:
    """Start in the partial folder, or go on there."""
    output.begin()
    fingerprint = plan.fingerprint(rows.digest)
    try:
        ledger = Ledger(output.partial, fingerprint)
    except UsageError:
        if not output.overwrite:
            raise
        output.discard()
        output.begin()
        ledger = Ledger(output.partial, fingerprint)
    writer = ShardWriter(output.partial, plan.specs, plan.shard)
    if len(ledger) and not writer.complete:  # somebody removed files that it calls finished
        ledger.remove()
        ledger = Ledger(output.partial, fingerprint)
    return writer, ledger


def _copy_dense(plan: Plan, writer: ShardWriter, ledger: Ledger, report: Report) -> None:
    """Embeddings, norms, head: as they are, but float32 becomes float16."""
    if _DENSE in ledger:
        return
    with report.timing("copy"):
        for name, spec in plan.layout.dense.items():
            tensor = plan.skeleton.checkpoint.get(name)
            stored = tensor.to(spec.dtype)
            if stored.dtype != tensor.dtype and not bool(stored.isfinite().all()):
                raise QuantkitError(
                    f"{name} has values that do not fit into {spec.dtype}",
                    "save the model in bfloat16 first",
                )
            writer.write(name, stored)
        writer.sync()
    ledger.finish(_DENSE, {})


def _quantize_blocks(
    plan: Plan,
    writer: ShardWriter,
    ledger: Ledger,
    report: Report,
    rides: dict[str, list[list[int]]],
    strict: bool,
    progress: Progress,
) -> None:
    cpu_attention.use(plan.skeleton.model)
    walk = Walk(plan.skeleton)
    ride = RideAlong(rides)
    rows = batches(report.calibration.rows, plan.tokens_at_once)
    with report.timing("embed"):
        hidden = walk.embed(rows + ride.batches)
    full = gather.copied(hidden[: len(rows)])
    ride.start(hidden[len(rows) :])
    del hidden
    quantized = gather.copied(full) if plan.aligned else None
    solved_before = sum(walk.block_name(index) in ledger for index in range(len(walk)))
    if solved_before:
        progress.note(f"going on: {solved_before} blocks are solved already, they are only run")
    progress.begin("quantizing", len(walk))
    for index, jobs in enumerate(plan.layout.jobs):
        started = time.perf_counter()
        part = walk.block_name(index)
        with walk.block(index) as block:
            ride.before(block)
            if part in ledger:
                with report.timing("replay"):
                    gather.advance(block, full)
                    _put_finished(plan, jobs, block, writer)
            else:
                with report.timing("solve"):
                    solved = _solve(plan, jobs, block, full, quantized)
                with report.timing("write"):
                    _write(plan, jobs, solved, writer)
                ledger.finish(part, _described(jobs, solved))
            if quantized is not None and index + 1 < len(walk):
                with report.timing("propagate"):
                    gather.advance(block, quantized)
            ride.after(block)
        report.layers |= ledger.report(part)
        _count_fallbacks(jobs, ledger.report(part), plan, report, strict, progress)
        errors = [ledger.report(part)[job.disk]["error"] for job in jobs]
        loss = sum(errors) / len(errors) if errors else None
        progress.step(Step(index + 1, len(walk), part, loss, time.perf_counter() - started))
    progress.end()
    if rides:
        with report.timing("check"):
            report.measured = ride.finish(walk)


def _solve(
    plan: Plan, jobs: list[Job], block: Block, full: list[Tensor], quantized: list[Tensor] | None
) -> dict[str, Solved]:
    """Every job of the block, by its name in the block."""
    skeleton = plan.skeleton
    names = {job.inner: job for job in jobs}

    def weight(name: str) -> Tensor:
        tensor = skeleton.checkpoint.get(f"{names[name].disk}.weight")
        tensor = tensor.to(skeleton.device, torch.float32)
        return tensor.T.contiguous() if isinstance(block.linear(name), Conv1D) else tensor

    def bias(name: str) -> Tensor | None:
        if not names[name].bias:
            return None
        tensor = skeleton.checkpoint.get(f"{names[name].disk}.bias")
        return tensor.to(skeleton.device, torch.float32)

    return solve_block(block, names, weight, full, quantized, plan.settings, bias)


def _write(plan: Plan, jobs: list[Job], solved: dict[str, Solved], writer: ShardWriter) -> None:
    """Pack, write, and see that what is in the file unpacks to what was solved."""
    for job in jobs:
        result = solved[job.inner]
        tensors = gptq_format.pack(result.qweight, plan.convention)
        if job.bias:
            assert result.bias is not None
            tensors["bias"] = result.bias
        for suffix, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise QuantkitError(f"{job.disk}.{suffix} does not fit into float16")
            writer.write(f"{job.disk}.{suffix}", tensor)
        if not _read(plan, job, writer).identical(result.qweight.to("cpu")):
            raise QuantkitError(f"{job.disk} was written, but reads back differently")
    writer.sync()


def _read(plan: Plan, job: Job, writer: ShardWriter) -> QWeight:
    suffixes = gptq_format.specs(job.out, job.width, plan.settings.scheme)
    tensors = {suffix: writer.read(f"{job.disk}.{suffix}") for suffix in suffixes}
    return gptq_format.unpack(tensors, plan.settings.scheme, plan.convention, job.disk)


def _put_finished(plan: Plan, jobs: list[Job], block: Block, writer: ShardWriter) -> None:
    """Give the block the quantized weights of an earlier, interrupted run."""
    for job in jobs:
        bias = writer.read(f"{job.disk}.bias") if job.bias else None
        put(block, job.inner, _read(plan, job, writer), bias)


def _described(jobs: list[Job], solved: dict[str, Solved]) -> dict[str, dict[str, Any]]:
    return {
        job.disk: {
            "error": solved[job.inner].error,
            "damp": solved[job.inner].damp,
            "dead": solved[job.inner].dead,
            "method": solved[job.inner].method,
        }
        for job in jobs
    }


def _count_fallbacks(
    jobs: list[Job],
    described: dict[str, dict[str, Any]],
    plan: Plan,
    report: Report,
    strict: bool,
    progress: Progress,
) -> None:
    found = []
    for job in jobs:
        layer = described[job.disk]
        if layer["damp"] > plan.settings.options.damp:
            found.append(
                f"{job.disk} needed a damping of {layer['damp']:g} (statistics are exact with "
                "--dtype float32)"
            )
        if layer["method"] != "gptq":
            found.append(f"{job.disk} was only rounded: no calibration token reached it")
        if not isfinite(layer["error"]):
            raise QuantkitError(f"{job.disk} has an error that is not a number")
    if found and strict:
        raise QuantkitError(f"--strict: {found[0]}", "leave out --strict to allow it")
    for text in found:
        progress.warn(text)
    report.fallbacks += found
