"""Parts of a file on the Hub: whole files that go on where a killed run stopped, and single tensors
of files that never come here.

huggingface_hub begins a file anew when its process was killed, and does not look at what arrived
over plain HTTP. Weight files are gigabytes, so they are fetched here: in pieces, several at a time,
appended to ``HASH.part`` beside the cache's finished files; whole, it must have the hash that the
Hub told, and then becomes the cache's own.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quantkit.core import hub
from quantkit.errors import QuantkitError

PIECE = 16 << 20
_AT_ONCE = 4


@dataclass(frozen=True)
class Remote:
    """A large file of a commit."""

    repository: str
    commit: str
    path: str
    size: int
    sha256: str

    def read(self, start: int, stop: int) -> bytes:
        """The bytes start..stop. Raises QuantkitError when the Hub sends something else."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        wanted = f"bytes={start}-{stop - 1}"
        headers = build_hf_headers() | {"Range": wanted, "Accept-Encoding": "identity"}
        url = hf_hub_url(self.repository, self.path, revision=self.commit)

        def get() -> bytes:
            client = get_session()
            with client.stream("GET", url, headers=headers, follow_redirects=True) as response:
                hf_raise_for_status(response)
                content = bytearray()
                told = response.headers.get("Content-Range", "")
                if told.startswith(f"bytes {start}-{stop - 1}/"):
                    for part in response.iter_raw():
                        content += part
                        if len(content) > stop - start:  # it may never end
                            break
            if len(content) != stop - start:
                raise QuantkitError(
                    f"the Hub did not send the {stop - start} bytes of {self.path} that were "
                    "asked for",
                    "run the same command again to continue",
                )
            return bytes(content)

        with hub.told(self.repository, self.commit, "downloading"):
            return hub.patiently(get)

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes start..stop in order, some of them on their way while others are used."""
        ranges = [(at, min(at + PIECE, stop)) for at in range(start, stop, PIECE)]
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch")
        waiting: list[Future[bytes]] = []
        try:
            for index in range(len(ranges) + _AT_ONCE):
                if index < len(ranges):
                    waiting.append(pool.submit(self.read, *ranges[index]))
                if index >= _AT_ONCE and waiting:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def fetch(remote: Remote, folder: Path, moved: Callable[[int], object]) -> None:
    """The whole file as ``folder/HASH``; goes on with what an earlier run has left. ``moved`` is
    told of bytes as they arrive. Raises QuantkitError when they are not what the Hub promised."""
    from huggingface_hub.utils import WeakFileLock

    folder.mkdir(parents=True, exist_ok=True)
    done, part = folder / remote.sha256, partial(folder, remote.sha256)
    with WeakFileLock(part.with_suffix(".lock")):
        if done.exists():  # somebody else was faster
            return
        with part.open("ab") as file:
            held = file.tell()
            moved(held)
            for piece in remote.pieces(held, remote.size):
                file.write(piece)
                moved(len(piece))
        if part.stat().st_size != remote.size or _sha256(part) != remote.sha256:
            part.unlink()
            raise QuantkitError(
                f"{remote.path} arrived damaged: its sha256 is not the one that the Hub tells",
                "run the same command again to fetch it anew",
            )
        part.replace(done)
    part.with_suffix(".lock").unlink(missing_ok=True)


def partial(folder: Path, sha256: str) -> Path:
    return folder / f"{sha256}.part"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
