"""Sending while watching the other side: whoever is gone ends the request (pace.py: who does not
read is gone after a while)."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quantkit.serve.bodies import event
from quantkit.serve.errors import error_body

T = TypeVar("T")


class Gone(Exception):
    """Nobody is there any more to answer to."""


class Ending(Exception):
    """The server ends, and waits no longer for the answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes. Raises Gone then, and Ending
    when this is cancelled, which the server does alone."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    except asyncio.CancelledError as error:
        raise Ending("the server ends, and the answer takes longer than it waits") from error
    finally:
        await _ended(working)
        await _ended(leaving)


class EventStream(Response):
    """Server-sent events as they come."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        except Gone:
            return
        except Ending as error:
            last = event(error_body(503, str(error)))
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(task: asyncio.Task[Any]) -> None:
    """Cancel ``task`` if it still runs, and wait until it has cleaned up."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
