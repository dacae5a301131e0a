"""Where an artifact came from: versions, machine, hashes of the source's files."""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from quantkit import __version__
from quantkit.core.ranges import Remote

FILE = "quantkit.json"
_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of quantkit, Python and what the result depends on."""
    found = {"quantkit": __version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found


def machine(device: torch.device, processes: int = 1) -> str:
    """The processor that did the work, or those of several processes."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return name if processes == 1 else f"{processes} processes on {name}"


def identity(path: Path, remote: Mapping[str, Remote]) -> str:
    """What changes when the file does; ``remote`` are those that are still on the Hub, by name."""
    if there := remote.get(path.name):
        return f"{there.size} bytes, sha256 {there.sha256}"
    return f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns}"


def hash_files(
    files: list[Path], remote: Mapping[str, Remote] | None = None
) -> Future[dict[str, str]]:
    """sha256 of each file, by name, computed beside the work (hashing frees the interpreter); of
    files that are still on the Hub, as it tells them."""
    known = {name: one.sha256 for name, one in (remote or {}).items()}
    pool = ThreadPoolExecutor(1, thread_name_prefix="hash")

    def work() -> dict[str, str]:
        return {path.name: known.get(path.name) or _sha256(path) for path in files}

    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
