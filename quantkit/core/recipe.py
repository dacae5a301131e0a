"""Recipes: commands and their options in a TOML file, so that a result can be made again.

    about = "What it is, in a line"
    model = "owner/name"                # what the first step works on
    out = "name-gptq-4bit-128g"         # where it writes to

    [[step]]
    command = "gptq"
    bits = 4

    [[step]]                            # without a model, a step works on what was written before
    command = "verify"
    against = "$model"                  # $model and $out stand for the two lines above

A recipe of one step may leave out ``[[step]]`` and give ``command`` and its options at the top.
Keys are the names of the options. Which those are, and what values they take, only the command
line knows: it says so with a ``Vocabulary``.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantkit import data
from quantkit.core import rules
from quantkit.errors import UsageError

_SUFFIX = ".toml"
_TOP = ("about", "model", "out")
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Key:
    """An option: what a value of it is, whether there may be several, and its choices if few."""

    kind: Literal["bool", "int", "float", "str", "limit"]
    several: bool = False
    choices: tuple[str, ...] = ()


Vocabulary = Mapping[str, Mapping[str, Key]]  # the options of every command


@dataclass(frozen=True)
class Step:
    """A command with the options that are given to it."""

    command: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Steps in their order; what they work on and write is filled in."""

    name: str
    about: str
    steps: list[Step]


def read(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises UsageError when it cannot be read."""
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # of TOML or of UTF-8
        raise UsageError(f"{path} is not TOML ({error})") from error


def bundled() -> dict[str, Path]:
    """The recipes that come with quantkit, by name."""
    return {file.stem: file for file in sorted(data.recipes().glob(f"*{_SUFFIX}"))}


def find(name: str) -> Path:
    """The file that ``name`` means: a path, or the name of one that comes with quantkit. Raises
    UsageError when there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = bundled()
    if name in known:
        return known[name]
    if len(path.parts) > 1 or path.suffix == _SUFFIX:
        raise UsageError(f"there is no recipe {name}", "'quantkit run --list' shows those to hand")
    raise UsageError(f"there is no recipe '{name}'", _near(name, known))


def assemble(
    content: Mapping[str, Any],
    vocabulary: Vocabulary,
    name: str = "recipe",
    *,
    model: str | None = None,
    out: str | None = None,
    changes: Iterable[str] = (),
) -> Recipe:
    """The recipe that a file's content means, with ``model`` and ``out`` in the place of its own.

    ``changes`` are ``key=value`` for every step that has the option, or ``command.key=value``.
    Raises UsageError for unknown commands and keys, values of the wrong type, and steps that do not
    know what to work on.
    """
    top = {key: content[key] for key in _TOP if key in content}
    for key, value in top.items():
        if not isinstance(value, str):
            raise UsageError(f"{name}: {key} should be text, not {_shown(value)}")
    steps = [_step(name, table, vocabulary) for table in _tables(name, content)]
    for change in changes:
        _change(steps, change, vocabulary)
    _instead(name, steps[0], vocabulary, model, out, str(content))
    model, out = model or top.get("model"), out or top.get("out")
    for step in steps:
        step.options.update(
            {key: _filled(value, model, out, name) for key, value in step.options.items()}
        )
    _connect(name, steps, vocabulary, model, out)
    return Recipe(name, top.get("about", ""), steps)


def _tables(name: str, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of every step."""
    rest = {key: value for key, value in content.items() if key not in _TOP}
    if "step" not in rest:
        return [rest]
    steps = rest.pop("step")
    if rest:
        key = next(iter(rest))
        raise UsageError(f"{name}: '{key}' stands outside of a [[step]]", _near(key, _TOP))
    if not isinstance(steps, list) or not steps or not all(isinstance(s, dict) for s in steps):
        raise UsageError(f"{name}: steps are written as [[step]], each with its command")
    return steps


def _step(name: str, table: dict[str, Any], vocabulary: Vocabulary) -> Step:
    command = table.get("command")
    if command is None:
        raise UsageError(f"{name}: a step has no command", f"one of {', '.join(vocabulary)}")
    if not isinstance(command, str):
        raise UsageError(f"{name}: command should be text, not {_shown(command)}")
    if command not in vocabulary:
        raise UsageError(f"{name}: there is no command '{command}'", _near(command, vocabulary))
    options = {}
    for key, value in table.items():
        if key == "command":
            continue
        where = f"{name}: {command}"
        options[key] = _checked(where, key, value, _known(where, key, vocabulary[command]))
    return Step(command, options)


def _known(where: str, key: str, options: Mapping[str, Key]) -> Key:
    if key == "dry_run":
        raise UsageError(f"{where}: a step cannot be a dry run", "use 'quantkit run --dry-run'")
    if key not in options:
        raise UsageError(f"{where} has no option '{key}'", _near(key, options))
    return options[key]


def _checked(where: str, key: str, value: Any, known: Key) -> Any:
    """The value as the option takes it."""
    if known.several:
        values = value if isinstance(value, list) else [value]
        return [_single(where, key, one, known) for one in values]
    return _single(where, key, value, known)


def _single(where: str, key: str, value: Any, known: Key) -> Any:
    if key == "rule" and isinstance(value, dict):  # [[step.rule]]
        return str(rules.of(value))
    fits = {
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, (int, float)) and not isinstance(value, bool),
        "str": isinstance(value, str),
    }
    fits["limit"] = fits["float"] or fits["str"]
    words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
    words["limit"] = "a number or SET=NUMBER"
    if not fits[known.kind]:
        raise UsageError(f"{where}: {key} should be {words[known.kind]}, not {_shown(value)}")
    if known.choices and value not in known.choices:
        raise UsageError(
            f"{where}: {key} cannot be {_shown(value)}", f"use {', '.join(known.choices)}"
        )
    return value


def _change(steps: list[Step], change: str, vocabulary: Vocabulary) -> None:
    """Apply one ``key=value``."""
    path, equals, text = change.partition("=")
    if not equals:
        raise UsageError(f"'{change}' sets nothing", "write KEY=VALUE or COMMAND.KEY=VALUE")
    command, _, key = path.strip().rpartition(".")
    key = key.replace("-", "_")  # as it is typed at the command itself
    meant = [step for step in steps if command in ("", step.command)]
    if not meant:
        used = [step.command for step in steps]
        raise UsageError(f"--set {change}: there is no step '{command}'", _near(command, used))
    having = [step for step in meant if key in vocabulary[step.command]]
    if not having:
        keys = [known for step in meant for known in vocabulary[step.command]]
        raise UsageError(f"--set {change}: there is no option '{key}'", _near(key, keys))
    for step in having:
        known = vocabulary[step.command][key]
        value = _parsed(text.strip(), known)
        step.options[key] = _checked(f"--set {change}", key, value, known)


def _parsed(text: str, known: Key) -> Any:
    """A value that was typed. What is no such value stays text, to be refused as that."""
    if known.several and text.startswith("["):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except ValueError:
            return text
    if known.kind == "bool":
        return _WORDS.get(text.lower(), text)
    if known.kind == "str":
        return text
    try:
        return int(text) if known.kind == "int" else float(text)
    except ValueError:
        return text


def _instead(
    name: str,
    first: Step,
    vocabulary: Vocabulary,
    model: str | None,
    out: str | None,
    content: str,
) -> None:
    """``model`` and ``out`` in the place of what the first step says itself."""
    known = vocabulary[first.command]
    for key, value in (("model", model), ("out", out)):
        if value is None:
            continue
        if key in first.options:
            first.options[key] = value
        elif "models" in first.options and key == "model":
            first.options["models"] = [value]
        elif not {key, f"{key}s"} & known.keys() and f"${key}" not in content:
            raise UsageError(
                f"{name}: --{key} changes nothing, as {first.command} has no {key}",
                f"leave out --{key}, or write ${key} in the recipe",
            )


def _filled(value: Any, model: str | None, out: str | None, name: str) -> Any:
    """The value with the recipe's model and out in the places of $model and $out."""
    if isinstance(value, list):
        return [_filled(one, model, out, name) for one in value]
    if not isinstance(value, str):
        return value

    def meant(found: re.Match[str]) -> str:
        value = {"model": model, "out": out}[found[1]]
        if value is None:
            raise UsageError(
                f"{name} speaks of {found[0]} and does not say what it is",
                f"give --{found[1]}, or write {found[1]} = ... at its top",
            )
        return value

    return re.sub(r"\$(model|out)\b", meant, value)


def _connect(
    name: str, steps: list[Step], vocabulary: Vocabulary, model: str | None, out: str | None
) -> None:
    """Let every step work on what the one before wrote, where it does not say otherwise."""
    latest = model
    taken = {_place(model): "it is the model"} if model else {}
    for index, step in enumerate(steps):
        where = f"{name}, step {index + 1} ({step.command})"
        for key in {"model", "models"} & vocabulary[step.command].keys() - step.options.keys():
            if latest is None:
                raise UsageError(f"{where} does not say which model", "give --model")
            step.options[key] = [latest] if key == "models" else latest
        if "out" not in vocabulary[step.command]:
            continue
        if index == 0 and out is not None:
            step.options.setdefault("out", out)
        if "out" not in step.options and len(steps) > 1:
            raise UsageError(f"{where} does not say where to write", 'add out = "FOLDER" to it')
        latest = step.options.get("out")
        if latest is None:
            continue
        if (place := _place(latest)) in taken:
            raise UsageError(
                f"{where} would write to {latest}, which is there already: {taken[place]}",
                "give every step an out of its own",
            )
        taken[place] = f"step {index + 1} writes it"


def _place(path: str) -> Path:
    """The same for all ways to write it."""
    return Path(path).expanduser().resolve()


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def _near(word: object, known: Iterable[str]) -> str:
    """A hint: the nearest known word, or all of them."""
    words = list(dict.fromkeys(known))
    near = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"there are {', '.join(words)}"
