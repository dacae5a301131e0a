"""Hidden states of all calibration rows, kept where there is room: on the device that computes, in
RAM, or in a file beside the output.

    keeping = Keeping("disk", folder)
    full = keeping.keep(walk.embedding(batches), [batch.shape for batch in batches])
    for index, x in enumerate(full):      # x is on the device, until the next one is asked for
        full.put(index, block.forward(x))

Kept elsewhere, the next micro-batch comes in while this one computes, and the one before goes out:
by two threads and, on a GPU, two streams of their own. A file is mapped into memory, so that the
system's cache holds as much of it as there is room for. The numbers are the same in every place.
"""

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.core.footprint import Home

Shape = tuple[int, ...]  # of a micro-batch: rows and tokens, first


class States:
    """Micro-batches [rows, tokens, width] on the device itself, in the memory of ``parts``.

    ``everywhere``: the tokens of every micro-batch of all ranks, once they are known (gather.py).
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = list(parts)
        self.everywhere: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def shapes(self) -> list[Shape]:
        """(rows, tokens) of every micro-batch."""
        return [(x.shape[0], x.shape[1]) for x in self._parts]

    @property
    def width(self) -> int:
        return self._parts[0].shape[-1]

    @property
    def device(self) -> torch.device:
        """The one that computes."""
        return self._parts[0].device

    def __iter__(self) -> Iterator[Tensor]:
        """All of them in order, each on the device; it may be gone when the next is asked for."""
        return iter(self._parts)

    def __getitem__(self, index: int) -> Tensor:
        """One of them, on the device."""
        return self._parts[index]

    def put(self, index: int, x: Tensor) -> None:
        """Put ``x`` in the place of a micro-batch."""
        self._parts[index].copy_(x.reshape(self._parts[index].shape))

    def settle(self) -> None:
        """Wait until everything that was put has arrived."""

    def empty(self, width: int | None = None) -> "States":
        """Places for as many states, in the same kind of memory, ``width`` features each or as many
        as these."""
        return _on_device(self.shapes, self._like(width), self.device)

    def _like(self, width: int | None) -> Tensor:
        return self._parts[0].new_empty(0, self.width if width is None else width)

    def copy(self) -> "States":
        """The same states once more."""
        other = self.empty()
        for index, x in enumerate(self):
            other.put(index, x)
        other.settle()
        return other


class Away(States):
    """Micro-batches in memory of the CPU, ``parts``, for a device to compute with; ``keeping``
    makes more of the same kind."""

    def __init__(self, parts: Sequence[Tensor], device: torch.device, keeping: "Keeping") -> None:
        super().__init__(parts)
        self._device, self._keeping = device, keeping
        self._reading, self._writing = _Lane(device), _Lane(device)
        self._going: Future[torch.cuda.Event | None] | None = None
        self._slot: Tensor | None = None  # what is on its way out

    @property
    def device(self) -> torch.device:
        return self._device

    def __iter__(self) -> Iterator[Tensor]:
        self.settle()
        slots = [self._new_slot(), self._new_slot()]

        def fetch(index: int) -> "Future[torch.cuda.Event | None]":
            # a slot is free when what was computed so far is done: that used the one before
            part = self._parts[index]
            return self._reading.copy(_fitted(slots[index % 2], part), part)

        coming = fetch(0)
        try:
            for index, part in enumerate(self._parts):
                self._reading.wait(coming)
                if index + 1 < len(self):
                    coming = fetch(index + 1)
                yield _fitted(slots[index % 2], part)
        finally:
            self._reading.wait(coming)  # it writes into a slot

    def __getitem__(self, index: int) -> Tensor:
        self.settle()
        return self._parts[index].to(self._device, copy=True)

    def put(self, index: int, x: Tensor) -> None:
        # by way of a slot: whoever made x may go on to change it
        if self._slot is None:
            self._slot = self._new_slot()
        if self._going:
            self._writing.wait(self._going)
        leaving = _fitted(self._slot, self._parts[index])
        leaving.copy_(x.reshape(leaving.shape))
        self._going = self._writing.copy(self._parts[index], leaving)

    def settle(self) -> None:
        going, self._going = self._going, None
        if going:
            arrived = going.result()
            if arrived:
                arrived.synchronize()
        self._slot = None

    def empty(self, width: int | None = None) -> "States":
        return self._keeping.room(self.shapes, self._like(width), self._device)

    def _new_slot(self) -> Tensor:
        largest = max(self._parts, key=Tensor.numel)
        return torch.empty(largest.numel(), dtype=largest.dtype, device=self._device)


class _Lane:
    """Copies one after another, beside the computation: in a thread and, for a GPU, a stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if cuda else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="states")

    def copy(self, into: Tensor, source: Tensor) -> "Future[torch.cuda.Event | None]":
        """Copy as soon as the device has done all that it was given so far."""
        now = torch.cuda.current_stream(self._device).record_event() if self._stream else None
        return self._thread.submit(self._copy, into, source, now)

    def _copy(
        self, into: Tensor, source: Tensor, after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        if self._stream is None or after is None:
            into.copy_(source)
            return None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            into.copy_(source, non_blocking=True)
            arrived: torch.cuda.Event = self._stream.record_event()
        return arrived

    def wait(self, copying: "Future[torch.cuda.Event | None]") -> None:
        """Let the device go on only when a copy has ended."""
        arrived = copying.result()
        if arrived:
            torch.cuda.current_stream(self._device).wait_event(arrived)


@dataclass(frozen=True)
class Keeping:
    """Where hidden states are kept; ``folder`` is for files, which are gone when they are no longer
    used, or when the process ends."""

    home: Home
    folder: Path

    def keep(self, parts: Iterable[Tensor], shapes: Sequence[Shape]) -> States:
        """The micro-batches ``parts``, whose rows and tokens are known beforehand. They are taken
        one at a time. Raises OSError when the disk is full, torch.OutOfMemoryError when memory is.
        """
        states = States([])
        for index, x in enumerate(parts):
            if not index:
                states = self.room(shapes, x, x.device)
            states.put(index, x)
        states.settle()
        return states

    def room(self, shapes: Sequence[Shape], like: Tensor, device: torch.device) -> States:
        """Places for micro-batches as wide as ``like``."""
        if self.home == "device":
            return _on_device(shapes, like, device)
        count = _tokens(shapes) * like.shape[-1]
        if self.home == "disk":
            whole = _mapped(self.folder, count, like.dtype)
        else:
            whole = torch.empty(count, dtype=like.dtype)
        states = Away(_cut(whole.reshape(-1, like.shape[-1]), shapes), device, self)
        if self.home == "ram" and device.type == "cuda":
            _pin(whole, states)
        return states


def _on_device(shapes: Sequence[Shape], like: Tensor, device: torch.device) -> States:
    whole = torch.empty(_tokens(shapes), like.shape[-1], dtype=like.dtype, device=device)
    return States(_cut(whole, shapes))


def _mapped(folder: Path, count: int, dtype: torch.dtype) -> Tensor:
    """Numbers in a file that is gone with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix="states-")
    try:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a signal later
            os.posix_fallocate(handle, 0, count * dtype.itemsize)
        return torch.from_file(name, shared=True, size=count, dtype=dtype)
    finally:
        os.close(handle)
        with suppress(PermissionError):  # Windows keeps the name while the file is mapped
            Path(name).unlink()


def _pin(whole: Tensor, owner: object) -> None:
    """Let a GPU read and write the memory by itself, as long as ``owner`` lives. (torch's own
    pinned memory comes in powers of two.)"""
    runtime: Any = torch.cuda.cudart()
    address = whole.data_ptr()
    if int(runtime.cudaHostRegister(address, whole.nbytes, 0)):
        raise torch.OutOfMemoryError(f"{whole.nbytes / 1e9:.1f} GB of RAM cannot be locked")
    weakref.finalize(owner, runtime.cudaHostUnregister, address)


def _tokens(shapes: Sequence[Shape]) -> int:
    return sum(rows * tokens for rows, tokens, *_ in shapes)


def _cut(whole: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Micro-batches in one piece of memory [tokens, width]: small lasting tensors among all the
    short-lived ones would leave the heap in pieces."""
    parts = torch.split(whole, [shape[0] * shape[1] for shape in shapes])
    return [part.reshape(shape[0], shape[1], -1) for part, shape in zip(parts, shapes)]


def _fitted(slot: Tensor, part: Tensor) -> Tensor:
    """The beginning of a slot, in the shape of a micro-batch."""
    return slot[: part.numel()].reshape(part.shape)
