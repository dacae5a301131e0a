"""Clients that are too slow. Without a limit, one that sends or takes a byte a minute holds a
connection for hours, and some hundred of them hold all there are.

A head that is late ends its connection, since nobody has asked for anything yet, and so does the
rest of a body that was refused before it was here; a body that is waited for is answered with 408.
Who takes nothing of an answer loses the connection, and with it the answer.
"""

import asyncio

import h11
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 30.0  # for the head of a request, and for its body
STALLED = 60.0  # in which a client has to take something


class Paced(H11Protocol):
    """uvicorn's protocol, which itself waits for ever for a head that was begun, or for a first
    one, for what follows it when it has its answer, and for a client to take that."""

    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # to be told when the system takes no more
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._unwatch()
        super().connection_lost(exc)

    # what arrives

    def _look(self) -> None:
        sending, here = self.conn.their_state, self.conn.our_state
        if sending is h11.IDLE or (sending is h11.SEND_BODY and here is h11.DONE):
            if self._late is None:
                self._wait()
        else:
            self._stop()

    def _wait(self) -> None:
        self._late = self.loop.call_later(SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    # what is taken

    def _watch(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(STALLED, self._end_or_watch, left)

    def _end_or_watch(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch()
        else:
            self.transport.abort()  # to close it would wait for what is left to be taken

    def _unwatch(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def in_time(receive: Receive) -> Receive:
    """``receive``, until the body is whole or has taken too long: then it raises HTTPException."""
    end = asyncio.get_running_loop().time() + SECONDS
    whole = False

    async def limited() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout_at(end):
                message = await receive()
        except TimeoutError as error:
            told = f"the body was not here after {SECONDS:g} seconds"
            raise HTTPException(408, told, {"Connection": "close"}) from error
        whole = not message.get("more_body", False)
        return message

    return limited
