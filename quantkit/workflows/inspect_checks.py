"""What can be wrong with a checkpoint: one function for each kind of trouble.

A check looks and yields findings. An error is something that makes a reader fail in silence or
compute something else; a warning is something that one reader or other will stumble over; a note
is worth knowing. What can be corrected carries the changes that correct it (repair.py). Here are
those of tensors and of the model around them; inspect_declared.py and inspect_files.py have others.
"""

import re
from collections.abc import Iterator
from typing import Any

from quantkit.core.checkpoint import INDEX
from quantkit.formats import awq
from quantkit.formats.older_names import with_older_names
from quantkit.workflows import inspect_declared as declared
from quantkit.workflows import inspect_files as files
from quantkit.workflows.inspect_facts import Linears, Structure
from quantkit.workflows.inspect_look import CONFIG, HEADS, Finding, Level, Look, some
from quantkit.workflows.repair import Change, Drop, Header, Put

# buffers that older versions of transformers saved and none reads
_OLD_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias|attention\.bias|attn\.bias)$")


def check(look: Look) -> list[Finding]:
    """Everything that is wrong or worth knowing, the worst first."""
    checks = [declared.undeclared, declared.method, declared.facts, declared.convention]
    checks += [declared.mixed, _head, _activations, _rotary, files.weight_files, files.headers]
    checks += [files.leaks, files.generation, files.tokenizer]
    found = [finding for one in checks for finding in one(look)]
    if not look.config:
        found.append(Finding("error", "no-config", "there is no config.json"))
    return check_tensors(look.linears, look.structure, found)


def check_tensors(
    linears: Linears, structure: Structure, others: list[Finding] | None = None
) -> list[Finding]:
    """What needs no files beside the weights; with ``others``, the worst first."""
    found = [*_unreadable(linears), *_numbers(linears), *_structure(structure), *(others or [])]
    order: tuple[Level, ...] = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))


# the tensors


def _unreadable(linears: Linears) -> Iterator[Finding]:
    broken = linears.unreadable
    if broken:
        name, why = next(iter(broken.items()))
        yield Finding(
            "error", "unreadable", f"{len(broken)} quantized linears cannot be read; {name}: {why}"
        )


def _numbers(linears: Linears) -> Iterator[Finding]:
    kinds = (
        ("nan", "not numbers", linears.nan),
        ("infinite", "infinite", linears.infinite),
    )
    for code, words, bad in kinds:
        if bad.count:
            text = f"{bad.count} scales are {words}, the first in {bad.first}"
            yield Finding("error", code, text)
    zero = linears.zero
    if zero.count:
        text = f"{zero.count} scales are 0 (their weights are all equal), the first in {zero.first}"
        yield Finding("warning", "zero-scale", text)
    wrapped = linears.wrapped
    if wrapped.count:
        # AutoGPTQ: exllama masks after adding 1, qlinear_cuda.py and triton_utils mask before it
        yield Finding(
            "warning",
            "wrapped-zero",
            f"{wrapped.count} zero points are 0, which v1 stores wrapped around and some readers "
            f"take for the largest code plus 1; the first in {wrapped.first}",
        )


# the model around them


def _structure(found: Structure) -> Iterator[Finding]:
    if found.unknown:
        yield Finding("warning", "structure", f"the structure was not checked: {found.unknown}")
    if found.missing:
        yield Finding("error", "missing", f"the model needs {some(found.missing)}: no such tensor")
    if found.misfit:
        yield Finding("error", "shape", f"a tensor does not fit the model: {some(found.misfit)}")
    old = [name for name in found.unexpected if _OLD_BUFFERS.search(name)]
    scales = awq.activation_scale_names(found.unexpected)
    odd = [name for name in found.unexpected if name not in old and name not in scales]
    if odd:
        yield Finding("warning", "unexpected", f"the model has no place for {some(odd)}")
    if old:
        text = f"{some(old)}: buffers of older versions, which nothing reads"
        yield Finding("note", "buffers", text)
    if found.dense:
        text = f"linears inside the blocks that are not quantized: {some(found.dense)}"
        yield Finding("note", "dense", text)


def _head(look: Look) -> Iterator[Finding]:
    right, wrong = HEADS.get(look.model_type, ("", ""))
    tensors = look.opened.tensors
    if wrong in tensors and right in tensors:
        yield Finding("error", "head", f"there are two heads, {right} and {wrong}")
    elif wrong in tensors:
        file = tensors.file_of(wrong)
        changes: tuple[Change, ...] = (Header(file, {wrong: right}),)
        if look.opened.source.read_json(INDEX):
            changes += (Drop(INDEX, ("weight_map", wrong)), Put(INDEX, ("weight_map", right), file))
        yield Finding(
            "error",
            "head",
            f"the head is stored as {wrong}; transformers 4 and vLLM look for {right} and go on "
            "without",
            changes if file.endswith(".safetensors") else (),
        )
    if look.structure.head == "both":
        if look.structure.head_differs:
            text = "config.json ties the head to the embedding, and it is stored with other numbers"
            yield Finding("error", "head", text)
        else:
            yield Finding("note", "head", "the head is stored twice: it is tied to the embedding")


def _activations(look: Look) -> Iterator[Finding]:
    if lacks_activation_scales(look):
        text = f"AWQ of {look.model_type} needs scales of its activations (act.scales); without "
        yield Finding("error", "act-scales", text + "them transformers computes NaN")


def lacks_activation_scales(look: Look) -> bool:
    """Whether readers of AWQ would miss them."""
    outputs = {prefix: out for prefix, (out, _) in look.linears.shapes.items()}
    needed = awq.activation_scales(look.model_type, outputs) if look.opened.format == "awq" else ()
    return any(name not in look.opened.tensors for name in needed)


def has_activation_scales(look: Look) -> bool:
    """Whether there are any."""
    return bool(awq.activation_scale_names(look.opened.tensors))


def unsaid_rotary(look: Look) -> dict[str, Any]:
    """What readers of the older names of rotary settings do not find, and would not guess."""
    older = with_older_names(look.config)
    usual = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    return {k: v for k, v in older.items() if k not in look.config and usual.get(k) != v}


def _rotary(look: Look) -> Iterator[Finding]:
    unsaid = unsaid_rotary(look)
    if unsaid:
        text = "config.json has the rotary positions only as transformers 5 writes them; what "
        text += f"reads the older names (mlx-lm, transformers 4) misses {', '.join(unsaid)}"
        changes = tuple(Put(CONFIG, (key,), value) for key, value in unsaid.items())
        yield Finding("note", "rotary", text, changes)
