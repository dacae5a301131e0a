"""A Hub on this machine: what huggingface_hub's client talks to, in the tests.

    hub = Hub()
    hub.add("somebody/tiny", {"config.json": b"{}", "model.safetensors": raw})
    with serving(hub) as endpoint: ...

It keeps repositories as the real one does: branches that point to commits, commits that hold all
files, large files by their sha256. Large files are served, and taken, by a second server (another
origin), to which the first one redirects. ``hub.instead`` is asked before every answer and may give
another one: faults are made there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

from hub_answers import Handler, Storage
from hub_store import READER, WRITER, Repository


class Hub:
    """part_size: large files of more bytes are uploaded in parts. ``seen``: method, path and Range
    of every request; ``stored``: large files that were uploaded, by sha256."""

    def __init__(self, part_size: int = 1 << 20) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens = {WRITER: "write", READER: "read"}
        self.seen: list[tuple[str, str, str | None]] = []
        self.stored: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.instead: Callable[[Handler], bool] = lambda handler: False
        self.part_size = part_size
        self.lock = Lock()
        self.endpoint = self.storage = ""

    def add(self, name: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        repository = self.repositories.setdefault(name, Repository())
        return repository.commit(branch, dict(files))

    def add_folder(self, name: str, folder: Path, branch: str = "main") -> str:
        return self.add(name, {p.name: p.read_bytes() for p in folder.iterdir()}, branch)

    def fetched(self) -> list[tuple[str, str | None]]:
        """File and Range of every download so far, from either server."""
        found = [(p, r) for method, p, r in self.seen if method == "GET" and "/resolve/" in p]
        return [(path.rpartition("/")[2], wanted) for path, wanted in found]


@contextmanager
def _server(handler: type[Handler], hub: Hub, port: int) -> Iterator[str]:
    bound = type("Bound", (handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", port), bound)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that is killed hangs up
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving(hub: Hub, port: int = 0) -> Iterator[str]:
    """The endpoint of ``hub``, while it runs."""
    with ExitStack() as stack:
        hub.storage = stack.enter_context(_server(Storage, hub, 0))
        hub.endpoint = stack.enter_context(_server(Handler, hub, port))
        yield hub.endpoint
