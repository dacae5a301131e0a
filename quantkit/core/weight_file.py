"""One open file of tensors: safetensors, or what torch.save wrote. Nothing is resident until it is
touched."""

import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.core import pickled
from quantkit.core.tensor_spec import DTYPES, TensorSpec
from quantkit.errors import QuantkitError


class WeightFile(Protocol):
    """Everything else about it is its own affair."""

    def names(self) -> Iterable[str]: ...
    def spec(self, name: str) -> TensorSpec: ...
    def get(self, name: str) -> Tensor: ...
    def release(self) -> None: ...


class _Safetensors:
    """A safetensors file: mapped as a whole, or tensor by tensor where the system refuses that, as
    Linux does for files larger than its memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: Any  # safetensors has no stubs
        self._apart: _Apart | None = None
        self.release()

    def names(self) -> Iterable[str]:
        names: list[str] = self._handle.keys()
        return names

    def spec(self, name: str) -> TensorSpec:
        part = self._handle.get_slice(name)
        dtype = DTYPES.get(part.get_dtype())
        if dtype is None:
            raise QuantkitError(
                f"tensor {name} has the dtype {part.get_dtype()}, which quantkit does not read"
            )
        return TensorSpec(dtype, tuple(part.get_shape()))

    def get(self, name: str) -> Tensor:
        with self._complaint():
            if self._apart:
                return self._apart.get(name, self.spec(name))
            tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def release(self) -> None:
        with self._complaint():
            if self._apart:  # of which nothing is held but what is in use
                return
            try:
                self._handle = safe_open(self._path, framework="pt")
            except RuntimeError as error:
                if pickled.NO_MAP not in str(error):
                    raise
                self._handle = safe_open(self._path, framework="np")  # for its look at the header
                self._apart = _Apart(self._path)

    @contextmanager
    def _complaint(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            if os.access(self._path, os.F_OK) and not os.access(self._path, os.R_OK):
                raise QuantkitError(
                    f"{self._path} cannot be read (Permission denied)", "see whose file it is"
                ) from error
            raise QuantkitError(
                f"{self._path} is missing, truncated or not a safetensors file ({error})",
                "download or copy it again",
            ) from error


class _Apart:
    """The tensors of a safetensors file, known to be sound, each in a map of its own. What is
    written to them does not get into the file."""

    def __init__(self, path: Path) -> None:
        self._path, self._header = path, read_header(path)
        with path.open("rb") as file:
            self._data = 8 + int.from_bytes(file.read(8), "little")

    def get(self, name: str, spec: TensorSpec) -> Tensor:
        start, stop = self._header[name]["data_offsets"]
        if start == stop:  # nothing cannot be mapped
            return torch.empty(spec.shape, dtype=spec.dtype)
        raw = np.memmap(self._path, np.uint8, "c", self._data + start, (stop - start,))
        return torch.from_numpy(raw).view(spec.dtype).reshape(spec.shape)


class _Pickled:
    """A file of torch.save."""

    def __init__(self, path: Path) -> None:
        self._tensors = pickled.load(path)

    def names(self) -> Iterable[str]:
        return self._tensors

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec.of(self._tensors[name])

    def get(self, name: str) -> Tensor:
        return self._tensors[name].contiguous()

    def release(self) -> None:
        """Nothing: all tensors share one map, which is held for good."""


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file that has been opened before, so that it is known to be
    sound."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    return header


def open_weights(path: Path) -> WeightFile:
    """Raises QuantkitError for what is no file of tensors, or is damaged."""
    if os.path.lexists(path) and not path.is_file():  # a FIFO would be waited for
        raise QuantkitError(
            f"{path} is not a regular file, or a link that leads nowhere",
            "download the model again",
        )
    return _Pickled(path) if path.suffix in pickled.SUFFIXES else _Safetensors(path)
