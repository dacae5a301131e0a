"""What an engine is: token ids in, a stream of token ids out."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from quantkit.core.sampling import Sampling

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Job:
    """One text to be continued: ``prompt`` ids, not empty; at most ``max_tokens`` more, which fit
    into the context; ``logprobs``: how many of the likeliest tokens to tell with each token (0: the
    token's own alone, None: nothing)."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A token of the text. ``logprob`` is of the model's own distribution, before any sampling
    setting; ``top`` the likeliest tokens and theirs."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Busy(Exception):
    """The queue is full."""


class Dead(Exception):
    """The engine has failed and will not come back; with a message, only this text has."""


class Stream:
    """The tokens of one job, read in an event loop and written from anywhere through ``deliver``.

    It holds at most ``job.max_tokens`` tokens, so a reader may be slow: the engine never waits for
    it, and the memory of the model is free as soon as the text is finished.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.finish: Finish | None = None  # why it ended, when it has
        self.cancelled = False  # nobody reads any more: the engine lets go of it
        self._loop = asyncio.get_running_loop()
        self._tokens: deque[Token] = deque()
        self._failed: str | None = None  # why, or "" where the engine did
        self._ready = asyncio.Event()

    def cancel(self) -> None:
        """Stop; may be called at any time, from anywhere."""
        self.cancelled = True

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Token:
        """Raises Dead when the text or the engine failed."""
        while not self._tokens:
            if self._failed is not None:
                raise Dead(self._failed)
            if self.finish is not None:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return self._tokens.popleft()

    # what comes from the engine, in the event loop

    def put(self, tokens: list[Token], finish: Finish | None = None) -> None:
        self._tokens.extend(tokens)
        self.finish = finish
        self._ready.set()

    def fail(self, why: str = "") -> None:
        self._failed = why
        self._ready.set()

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Have the event loop call this, from another thread. One that is gone has no readers."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


@dataclass(frozen=True)
class Load:
    """What an engine is doing. ``kv_used`` of ``kv_room`` tokens have their keys and values in
    memory, or room for them reserved; both 0 where the engine does not say."""

    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    kv_room: int = 0


@dataclass(frozen=True)
class Limits:
    """``context``: tokens of prompt and text together; ``logprobs``: whether the engine tells
    them."""

    context: int
    logprobs: bool = True


class Engine(Protocol):
    """``name`` is that of the file in engines/."""

    name: str
    limits: Limits

    def submit(self, jobs: list[Job]) -> list[Stream]:
        """Start all of ``jobs`` or none. Raises Busy when there is no room in the queue, Dead after
        a failure. Never waits."""

    def load(self) -> Load: ...

    @property
    def dead(self) -> bool: ...

    def watch(self, died: Callable[[], None]) -> None:
        """Have ``died`` called, from any thread, when the engine fails."""

    def close(self) -> None:
        """End everything; the engine was idle, or what it still did is lost."""
