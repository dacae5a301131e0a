"""Seconds by phase, for ``--profile``: what a run spends its time on.

    with phase("forward"):
        ...
            with phase("hessian"):       # counts for itself, and no longer for "forward"
                ...

Nothing is measured until :func:`start` is called. A GPU is waited for at both ends of a phase, so a
profiled run takes a little longer than others.

Beside that stands the floor: what the arithmetic that cannot be avoided takes, at the speed of
large products on the machine at hand.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Profile:
    """Exclusive seconds by phase, of one thread; by phase, too, the ``least`` operations for what
    was done; and the machine's ``speed``, operations a second, 0 while it is not known."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.least: dict[str, float] = {}
        self.speed = 0.0
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def add(self, operations: Mapping[str, float]) -> None:
        """Something was done that takes so many operations at least."""
        for name, count in operations.items():
            self.least[name] = self.least.get(name, 0.0) + count

    def floor(self) -> dict[str, float]:
        """Seconds by phase that cannot be avoided; {} while that is not known."""
        return {name: count / self.speed for name, count in self.least.items() if self.speed}

    def _charge(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


_profile: Profile | None = None


def start() -> Profile:
    """Measure from now on, from nothing."""
    global _profile
    _profile = Profile()
    return _profile


def running() -> Profile | None:
    """What is measured now."""
    return _profile


def stop() -> None:
    """Do not measure any more."""
    global _profile
    _profile = None


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What happens in here is ``name``, but for phases inside of it."""
    profile = _profile
    if profile is None:
        yield
        return
    profile.enter(name)
    try:
        yield
    finally:
        profile.leave()
