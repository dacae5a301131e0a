"""Rules: other settings for some of a model's linears, by their names.

    *.mlp.down_proj: bits=8,group=64        on the command line
    *.layers.0.*: skip

    [[step.rule]]                           in a recipe
    match = "*.mlp.down_proj"
    bits = 8
    group = 64

Patterns are those of file names (``*``, ``?``, ``[0-9]``); ``*`` does not stop at dots. Where
several rules match, each changes what it speaks of, and the last one wins.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from quantkit.errors import UsageError

if TYPE_CHECKING:  # this file is part of the command line, which is light
    from quantkit.core.qweight import Scheme

_WORDS = {"true": True, "false": False}
_HOW = "write 'PATTERN: bits=8,group=64' or 'PATTERN: skip'"


class Setting(NamedTuple):
    """What the rules say about a linear. ``rtn``: it is rounded to nearest, whatever the method."""

    scheme: "Scheme"
    skip: bool
    rtn: bool


@dataclass(frozen=True)
class Rule:
    """What is not None is set for every linear whose name matches. ``skip``: it stays as it is;
    ``method``: ``rtn`` rounds it to nearest, without calibration."""

    match: str
    bits: int | None = None
    group: int | None = None
    sym: bool | None = None
    skip: bool | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        if self.method not in (None, "rtn"):
            raise UsageError(
                f"rule '{self}': method can only be rtn", "leave it out for the command's own"
            )
        how = (self.bits, self.group, self.sym, self.method)
        if self.skip and any(value is not None for value in how):
            raise UsageError(f"rule '{self}' skips linears and says how to quantize them", _HOW)
        if all(value is None for key, value in vars(self).items() if key != "match"):
            raise UsageError(f"rule '{self.match}' says nothing", _HOW)

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.match)

    def __str__(self) -> str:
        said = {k: v for k, v in vars(self).items() if k != "match" and v is not None}
        parts = [
            key if value is True and key == "skip" else f"{key}={str(value).lower()}"
            for key, value in said.items()
        ]
        return f"{self.match}: {','.join(parts)}"


def parsed(texts: str | Iterable[str]) -> tuple[Rule, ...]:
    """One rule, or several."""
    return tuple(parse(text) for text in ([texts] if isinstance(texts, str) else texts))


def parse(text: str) -> Rule:
    """``PATTERN: bits=8,group=64``. Raises UsageError."""
    pattern, colon, said = text.rpartition(":")
    if not colon or not pattern.strip():
        raise UsageError(f"'{text}' is not a rule", _HOW)
    table: dict[str, Any] = {"match": pattern.strip()}
    for part in said.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals and key != "skip":
            raise UsageError(f"rule '{text}': '{part.strip()}' sets nothing", _HOW)
        table[key] = _typed(value) if equals else True
    return of(table)


def _typed(value: str) -> Any:
    if re.fullmatch(r"-?[0-9]+", value):
        return int(value)
    return _WORDS.get(value.lower(), value)


def of(table: Mapping[str, Any]) -> Rule:
    """The rule of a recipe's table. Raises UsageError for unknown keys and values of another
    type."""
    kinds = {"match": str, "bits": int, "group": int, "sym": bool, "skip": bool, "method": str}
    words = {str: "text", int: "a whole number", bool: "true or false"}
    shown = ", ".join(f"{key}={value}" for key, value in table.items())
    for key, value in table.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.5)
            raise UsageError(
                f"a rule ({shown}) has no '{key}'",
                f"did you mean '{near[0]}'?" if near else f"there are {', '.join(kinds)}",
            )
        if type(value) is not kinds[key]:
            raise UsageError(
                f"a rule ({shown}): {key} should be {words[kinds[key]]}, not {value!r}"
            )
    if "match" not in table:
        raise UsageError(f"a rule ({shown}) does not say what it matches", 'add match = "PATTERN"')
    return Rule(**table)


def setting(rules: Sequence[Rule], name: str, scheme: "Scheme") -> Setting:
    """What the rules make of a linear with this name that would have ``scheme``. Raises UsageError
    for a scheme that there is not."""
    found = Setting(scheme, False, False)
    for rule in rules:
        if not rule.matches(name):
            continue
        said = {"bits": rule.bits, "group_size": rule.group, "symmetric": rule.sym}
        changes = {key: value for key, value in said.items() if value is not None}
        found = found._replace(scheme=replace(found.scheme, **changes))  # type: ignore[arg-type]
        if rule.skip is not None:
            found = found._replace(skip=rule.skip)
        elif changes or rule.method:  # it speaks of how, so it is to be quantized
            found = found._replace(skip=False)
        if rule.method is not None:
            found = found._replace(rtn=True)
    return found


def check_matches(rules: Iterable[Rule], names: Sequence[str]) -> None:
    """Raise UsageError for a rule that matches none of the linears ``names``, with some that are
    called nearly so."""
    for rule in rules:
        if any(rule.matches(name) for name in names):
            continue
        # what is left of names behind the block's number is the same in all blocks
        kinds = ["*." + re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in names]
        kinds = list(dict.fromkeys(kinds))
        near = difflib.get_close_matches(rule.match, [*kinds, *names], n=2, cutoff=0.5)
        raise UsageError(
            f"rule '{rule}' matches no linear of the model",
            f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(kinds)}",
        )
