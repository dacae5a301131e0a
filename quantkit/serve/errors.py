"""Refusals, with bodies of OpenAI's form, so that its clients raise the right exceptions."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that is answered with an error. ``param`` is the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = error_body(status, message, param, code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install(app: FastAPI) -> None:
    """Answer every refusal in this form."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _first(error)
        return JSONResponse(error_body(400, message, param), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            error_body(error.status_code, str(error.detail)), error.status_code, error.headers
        )


def _first(error: RequestValidationError) -> tuple[str, str | None]:
    """A sentence about the first field that is wrong, and the field. What was sent is not
    repeated: it may be long, or not printable."""
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        return "the body is not valid JSON", None
    field = _field(found[0])
    # a field of several forms has an error for each
    said = [str(one["msg"]).removeprefix("Value error, ") for one in found if _field(one) == field]
    said = [f"{message[:1].lower()}{message[1:]}" for message in dict.fromkeys(said)]
    return f"{field or 'the body'}: {', or '.join(said[:4])}", field


def _field(error: dict[str, Any]) -> str | None:
    place = error["loc"][1:]
    return str(place[0]) if place and isinstance(place[0], str) else None
