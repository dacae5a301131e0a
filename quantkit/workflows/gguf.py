"""``quantkit gguf``: a full-precision model in, one file for llama.cpp out.

Q4_0, Q4_1, Q8_0   with calibration: GPTQ on groups of 32, which are the file's blocks, so that
                   nothing is rounded a second time
Q5_0, Q5_1, and    rounded to nearest
without calibration
K types            llama.cpp rounds, weighing inputs by their mean squares with calibration
F16, BF16, F32     as they are
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.core import calibration
from quantkit.core.progress import Progress
from quantkit.core.provenance import FILE
from quantkit.core.sizes import size_in_bytes
from quantkit.core.source import Source, resolve
from quantkit.errors import UsageError
from quantkit.formats import gguf as blocks
from quantkit.formats import imatrix
from quantkit.methods import rtn
from quantkit.runtime.opened import Opened, open_checkpoint
from quantkit.workflows.convert import begin, carry, fingerprint_of
from quantkit.workflows.convert_gguf import GgufTarget
from quantkit.workflows.convert_kquants import TYPES, KQuantTarget
from quantkit.workflows.convert_record import Conversion
from quantkit.workflows.importance import importance
from quantkit.workflows.output import Output, disk_errors
from quantkit.workflows.quantize import quantize
from quantkit.workflows.rounded import Rounded, Rounding

PLAIN = ("F16", "BF16", "F32")
# bits that GPTQ has: not 5
_GPTQ = {"Q4_0": {"bits": 4, "sym": True}, "Q4_1": {"bits": 4, "sym": False}}
_GPTQ["Q8_0"] = {"bits": 8, "sym": True}
_CALIBRATED = ("Q4_0", "Q4_1", *TYPES)  # unless --calib says otherwise
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class _Run:
    """What all kinds of runs need."""

    source: Source
    opened: Opened
    kind: str
    types: dict[str, str]
    pre_tokenizer: str | None
    output: Output
    dry_run: bool
    progress: Progress
    started: float = field(default_factory=time.perf_counter)

    @property
    def to(self) -> str:
        return f"gguf:{self.kind.lower()}"

    def carry(self, opened: Opened, target: Any, **settings: Any) -> Conversion:
        fingerprint = settings.pop("fingerprint", None)
        result = carry(
            opened,
            target,
            self.to,
            self.output,
            settings=self.settings(**settings),
            dry_run=self.dry_run,
            progress=self.progress,
            fingerprint=fingerprint,
        )
        result.seconds = time.perf_counter() - self.started  # with what came before
        return result

    def settings(self, **more: Any) -> dict[str, Any]:
        return {"types": self.types, "pre_tokenizer": self.pre_tokenizer, **more}

    def fingerprint(self, **more: Any) -> dict[str, Any]:
        """Of the original and everything that is done with it."""
        return fingerprint_of(self.opened, self.to, self.settings(**more), size_in_bytes("5GB"))


def quantize_gguf(
    model: str,
    out: str | Path | None = None,
    *,
    type: str = "q4_0",
    calib: str | list[str] | tuple[str, ...] | None = None,
    calib_rows: int = 128,
    calib_seqlen: int = 2048,
    seed: int = 0,
    fast: bool = False,
    check: bool = True,
    embedding_type: str | None = None,
    output_type: str | None = None,
    imatrix_out: str | Path | None = None,
    pre_tokenizer: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    low_disk: bool = False,
    max_gpu_memory: str | None = None,
    max_memory: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Quantize ``model`` (``demo``, a folder, or a Hub repository) to a GGUF file in ``out``.

    type            q4_0, q4_1, q5_0, q5_1, q8_0, f16, bf16, f32, or a K type such as q4_k_m (these
                    need llama-cpp-python)
    calib           calibration sources (see core/calibration.py), ``none`` to go without. By
                    default bundled for q4_0, q4_1 and the K types, and none for the others
    fast            GPTQ in one pass
    check           measure the result on held-out text along the way, where GPTQ rounds
    embedding_type  what embeddings and head are stored as: q8_0 and so on; by default in the 16
    output_type     bits that they have, in K types as llama.cpp chooses (the type itself, and Q6_K)
    imatrix_out     a file for llama.cpp's importance matrix, with a K type
    low_disk        leave the weights on the Hub, and read them tensor by tensor; not with K types
    max_gpu_memory  and max_memory: as for quantize, where GPTQ rounds

    Raises UsageError for options that do not go together and QuantkitError for a model that cannot
    be quantized, both before anything is written. An interrupted call goes on when repeated.
    """
    kind = type.upper()
    progress = progress or Progress()
    sources = _sources(kind, calib)
    if imatrix_out and (kind not in TYPES or not sources):
        raise UsageError("only K types with calibration have an importance matrix")
    if (max_gpu_memory or max_memory) and (kind not in _GPTQ or not sources):
        raise UsageError(f"limits of memory are for GPTQ, which does not round {type} here")
    if fast and (kind not in _GPTQ or not sources):
        raise UsageError(f"--fast is for GPTQ, which does not round {type} here", "leave it out")
    if low_disk and kind in TYPES:
        raise UsageError(
            "llama.cpp makes K types of a plain file, which is larger than the original",
            "leave out --low-disk, or use a type such as q4_0",
        )
    source = resolve(model, revision, low_disk=low_disk)
    run = _Run(
        source,
        open_checkpoint(source),
        kind,
        _types(kind, embedding_type, output_type),
        pre_tokenizer,
        Output(Path(out) if out else Path(f"{source.short_name}-gguf-{type.lower()}"), overwrite),
        dry_run,
        progress,
    )
    run.output.keep_apart(source)
    given = {
        "calib": sources,
        "calib_rows": calib_rows,
        "calib_seqlen": calib_seqlen,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    if kind in PLAIN:
        return run.carry(run.opened, _plain_target(run, run.opened))
    if kind in TYPES:
        return _k_type(run, given, imatrix_out)
    if sources:
        limits = {"max_gpu_memory": max_gpu_memory, "max_memory": max_memory}
        return _calibrated(run, model, given | {"fast": fast, "check": check}, low_disk, limits)
    rounded = _rounded(run)
    return run.carry(rounded, _plain_target(run, rounded))


def _sources(kind: str, calib: str | list[str] | tuple[str, ...] | None) -> list[str]:
    """Calibration sources, [] for none."""
    if kind not in (*blocks.WRITTEN, *TYPES, *PLAIN):
        known = ", ".join((*blocks.WRITTEN, *TYPES, *PLAIN)).lower()
        raise UsageError(f"'{kind.lower()}' is no type that is written", f"use {known}")
    if not calib:
        return ["bundled"] if kind in _CALIBRATED else []
    sources = [calib] if isinstance(calib, str) else list(calib)
    if sources == ["none"]:
        return []
    if kind not in _GPTQ and kind not in TYPES:
        raise UsageError(
            f"nothing is calibrated for {kind.lower()}", "leave out --calib, or use q4_0 or q4_k_m"
        )
    return sources


def _types(kind: str, embedding: str | None, output: str | None) -> dict[str, str]:
    """Types of embedding and head by their names in GGUF."""
    known = (*blocks.WRITTEN, *PLAIN, *(("Q4_K", "Q5_K", "Q6_K") if kind in TYPES else ()))
    found = {}
    for option, name, given in (
        ("embedding", _EMBEDDING, embedding),
        ("output", _OUTPUT, output),
    ):
        if given is None:
            continue
        if given.upper() not in known:
            raise UsageError(
                f"'{given}' is no --{option}-type here", f"use {', '.join(known).lower()}"
            )
        found[name] = given.upper()
    return found


def _plain_target(run: _Run, opened: Opened) -> GgufTarget:
    return GgufTarget(opened, run.kind, False, run.pre_tokenizer, run.types)


def _rounded(run: _Run) -> Rounded:
    """The original as it is when it is rounded to nearest."""
    form = blocks.FORMS[run.kind]
    scheme = blocks.scheme_of(run.kind)

    def rounder(weight: Any) -> Rounding:
        return Rounding(rtn.quantize(weight, scheme, offset=form.offset, signed=True))

    return Rounded(run.opened, rounder, "rtn", run.settings(), halve=True)


def _calibrated(
    run: _Run,
    model: str,
    given: dict[str, Any],
    low_disk: bool,
    limits: dict[str, Any],
) -> Conversion:
    """GPTQ into the scratch folder, and that into the file. ``limits`` of memory change nothing in
    it."""
    _plain_target(run, _rounded(run)).survey(Progress())  # refusals come now, not hours later
    given = {**given, **_GPTQ[run.kind], "group": blocks.scheme_of(run.kind).group_size}
    scratch = run.output.scratch / "gptq"

    def solve(dry_run: bool = False) -> None:
        quantize(
            model,
            scratch,
            **given,
            **limits,
            revision=run.source.revision,  # the branch may move meanwhile
            low_disk=low_disk,
            dry_run=dry_run,
            progress=run.progress,
        )

    if run.dry_run:
        solve(dry_run=True)
        rounded = _rounded(run)
        return run.carry(rounded, _plain_target(run, rounded))
    fingerprint = run.fingerprint(method="gptq", **given)
    with disk_errors(run.output.folder):
        begin(run.output, fingerprint)
    if not scratch.exists():
        solve()
    source = Source(run.source.name, scratch, run.source.revision)
    opened = open_checkpoint(source)
    measured = (source.read_json(FILE) or {}).get("measured")
    result = run.carry(opened, _plain_target(run, opened), fingerprint=fingerprint)
    result.measured = measured
    return result


def _k_type(run: _Run, given: dict[str, Any], imatrix_out: str | Path | None) -> Conversion:
    """llama.cpp's rounding, with the importance of inputs where there is calibration."""
    target = KQuantTarget(run.opened, run.kind, run.pre_tokenizer, run.types)
    if not given["calib"]:
        return run.carry(run.opened, target)
    fingerprint = run.fingerprint(method="importance", **given)
    target.survey(Progress())
    if run.dry_run:
        return run.carry(run.opened, target)
    with disk_errors(run.output.folder):
        begin(run.output, fingerprint)
        run.output.scratch.mkdir(exist_ok=True)
        file = run.output.scratch / "imatrix.gguf"
        if not file.exists():
            _look(run, target, given, file)
        if imatrix_out:
            Path(imatrix_out).write_bytes(file.read_bytes())
    target = KQuantTarget(run.opened, run.kind, run.pre_tokenizer, run.types, imatrix.read(file))
    used = {"importance": _public(given["calib"])}
    return run.carry(run.opened, target, fingerprint=fingerprint, **used)


def _look(run: _Run, target: KQuantTarget, given: dict[str, Any], file: Path) -> None:
    """The importance of every input, into ``file``."""
    found, rows, tokens = importance(run.source, progress=run.progress, **given)
    matrix = {target.plain.there[f"{prefix}.weight"]: values for prefix, values in found.items()}
    temporary = file.with_suffix(".tmp")
    imatrix.write(temporary, matrix, _public(given["calib"]), rows, tokens)
    temporary.replace(file)


def _public(sources: list[str]) -> list[str]:
    """Calibration sources without the paths of this machine."""
    return [calibration.public_name(source) for source in sources]
