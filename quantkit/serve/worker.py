"""A thread that runs a backend: requests wait in a bounded queue, and are let go when cancelled."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from quantkit.serve.engine import Busy, Dead, Finish, Job, Limits, Load, Stream, Token

Delivery = tuple[Stream, list[Token], Finish | None]


class Backend(Protocol):
    """A model that computes. All calls but ``load`` come from one thread."""

    name: str
    limits: Limits
    rows: int  # texts that run together at most

    def admits(self, job: Job) -> bool:
        """Whether there is room for this job now. With nothing running, there is for every job
        that the limits allow."""

    def add(self, stream: Stream) -> None:
        """Take this up; there is room for it."""

    def turn(self) -> list[Delivery]:
        """Some milliseconds of work, new tokens as its result; cancelled streams are let go first.
        Only called while there is something to do."""

    @property
    def busy(self) -> bool:
        """Whether anything is running."""

    def load(self) -> Load: ...

    def close(self) -> None: ...


class Worker:
    """An Engine made of a backend. ``queue`` texts may wait beside those that run."""

    def __init__(self, backend: Backend, queue: int) -> None:
        self.name, self.limits = backend.name, backend.limits
        self.dead = False
        self._backend = backend
        self._room = backend.rows + queue
        self._waiting: deque[Stream] = deque()
        self._running: set[Stream] = set()  # taken up, not finished
        self._changed = threading.Condition()
        self._closing = False
        self._died: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name=f"engine {self.name}", daemon=True)
        self._thread.start()

    def submit(self, jobs: list[Job]) -> list[Stream]:
        streams = [Stream(job) for job in jobs]
        with self._changed:
            if self.dead or self._closing:
                raise Dead
            self._waiting = deque(s for s in self._waiting if not s.cancelled)
            if len(self._running) + len(self._waiting) + len(streams) > self._room:
                raise Busy
            self._waiting.extend(streams)
            self._changed.notify()
        return streams

    def load(self) -> Load:
        held = self._backend.load()
        return Load(held.running, len(self._waiting), held.kv_used, held.kv_room)

    def watch(self, died: Callable[[], None]) -> None:
        self._died = died

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._next():
                deliveries = self._backend.turn()
                self._running -= {s for s, _, finish in deliveries if finish or s.cancelled}
                if deliveries:
                    deliveries[0][0].call(_deliver, deliveries)
            self._backend.close()
        finally:
            # whatever went wrong is on its way to the thread's last words; nobody may hang on it
            if not self._closing:
                self._fail()

    def _next(self) -> bool:
        """Wait until there is work, and take up what there is room for. False: time to end."""
        with self._changed:
            while not (self._closing or self._backend.busy or self._waiting):
                self._changed.wait()
            while self._waiting:
                stream = self._waiting[0]
                if not stream.cancelled:
                    if not self._backend.admits(stream.job):
                        break
                    self._backend.add(stream)
                    self._running.add(stream)
                self._waiting.popleft()
            return not self._closing

    def _fail(self) -> None:
        with self._changed:
            self.dead = True
            lost = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for stream in lost:
            stream.call(stream.fail)
        if self._died is not None:
            self._died()


def _deliver(deliveries: list[Delivery]) -> None:
    for stream, tokens, finish in deliveries:
        stream.put(tokens, finish)
