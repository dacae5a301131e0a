"""``quantkit inspect``: what a folder holds, what is wrong with it, and what will load it."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantkit.core import ledger
from quantkit.core.source import Source, resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import Tensors, gptq
from quantkit.runtime.opened import Folder, Opened, open_checkpoint, recorded
from quantkit.workflows import inspect_checks as checks
from quantkit.workflows import inspect_files
from quantkit.workflows.inspect_facts import (
    Linears,
    Structure,
    look_at_linears,
    look_at_structure,
)
from quantkit.workflows.inspect_look import CONFIG, Finding, Look
from quantkit.workflows.repair import repair as write_repaired
from quantkit.workflows.targets import Subject, Verdict, verdicts

if TYPE_CHECKING:
    from quantkit.runtime.gguf_opened import GgufOpened

_NESTED = 50  # levels in quantkit.json; a conversion of a conversion has one more
_BASE_MODEL = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]+)?['\"]?([\w./-]+)", re.MULTILINE)
_EXPERT = re.compile(r"\bexperts\.\d+\.")


@dataclass
class Inspection:
    """kind: dense, or the format's name. The rest of the fields is empty where it does not apply.

    method           as recorded: gptq, awq, rtn...
    convention       of GPTQ's zero points, as found in the tensors (v1, v2; for asymmetric weights
                     as the configuration says)
    declared         the convention in the configuration
    act_order        some linear has groups that are not contiguous
    bits_per_weight  of packed weights, scales and zeros included
    dense_linears    inside the decoder blocks
    head             own, quantized, tied, both (tied and stored), missing
    types            of a GGUF file's quantized linears, and how many have each
    repaired         what --repair changed
    """

    name: str
    kind: str
    architecture: str
    bytes: int
    files: int
    tensors: int
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    method: str | None = None
    bits: int | None = None
    grid: str | None = None
    group: int | None = None
    sym: bool | None = None
    act_order: bool | None = None
    convention: str | None = None
    declared: str | None = None
    linears: int = 0
    bits_per_weight: float | None = None
    dense_linears: list[str] = field(default_factory=list)
    head: str = ""
    types: dict[str, int] = field(default_factory=dict)
    tokenizer: bool = False
    chat_template: bool = False
    made_from: str | None = None
    made_by: str | None = None
    measured: dict[str, float | None] | None = None
    provenance: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)
    targets: list[Verdict] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(finding.level == "error" for finding in self.findings)

    def described(self) -> dict[str, Any]:
        found = asdict(replace(self, provenance=None, findings=[]))
        found["provenance"] = self.provenance
        found["findings"] = [
            {"level": f.level, "code": f.code, "text": f.text, "repairable": bool(f.changes)}
            for f in self.findings
        ]
        return found


def inspect(
    model: str,
    *,
    revision: str | None = None,
    model_basename: str | None = None,
    repair: str | Path | None = None,
) -> Inspection:
    """Look at ``model``: ``demo``, a folder, a .gguf file or a Hub repository. ``model_basename``
    names the weight file, without its ending, where a folder has several. With ``repair``, write a
    corrected copy to that folder; the findings are those of the original. Raises QuantkitError when
    the model cannot be read, or has nothing to repair."""
    source = _resolve(model, revision, model_basename)
    unfinished = _unfinished(source)
    if unfinished is not None and repair is not None:
        raise UsageError(f"{source.name} is unfinished, which no repair can change")
    # an unfinished folder has zeros where nothing was written yet
    found = _look_over(open_checkpoint(source, model_basename), read=unfinished is None)
    if unfinished is not None:
        found.findings, found.targets = [unfinished], []
    if repair is not None:
        changes = [change for finding in found.findings for change in finding.changes]
        found.repaired = write_repaired(source, repair, changes)
    return found


def readers(name: str, folder: Path) -> list[dict[str, Any]]:
    """The programs that load the model in ``folder``, whose files are all written: what they need
    and what they run on, for quantkit.json. Raises QuantkitError when none can, since tensors do
    not fit the model."""
    found = _look_over(open_checkpoint(Source(name, folder)), read=True)
    for finding in found.findings:
        if finding.code == "shape":
            raise QuantkitError(
                f"nothing can load what was made of {name}: {finding.text}",
                f"'quantkit inspect {name}' says more of what it was made of",
            )
    return [
        {"program": one.target, "needs": one.needs, "hardware": one.hardware}
        for one in found.targets
        if one.loads
    ]


def _look_over(opened: Opened, read: bool) -> Inspection:
    """What it is, what is wrong with it, who loads it; without ``read`` from headers alone."""
    linears = look_at_linears(opened, read=read)
    structure = look_at_structure(opened, linears) if opened.model_config else Structure()
    if not isinstance(opened, Folder):
        found = _described_gguf(cast("GgufOpened", opened), linears, structure)
        found.findings = checks.check_tensors(linears, structure)
        kind = str(opened.model_config.get("model_type", ""))
        found.targets = verdicts(replace(_subject(found, linears), model_type=kind))
        return found
    look = Look(opened, opened.model_config, linears, structure)
    found = _described(look)
    if read:
        found.findings = checks.check(look)
        found.targets = verdicts(_subject_of_folder(found, look))
    return found


def _resolve(model: str, revision: str | None, model_basename: str | None) -> Source:
    try:
        return resolve(model, revision, model_basename)
    except QuantkitError:
        partial = _begun(model)
        if partial is None:
            raise
        raise QuantkitError(
            f"{model} is unfinished: there is only {partial}",
            "run the command that began it again to go on",
        ) from None


def _begun(model: str) -> Path | None:
    """What an unfinished run has left of a folder of this name."""
    try:
        folder = Path(model).expanduser()
        partial = folder.with_name(folder.name + ".partial")
        return partial if (partial / ledger.FILE).is_file() else None
    except (OSError, RuntimeError, ValueError):  # no name for a folder, or of nobody's home
        return None


def _unfinished(source: Source) -> Finding | None:
    done = source.read_json(ledger.FILE) if source.folder.name.endswith(".partial") else None
    if done is None:
        return None
    parts = done.get("done")
    count = len(parts) if isinstance(parts, dict) else 0
    return Finding(
        "error",
        "unfinished",
        f"this folder is unfinished, {count} parts are done; run the command that began it again",
    )


def _described(look: Look) -> Inspection:
    """What a folder holds."""
    opened, source = look.opened, look.opened.source
    found = Inspection(
        name=source.name,
        kind=opened.format,
        architecture=_architecture(look.config),
        bytes=opened.tensors.nbytes,
        files=len(opened.tensors.files),
        tensors=sum(1 for _ in opened.tensors),
        tokenizer=inspect_files.has_tokenizer(look),
        chat_template=inspect_files.has_chat_template(look),
        provenance=_flat_enough(recorded(opened, checked=False)),
    )
    dense = opened.tensors.without(look.linears.names)
    _describe_tensors(found, look.linears, look.structure, dense)
    if opened.format == "gptq" and look.linears.shapes:
        found.declared = gptq.declared_convention(opened.config)
    _describe_origin(found, look)
    return found


def _described_gguf(opened: "GgufOpened", linears: Linears, structure: Structure) -> Inspection:
    """What a GGUF file holds."""
    found = Inspection(
        name=opened.source.name,
        kind=opened.format,
        architecture=_architecture(opened.model_config),
        bytes=sum(file.stat().st_size for file in opened.files),
        files=len(opened.files),
        tensors=len(opened.file.tensors),
        method="gguf",
        tokenizer="tokenizer.ggml.tokens" in opened.metadata,
        chat_template="tokenizer.chat_template" in opened.metadata,
        made_by=_text(dict(opened.metadata), "general.quantized_by"),
        provenance=_flat_enough(recorded(opened, checked=False)),
    )
    _describe_record(found)
    _describe_tensors(found, linears, structure, opened.dense)
    types = (opened.tensor(name).type for prefix in linears.shapes for name in opened.names(prefix))
    found.types = dict(Counter(types))
    return found


def _flat_enough(content: dict[str, Any] | None) -> dict[str, Any] | None:
    """The content, which will be printed: nothing where it is nested as no tool would."""
    inside: list[Any] = [content]
    for _ in range(_NESTED):
        inside = [value for one in inside if isinstance(one, dict | list) for value in _values(one)]
    return None if inside else content


def _values(one: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return one.values() if isinstance(one, dict) else one


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return str(
        names[0] if isinstance(names, list) and names else config.get("model_type", "unknown")
    )


def _describe_tensors(
    found: Inspection, linears: Linears, structure: Structure, dense: Tensors
) -> None:
    dtypes: Counter[str] = Counter()
    for name in dense:
        spec = dense.spec(name)
        dtypes[str(spec.dtype).removeprefix("torch.")] += prod(spec.shape)
    found.dtypes, found.parameters = dict(dtypes), sum(dtypes.values()) + linears.weights
    found.dense_linears, found.head = structure.dense, structure.head
    found.linears = len(linears.shapes) + len(linears.unreadable)
    scheme = linears.scheme
    if scheme is None:
        return
    found.bits, found.group, found.sym = scheme.bits, scheme.group_size, scheme.symmetric
    found.grid = scheme.grid
    found.act_order, found.convention = bool(linears.ordered), linears.convention
    found.bits_per_weight = 8 * linears.nbytes / linears.weights


def _describe_origin(found: Inspection, look: Look) -> None:
    """Where it came from, by quantkit.json, else by what other tools leave behind."""
    found.method = _text(look.opened.config, "quant_method")
    _describe_record(found)
    readme = look.opened.source.folder / "README.md"
    if not found.made_from and readme.is_file():
        base = _BASE_MODEL.search(readme.read_text("utf-8", errors="replace"))
        found.made_from = base and base[1]
    meta = look.opened.config.get("meta")
    tools = meta.get("quantizer") if isinstance(meta, dict) else None
    if not found.made_by and tools:
        found.made_by = ", ".join(map(str, tools)) if isinstance(tools, list) else str(tools)


def _describe_record(found: Inspection) -> None:
    """What quantkit.json says."""
    made = found.provenance or {}
    found.method = _text(made, "method") or found.method
    # what was converted, and the original that it was quantized from
    steps = [_named(made, "conversion", "from"), _named(made, "source")]
    found.made_from = ", from ".join(dict.fromkeys(filter(None, steps))) or None
    if version := _text(made, "versions", "quantkit"):
        found.made_by = f"quantkit {version}"
    for part in ("verified", "measured"):  # by verify, and when it was made
        measured = made.get(part)
        if found.measured is None and isinstance(measured, dict):
            numbers = {key: measured.get(key) for key in ("kl", "kl_error", "top1")}
            error = numbers.pop("kl_error")
            if all(isinstance(value, int | float) for value in numbers.values()):
                error = error if isinstance(error, int | float) else None
                found.measured = {**numbers, "kl_error": error}


def _named(made: dict[str, Any], *path: str) -> str | None:
    name, revision = _text(made, *path, "name"), _text(made, *path, "revision")
    return f"{name} @ {revision[:12]}" if name and revision else name


def _text(content: dict[str, Any], *path: str) -> str | None:
    """A text inside JSON that anybody may have written."""
    at: Any = content
    for key in path:
        at = at.get(key) if isinstance(at, dict) else None
    return at if isinstance(at, str) else None


def _subject(found: Inspection, linears: Linears) -> Subject:
    """What decides who loads it, as far as a GGUF file has it too."""
    fatal = {f.code for f in found.findings if f.level == "error"} - {"undeclared", "act-scales"}
    return Subject(
        format=found.kind,
        bits=frozenset(linears.bits),
        groups=frozenset(linears.groups),
        shapes=frozenset(linears.shapes.values()),
        symmetric=found.sym is not False,
        act_order=bool(linears.ordered),
        stored_order=linears.stored_order,
        broken=bool(fatal),
        bfloat16="bfloat16" in found.dtypes,
        quantized_head=found.head == "quantized",
        packed_experts=any(_EXPERT.search(name) for name in linears.shapes),
    )


def _subject_of_folder(found: Inspection, look: Look) -> Subject:
    return replace(
        _subject(found, look.linears),
        model_type=look.model_type,
        declared=any(place[0] == CONFIG for place in look.declarations),
        standard_files=inspect_files.standard_files(look),
        lacks_act_scales=checks.lacks_activation_scales(look),
        has_act_scales=checks.has_activation_scales(look),
        unsaid_rotary=bool(checks.unsaid_rotary(look)),
    )
