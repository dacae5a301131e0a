"""What can be wrong with a checkpoint: one function for each kind of trouble.

A check looks and yields findings. An error is something that makes a reader fail in silence or
compute something else; a warning is something that one reader or other will stumble over; a note
is worth knowing. What can be corrected carries the changes that correct it (repair.py).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from quantkit import __version__, formats
from quantkit.core.checkpoint import INDEX, read_header
from quantkit.errors import QuantkitError
from quantkit.formats import awq, gptq
from quantkit.formats.older_names import with_older_names
from quantkit.runtime.opened import Folder
from quantkit.workflows.inspect_facts import Linears, Structure
from quantkit.workflows.repair import Change, Drop, Header, Put, Rename

Level = Literal["error", "warning", "note"]
CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
BESIDE = ("quantize_config.json", "quant_config.json")
_SECTIONS = ("quantization_config", "quantization")
_STANDARD = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

# what a quantization's configuration says that its tensors say too; other keys are free
_FACTS: tuple[str, ...] = ("bits", "num_bits", "group_size", "sym", "symmetric")
_FACTS += ("desc_act", "zero_point", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
_SYNONYMS = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}
# GPTQ and AWQ tensors also come from AutoRound, which has keys of its own for the rest
_ALSO_CALLED = {"gptq": ("auto-round",), "awq": ("auto-round",)}
_WITHOUT_CONVENTION = ("auto-round",)
# rules for single modules: their linears may differ from the others
_EXCEPTIONS = ("dynamic", "extra_config")

# GPT-NeoX calls its head embed_out in files; transformers 5 calls it lm_head in memory, and some
# writers put that name into files (GPTQModel with its disk offload off), where older transformers
# and vLLM do not look (vllm/model_executor/models/gpt_neox.py)
_HEADS = {"gpt_neox": ("embed_out.weight", "lm_head.weight")}
# buffers that older versions of transformers saved and none reads
_OLD_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias|attention\.bias|attn\.bias)$")

_PATH = re.compile(r"(file:/|~?/[^/\s]+/|[A-Za-z]:[\\/]|\\\\)\S")
# tokens are text of a model's, whatever they look like
_TOKENS = re.compile(r"token|template|vocab")
_NESTED = 20  # levels of a configuration that are looked through
_TEXT_LENGTH = 200  # a name of a data set is shorter, a calibration text longer


@dataclass(frozen=True)
class Finding:
    """``code`` names the kind of finding, for programs."""

    level: Level
    code: str
    text: str
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Look:
    """A folder and everything that was found out about it."""

    opened: Folder
    config: dict[str, Any]
    linears: Linears
    structure: Structure

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @cached_property
    def declarations(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """(file, key...) -> what is said there of the quantization."""
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        for section in _SECTIONS:
            if isinstance(self.config.get(section), dict):
                found[CONFIG, section] = self.config[section]
        for file in BESIDE:
            content = self.opened.source.read_json(file)
            if content:
                found[file,] = content
        return found

    @cached_property
    def wanted(self) -> dict[str, Any] | None:
        """The keys of config.json that the tensors call for, as the format's own writer has them;
        None where the linears are of several kinds or could not be read."""
        scheme = self.linears.scheme
        if scheme is None or self.linears.unreadable or len(self.linears.bits) > 1:
            return None
        name = "gptq_v2" if self.linears.convention == "v2" else self.opened.format
        dense = list(self.structure.dense)
        lm_head = self.structure.head == "quantized"
        if self.model_type in _HEADS and not lm_head:
            dense.append(_HEADS[self.model_type][0].removesuffix(".weight"))
        if self.opened.format == "gptq":
            dense = self.structure.dense  # its rules are for linears inside the blocks
        found = formats.by_name(name).configuration(
            scheme, dense, f"quantkit:{__version__}", lm_head=lm_head
        )
        if self.opened.format == "gptq":
            found["quantization_config"]["desc_act"] = bool(self.linears.ordered)
        return found


def check(look: Look) -> list[Finding]:
    """Everything that is wrong or worth knowing, the worst first."""
    checks = [_undeclared, _method, _facts, _convention, _mixed, _head, _activations]
    checks += [_rotary, _weight_files, _headers, _leaks, _generation, _tokenizer]
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


# the configuration against the tensors


def _undeclared(look: Look) -> Iterator[Finding]:
    if look.opened.format == "dense":
        return
    said = look.declarations
    wanted = look.wanted
    if not any(place[0] == CONFIG for place in said):
        where = f", only {next(iter(said))[0]} does" if said else ""
        changes = _declare(look, wanted, said)
        yield Finding(
            "error",
            "undeclared",
            f"config.json does not say that the model is quantized{where}; transformers would fill "
            "the linears with random numbers"
            + ("" if changes else " (asymmetric zero points do not tell their convention)"),
            changes,
        )
    elif wanted is not None:
        section = {**look.config, **wanted}
        for file, content in _beside(look, section).items():
            if (file,) not in said:
                text = f"there is no {file}, which older loaders read"
                yield Finding("note", "no-beside", text, (Put(file, (), content),))


def _beside(look: Look, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return formats.by_name(look.opened.format).beside(config, look.opened.source.name)


def _declare(
    look: Look, wanted: dict[str, Any] | None, said: dict[tuple[str, ...], dict[str, Any]]
) -> tuple[Change, ...]:
    """Say in config.json what is seen in the tensors, and in files beside it if there are none."""
    blind = look.opened.format == "gptq" and wanted is not None and not said
    if wanted is None or (blind and not look.linears.scheme.symmetric):  # type: ignore[union-attr]
        return ()
    older = next(iter(said.values()), {})
    changes: list[Change] = []
    for section, content in wanted.items():
        # numbers and switches of the method are worth keeping; texts may be anything
        kept = {k: v for k, v in older.items() if isinstance(v, bool | int | float)}
        facts = {k: v for k, v in content.items() if k in _FACTS}
        changes.append(Put(CONFIG, (section,), {**content, **kept, **facts}))
    if not said:
        files = _beside(look, {**look.config, **wanted})
        changes += [Put(file, (), content) for file, content in files.items()]
    return tuple(changes)


def _method(look: Look) -> Iterator[Finding]:
    wanted = look.wanted
    for place, said in look.declarations.items():
        right = wanted[place[-1]].get("quant_method") if wanted and place[-1] in wanted else None
        if wanted is not None and place[0] != CONFIG:
            right = next(iter(wanted.values())).get("quant_method")
        method = said.get("quant_method")
        allowed = (right, *_ALSO_CALLED.get(look.opened.format, ()))
        if right is None or method in allowed or (method is None and place[0] != CONFIG):
            continue
        if method is None:
            text, change = (
                f"{place[0]} names no quant_method",
                Put(*_at(place, "quant_method"), right),
            )
        else:
            text = f"{place[0]} says the method is {method}, the tensors are in the format {right}"
            content = (
                wanted[place[-1]] if wanted and place[0] == CONFIG else {"quant_method": right}
            )
            change = Put(place[0], place[1:], content)
        yield Finding("error", "method", text, (change,))


def _at(place: tuple[str, ...], *keys: str) -> tuple[str, tuple[str, ...]]:
    """File and path of a key below a place."""
    return place[0], (*place[1:], *keys)


def _facts(look: Look) -> Iterator[Finding]:
    """Bits, groups, symmetry and order, everywhere they are written down."""
    wanted = look.wanted
    if wanted is None:
        return
    for place, said in look.declarations.items():
        section = wanted.get(place[-1]) or next(iter(wanted.values()))
        for path, right in _leaves(section):
            at = _find(said, path)
            if at is None:
                if place[0] == CONFIG and len(path) == 1:
                    yield _unsaid(place, path[0], right)
                continue
            value = _value(said, at)
            if path[-1] == "group_size" and _one_group(look, value, right):
                continue
            if value != right:
                yield _wrong(place, at, value, right, said)


def _leaves(
    content: dict[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        elif key in _FACTS:
            yield (*above, key), value


def _find(said: dict[str, Any], path: tuple[str, ...]) -> tuple[str, ...] | None:
    """Where ``said`` has what ``path`` names: there, or under an older name of the key."""
    names = [path[-1], *(old for old, new in _SYNONYMS.items() if new == path[-1])]
    at: Any = said
    for key in path[:-1]:
        at = at.get(key) if isinstance(at, dict) else None
    if not isinstance(at, dict):
        return None
    name = next((name for name in names if name in at), None)
    return None if name is None else (*path[:-1], name)


def _value(said: dict[str, Any], path: tuple[str, ...]) -> Any:
    at: Any = said
    for key in path:
        at = at[key]
    return at


def _one_group(look: Look, said: Any, right: Any) -> bool:
    """Whether both mean one group a row: -1, nothing, or a size that no row exceeds."""
    if right not in (-1, None):
        return False
    widest = max(width for _, width in look.linears.shapes.values())
    return said in (-1, None) or (isinstance(said, int) and said >= widest)


def _unsaid(place: tuple[str, ...], key: str, right: Any) -> Finding:
    text = f"{place[0]} does not say {key} (the tensors: {right}); vLLM wants all of them"
    return Finding("warning", "unsaid", text, (Put(*_at(place, key), right),))


def _wrong(
    place: tuple[str, ...], at: tuple[str, ...], value: Any, right: Any, said: dict[str, Any]
) -> Finding:
    key = at[-1]
    changes: tuple[Change, ...] = (Put(*_at(place, *at), right),)
    if key == "group_size" and _find(said, (*at[:-1], "strategy")):
        strategy = "channel" if right in (-1, None) else "group"
        changes += (Put(*_at(place, *at[:-1], "strategy"), strategy),)
    text = f"{place[0]} says {key} is {value}, the tensors say {right}"
    if key == "desc_act" and right is False:
        text += "; harmless, but readers choose slower kernels"
        return Finding("note", "config", text, changes)
    if key in ("sym", "symmetric") and right is True:
        return Finding("warning", "config", text + "; symmetric is read by more", changes)
    return Finding("error", "config", text, changes)


def _convention(look: Look) -> Iterator[Finding]:
    """GPTQ's zero points: 'minus one' or as they are."""
    conventions = look.linears.conventions
    if len(conventions) > 1:
        yield Finding("error", "convention", "some linears have v1 zero points, others v2")
    if len(conventions) != 1:
        return
    right = look.linears.convention
    seen = look.linears.scheme is not None and look.linears.scheme.symmetric
    said = {
        place: gptq.declared_convention(content)
        for place, content in look.declarations.items()
        if content.get("quant_method") not in _WITHOUT_CONVENTION and _readable(content)
    }
    for place, convention in said.items():
        if convention == right:
            continue
        text = f"{place[0]} says zero points are {convention}, "
        if not seen:
            text += f"another file {right}; asymmetric tensors do not show which is right"
            yield Finding("error", "convention", text)
            continue
        text += f"the tensors say {right}; readers that believe it shift every weight"
        yield Finding("error", "convention", text, _convene(look, place))


def _readable(content: dict[str, Any]) -> bool:
    try:
        gptq.declared_convention(content)
    except QuantkitError:
        return False  # told by _unreadable: no linear could be read
    return True


def _convene(look: Look, place: tuple[str, ...]) -> tuple[Change, ...]:
    wanted = look.wanted
    if wanted is None:
        return ()
    form = wanted["quantization_config"]["checkpoint_format"]
    said = look.declarations[place]
    keys = ["checkpoint_format", *(["format"] if "format" in said else [])]
    return tuple(Put(*_at(place, key), form) for key in keys)


def _mixed(look: Look) -> Iterator[Finding]:
    bits, groups = look.linears.bits, look.linears.groups
    if len(bits) <= 1 and len(groups) <= 1:
        return
    kinds = " and ".join(
        f"{' / '.join(map(str, sorted(found)))} {what}"
        for what, found in (("bits", bits), ("inputs a group", groups))
        if len(found) > 1
    )
    declared = any(
        said.get(key) for said in look.declarations.values() for key in _EXCEPTIONS
    ) or any(_several(said.get("config_groups")) for said in look.declarations.values())
    if declared or look.opened.format in ("mlx", "bnb"):
        yield Finding("note", "mixed", f"the linears have {kinds}, by rules of the configuration")
    else:
        text = f"the linears have {kinds}, and the configuration has no rules for single modules"
        yield Finding("warning", "mixed", text)


def _several(groups: Any) -> bool:
    return isinstance(groups, dict) and len(groups) > 1


# the model around them


def _structure(found: Structure) -> Iterator[Finding]:
    if found.unknown:
        yield Finding("warning", "structure", f"the structure was not checked: {found.unknown}")
    if found.missing:
        yield Finding("error", "missing", f"the model needs {_some(found.missing)}: no such tensor")
    if found.misfit:
        yield Finding("error", "shape", f"a tensor does not fit the model: {_some(found.misfit)}")
    old = [name for name in found.unexpected if _OLD_BUFFERS.search(name)]
    scales = awq.activation_scale_names(found.unexpected)
    odd = [name for name in found.unexpected if name not in old and name not in scales]
    if odd:
        yield Finding("warning", "unexpected", f"the model has no place for {_some(odd)}")
    if old:
        text = f"{_some(old)}: buffers of older versions, which nothing reads"
        yield Finding("note", "buffers", text)
    if found.dense:
        text = f"linears inside the blocks that are not quantized: {_some(found.dense)}"
        yield Finding("note", "dense", text)


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _head(look: Look) -> Iterator[Finding]:
    right, wrong = _HEADS.get(look.model_type, ("", ""))
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
    outputs = {prefix: out for prefix, (out, _) in look.linears.shapes.items()}
    needed = awq.activation_scales(look.model_type, outputs) if look.opened.format == "awq" else ()
    return any(name not in look.opened.tensors for name in needed)


def has_activation_scales(look: Look) -> bool:
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


# the files


def standard_files(look: Look) -> bool:
    return all(_STANDARD.fullmatch(file) for file in look.opened.tensors.files)


def _weight_files(look: Look) -> Iterator[Finding]:
    files, tensors = look.opened.tensors.files, look.opened.tensors
    if not standard_files(look):
        single = len(files) == 1 and files[0].endswith(".safetensors")
        named = [f for f in BESIDE if (look.opened.source.read_json(f) or {}).get(_BASENAME)]
        changes: tuple[Change, ...] = (Rename(files[0], "model.safetensors"),)
        changes += tuple(Put(file, (_BASENAME,), "model") for file in named)
        text = f"transformers and mlx do not find {_some(files)}; it should be model.safetensors"
        yield Finding("warning", "file-name", text, changes if single else ())
    elif all(_SHARD.fullmatch(f) for f in files) and not look.opened.source.read_json(INDEX):
        where = {name: tensors.file_of(name) for name in sorted(tensors)}
        content = {"metadata": {"total_size": tensors.nbytes}, "weight_map": where}
        text = f"there is no {INDEX}, without which transformers finds no shards"
        yield Finding("error", "no-index", text, (Put(INDEX, (), content),))


_BASENAME = "model_file_base_name"


def _headers(look: Look) -> Iterator[Finding]:
    """transformers 4 (modeling_utils.py, load_state_dict) refuses files that do not say whose they
    are; 5 does not look."""
    bare = [
        file
        for file in look.opened.tensors.files
        if file.endswith(".safetensors")
        and (read_header(look.opened.source.folder / file).get("__metadata__") or {}).get("format")
        not in ("pt", "tf", "flax", "mlx")
    ]
    if bare:
        text = f"the header of {_some(bare)} does not say 'pt', and transformers 4 refuses the file"
        yield Finding("warning", "header", text, tuple(Header(file) for file in bare))


def _leaks(look: Look) -> Iterator[Finding]:
    """Paths of the machine that made the model, and texts that it was calibrated with."""
    for file in (CONFIG, *BESIDE, GENERATION, TOKENIZER):
        for path, what in _private(look.opened.source.read_json(file) or {}):
            text = f"{file} holds {what}: {'.'.join(path)}"
            yield Finding("warning", "leak", text, (Drop(file, path),))


def _private(
    content: dict[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in content.items() if len(above) < _NESTED else ():
        path = (*above, key)
        # optimum/gptq/quantizer.py writes its calibration texts under this name
        if key == "dataset" and (isinstance(value, list) or len(str(value)) > _TEXT_LENGTH):
            yield path, "calibration texts"
        elif key == "auto_map" or _TOKENS.search(key):
            if key == "tokenizer_file" and isinstance(value, str) and _PATH.match(value):
                yield path, "a path of another machine"
        elif isinstance(value, dict):
            yield from _private(value, path)
        elif isinstance(value, str) and _PATH.match(value):
            yield path, "a path of another machine"


def _generation(look: Look) -> Iterator[Finding]:
    settings = {**look.config, **(look.opened.source.read_json(GENERATION) or {})}
    vocabulary = look.config.get("vocab_size")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(key)
        ids = value if isinstance(value, list) else [value]
        if isinstance(vocabulary, int) and any(isinstance(i, int) and i >= vocabulary for i in ids):
            text = f"{key} is {value}, and the vocabulary has {vocabulary} tokens"
            yield Finding("error", "generation", text)
    if look.config and settings.get("eos_token_id") is None:
        text = "no eos_token_id in config.json or generation_config.json: generation does not end"
        yield Finding("warning", "generation", text)
    if look.config and settings.get("pad_token_id") is None:
        yield Finding("note", "generation", "no pad_token_id: batches of prompts need one")


def has_tokenizer(look: Look) -> bool:
    folder = look.opened.source.folder
    return any((folder / name).exists() for name in _TOKENIZERS) or any(folder.glob("*.tiktoken"))


def has_chat_template(look: Look) -> bool:
    folder = look.opened.source.folder
    files = ("chat_template.jinja", "chat_template.json")
    inside = (look.opened.source.read_json(TOKENIZER) or {}).get("chat_template")
    return bool(inside) or any((folder / name).exists() for name in files)


def _tokenizer(look: Look) -> Iterator[Finding]:
    if not has_tokenizer(look):
        yield Finding("warning", "tokenizer", "there is no tokenizer")
