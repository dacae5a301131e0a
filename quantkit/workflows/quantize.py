"""``quantkit gptq``: a full-precision model in, a measured GPTQ checkpoint out.

plan -> read -> walk -> solve -> propagate -> pack -> write -> check -> seal, one decoder block at a
time. A killed run goes on at its first unfinished block when the same call is repeated.
"""

import time
from contextlib import closing
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from quantkit import formats
from quantkit.core import durations, pinned, profile, provenance, rules
from quantkit.core.calibration import Calibration
from quantkit.core.checkpoint import Checkpoint, ShardWriter
from quantkit.core.ledger import Ledger
from quantkit.core.progress import Progress, Step
from quantkit.core.qweight import Scheme
from quantkit.core.sizes import size_in_bytes
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.methods import gptq
from quantkit.runtime import gather, speed
from quantkit.runtime.device import pick_dtype
from quantkit.runtime.kernels import cpu_attention
from quantkit.runtime.ranks import Ranks, join
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.staging import Staging, staging
from quantkit.runtime.states import Keeping, States
from quantkit.runtime.tokenizer import load_tokenizer
from quantkit.runtime.walk import Block, Walk
from quantkit.workflows import budget as budgeting
from quantkit.workflows import head as heading
from quantkit.workflows import legacy, seal, stored
from quantkit.workflows import plan as planning
from quantkit.workflows import room as memory
from quantkit.workflows.ahead import Behind, one_behind
from quantkit.workflows.budget import Choice
from quantkit.workflows.calibrate import calibrate, check_enough, check_known, longest_row, shared
from quantkit.workflows.check import TOKENS, RideAlong, held_out
from quantkit.workflows.layout import Job, lay_out
from quantkit.workflows.method import Method, Originals, Outcome
from quantkit.workflows.output import Output, companions, disk_errors
from quantkit.workflows.plan import Plan
from quantkit.workflows.task import Report, Task

_DENSE = "dense"


def quantize(
    model: str,
    out: str | Path | None = None,
    *,
    bits: int = 4,
    group: int = 128,
    sym: bool = True,
    rule: str | list[str] | tuple[str, ...] = (),
    target_bits: float | None = None,
    target_size: str | None = None,
    act_order: str = "static",
    damp: float = 0.01,
    fast: bool = False,
    align: float | None = None,
    refine: int | None = None,
    scale_search: bool = True,
    bias_correction: bool = True,
    lm_head: bool = False,
    tokens_per_input: int | None = None,
    calib: str | list[str] | tuple[str, ...] = "bundled",
    calib_rows: int = 128,
    calib_seqlen: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    format: str = "auto",
    max_shard_size: str = "5GB",
    check: bool = True,
    strict: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    low_disk: bool = False,
    max_gpu_memory: str | None = None,
    max_memory: str | None = None,
    legacy_name: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantize ``model`` (``demo``, a folder, or a Hub repository) by GPTQ and write it to ``out``.

    bits             2, 3, 4 or 8
    group            inputs that share a scale: 16 to 1024, or -1 for the whole row
    sym              symmetric: the zero point is the middle of the codes
    rule             other settings for some linears: ``*.down_proj: bits=8`` (core/rules.py)
    target_bits      choose bits (and groups, up to ``group``) for every part of the model so that
                     it loses the least with so many bits a weight on average (see budget.py)
    target_size      the same, with a folder of at most this size: ``6.0GB``
    act_order        static, none or group (see methods/gptq.py)
    damp             added to the Hessian's diagonal, as a fraction of its mean
    fast             one pass of the original model; no alignment, no refinement, thinned statistics
    align, refine    how far to align (0 to 1; 0.5) and how many rounds to refine (2)
    scale_search     search scales under the Hessian rather than take them from the range
    bias_correction  let biases take up the mean error
    lm_head          quantize the output head too (not one that is tied to the embedding)
    tokens_per_input statistics from so many tokens per feature of a block's widest input (all)
    calib            calibration sources (see core/calibration.py)
    device, dtype    where, and in which precision, the model is run
    format           of the files: gptq, gptq_v2, awq or compressed-tensors; auto is gptq, for
                     asymmetric weights gptq_v2, which has all zero points
    check            measure the result on held-out text along the way
    strict           raise where a fallback would be taken
    dry_run          plan and calibrate, write nothing
    low_disk         leave the weights on the Hub, and read them tensor by tensor
    max_gpu_memory   use at most so much of the GPU (``6GB``); by default what is free
    max_memory       the same of RAM. Where there is too little for the activations of all rows,
                     they are kept in RAM or on the disk; no result depends on that
    legacy_name      a second name of the weight file, such as gptq_model-4bit-128g

    Raises UsageError for options that cannot work and QuantkitError for input that cannot be used,
    both before anything is written. An interrupted call goes on when repeated.
    """
    scheme = Scheme(bits, group, sym)
    form = planning.format_name(format, scheme, "gptq", ordered=act_order == "group")
    legacy.check(legacy_name, form)
    method = planning.gptq_method(
        act_order=act_order,
        damp=damp,
        fast=fast,
        align=align,
        refine=refine,
        scale_search=scale_search,
        bias_correction=bias_correction,
        tokens_per_input=tokens_per_input,
        zero_min=formats.by_name(form).FORM.zero_min,
    )
    task = Task(
        model=model,
        out=out,
        scheme=scheme,
        format=form,
        calib=(calib,) if isinstance(calib, str) else tuple(calib),
        calib_rows=calib_rows,
        calib_seqlen=calib_seqlen,
        seed=seed,
        device=device,
        dtype=dtype,
        max_shard_size=max_shard_size,
        check=check,
        strict=strict,
        overwrite=overwrite,
        dry_run=dry_run,
        revision=revision,
        low_disk=low_disk,
        legacy_name=legacy_name,
        rules=rules.parsed(rule),
        budget=budgeting.wanted(target_bits, target_size),
        lm_head=method if lm_head else None,
        max_gpu_memory=max_gpu_memory,
        max_memory=max_memory,
    )
    return carry_out(task, method, progress or Progress())


def carry_out(task: Task, method: Method, progress: Progress) -> Report:
    """Quantize with any method. Raises and resumes as :func:`quantize` does."""
    started = time.perf_counter()
    ranks = join()
    progress = progress if ranks.first else Progress()
    shard = size_in_bytes(task.max_shard_size)
    on = ranks.connect(task.device)
    room = memory.room(on, task.max_gpu_memory, task.max_memory, ranks)
    source = ranks.first_on_host(lambda: resolve(task.model, task.revision, low_disk=task.low_disk))
    default = planning.default_out(source, method.name, task.scheme, task.budget)
    output = Output(Path(task.out) if task.out else default, task.overwrite)
    output.keep_apart(source)
    weights = Checkpoint(source.folder, remote=source.remote)
    skeleton = Skeleton(source, weights, on, pick_dtype(task.dtype, on))
    head = task.lm_head
    layout = lay_out(skeleton, task.scheme, task.format, task.rules, head is not None)
    specs = layout.specs()
    settled = (source, skeleton, layout, task.scheme, method, specs, shard, task.rules)
    plan = Plan(*settled, lm_head=head, ranks=ranks.size)
    legacy.check_size(task.legacy_name, plan.output_bytes, shard)
    beside = sum(path.stat().st_size for path in companions(source))
    if task.budget:
        budgeting.check(plan, task.budget, beside)
    elif ranks.first:
        output.check_space(plan.output_bytes)

    tokenizer = load_tokenizer(source)
    longest = longest_row(skeleton)
    rows = ranks.from_first(
        lambda: calibrate(
            source,
            tokenizer,
            [*task.calib],
            rows=task.calib_rows,
            seqlen=task.calib_seqlen,
            longest=longest,
            seed=task.seed,
            device=on,
        )
    )
    check_enough(rows, ranks.size)
    check_known(rows.rows, skeleton)
    plan = memory.placed(plan, room, rows, None, ranks)
    report = Report(output.folder, plan, rows, ranks.size)
    if task.budget:
        with report.timing("choose"), memory.limited(on, task.max_gpu_memory):
            plan = _within(task, rows, output, beside, report, progress, ranks)
        layout, report.plan = plan.layout, plan
        if ranks.first:
            output.check_space(plan.output_bytes)
    report.fallbacks += [f"{name} stays dense: its shape cannot be packed" for name in layout.kept]
    report.fallbacks += rows.short
    if task.strict and report.fallbacks:
        raise QuantkitError(f"--strict: {report.fallbacks[0]}", "leave out --strict to allow it")
    report.seconds["prepare"] = time.perf_counter() - started
    for line in planning.describe(plan, rows):
        progress.note(line)
    for text in report.fallbacks:
        progress.warn(text)
    if text := memory.too_little(plan, room, rows):
        progress.warn(text)
    if task.dry_run:
        ranks.leave()
        return report

    tokens = min(TOKENS, longest or TOKENS)
    rides = held_out(tokenizer, tokens=tokens) if task.check else {}
    check_known((row for some in rides.values() for row in some), skeleton)

    def walk(plan: Plan, writer: ShardWriter | None, ledger: Ledger | None) -> None:
        states = Keeping(plan.way.states, output.scratch)
        _quantize_blocks(plan, states, writer, ledger, report, rides, task.strict, progress, ranks)

    if not ranks.first:
        with disk_errors(output.scratch), memory.limited(on, task.max_gpu_memory):
            report.plan = memory.placed(plan, room, rows, None, ranks)
            memory.backing_off(report, progress, lambda plan: walk(plan, None, None))
        ranks.leave()
        return report
    hashes = provenance.hash_files(planning.source_files(source, weights), weights.remote)
    with disk_errors(output.folder), memory.limited(on, task.max_gpu_memory):
        writer, ledger = _begin(plan, rows, output)
        try:
            report.plan = memory.placed(plan, room, rows, _tokens_at_once(ledger), ranks)
            memory.backing_off(report, progress, lambda plan: walk(plan, writer, ledger))
            ranks.leave()
            if measured := profile.running():
                measured.speed = speed.products(on, skeleton.dtype)
            with report.timing("seal"):
                seal.seal(report, output, writer, task, hashes.result())
        finally:
            writer.abandon()
    report.written = True
    return report


def _tokens_at_once(ledger: Ledger) -> int | None:
    """Those of the blocks that are finished: what sums come out as depends on it, a little."""
    parts = [ledger.report(part) for part in ledger]
    return next((part["tokens"] for part in reversed(parts) if "tokens" in part), None)


def _within(
    task: Task,
    rows: Calibration,
    output: Output,
    beside: int,
    report: Report,
    progress: Progress,
    ranks: Ranks,
) -> Plan:
    """The plan with the schemes that lose least under the budget, measured now, on one rank, or by
    an interrupted run."""
    plan, budget = report.plan, task.budget
    assert budget is not None

    def choose(plan: Plan, options: gptq.Options) -> Choice:
        return budgeting.choose(
            plan,
            budget,
            beside,
            rows.rows,
            Keeping(plan.way.states, output.scratch),
            lambda index, block: _originals(plan, index, block),
            options,
            progress,
        )

    def parts() -> list[dict[str, Any]]:
        fingerprint = plan.fingerprint(rows.digest) | {"target": str(budget)}
        with disk_errors(output.folder):
            known = budgeting.kept(output.partial, fingerprint)
            if known is not None:
                return known
            # zero points and the order of columns as they will be, without the last rounds
            options = gptq.Options(
                plan.method.resolved().get("act_order", "static"),
                plan.method.damp,
                rounds=0,
                zero_min=plan.packer.FORM.zero_min,
            )
            choice = memory.backing_off(report, progress, lambda plan: choose(plan, options))
            if not task.dry_run:
                budgeting.keep(output.partial, fingerprint, choice)
        return choice.parts

    choice = budgeting.again(plan, ranks.from_first(parts))
    report.budget = choice.described(budget)
    return choice.plan


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
        ledger.forget()
    return writer, ledger


def _copy_dense(plan: Plan, writer: ShardWriter | None, ledger: Ledger | None) -> None:
    """Embeddings, norms, head: as they are, but float32 becomes float16."""
    if writer is None or ledger is None or _DENSE in ledger:
        return
    for name, spec in plan.layout.dense.items():
        tensor = plan.skeleton.checkpoint.get(name)
        cast = tensor.to(spec.dtype)
        if cast.dtype != tensor.dtype and not bool(cast.isfinite().all()):
            raise QuantkitError(
                f"{name} has values that do not fit into {spec.dtype}",
                "save the model in bfloat16 first",
            )
        writer.write(name, cast)
    for name, spec in plan.layout.ones.items():
        writer.write(name, torch.ones(spec.shape, dtype=spec.dtype))
    writer.sync()
    plan.skeleton.checkpoint.release()
    ledger.finish(_DENSE, {})


def _quantize_blocks(
    plan: Plan,
    states: Keeping,
    writer: ShardWriter | None,
    ledger: Ledger | None,
    report: Report,
    rides: dict[str, list[list[int]]],
    strict: bool,
    progress: Progress,
    ranks: Ranks,
) -> None:
    threaded = _threaded(plan)
    device = plan.skeleton.device
    with one_behind(threaded, device) as behind, staging(plan.skeleton, threaded) as ahead:
        _walk_blocks(
            plan, states, writer, ledger, report, rides, strict, progress, ranks, behind, ahead
        )


def _threaded(plan: Plan) -> bool:
    """Whether threads read and write beside the computation: on a CPU they would only take cores
    and memory from it."""
    return plan.cuda and plan.way.ahead


def _walk_blocks(
    plan: Plan,
    states: Keeping,
    writer: ShardWriter | None,
    ledger: Ledger | None,
    report: Report,
    rides: dict[str, list[list[int]]],
    strict: bool,
    progress: Progress,
    ranks: Ranks,
    behind: Behind,
    ahead: Staging | None,
) -> None:
    """Each rank walks with its part of the rows; the first one has ``writer`` and ``ledger``."""
    cpu_attention.use(plan.skeleton.model)
    walk = Walk(plan.skeleton)
    ride = RideAlong(rides, plan.tokens_compared, ranks)
    everyone = shared(report.calibration.rows, plan.way.tokens, ranks.size)
    rows = everyone[ranks.part(len(everyone))]
    batches = [*rows, *ride.batches, *_other_shapes(everyone, rows)]
    finished = ranks.share(None if ledger is None else {p: ledger.report(p) for p in ledger})
    with report.timing("copy"):
        behind(_copy_dense, plan, writer, ledger)
    with report.timing("embed"), closing(walk.embedding(batches)) as hidden:
        full = states.keep(islice(hidden, len(rows)), [batch.shape for batch in rows])
        aside = islice(hidden, len(ride.batches))
        ride.start(states.keep(aside, [batch.shape for batch in ride.batches]))
        for _ in hidden:  # other shapes are only made known
            pass
        quantized = full.copy() if plan.method.aligned else None
    solved_before = sum(walk.block_name(index) in finished for index in range(len(walk)))
    if solved_before:
        progress.note(f"going on: {solved_before} blocks are solved already, they are only run")
    parts = len(walk) + (plan.layout.head is not None)
    progress.begin("quantizing", parts)
    for index, jobs in enumerate(plan.layout.jobs):
        started = time.perf_counter()
        part = walk.block_name(index)
        if ahead:
            with report.timing("read"):
                ahead.arrived(part)
        with walk.block(index) as block:
            if ahead and index + 1 < len(walk):
                ahead.begin(walk.block_name(index + 1))
            with report.timing("check"):
                ride.before(block)
            if part in finished:
                done = finished[part]
                with report.timing("replay"):
                    gather.advance(block, full)
                    stored.put_finished(plan, index, block, writer, done["others"], ranks)
            else:
                with report.timing("solve"):
                    outcome = _solve(plan, index, block, full, quantized, ranks)
                if measured := profile.running():
                    tokens = sum(batch.numel() for batch in rows)
                    measured.add(durations.least(plan.shapes.blocks[index], tokens))
                done = _described(jobs, outcome) | {"tokens": plan.way.tokens}
                with report.timing("write"):
                    behind(_keep, plan, index, outcome, writer, ledger, part, done)
            if quantized is not None and index + 1 < len(walk):
                with report.timing("propagate"):
                    gather.advance(block, quantized)
            with report.timing("check"):
                ride.after(block)
        plan.skeleton.checkpoint.release()
        loss = _tell(jobs, done["layers"], plan, report, strict, progress)
        progress.step(Step(index + 1, parts, part, loss, time.perf_counter() - started))
    job = plan.layout.head
    if job:
        with report.timing("write"):  # writer and ledger are used here now
            behind.finish()
        started = time.perf_counter()
        done = finished.get(job.name)
        if done is None:
            done = _quantize_head(plan, job, walk, rows, full, writer, ledger, report, ranks)
        loss = _tell([job], done["layers"], plan, report, strict, progress)
        progress.step(Step(parts, parts, job.name, loss, time.perf_counter() - started))
    progress.end()
    if rides:
        with report.timing("check"):
            head = heading.written(plan, job, writer, ranks) if job else None
            report.measured = ride.finish(walk, head)
    with report.timing("write"):
        behind.finish()


def _other_shapes(everyone: list[Tensor], own: list[Tensor]) -> list[Tensor]:
    """A micro-batch of every shape that only other ranks have."""
    known = {batch.shape for batch in own}
    found = {batch.shape: batch for batch in everyone if batch.shape not in known}
    return [*found.values()]


def _keep(
    plan: Plan,
    index: int,
    outcome: Outcome,
    writer: ShardWriter | None,
    ledger: Ledger | None,
    part: str,
    done: dict[str, Any],
) -> None:
    """A block into the output's files and then into the ledger, while the next one computes."""
    if writer and ledger is not None:
        for name, found in stored.write(plan, index, outcome, writer).items():
            done["layers"][name]["digest"] = found
        ledger.finish(part, done)


def _quantize_head(
    plan: Plan,
    job: Job,
    walk: Walk,
    rows: list[Tensor],
    full: States,
    writer: ShardWriter | None,
    ledger: Ledger | None,
    report: Report,
    ranks: Ranks,
) -> dict[str, Any]:
    """The last part: ``full`` is what the original model gives its final norm for ``rows``."""
    with report.timing("solve"):
        outcome = heading.solve(plan, job, walk, rows, full, ranks)
    done = _described([job], outcome)
    if writer and ledger is not None:
        with report.timing("write"):
            solved = outcome.linears[job.inner]
            stored.write_linear(plan, job, solved, writer)
            done["layers"][job.disk]["digest"] = stored.digest_of(plan, job, solved, writer)
            writer.sync()
        ledger.finish(job.name, done)
    return done


def _solve(
    plan: Plan,
    index: int,
    block: Block,
    full: States,
    quantized: States | None,
    ranks: Ranks,
) -> Outcome:
    """The method on a block, with the checkpoint's own weights at hand."""
    return plan.method.solve(block, _originals(plan, index, block), full, quantized, ranks)


def _originals(plan: Plan, index: int, block: Block) -> Originals:
    skeleton = plan.skeleton
    jobs = {job.inner: job for job in plan.layout.jobs[index]}

    def get(disk: str) -> Tensor:
        # in two steps: in one, the CPU would make a float32 copy first
        return pinned.carried(skeleton.read(disk), skeleton.device).float()

    def weight(name: str) -> Tensor:
        tensor = get(f"{jobs[name].disk}.weight")
        return tensor.T.contiguous() if isinstance(block.linear(name), Conv1D) else tensor

    def bias(name: str) -> Tensor | None:
        return get(f"{jobs[name].disk}.bias") if jobs[name].bias else None

    def other(name: str) -> tuple[Tensor, torch.dtype]:
        disk = plan.disk_name(index, name)
        return get(disk), plan.specs[disk].dtype

    schemes = {name: job.scheme for name, job in jobs.items()}
    plain = {name for name, job in jobs.items() if job.rtn}
    return Originals(schemes, weight, bias, other, plain)


def _described(jobs: list[Job], outcome: Outcome) -> dict[str, Any]:
    """A finished block in the ledger. Here, and once, it is waited for what a GPU has computed."""
    results = [outcome.linears[job.inner] for job in jobs]
    errors = torch.stack([solved.error for solved in results]).tolist() if results else []
    layers = {
        job.disk: {
            "error": error,
            "damp": solved.damp,
            "dead": solved.dead,
            "method": solved.method,
            **solved.notes,
        }
        for job, solved, error in zip(jobs, results, errors)
    }
    return {"layers": layers, "others": list(outcome.others)}


def _tell(
    jobs: list[Job],
    layers: dict[str, dict[str, Any]],
    plan: Plan,
    report: Report,
    strict: bool,
    progress: Progress,
) -> float | None:
    """Take a finished part into the report; returns its mean error."""
    report.layers |= layers
    _count_fallbacks(jobs, layers, plan, report, strict, progress)
    errors = [layers[job.disk]["error"] for job in jobs]
    return sum(errors) / len(errors) if errors else None


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
        if layer["damp"] > plan.method.damp:
            found.append(
                f"{job.disk} needed a damping of {layer['damp']:g} (statistics are exact with "
                "--dtype float32)"
            )
        if layer["method"] == "rtn" and not job.rtn:
            found.append(f"{job.disk} was only rounded: no calibration token reached it")
        if not isfinite(layer["error"]):
            raise QuantkitError(f"{job.disk} has an error that is not a number")
    if found and strict:
        raise QuantkitError(f"--strict: {found[0]}", "leave out --strict to allow it")
    for text in found:
        progress.warn(text)
    report.fallbacks += found
