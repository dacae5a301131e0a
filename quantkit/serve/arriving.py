"""Requests that arrive too slowly. Without a limit, a client that sends a byte a minute holds a
connection for hours, and some hundred of them hold all there are.

A head that is late ends its connection, since nobody has asked for anything yet; a body that is
late is answered with 408.
"""

import asyncio

import h11
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 30.0  # for the head of a request, and for its body


class HeadInTime(H11Protocol):
    """uvicorn's protocol, which itself waits for ever for a head that was begun, or for a first
    one."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._late is None:  # a part of the next head
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._late = self.loop.call_later(SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


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
