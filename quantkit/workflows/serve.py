"""``quantkit serve``: models loaded, each into its engine, behind one HTTP server."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError, UsageError

if TYPE_CHECKING:
    import uvicorn

KEY = "QUANTKIT_API_KEY"  # the environment variable
_HEADERS = 32 << 10  # bytes of a request's head
_CONNECTIONS = 512


def serve(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allowed_host: Sequence[str] = (),
    drain_seconds: int = 30,
    page: bool = True,
    note: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> None:
    """Serve ``models`` until SIGTERM or Ctrl-C; running answers have ``drain_seconds`` to end.
    ``options`` are those of serve_models.Settings; ``note`` is told the address and the choices.

    Raises QuantkitError when the server cannot start, and when an engine failed.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise QuantkitError("the server is not installed", "pip install 'quantkit[serve]'")
    import uvicorn

    from quantkit.serve.app import create_app
    from quantkit.serve.guard import local_hosts
    from quantkit.workflows.serve_models import Settings, names_of, open_models

    settings = Settings(**options)
    api_key = api_key or os.environ.get(KEY) or None
    local = _is_local(host)
    if api_key is None and not local:
        raise UsageError(
            f"everybody who reaches {host} could use this server", f"set --api-key, or {KEY}"
        )
    if api_key is not None and not _fits_a_header(api_key):
        raise UsageError(
            "--api-key must be printable ASCII without spaces around it, as it travels in a header"
        )
    with ExitStack() as ending:
        # before the models are loaded, which takes longer
        listening = ending.enter_context(_bound(host, port))
        with _sigterm(lambda *_: sys.exit(128 + signal.SIGTERM)):
            served = open_models(models, names_of(tuple(models)), settings, note)
        for model in served:
            ending.callback(model.engine.close)  # vLLM is a process, which would stay
        names = (*allowed_host, _name(listening)) if local else tuple(allowed_host)
        hosts = local_hosts(names) if names else None
        app = create_app(served, hosts=hosts, api_key=api_key, with_page=page)
        server = uvicorn.Server(configuration(app, drain_seconds))
        for model in served:
            model.engine.watch(lambda: _stop(server))
        with _refused(host, port):
            listening.listen()  # another one may, which has bound it too
        note(f"ready: {_url(listening)} (OpenAI clients: {_url(listening)}/v1)")
        _run(server, listening)
    dead = [model.name for model in served if model.engine.dead]
    if dead:
        raise QuantkitError(f"the engine of {' and '.join(dead)} has failed", "see above for why")


def configuration(app: Any, drain_seconds: int) -> "uvicorn.Config":
    """How ``app`` is served."""
    import uvicorn

    from quantkit.serve.pace import Paced

    return uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        h11_max_incomplete_event_size=_HEADERS,
        http=Paced,
        ws="none",
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=drain_seconds,
    )


def _run(server: "uvicorn.Server", listening: socket.socket) -> None:
    """Until a signal comes. uvicorn raises the signals that it caught again when it is done; to
    have been told to stop is no failure."""
    with _sigterm(lambda *_: None), suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


@contextmanager
def _sigterm(handler: Callable[..., None]) -> Iterator[None]:
    """Have SIGTERM do this."""
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(server: "uvicorn.Server") -> None:
    server.should_exit = True


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket with this address. Port 0 is any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _refused(host, port):
            found.bind((host, port))
        yield found


@contextmanager
def _refused(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        raise QuantkitError(
            f"cannot listen on {host} port {port} ({error})", "choose another --port"
        ) from error


def _fits_a_header(key: str) -> bool:
    return key.isascii() and key.isprintable() and key == key.strip()


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False  # a name: whoever can resolve it may come


def _name(listening: socket.socket) -> str:
    """The address as it is in a URL."""
    host: str = listening.getsockname()[0]
    return f"[{host}]" if ":" in host else host


def _url(listening: socket.socket) -> str:
    return f"http://{_name(listening)}:{listening.getsockname()[1]}"
