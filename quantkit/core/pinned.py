"""Copies between a GPU and other memory, by way of a piece of memory that is pinned.

A GPU reads and writes memory by itself where the system cannot move it away. From and to any other
the driver copies through small buffers of its own: 2 GB/s, measured where the bus has 50, and that
in the middle of the stream. Here everything goes through one piece of pinned memory, which each
thread has of its own, part by part and on the thread's current stream. The stream has done each
copy before anybody goes on, so there is nothing that could be too early.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_PIECE = 16 << 20  # bytes; a power of two, which is what torch's pinned memory comes in
_threads = threading.local()


def carried(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``."""
    if tensor.is_cuda == (device.type == "cuda"):
        return tensor.to(device)
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if there.is_cuda:
        source = _bytes(tensor)
        fill(there, lambda piece, start: piece.copy_(source[start : start + len(piece)]))
        return there
    rest = _bytes(there)
    for piece in leaving(tensor):
        rest[: len(piece)] = piece
        rest = rest[len(piece) :]
    return there


def numbers(tensor: Tensor) -> Any:
    """``tensor.tolist()``. A GPU is waited for before the copy is begun: in traces of an H200,
    copies of another stream ended only when one that waited for kernels did."""
    if tensor.is_cuda:
        _wait(tensor.device)
    return tensor.tolist()


def fill(tensor: Tensor, read: Callable[[Tensor, int], object]) -> None:
    """Fill a contiguous tensor on a GPU: ``read(piece, start)`` puts its bytes from ``start`` on
    into ``piece``, uint8 on the CPU."""
    assert tensor.is_contiguous()  # or a copy would be filled
    for start, part in _parts(tensor):
        piece = _piece()[: len(part)]
        read(piece, start)
        part.copy_(piece, non_blocking=True)
        _wait(tensor.device)


def leaving(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor on a GPU, in order: pieces of uint8 on the CPU, each of which is gone
    when the next one is asked for."""
    for _, part in _parts(tensor):
        piece = _piece()[: len(part)]
        piece.copy_(part, non_blocking=True)
        _wait(tensor.device)
        yield piece


def _parts(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Where parts of a tensor's bytes begin, and the parts."""
    whole = _bytes(tensor)
    for start in range(0, len(whole), _PIECE):
        yield start, whole[start : start + _PIECE]


def _bytes(tensor: Tensor) -> Tensor:
    """uint8, in the tensor's own memory if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _piece() -> Tensor:
    """This thread's own, as long as the thread lives."""
    if not hasattr(_threads, "piece"):
        _threads.piece = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
    piece: Tensor = _threads.piece
    return piece


def _wait(device: torch.device) -> None:
    """Until everything that this thread's stream was given is done."""
    torch.cuda.current_stream(device).synchronize()
