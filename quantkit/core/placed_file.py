"""A file whose size and places are known before its content: tensors are written in any order, by
any thread, and a run that was killed goes on in the same file."""

import os
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from quantkit.core import pinned
from quantkit.errors import QuantkitError

_CPU = torch.device("cpu")


class PlacedFile:
    """``size`` bytes at ``path`` that begin with ``header``. A file that is so already is gone on
    with, and ``kept`` is True; any other is started anew."""

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self.path = path
        path.touch()
        self._handle = open(path, "r+b", buffering=0)
        self._lock = Lock()
        self.kept = self._handle.read(len(header)) == header and path.stat().st_size == size
        if not self.kept:
            self._handle.truncate(0)
            self._put(0, memoryview(header))
            self._handle.truncate(size)

    def write(self, offset: int, tensor: Tensor) -> None:
        """Put the bytes of a tensor there."""
        if not tensor.is_cuda:
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._put(offset, raw.data)
            return
        for piece in pinned.leaving(tensor):
            self._put(offset, piece.numpy().data)
            offset += len(piece)

    def _put(self, offset: int, raw: memoryview) -> None:
        with self._lock:
            self._handle.seek(offset)
            while len(raw):  # a system writes at most 2 GB at once
                raw = raw[self._handle.write(raw) :]

    def read(self, offset: int, size: int, device: torch.device = _CPU) -> Tensor:
        """uint8 [size] on ``device``: what lies there now. Raises QuantkitError at the end of the
        file."""
        found = torch.empty(size, dtype=torch.uint8, device=device)
        if found.is_cuda:
            pinned.fill(found, lambda piece, start: self._get(offset + start, piece))
        else:
            self._get(offset, found)
        return found

    def _get(self, offset: int, into: Tensor) -> None:
        left = into.numpy().data
        with self._lock:
            self._handle.seek(offset)
            while len(left):
                count = self._handle.readinto(left)
                if not count:
                    raise QuantkitError(f"{self.path.name} ends before its tensors do")
                left = left[count:]

    def sync(self) -> None:
        """Make everything written so far survive a crash of the machine."""
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Leave the file as it is."""
        self._handle.close()
