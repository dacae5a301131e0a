"""Working on several tensors at once, in bounded memory and in order."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_CPU = torch.device("cpu")
_WORKERS = min(4, os.cpu_count() or 1)
_BESIDE = 4
# bytes of codes or plain numbers that are being worked on or wait: two of the largest linears of a
# 10B model are not (peak 1.0 GB instead of 0.87, and hardly faster)
_IN_FLIGHT = 170 << 20


class Ahead:
    """Threads that each use one core: moving bits is bound by memory, and a thread of its own for
    every tensor keeps cores busier than several for one operation after the other."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def map(self, work: Callable[[str], T], sizes: Mapping[str, int]) -> Iterator[tuple[str, T]]:
        """``work(name)`` for every name, in order. A tensor larger than what may be worked on at
        once is worked on alone."""
        running: deque[tuple[str, Future[T]]] = deque()
        left = dict(sizes)
        try:
            for name in sizes:
                while running and sum(left[n] for n, _ in running) + left[name] > _IN_FLIGHT:
                    yield _finished(running)
                running.append((name, self._pool.submit(work, name)))
            while running:
                yield _finished(running)
        finally:
            for _, future in running:
                future.cancel()


def _finished(running: "deque[tuple[str, Future[T]]]") -> tuple[str, T]:
    name, future = running[0]
    result = future.result()
    running.popleft()
    return name, result


@contextmanager
def ahead() -> Iterator[Ahead]:
    """Threads for as long as this lasts. An error ends all of them."""
    with on_cores(1), ThreadPoolExecutor(_WORKERS, thread_name_prefix="ahead") as pool:
        yield Ahead(pool)


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """torch uses so many cores for an operation, also in threads that begin inside. With one, long
    sums come out as in the threads of ``ahead``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def beside(processes: int) -> int:
    """Cores for an operation of threads that read and write beside a GPU, where so many processes
    share the machine: their part of it, as torchrun leaves one to each if nobody says otherwise.
    With one, blocks of two H200 took a tenth longer, and with more than four no less."""
    own = _cores() // processes if processes > 1 else torch.get_num_threads()
    return max(1, min(_BESIDE, own))


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Behind:
    """Calls functions one at a time in a thread of its own, each while the caller goes on. On a GPU
    the thread has a stream of its own, so that neither waits for the other's work there.

    A call begins when the GPU has done what the caller had given it before, so that all arguments
    are there. They are held until its own work there is done: their memory is not used again while
    it is read. The caller must not change them.
    """

    def __init__(self, pool: ThreadPoolExecutor | None, device: torch.device) -> None:
        self._pool = pool
        cuda = pool is not None and device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if cuda else None
        self._last: Future[None] | None = None

    def __call__(self, work: Callable[..., None], *args: object) -> None:
        """Wait for the call before, then begin this one. An error of the one before comes out here
        (or in ``finish``)."""
        self.finish()
        if self._pool is None:
            work(*args)
        elif self._stream is None:
            self._last = self._pool.submit(work, *args)
        else:
            ready = torch.cuda.current_stream(self._stream.device).record_event()
            self._last = self._pool.submit(self._on_stream, ready, work, args)

    def _on_stream(
        self, ready: torch.cuda.Event, work: Callable[..., None], args: tuple[object, ...]
    ) -> None:
        ready.synchronize()  # and not in the stream: copies that wait hold up others (pinned.py)
        with torch.cuda.stream(self._stream):
            try:
                work(*args)
            finally:
                self._stream.synchronize()  # ``args`` may be let go of from here on

    def finish(self) -> None:
        """Wait for the last call."""
        last, self._last = self._last, None
        if last:
            last.result()


@contextmanager
def one_behind(threaded: bool = True, device: torch.device = _CPU) -> Iterator[Behind]:
    """A :class:`Behind` whose calls have all ended when this does, for a caller that computes on
    ``device``; not ``threaded``: they end before they return."""
    if not threaded:
        yield Behind(None, device)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="behind") as pool:
        behind = Behind(pool, device)
        yield behind
        behind.finish()
