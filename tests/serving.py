"""A server for tests: in this process, on a free port of the loopback, with small models."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import uvicorn

from quantkit.serve.app import create_app
from quantkit.serve.guard import local_hosts
from quantkit.serve.model import Served
from quantkit.workflows.serve import configuration
from quantkit.workflows.serve_models import Settings, open_model


@dataclass
class Running:
    url: str
    models: list[Served]
    server: uvicorn.Server

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **options)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        with self.client() as client:
            return client.post(path, json=body)


def demo(
    name: str = "demo",
    model: str = "demo",
    note: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Served:
    """In float32, so that a batch chooses the tokens that a single text does."""
    return open_model(model, name, Settings(**{"dtype": "float32", **settings}), note)


@contextmanager
def running(*models: Served, **options: Any) -> Iterator[Running]:
    app = create_app(models, **{"hosts": local_hosts(()), **options})
    config = configuration(app, drain_seconds=1)
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", list(models), server)
    finally:
        server.should_exit = True
        thread.join()


def until(reached: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until it is so; fails when it does not come."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "waited for nothing"
        time.sleep(0.01)
