"""``quantkit rtn``: every weight to the nearest level, without calibration.

Shard by shard, with the weights of one linear in memory; no model runs. It is the baseline that any
method has to beat.
"""

from pathlib import Path

from torch import Tensor

from quantkit import formats
from quantkit.core.form import Form
from quantkit.core.progress import Progress
from quantkit.core.qweight import Scheme
from quantkit.core.source import Source, resolve
from quantkit.errors import UsageError
from quantkit.formats import gguf
from quantkit.methods import rtn
from quantkit.runtime.opened import open_checkpoint
from quantkit.workflows import convert_targets
from quantkit.workflows.convert import carry
from quantkit.workflows.convert_record import Conversion
from quantkit.workflows.output import Output
from quantkit.workflows.rounded import Rounded, Rounding


def quantize_rtn(
    model: str,
    out: str | Path | None = None,
    *,
    bits: int | None = None,
    group: int | None = None,
    sym: bool | None = None,
    format: str = "auto",
    max_shard_size: str = "5GB",
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    low_disk: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Round the linears inside the blocks of ``model`` (``demo``, a folder, or a Hub repository) to
    nearest and write it to ``out``. Everything else stays as it is, but float32 becomes float16.

    bits           2, 3, 4 (the default), 8, and what else the format has
    group          inputs that share a scale (128; 32 for gguf), or -1 for the whole row
    sym            symmetric codes (the default, where the format has them)
    format         auto (gptq when symmetric, else gptq_v2), gptq, gptq_v2, awq, compressed-tensors,
                   mlx, or gguf:TYPE with the types q4_0, q4_1, q5_0, q5_1, q8_0
    pre_tokenizer  GGUF's name for the tokenizer's first step, where it is not recognised
    low_disk       leave the weights on the Hub, and read them tensor by tensor

    Raises UsageError for what the format does not have, QuantkitError for a model that cannot be
    quantized, both before anything is written. An interrupted call goes on when repeated.
    """
    if format == "auto":
        format = "gptq" if sym is not False else "gptq_v2"
    form = _form(format)
    scheme = _scheme(form, format, bits, group, sym)

    def rounder(weight: Tensor) -> Rounding:
        return Rounding(
            rtn.quantize(weight, scheme, form.zero_min, offset=form.offset, signed=True)
        )

    if pre_tokenizer and not format.startswith("gguf"):
        raise UsageError(f"--pre-tokenizer is for GGUF files, and {format} is none", "leave it out")
    settings = {"bits": scheme.bits, "group": scheme.group_size, "sym": scheme.symmetric}
    source = resolve(model, revision, low_disk=low_disk)
    opened = Rounded(open_checkpoint(source), rounder, "rtn", settings, halve=True)
    target = convert_targets.target(format, opened, lossy=False, pre_tokenizer=pre_tokenizer)
    return carry(
        opened,
        target,
        format,
        Output(Path(out) if out else default_out(source, format, scheme), overwrite),
        settings={"method": "rtn", **settings, "pre_tokenizer": pre_tokenizer},
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        progress=progress,
    )


def _form(format: str) -> Form:
    """What numbers the format holds. Raises UsageError for what is no integer format."""
    name, kind = convert_targets.parse(format)
    if name == "gguf" and (kind or "").upper() in gguf.FORMS:
        return gguf.FORMS[(kind or "").upper()]
    if name not in formats.TARGETS:
        known = "gptq, gptq_v2, awq, compressed-tensors, mlx"
        types = ", ".join(f"gguf:{type.lower()}" for type in gguf.FORMS)
        raise UsageError(f"'{format}' does not hold rounded integers", f"use {known}, {types}")
    return formats.by_name(name).FORM


def _scheme(
    form: Form, format: str, bits: int | None, group: int | None, sym: bool | None
) -> Scheme:
    """The scheme that was asked for; a format that has only one answers what was not."""
    fixed = len(form.bits) == 1 and bool(form.groups)  # GGUF: the type says it all
    if fixed:
        bits = form.bits[0] if bits is None else bits
        group = form.groups[0] if group is None else group
    bits = 4 if bits is None else bits
    group = 128 if group is None else group
    if bits not in form.bits:
        raise UsageError(
            f"{format} has no codes of {bits!r} bits", f"use {', '.join(map(str, form.bits))}"
        )
    if form.groups and group not in form.groups:
        sizes = ", ".join(map(str, form.groups))
        raise UsageError(f"{format} has no groups of {group}", f"use --group {sizes}")
    own = form.offset != "minimum"
    if sym is not None and fixed and sym != own:
        raise UsageError(
            f"{format} is {'' if own else 'a'}symmetric",
            "leave out --sym and --asym: the type says which it is",
        )
    return Scheme(bits, group, own if sym is None else sym)


def default_out(source: Source, format: str, scheme: Scheme) -> Path:
    """``weblab-10b-rtn-4bit-128g`` in the current folder, with the format where it says more."""
    group = "row" if scheme.group_size == -1 else f"{scheme.group_size}g"
    shape = format.replace(":", "-") if ":" in format else f"{scheme.bits}bit-{group}"
    other = f"-{format}" if format in ("awq", "mlx", "compressed-tensors") else ""
    return Path(f"{source.short_name}-rtn-{shape}{other}")
