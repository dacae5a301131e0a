"""``quantkit gptq``: a full-precision model in, a measured GPTQ checkpoint out.

plan -> read -> walk -> solve -> propagate -> pack -> write -> check -> seal, one decoder block at a
time. A killed run goes on at its first unfinished block when the same call is repeated.
"""

import time
from pathlib import Path
from typing import Any

from quantkit import formats
from quantkit.core import profile, provenance, rules
from quantkit.core.calibration import Calibration
from quantkit.core.checkpoint import Checkpoint, ShardWriter
from quantkit.core.ledger import Ledger
from quantkit.core.progress import Progress
from quantkit.core.qweight import Scheme
from quantkit.core.sizes import size_in_bytes
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.methods import gptq
from quantkit.runtime import speed
from quantkit.runtime.device import pick_dtype
from quantkit.runtime.ranks import Ranks, join
from quantkit.runtime.skeleton import Skeleton
from quantkit.runtime.states import Keeping
from quantkit.runtime.tokenizer import load_tokenizer
from quantkit.workflows import budget as budgeting
from quantkit.workflows import legacy, seal
from quantkit.workflows import plan as planning
from quantkit.workflows import room as memory
from quantkit.workflows.blocks import Blocks, Files, originals
from quantkit.workflows.budget import Choice
from quantkit.workflows.calibrate import calibrate, check_enough, check_known, longest_row, too_few
from quantkit.workflows.check import TOKENS, held_out
from quantkit.workflows.layout import lay_out
from quantkit.workflows.method import Method
from quantkit.workflows.output import Output, companions, disk_errors
from quantkit.workflows.plan import Plan
from quantkit.workflows.task import Report, Task


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
    _refuse_different(task, method, ranks)
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
            progress=progress,
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
    chosen = report.seconds.get("choose", 0.0)
    report.seconds["prepare"] = time.perf_counter() - started - chosen
    for line in planning.describe(plan, rows):
        progress.note(line)
    for text in report.fallbacks:
        progress.warn(text)
    for short in (too_few(rows, plan.shapes.widest), memory.too_little(plan, room, rows)):
        if short:
            progress.warn(short)
    if task.dry_run:
        ranks.leave()
        return report

    tokens = min(TOKENS, longest or TOKENS)
    rides = held_out(tokenizer, tokens=tokens) if task.check else {}
    check_known((row for some in rides.values() for row in some), skeleton)

    def walk(plan: Plan, files: Files | None) -> None:
        states = Keeping(plan.way.states, output.scratch)
        Blocks(plan, states, files, report, rides, task.strict, progress, ranks).run()

    if not ranks.first:
        with disk_errors(output.scratch), memory.limited(on, task.max_gpu_memory):
            report.plan = memory.placed(plan, room, rows, None, ranks)
            memory.backing_off(report, progress, lambda plan: walk(plan, None))
        ranks.leave()
        return report
    hashes = provenance.hash_files(planning.source_files(source, weights), weights.remote)
    with disk_errors(output.folder), memory.limited(on, task.max_gpu_memory):
        files = _begin(plan, rows, output)
        try:
            report.plan = memory.placed(plan, room, rows, _tokens_at_once(files.ledger), ranks)
            memory.backing_off(report, progress, lambda plan: walk(plan, files))
            ranks.leave()
            if measured := profile.running():
                measured.speed = speed.products(on, skeleton.dtype)
            with report.timing("seal"):
                seal.seal(report, output, files.writer, task, hashes.result())
        finally:
            files.writer.abandon()
    report.written = True
    return report


def _refuse_different(task: Task, method: Method, ranks: Ranks) -> None:
    """Raises UsageError where processes were given different options: on every host one starts
    them by hand."""
    said = ranks.everyone({**vars(task), "method": method})
    for name, own in said[0].items():
        if any(one[name] != own for one in said):
            raise UsageError(
                f"the {ranks.size} processes were given different options ({name})",
                "start all of them with the same command",
            )


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
            lambda index, block: originals(plan, index, block),
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


def _begin(plan: Plan, rows: Calibration, output: Output) -> Files:
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
    return Files(writer, ledger)
