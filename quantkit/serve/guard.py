"""Who may ask: the host name, the origin, the key, and the type, size and pace of what is sent.

A server on 127.0.0.1 is reachable from every page that the user's browser shows. Three checks keep
such pages out: the Host header (a page can point its own name at 127.0.0.1), the Origin header, and
the content type (JSON cannot be sent to another origin without asking first, and nobody answers).
"""

import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from quantkit.serve.errors import error_body
from quantkit.serve.pace import in_time

_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_OPEN = ("/", "/health")  # and the page's files: nothing about the models is in them
PAGE = "/page/"
TAKING = ("/v1/chat/completions", "/v1/completions")  # the only paths that take a body
MAX_BODY = 4 << 20  # bytes


class Guard:
    """ASGI middleware. ``hosts``: names under which the server may be called, None for any;
    ``api_key``: what must be sent as a bearer token, None for nothing."""

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str] | None, api_key: str | None) -> None:
        self._app, self._hosts = app, hosts
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is None:
            await self._app(scope, in_time(receive), send)
            return
        status, message, headers = refusal
        await JSONResponse(error_body(status, message), status, headers)(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str, dict[str, str]] | None:
        host = headers.get("host", "")
        if self._hosts is not None and host_name(host) not in self._hosts:
            return 403, "this host name is not served here (--allowed-host)", {}
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return 403, "other sites' pages may not use this server", {}
        if not self._knows(scope["path"], headers):
            return 401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"}
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > MAX_BODY:
            return 413, f"the body is larger than {MAX_BODY} bytes", {}
        if scope["path"] in TAKING:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if scope["method"] == "POST" and kind != "application/json":
                return 415, "send application/json", {}
        return None

    def _knows(self, path: str, headers: Headers) -> bool:
        if self._key is None or path in _OPEN or path.startswith(PAGE):
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # both sides as bytes: compare_digest takes as long for any wrong key
        right = hmac.compare_digest(given.strip().encode(), self._key)
        return right and scheme.lower() == "bearer"


def local_hosts(more: tuple[str, ...]) -> frozenset[str]:
    """Names of this machine for itself, and ``more``."""
    return frozenset((*_LOCAL, *(name.lower() for name in more)))


def host_name(host: str) -> str:
    """Without the port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()
