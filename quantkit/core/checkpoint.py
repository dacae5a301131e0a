"""Folders of safetensors files: read tensors by name, write shards whose layout is planned ahead.

Reading maps files into memory; nothing is resident until it is touched. Writing knows every
tensor's name, dtype and shape before the first byte, so headers are written at once and each
tensor goes straight to its final place: no merging at the end, and a killed run finds what it
finished exactly where it belongs.
"""

import json
import os
import stat
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import QuantkitError

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """dtype and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        return cls(tensor.dtype, tuple(tensor.shape))


class Checkpoint:
    """The tensors of a folder, by name.

    Raises QuantkitError when there are no safetensors files, when the index names a shard that is
    missing or lies outside of the folder, or when a file is truncated or corrupt.
    """

    def __init__(self, folder: Path, files: Iterable[str] | None = None) -> None:
        self.folder = folder
        self.files = sorted(files) if files is not None else _weight_files(folder)
        self._handles = {name: _open(folder, name) for name in self.files}
        self._where: dict[str, str] = {}
        for file, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118  (a safe_open handle is no mapping)
                if name in self._where:
                    raise QuantkitError(
                        f"tensor {name} is in both {self._where[name]} and {file} of {folder}",
                        "remove the files that do not belong to this model",
                    )
                self._where[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def spec(self, name: str) -> TensorSpec:
        part = self._handles[self._where[name]].get_slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise QuantkitError(
                f"tensor {name} has the dtype {part.get_dtype()}, which quantkit does not read"
            )
        return TensorSpec(dtype, tuple(part.get_shape()))

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU, backed by the file."""
        tensor: Tensor = self._handles[self._where[name]].get_tensor(name)
        return tensor

    def without(self, names: Collection[str]) -> "Checkpoint":
        """A view that does not show the tensors ``names``."""
        view = copy(self)
        view._where = {n: file for n, file in self._where.items() if n not in names}
        return view

    def file_of(self, name: str) -> str:
        return self._where[name]

    @property
    def nbytes(self) -> int:
        return sum((self.folder / file).stat().st_size for file in self.files)


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.exists():
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        if not found:
            raise _no_weights(folder)
        return found
    try:
        listed = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuantkitError(
            f"{index} is not a readable index of shards", "download the model again"
        ) from error
    for name in sorted(listed, key=str):
        # an index is data from strangers: it must not lead out of the folder
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise QuantkitError(
                f"{index} names a file outside of the model's folder: {name!r}",
                "do not use this model, or repair its index",
            )
        if not (folder / name).exists():
            raise QuantkitError(
                f"{index.name} names {name}, which is not in {folder}",
                "the download is incomplete; download the model again",
            )
    return sorted(listed)


def _no_weights(folder: Path) -> QuantkitError:
    others = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.gguf")
    )
    if others:
        return QuantkitError(
            f"{folder} has no safetensors weights, only {others[0]}",
            "save the model as safetensors first (transformers: model.save_pretrained)",
        )
    return QuantkitError(
        f"{folder} has no model weights (*.safetensors)", "is this the right folder?"
    )


def _open(folder: Path, name: str):  # type: ignore[no-untyped-def]  # safetensors has no stubs
    path = folder / name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise QuantkitError(f"{path} is not a regular file", "download the model again")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise QuantkitError(
            f"{path} is missing, truncated or not a safetensors file ({error})",
            "download or copy it again",
        ) from error


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
        self._handles: list[BinaryIO] = []
        self._dirty: set[int] = set()
        self.complete = True
        for number, names in enumerate(shards):
            header, offsets = _header({name: self._specs[name] for name in names})
            end = len(header) + sum(self._specs[name].nbytes for name in names)
            handle, kept = _prepare(folder / self._files[number], header, end)
            self._handles.append(handle)
            self.complete &= kept
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
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._handles[number].seek(offset)
        self._handles[number].write(raw.data)
        self._dirty.add(number)

    def sync(self) -> None:
        """Make everything written so far survive a crash of the machine."""
        for number in sorted(self._dirty):
            self._handles[number].flush()
            os.fsync(self._handles[number].fileno())
        self._dirty.clear()

    def read(self, name: str) -> Tensor:
        """What the file now holds under ``name``: to check it, or to continue from it."""
        spec = self._specs[name]
        number, offset = self._place[name]
        handle = self._handles[number]
        handle.flush()
        handle.seek(offset)
        raw = bytearray(handle.read(spec.nbytes))
        if len(raw) < spec.nbytes:
            raise QuantkitError(f"{self._files[number]} ends before {name}")
        if not raw:
            return torch.empty(spec.shape, dtype=spec.dtype)
        return torch.frombuffer(raw, dtype=spec.dtype).reshape(spec.shape)

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
        for handle in self._handles:
            handle.close()
        self._handles = []


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
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


def _prepare(path: Path, header: bytes, size: int) -> tuple[BinaryIO, bool]:
    """Open the shard for reading and writing; start it anew unless it is this plan's already.
    Returns whether it was."""
    path.touch()
    handle = open(path, "r+b")
    kept = handle.read(len(header)) == header and path.stat().st_size == size
    if not kept:
        handle.truncate(0)
        handle.seek(0)
        handle.write(header)
        handle.truncate(size)
        handle.flush()
    return handle, kept


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
