"""``quantkit awq``: activation-aware scaling, then the recipe of quantize.py."""

from pathlib import Path
from typing import cast

from quantkit import formats
from quantkit.core import rules
from quantkit.core.progress import Progress
from quantkit.core.qweight import Scheme
from quantkit.errors import UsageError
from quantkit.workflows import plan as planning
from quantkit.workflows.awq_block import Awq, Refine
from quantkit.workflows.budget import wanted
from quantkit.workflows.quantize import carry_out
from quantkit.workflows.task import Report, Task


def quantize_awq(
    model: str,
    out: str | Path | None = None,
    *,
    bits: int = 4,
    group: int = 128,
    sym: bool = False,
    rule: str | list[str] | tuple[str, ...] = (),
    target_bits: float | None = None,
    target_size: str | None = None,
    refine: str = "gptq",
    align: float | None = None,
    damp: float = 0.01,
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
    progress: Progress | None = None,
) -> Report:
    """Quantize ``model`` (``demo``, a folder, or a Hub repository) by AWQ and write it to ``out``.

    rule, target_bits, target_size  other bits for some linears, as in quantize
    refine   how scaled weights are rounded: gptq (scales and GPTQ together), or none: to nearest,
             within ranges that are searched, as AWQ does
    align    with refine gptq: how far targets go towards undoing earlier errors (0 to 1; 0.5)
    format   of the files: awq (4 bits), compressed-tensors, gptq, gptq_v2; auto is awq for 4 bits
             and else one of GPTQ's

    Everything else is as for workflows.quantize.quantize, and so is what is raised.
    """
    if refine == "none" and align:
        raise UsageError("align has no meaning with --refine none", "leave one of them out")
    scheme = Scheme(bits, group, sym)
    form = planning.format_name(format, scheme, "awq")
    settings = planning.gptq_method(
        act_order="static",
        damp=damp,
        fast=False,
        align=0.0 if refine == "none" else align,
        refine=0 if refine == "none" else None,
        scale_search=True,
        bias_correction=True,
        tokens_per_input=None,
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
        rules=rules.parsed(rule),
        budget=wanted(target_bits, target_size),
        max_gpu_memory=max_gpu_memory,
        max_memory=max_memory,
    )
    progress = progress or Progress()
    report = carry_out(task, Awq(cast(Refine, refine), settings), progress)
    if report.written and not report.pairs():
        progress.warn("nothing in this architecture could be scaled: weights were only rounded")
    return report
