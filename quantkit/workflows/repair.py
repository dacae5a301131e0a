"""``quantkit inspect --repair``: a corrected copy of a model's folder.

What is wrong is found elsewhere (inspect_checks.py); a finding that can be corrected carries the
changes, and this file knows how to make them. Nothing is edited in place: small files are written
anew, weights are hard links, or copies where the disk does not let them be links. Weights are only
rewritten for their header:

    u64 length | header as JSON: {"__metadata__": {...}, "name": {dtype, shape, offsets}} | data
                 ^ replaced, padded to 8 bytes                                              ^ as is
"""

import json
import os
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.core import ledger, provenance
from quantkit.core.card_data import CARD
from quantkit.core.checkpoint import write_json, write_text
from quantkit.core.source import Source
from quantkit.core.weight_file import read_header
from quantkit.errors import QuantkitError, UsageError
from quantkit.workflows import card
from quantkit.workflows.output import Output, disk_errors

_COPIED = 1 << 20  # bytes at a time
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")  # too large to be copied for nothing


@dataclass(frozen=True)
class Put:
    """Set a key of a JSON file; () is the whole file."""

    file: str
    path: tuple[str, ...]
    value: Any


@dataclass(frozen=True)
class Drop:
    """Take a key out of a JSON file."""

    file: str
    path: tuple[str, ...]


@dataclass(frozen=True)
class Rename:
    """Give a weight file another name."""

    file: str
    to: str


@dataclass(frozen=True)
class Header:
    """Mark a weight file as PyTorch's, and give some of its tensors other names."""

    file: str
    names: dict[str, str] = field(default_factory=dict)


Change = Put | Drop | Rename | Header


def repair(source: Source, out: str | Path, changes: list[Change]) -> list[str]:
    """Write ``source`` with ``changes`` to the folder ``out`` -> what was changed, in sentences.
    Raises UsageError when ``out`` cannot be used, QuantkitError when there is nothing to change."""
    if not changes:
        raise QuantkitError(
            f"{source.name} has nothing that could be repaired",
            "'quantkit inspect' without --repair shows what is wrong, if anything is",
        )
    folder = Path(out)
    with disk_errors(folder):
        output = Output(folder, overwrite=False, option="--repair")
        if output.partial.resolve() == source.folder.resolve():
            raise UsageError(
                f"{folder} would be made from {output.partial} in its own place",
                "choose another --repair",
            )
        output.check_space(_needed(source.folder, folder, changes))
        _begin(output, source.name)
        told = _copy(source.folder, output.partial, changes)
        told += _edit(source, output.partial, changes)
        told += _without_verdict(output.partial)
        output.complete()
    return told


def _begin(output: Output, name: str) -> None:
    """An empty partial folder that says whose it is: a repair is short, and begins anew."""
    started = Source(name, output.partial).read_json(ledger.FILE) or {}
    if output.partial.exists() and "repair" not in (started.get("fingerprint") or {}):
        raise UsageError(
            f"{output.partial} holds something else that is unfinished", "choose another --repair"
        )
    output.discard()
    output.begin()
    ledger.Ledger(output.partial, {"repair": name})


def _needed(folder: Path, out: Path, changes: list[Change]) -> int:
    """Bytes that cannot be hard links: headers that change, or everything on another disk."""
    parent = next(p for p in out.absolute().parents if p.exists())
    linked = folder.stat().st_dev == parent.stat().st_dev
    headers = {change.file for change in changes if isinstance(change, Header)}
    return sum(p.stat().st_size for p in _files(folder) if not linked or p.name in headers)


def _files(folder: Path) -> list[Path]:
    """What is copied: plain files, but for hidden ones and what an unfinished run left."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name != ledger.FILE
    ]


def _copy(folder: Path, partial: Path, changes: Iterable[Change]) -> list[str]:
    renamed = {c.file: c.to for c in changes if isinstance(c, Rename)}
    headers: dict[str, dict[str, str]] = {}
    for change in changes:
        if isinstance(change, Header):
            headers.setdefault(change.file, {}).update(change.names)
    told = []
    for path in _files(folder):
        new = partial / renamed.get(path.name, path.name)
        if path.name in set(renamed.values()) - renamed.keys():
            told.append(f"{path.name} was left out: another file has its name now")
            continue
        if path.name in headers:
            _rewrite(path, new, headers[path.name])
            told.append(f"{new.name}: its header now says that it is PyTorch's")
            told += [f"{new.name}: {a} is now {b}" for a, b in headers[path.name].items()]
        elif path.suffix in _WEIGHTS:
            _link(path, new)
        else:
            shutil.copyfile(path, new)
        if new.name != path.name:
            told.append(f"{path.name} is now {new.name}")
    folders = (path for path in sorted(folder.iterdir()) if path.is_dir())
    told += [f"the folder {p.name} was left out" for p in folders if not p.samefile(partial)]
    return told


def _link(path: Path, new: Path) -> None:
    """The same file under a second name. Some disks have no such thing; then it is a copy."""
    try:
        os.link(path.resolve(), new)
    except FileExistsError:  # to copy would be to write into the source, through that link
        raise
    except OSError:
        shutil.copyfile(path, new)


def _rewrite(path: Path, new: Path, names: dict[str, str]) -> None:
    """The file with another header and the same data."""
    old = read_header(path)
    metadata = {**old.pop("__metadata__", {}), "format": "pt"}
    header = {"__metadata__": metadata, **{names.get(n, n): entry for n, entry in old.items()}}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("rb") as source, new.open("xb") as target:
        (length,) = struct.unpack("<Q", source.read(8))
        source.seek(8 + length)
        target.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(source, target, _COPIED)
        target.flush()
        os.fsync(target.fileno())


def _edit(source: Source, partial: Path, changes: Iterable[Change]) -> list[str]:
    """The JSON files with their changes."""
    told = []
    contents: dict[str, dict[str, Any]] = {}
    for change in changes:
        if not isinstance(change, Put | Drop):
            continue
        if change.file not in contents:
            contents[change.file] = source.read_json(change.file) or {}
        contents[change.file], text = _changed(contents[change.file], change)
        told.append(text)
    for file, content in contents.items():
        write_json(partial / file, content)
    return told


def _without_verdict(partial: Path) -> list[str]:
    """What verify said was about the files as they were."""
    record = Source(partial.name, partial).read_json(provenance.FILE) or {}
    if "verified" not in record:
        return []
    left = {key: part for key, part in record.items() if key != "verified"}
    write_json(partial / provenance.FILE, left)
    shown = partial / CARD
    if shown.is_file() and card.is_ours(shown.read_text("utf-8", "replace"), record):
        write_text(shown, card.model_card(left))
    return [f"{provenance.FILE}: what verify had found was removed; verify the copy"]


def _changed(content: dict[str, Any], change: Put | Drop) -> tuple[dict[str, Any], str]:
    """The content with one change, and the change in words."""
    if isinstance(change, Put) and not change.path:
        return change.value, f"{change.file} was written"
    *parents, key = change.path
    at = content
    for parent in parents:
        at = at.setdefault(parent, {})
    shown = f"{change.file}: {'.'.join(change.path)}"
    if isinstance(change, Drop):
        at.pop(key, None)
        return content, f"{shown} was removed"
    old, at[key] = at.get(key), change.value
    if isinstance(change.value, dict):
        return content, f"{shown} was written"
    was = f", was {json.dumps(old)}" if old is not None else ""
    return content, f"{shown} is now {json.dumps(change.value)}{was}"
