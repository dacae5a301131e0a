"""What quantkit has worked out for this machine and can work out again: one folder, by kind.

    QUANTKIT_CACHE, or XDG_CACHE_HOME/quantkit, or ~/.cache/quantkit
        autotune/      which variant of a kernel is fastest here
        cubin/         kernels for Hopper, compiled

Whatever else lies there is somebody else's, and stays. Models are not here: those from the Hub lie
in huggingface_hub's own cache (HF_HOME), where other programs find them too. All of it may be
removed at any time.
"""

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import QuantkitError, UsageError

VARIABLE = "QUANTKIT_CACHE"
KINDS = ("autotune", "cubin")
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Kind:
    """The files of one kind that are there, and their bytes."""

    name: str
    files: int
    bytes: int


def root() -> Path:
    """Where all of it lies; it may not exist yet."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "quantkit"


def folder(kind: str) -> Path:
    """The folder of one kind, which need not exist. Raises ValueError for a name that is none."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of cached data")
    return root() / kind


def read(kind: str, name: str) -> bytes | None:
    """What was written under ``name``, or None."""
    try:
        return _file(kind, name).read_bytes()
    except OSError:  # not there, or not to be read: then it is worked out again
        return None


def write(kind: str, name: str, content: bytes) -> None:
    """Keep ``content``; another process sees all of it or nothing. A cache that cannot be written
    is no error: the next process works it out again."""
    file = _file(kind, name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        Path(temporary).replace(file)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


def kinds() -> list[Kind]:
    """Everything that is there."""
    found = []
    for path in map(folder, KINDS):
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file()]
            found.append(Kind(path.name, len(files), sum(file.stat().st_size for file in files)))
    return found


def clear(kind: str | None = None) -> list[Kind]:
    """Remove one kind, or all -> what was removed. Raises UsageError when there is no such kind."""
    gone = [one for one in kinds() if kind in (None, one.name)]
    if kind is not None and not gone:
        raise UsageError(f"there is nothing called {kind} in {root()}", "see 'quantkit cache list'")
    for one in gone:
        path = folder(one.name)
        try:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
        except OSError as error:
            raise QuantkitError(f"{path} cannot be removed ({error.strerror})") from error
    return gone


def _file(kind: str, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for cached data")
    return folder(kind) / name
