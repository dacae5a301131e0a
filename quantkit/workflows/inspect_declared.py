"""What the configuration says of the quantization, against what the tensors say."""

from collections.abc import Iterator
from typing import Any

from quantkit import formats
from quantkit.errors import QuantkitError
from quantkit.formats import gptq
from quantkit.workflows.inspect_look import CONFIG, Finding, Look
from quantkit.workflows.repair import Change, Put

# what a quantization's configuration says that its tensors say too; other keys are free
_FACTS: tuple[str, ...] = ("bits", "num_bits", "group_size", "sym", "symmetric")
_FACTS += ("desc_act", "zero_point", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
_SYNONYMS = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}
# GPTQ and AWQ tensors also come from AutoRound, which has keys of its own for the rest
_ALSO_CALLED = {"gptq": ("auto-round",), "awq": ("auto-round",)}
_WITHOUT_CONVENTION = ("auto-round",)
# rules for single modules: their linears may differ from the others
_EXCEPTIONS = ("dynamic", "extra_config")


def undeclared(look: Look) -> Iterator[Finding]:
    """Tensors that are quantized, and a config.json that does not say so."""
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


def method(look: Look) -> Iterator[Finding]:
    """The name of another method."""
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


def facts(look: Look) -> Iterator[Finding]:
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


def convention(look: Look) -> Iterator[Finding]:
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


def mixed(look: Look) -> Iterator[Finding]:
    """Linears that differ, without rules that say so."""
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
