"""Folders of weight files: read tensors by name, write shards whose layout is planned ahead.

Reading maps files into memory; nothing is resident until it is touched. Writing knows every
tensor's name, dtype and shape before the first byte, so headers are written at once and each
tensor goes straight to its final place: no merging at the end, and a killed run finds what it
finished exactly where it belongs.
"""

import json
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from quantkit.core.needed import KINDS, SHARD, SUFFIX, weight_sets
from quantkit.core.placed_file import PlacedFile
from quantkit.core.ranges import Remote
from quantkit.core.streamed import StreamedFile
from quantkit.core.tensor_spec import NAMES
from quantkit.core.tensor_spec import TensorSpec as TensorSpec  # known by this name elsewhere
from quantkit.core.weight_file import WeightFile, open_weights
from quantkit.errors import QuantkitError

INDEX = f"model.safetensors{SUFFIX}"
_MAX_JSON = 64 << 20  # the index of the largest models has 10 MB
_CPU = torch.device("cpu")


class Checkpoint:
    """The tensors of a folder, by name.

    Which files they are in: ``files`` if it is given, or those called ``basename`` (a name without
    its suffix), or what :func:`_weight_files` chooses. Those of ``remote`` that are not in the
    folder are read from the Hub, tensor by tensor.

    Raises QuantkitError when there are no weights or no single choice, when the index names a shard
    that is missing or lies outside of the folder, or when a file is truncated or corrupt.
    """

    def __init__(
        self,
        folder: Path,
        files: Iterable[str] | None = None,
        basename: str | None = None,
        remote: Mapping[str, Remote] | None = None,
    ) -> None:
        self.folder = folder
        self.remote = {n: r for n, r in (remote or {}).items() if not (folder / n).exists()}
        files = remote if remote and files is None else files
        self.files = sorted(files) if files is not None else _weight_files(folder, basename)
        self._open = {file: self._opened(file) for file in self.files}
        self._where: dict[str, str] = {}
        for file, held in self._open.items():
            for name in held.names():
                if name in self._where:
                    raise QuantkitError(
                        f"tensor {name} is in both {self._where[name]} and {file} of {folder}",
                        "remove the files that do not belong to this model",
                    )
                self._where[name] = file

    def _opened(self, file: str) -> WeightFile:
        remote = self.remote.get(file)
        return StreamedFile(remote) if remote else open_weights(self.folder / file)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def spec(self, name: str) -> TensorSpec:
        return self._open[self._where[name]].spec(name)

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU, contiguous, backed by the file."""
        return self._open[self._where[name]].get(name)

    def release(self) -> None:
        """Let go of the pages of files that were read so far; tensors that are still in use keep
        theirs. They are shared with the system's cache, but count as this process's memory."""
        for held in self._open.values():
            held.release()

    def without(self, names: Collection[str]) -> "Checkpoint":
        """A view that does not show the tensors ``names``."""
        view = copy(self)
        view._where = {n: file for n, file in self._where.items() if n not in names}
        return view

    def file_of(self, name: str) -> str:
        return self._where[name]

    @property
    def nbytes(self) -> int:
        return sum(
            self.remote[file].size if file in self.remote else (self.folder / file).stat().st_size
            for file in self.files
        )


def _weight_files(folder: Path, basename: str | None = None) -> list[str]:
    """The files that hold the model. Files that differ in ``-00001-of-00002`` alone are one set,
    whose name is what comes before. Chosen is the set ``basename``; or the one with the usual name;
    or the only one; safetensors before pickles. A set's index has the last word on its files."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [(suffixes, usual, weight_sets(names, suffixes)) for suffixes, usual in KINDS]
    for suffixes, usual, sets in found:
        name = basename or (usual if len(sets) != 1 else next(iter(sets)))
        if name in sets:
            return _of_set(folder, name, suffixes, sets[name])
        if sets and not basename:
            raise QuantkitError(
                f"{folder} holds several sets of weights: {_listed(sets)}",
                "say which with model_basename, or give the path of its file as the model",
            )
    held = {name: files for _, _, sets in found for name, files in sets.items()}
    if not held:
        raise _no_weights(folder)
    raise QuantkitError(
        f"{folder} has no weights with the model_basename {basename!r}, only {_listed(held)}",
        f"give one of these: {', '.join(sorted(held))}",
    )


def _of_set(folder: Path, name: str, suffixes: Iterable[str], files: list[str]) -> list[str]:
    for suffix in suffixes:
        index = folder / f"{name}{suffix}{SUFFIX}"
        if os.path.lexists(index):
            return _indexed(folder, index)
    shards = [shard for shard in (SHARD.fullmatch(Path(file).stem) for file in files) if shard]
    if shards and len(shards) != int(shards[0][2]):
        raise QuantkitError(
            f"{folder} has only a part of the shards of {name}: {', '.join(files)}",
            "the download is incomplete; download the model again",
        )
    return files


def _listed(sets: Mapping[str, list[str]]) -> str:
    return ", ".join(sorted(file for files in sets.values() for file in files))


def _indexed(folder: Path, index: Path) -> list[str]:
    """The shards that an index names."""
    try:
        listed = set(read_json(index)["weight_map"].values())
        if not listed:
            raise ValueError("it names no shards")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuantkitError(
            f"{index} is not a readable index of shards", "download the model again"
        ) from error
    for name in sorted(listed, key=str):
        # an index is data from strangers: it must not lead out of the folder
        if not _is_plain(name):
            raise QuantkitError(
                f"{index} names a file outside of the model's folder: {name!r}",
                "do not use this model, or repair its index",
            )
        if not os.path.lexists(folder / name):
            raise QuantkitError(
                f"{index.name} names {name}, which is not in {folder}",
                "the download is incomplete; download the model again",
            )
    return sorted(listed)


def _is_plain(name: object) -> bool:
    """Whether it is the name of a file that lies in the folder itself, and can be shown."""
    return isinstance(name, str) and Path(name).name == name != ".." and name.isprintable()


def _no_weights(folder: Path) -> QuantkitError:
    others = sorted(p.name for p in folder.glob("*.gguf"))
    if others:
        return QuantkitError(
            f"{folder} has no safetensors weights, only {others[0]}",
            "save the model as safetensors first (transformers: model.save_pretrained)",
        )
    return QuantkitError(
        f"{folder} has no model weights (*.safetensors)", "is this the right folder?"
    )


class ShardWriter:
    """Writes a planned set of tensors into shards, in any order, each to its final offset.

    ``specs`` fixes names, dtypes and shapes; the order of names decides which shard a tensor is in.
    Opening it over the files of an interrupted run with the same plan keeps what they hold;
    ``complete`` says whether all of them were there.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> None:
        self.folder = folder
        self._specs = dict(specs)
        shards = _divide(self._specs, max_shard_bytes)
        total = len(shards)
        self._files = [
            "model.safetensors" if total == 1 else f"model-{i:05d}-of-{total:05d}.safetensors"
            for i in range(1, total + 1)
        ]
        self._place: dict[str, tuple[int, int]] = {}
        self._open: list[PlacedFile] = []
        self._dirty: set[int] = set()
        self._lock = Lock()
        self.complete = True
        for number, names in enumerate(shards):
            header, offsets = _header({name: self._specs[name] for name in names})
            end = len(header) + sum(self._specs[name].nbytes for name in names)
            file = PlacedFile(folder / self._files[number], header, end)
            self._open.append(file)
            self.complete &= file.kept
            for name, offset in offsets.items():
                self._place[name] = (number, len(header) + offset)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self._specs.values())

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor where the plan wants it; its dtype and shape must be the planned ones."""
        spec = self._specs[name]
        if TensorSpec.of(tensor) != spec:
            raise ValueError(f"{name} is {TensorSpec.of(tensor)}, planned was {spec}")
        number, offset = self._place[name]
        self._open[number].write(offset, tensor)
        with self._lock:
            self._dirty.add(number)

    def sync(self) -> None:
        """Make everything written so far survive a crash of the machine. Other threads may go on
        writing meanwhile."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        for number in sorted(dirty):
            self._open[number].sync()

    def read(self, name: str, device: torch.device = _CPU) -> Tensor:
        """What the file now holds under ``name``: to check it, or to continue from it."""
        spec = self._specs[name]
        number, offset = self._place[name]
        raw = self._open[number].read(offset, spec.nbytes, device)
        return raw.view(spec.dtype).reshape(spec.shape)

    def close(self) -> None:
        """Sync, write the index if there is more than one shard, and close the files."""
        self.sync()
        if len(self._files) > 1:
            weight_map = {name: self._files[at] for name, (at, _) in self._place.items()}
            write_json(
                self.folder / INDEX,
                {
                    "metadata": {"total_size": self.nbytes},
                    "weight_map": dict(sorted(weight_map.items())),
                },
            )
        self.abandon()

    def abandon(self) -> None:
        """Close the files and leave them as they are."""
        for file in self._open:
            file.close()
        self._open = []


def _divide(specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    """Names in order, cut into shards of at most ``limit`` bytes (or one larger tensor)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and each tensor's offset in the data. Wide dtypes come first, so
    that every tensor is aligned to its element size."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(specs, key=lambda n: -specs[n].dtype.itemsize):
        spec = specs[name]
        offsets[name], start, end = end, end, end + spec.nbytes
        entries[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


def read_json(path: Path) -> Any:
    """What a JSON file from strangers holds. Raises ValueError, with the reason, when it is none:
    what would block, fill the memory or exhaust the stack is none either."""
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"it has more than {_MAX_JSON >> 20} MiB")
        return json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from error


def write_json(path: Path, content: object) -> None:
    """Write JSON so that the file is either the old one or the new one, never a part."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Like :func:`write_json`, for text."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable, where the system lets a folder be synced."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
