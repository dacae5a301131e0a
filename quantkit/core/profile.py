"""Seconds by phase, for ``--profile``: what a run spends its time on.

    with phase("forward"):
        ...
            with phase("hessian"):       # counts for itself, and no longer for "forward"
                ...

Nothing is measured until :func:`start` is called. A GPU is waited for at both ends of a phase, so a
profiled run takes a little longer than others.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Profile:
    """Exclusive seconds by phase. One thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

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
