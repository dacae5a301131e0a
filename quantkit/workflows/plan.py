"""What is decided, and what can be refused, before the first byte is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.core import provenance
from quantkit.core.calibration import Calibration
from quantkit.core.checkpoint import Checkpoint, TensorSpec
from quantkit.core.qweight import Scheme
from quantkit.core.source import Source
from quantkit.errors import UsageError
from quantkit.formats import gptq as gptq_format
from quantkit.formats.gptq import Convention
from quantkit.methods import gptq
from quantkit.runtime.skeleton import Skeleton
from quantkit.workflows.gptq_block import Settings
from quantkit.workflows.layout import Layout

CHECKPOINT_FORMATS = ("auto", "gptq", "gptq_v2")
_BASE = 350 << 20  # Python, torch and transformers
# Tokens per feature of the widest input. Instead of all (32 on neox, 85 on the demo), 10 cost 2 to
# 3 % in KL and save a fifth of the time.
_FAST_TOKENS = 10
_CUDA_TOKENS, _CPU_TOKENS = 16384, 2048


@dataclass(frozen=True)
class Plan:
    """A quantization that can be carried out.

    settings   how blocks are solved
    convention how zero points are stored
    specs      every tensor of the output, by its name on disk
    shard      most bytes in one file
    """

    source: Source
    skeleton: Skeleton
    layout: Layout
    settings: Settings
    convention: Convention
    specs: dict[str, TensorSpec]
    shard: int

    @property
    def aligned(self) -> bool:
        return self.settings.align > 0

    @property
    def tokens_at_once(self) -> int:
        """Tokens in a micro-batch: what keeps the device busy and its caches warm."""
        return _CUDA_TOKENS if self.skeleton.device.type == "cuda" else _CPU_TOKENS

    @property
    def output_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of all packed tensors per quantized weight: codes, scales, zeros."""
        jobs = self.layout.all_jobs()
        packed = sum(
            self.specs[f"{job.disk}.{suffix}"].nbytes
            for job in jobs
            for suffix in ("qweight", "qzeros", "scales")
        )
        return 8 * packed / sum(job.out * job.width for job in jobs)

    def peak_memory(self, tokens: int) -> int:
        """Bytes that calibrating with ``tokens`` tokens takes at most, roughly: the hidden states,
        one block, and what solving its largest linear needs."""
        skeleton, jobs = self.skeleton, self.layout.all_jobs()
        item = skeleton.dtype.itemsize
        hidden = skeleton.config.get_text_config().hidden_size
        states = tokens * hidden * item * (3 if self.aligned else 1)
        blocks = [sum(job.out * job.width for job in block) * item for block in self.layout.jobs]
        widest = max(jobs, key=lambda job: job.width)
        grams = 4 * sum(w * w for w in {job.width for job in self.layout.jobs[0]})
        solving = 4 * (3 * widest.width**2 + 6 * max(job.out * job.width for job in jobs))
        return _BASE + states + max(blocks) + grams + solving

    def resolved(self) -> dict[str, Any]:
        """The settings as they were resolved, for reports."""
        scheme, options = self.settings.scheme, self.settings.options
        return {
            "bits": scheme.bits,
            "group": scheme.group_size,
            "sym": scheme.symmetric,
            "act_order": options.act_order,
            "damp": options.damp,
            "align": self.settings.align,
            "refine": options.rounds,
            "scale_search": options.search,
            "bias_correction": self.settings.bias_correction,
            "tokens_per_input": self.settings.tokens_per_input or "all",
            "zero_convention": self.convention,
            "dtype": str(self.skeleton.dtype).removeprefix("torch."),
            "device": self.skeleton.device.type,
        }

    def fingerprint(self, calibration: str) -> dict[str, Any]:
        """Everything that decides the output's bytes, flat and readable."""
        versions = provenance.versions()
        files = {
            f"source file {path.name}": f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns}"
            for path in source_files(self.source, self.skeleton.checkpoint)
        }
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            **self.resolved(),
            "max_shard_size": self.shard,
            "calibration": calibration,
            **{f"{name} version": versions[name] for name in ("torch", "transformers")},
            "quantkit version": __version__,
            **files,
        }


def source_files(source: Source, checkpoint: Checkpoint) -> list[Path]:
    """The files of the original that decide the result."""
    names = ["config.json", *checkpoint.files]
    return [source.folder / name for name in names]


def block_settings(
    *,
    bits: int,
    group: int,
    sym: bool,
    act_order: str,
    damp: float,
    fast: bool,
    align: float | None,
    refine: int | None,
    scale_search: bool,
    bias_correction: bool,
    tokens_per_input: int | None,
    convention: Convention,
) -> Settings:
    """Settings from options. ``fast`` leaves out alignment and refinement and thins the statistics
    out, unless they are given."""
    if tokens_per_input is None and fast:
        tokens_per_input = _FAST_TOKENS
    if tokens_per_input is not None and tokens_per_input < 1:
        raise UsageError("tokens-per-input must be at least 1", "10 is few, 50 are many")
    if bits not in gptq_format.BITS:
        raise UsageError(f"{bits} bits are not supported", "use 2, 3, 4 or 8")
    align = (0.0 if fast else 0.5) if align is None else align
    refine = (0 if fast else 2) if refine is None else refine
    if not 0 <= align <= 1:
        raise UsageError(f"align {align} is out of range", "use 0 (off) to 1")
    options = gptq.Options(
        act_order=act_order,  # type: ignore[arg-type]  # Options checks it
        damp=damp,
        search=scale_search,
        rounds=refine,
        zero_min=1 if convention == "v1" and not sym else 0,
    )
    return Settings(Scheme(bits, group, sym), options, align, bias_correction, tokens_per_input)


def zero_convention(checkpoint_format: str, sym: bool) -> Convention:
    """``auto``: v1, which everything reads, for symmetric weights, v2 for asymmetric ones (v1 has
    no zero point 0)."""
    if checkpoint_format not in CHECKPOINT_FORMATS:
        raise UsageError(
            f"checkpoint format '{checkpoint_format}' is unknown", "use auto, gptq or gptq_v2"
        )
    if checkpoint_format == "auto":
        return "v1" if sym else "v2"
    return "v1" if checkpoint_format == "gptq" else "v2"


def default_out(source: Source, settings: Settings) -> Path:
    """``weblab-10b-gptq-4bit-128g`` in the current folder."""
    scheme = settings.scheme
    group = "row" if scheme.group_size == -1 else f"{scheme.group_size}g"
    return Path(f"{source.name.rpartition('/')[2]}-gptq-{scheme.bits}bit-{group}")


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
    scheme, jobs = plan.settings.scheme, plan.layout.all_jobs()
    weights = sum(job.out * job.width for job in jobs)
    tokens = sum(len(row) for row in rows.rows)
    labels = ", ".join(f"{label} {count:,}" for label, count in rows.tokens.items())
    group = "the whole row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    lines = [
        f"{plan.source.name}: {len(plan.layout.jobs)} blocks, {len(jobs)} linears, "
        f"{weights / 1e6:,.1f} M weights to {scheme.bits} bits, {group}, {kind}",
        f"calibration: {len(rows.rows)} rows, {tokens:,} tokens ({labels}); "
        f"{rows.used} documents used, {rows.left} left over",
        f"output: {plan.output_bytes / 1e6:,.1f} MB, from "
        f"{plan.skeleton.checkpoint.nbytes / 1e6:,.1f} MB; "
        f"{plan.bits_per_weight:.2f} bits per quantized weight",
        f"running on {plan.skeleton.device} in {str(plan.skeleton.dtype).removeprefix('torch.')}, "
        f"about {plan.peak_memory(tokens) / 1e9:.1f} GB of memory at most",
    ]
    lines += rows.notes
    if plan.layout.dropped:
        lines.append(
            f"{len(plan.layout.dropped)} tensors that the model has no use for are left out"
        )
    return lines
