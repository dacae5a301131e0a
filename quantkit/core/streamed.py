"""A safetensors file that stays on the Hub: its header first, then single tensors as they are asked
for, so that a model can be quantized on a disk that does not hold it.

    bytes 0..8     length N of the header, little endian
    bytes 8..8+N   {"name": {"dtype": "F16", "shape": [...], "data_offsets": [begin, end]}, ...}
    the rest       the data; offsets count from its start

Shards have up to 50 GB, and a block's tensors lie anywhere in them, so it is tensors that come, not
shards. They belong to one commit. Their bytes cannot be compared with the hash of the whole file;
TLS and the exact lengths have to do.
"""

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quantkit.core.ranges import Remote
from quantkit.core.tensor_spec import DTYPES, TensorSpec
from quantkit.errors import QuantkitError

_MAX_HEADER = 100_000_000  # what the safetensors library takes


class StreamedFile:
    """What weight_file.WeightFile is. Tensors are kept until ``release``: a block's are asked for
    several times."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._kept: dict[str, Tensor] = {}
        length = int.from_bytes(remote.read(0, 8), "little") if remote.size >= 8 else 0
        self._start = 8 + length
        if not 0 < length <= min(_MAX_HEADER, remote.size - 8):
            raise self._complaint("it has no header")
        try:
            header = json.loads(remote.read(8, self._start))
            header.pop("__metadata__", None)
            self._places = {name: self._place(name, entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._complaint("its header cannot be read") from error

    def _place(self, name: str, entry: dict[str, Any]) -> tuple[TensorSpec, int]:
        """dtype and shape, and where the data begins in the file."""
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise QuantkitError(
                f"tensor {name} has the dtype {entry['dtype']}, which quantkit does not read"
            )
        begin, end = entry["data_offsets"]
        spec = TensorSpec(dtype, tuple(int(side) for side in entry["shape"]))
        if not 0 <= begin <= end <= self._remote.size - self._start or end - begin != spec.nbytes:
            raise self._complaint(f"its header puts {name} where it cannot be")
        return spec, self._start + begin

    def _complaint(self, what: str) -> QuantkitError:
        return QuantkitError(
            f"{self._remote.path} of {self._remote.repository} is not a safetensors file: {what}",
            "look at the repository's page",
        )

    def names(self) -> Iterable[str]:
        return self._places

    def spec(self, name: str) -> TensorSpec:
        return self._places[name][0]

    def get(self, name: str) -> Tensor:
        kept = self._kept  # another thread may release meanwhile
        if name not in kept:
            kept[name] = self._fetched(*self._places[name])
        return kept[name]

    def _fetched(self, spec: TensorSpec, start: int) -> Tensor:
        raw = torch.empty(spec.nbytes, dtype=torch.uint8)
        at = 0
        for piece in self._remote.pieces(start, start + spec.nbytes):
            raw[at : at + len(piece)] = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
            at += len(piece)
        return raw.view(spec.dtype).reshape(spec.shape)

    def release(self) -> None:
        self._kept = {}
