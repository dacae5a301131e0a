"""The page at /: files that come with quantkit, under a policy that lets nothing else in."""

from fastapi import FastAPI
from fastapi.responses import Response

from quantkit import data
from quantkit.serve.errors import Refused
from quantkit.serve.guard import PAGE

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def install(app: FastAPI) -> None:
    """Answer for the page. Files are read once, so that no request names a path."""
    found = {file.name: file for file in data.page().iterdir() if file.suffix in _TYPES}
    files = {name: (file.read_bytes(), _TYPES[file.suffix]) for name, file in found.items()}

    def sent(name: str) -> Response:
        if name not in files:
            raise Refused(404, "there is no such file")
        content, kind = files[name]
        return Response(content, media_type=kind, headers=_HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return sent("index.html")

    @app.get(PAGE + "{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return sent(name)
