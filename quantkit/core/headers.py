"""The names, dtypes and shapes of a model's tensors, and none of their data.

On this machine they are those of its files. Of a repository on the Hub the headers of safetensors
files are read by range requests; the only files that come here are small ones, such as config.json.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from quantkit.core import pickled
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.ranges import Remote
from quantkit.core.source import Source, resolve
from quantkit.core.tensor_spec import DTYPES, TensorSpec
from quantkit.errors import QuantkitError

_AT_FIRST = 1 << 18  # bytes of a file that are asked for: few headers are longer
_LONGEST = 100_000_000  # bytes of a header, as the format limits it


def look(model: str, revision: str | None = None) -> tuple[Source, Checkpoint]:
    """``model`` (``demo``, a folder, a safetensors file or a Hub repository) and its tensors, whose
    data is not read and never fetched. Raises QuantkitError when there is no such model, or no
    header that tells what it holds."""
    source = resolve(model, revision, no_weights=True)
    if (source.file or "").endswith(".gguf"):
        raise QuantkitError(
            f"{source.name} is a GGUF file, which cannot be planned with",
            "give the model that it was made from",
        )
    files = {name: one for name, one in source.remote.items() if name.endswith(".safetensors")}
    if files:
        return source, Headers(source, files)
    if any(name.endswith(pickled.SUFFIXES) for name in source.remote):
        raise QuantkitError(
            f"the weights of {source.name} are not safetensors files, whose headers could be read",
            "download it, and give its folder",
        )
    return source, Checkpoint(source.folder, [source.file] if source.file else None)


class Headers(Checkpoint):
    """Safetensors files on the Hub, of which only the headers come here. Raises QuantkitError when
    one is damaged, and when data is asked for."""

    def __init__(self, source: Source, remote: Mapping[str, Remote]) -> None:
        self.folder, self.files = source.folder, sorted(remote)
        self._open = {file: _Header(remote[file]) for file in self.files}
        self._where = {name: file for file in self.files for name in self._open[file].names()}
        self._size = sum(one.size for one in remote.values())

    @property
    def nbytes(self) -> int:
        return self._size


class _Header:
    """One file."""

    def __init__(self, remote: Remote) -> None:
        self._path = remote.path
        start = remote.read(0, min(_AT_FIRST, remote.size))
        (length,) = struct.unpack("<Q", start[:8]) if len(start) >= 8 else (0,)
        if not 2 <= length <= min(_LONGEST, remote.size - 8):
            raise self._damaged()
        if length + 8 > len(start):
            start += remote.read(len(start), length + 8)
        try:
            self._tensors: dict[str, Any] = json.loads(start[8 : length + 8])
            self._tensors.pop("__metadata__", None)
            self._specs = {name: self._spec(name) for name in self._tensors}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._damaged() from error

    def _damaged(self) -> QuantkitError:
        return QuantkitError(
            f"{self._path} does not begin like a safetensors file", "report it on its Hub page"
        )

    def _spec(self, name: str) -> TensorSpec:
        dtype = DTYPES.get(self._tensors[name]["dtype"])
        if dtype is None:
            raise QuantkitError(
                f"tensor {name} has the dtype {self._tensors[name]['dtype']}, which quantkit does "
                "not read"
            )
        return TensorSpec(dtype, tuple(int(size) for size in self._tensors[name]["shape"]))

    def names(self) -> Iterable[str]:
        return self._specs

    def spec(self, name: str) -> TensorSpec:
        return self._specs[name]

    def get(self, name: str) -> Tensor:
        raise QuantkitError(
            f"what {name} holds has to be known, and only the header of {self._path} was read",
            "download the model, and give its folder",
        )

    def release(self) -> None:
        """Nothing is held."""
