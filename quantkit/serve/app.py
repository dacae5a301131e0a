"""The HTTP application: its routes, and nothing else."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantkit.serve import errors, page
from quantkit.serve.asking import ask
from quantkit.serve.errors import Refused
from quantkit.serve.guard import MAX_BODY, Guard
from quantkit.serve.metrics import Metrics, resident
from quantkit.serve.model import Served
from quantkit.serve.schemas import ChatRequest, CompletionRequest
from quantkit.serve.sending import Ending, EventStream, Gone, unless_gone

_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field is missing, wrong, or more than the model can do"},
    401: {"description": "The API key is missing or wrong"},
    403: {"description": "Called under a wrong host name, or by another site's page"},
    404: {"description": "No such model"},
    408: {"description": "The body arrived too slowly"},
    413: {"description": "The body is too large"},
    415: {"description": "The body is not application/json"},
    429: {"description": "Too many requests are waiting"},
    503: {"description": "The engine has failed"},
}
_ANSWERS = {
    200: {
        "description": "One object; with stream=true the same in pieces, as server-sent events",
        "content": {"text/event-stream": {}},
    }
} | _REFUSALS


def create_app(
    models: Sequence[Served],
    *,
    hosts: frozenset[str] | None = None,
    api_key: str | None = None,
    with_page: bool = True,
) -> ASGIApp:
    """Serve ``models``, which have different names; ``hosts`` and ``api_key`` as in guard.py."""
    served = {model.name: model for model in models}
    metrics = Metrics(models)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for model in models:
            model.vocabulary.close()  # it may be the engine's own
            model.engine.close()

    app = FastAPI(
        title="quantkit serve",
        lifespan=lifespan,
        docs_url=None,  # these load scripts from elsewhere
        redoc_url=None,
        max_body_size=MAX_BODY,  # for bodies that do not tell their length
    )
    errors.install(app)
    if with_page:
        page.install(app)

    def find(name: str | None) -> Served:
        if name is None:
            return models[0]
        if name not in served:
            raise Refused(
                404,
                f"there is no model {name[:200]!r} here; there is {', '.join(served)}",
                param="model",
                code="model_not_found",
            )
        return served[name]

    async def answer(body: ChatRequest | CompletionRequest, request: Request) -> Response:
        asking = await ask(body, find(body.model), metrics)
        if body.stream:
            return EventStream(asking.events(body.include_usage))
        try:
            return JSONResponse(await unless_gone(request.receive, asking.whole()))
        except Gone:
            return Response(status_code=499)  # nobody reads it; the metrics count it
        except Ending as error:
            raise Refused(503, str(error)) from error

    @app.post("/v1/chat/completions", responses=_ANSWERS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """An answer to messages."""
        return await answer(body, request)

    @app.post("/v1/completions", responses=_ANSWERS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """What follows a text, or token ids."""
        return await answer(body, request)

    @app.get("/v1/models", responses=_REFUSALS)
    async def list_models() -> dict[str, Any]:
        """All models that are served here."""
        return {"object": "list", "data": [_described(model) for model in models]}

    @app.get("/v1/models/{name:path}", responses=_REFUSALS)
    async def one_model(name: str) -> dict[str, Any]:
        """One of them."""
        return _described(find(name))

    @app.get("/health", responses={503: {"description": "An engine has failed"}})
    async def health() -> JSONResponse:
        """Whether every engine works."""
        failed = any(model.engine.dead for model in models)
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/metrics", response_class=PlainTextResponse, responses=_REFUSALS)
    async def numbers() -> Response:
        """What Prometheus reads."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return _Counting(Guard(app, hosts=hosts, api_key=api_key), metrics)


def _described(model: Served) -> dict[str, Any]:
    """OpenAI's fields, and ours under one name."""
    engine = model.engine
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "quantkit",
        "max_model_len": engine.limits.context,
        "quantkit": {
            "engine": engine.name,
            "chat_template": model.vocabulary.template,
            "memory_bytes": resident(),
            **model.about,
        },
    }


class _Counting:
    """ASGI middleware: answers by path and status. Paths that do not exist are one."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, noted if scope["type"] == "http" else send)
