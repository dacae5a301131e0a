"""llama.cpp's importance matrix: the mean square of every input of a weight, as a GGUF file.

    general.type          "imatrix"
    imatrix.datasets      where the text came from
    imatrix.chunk_count   pieces of text, u32
    imatrix.chunk_size    tokens in a piece, u32

    NAME.in_sum2          F32 [1, in]    sum of squares of the inputs of the weight NAME
    NAME.counts           F32 [1, 1]     and over how many of them

Facts: llama.cpp tools/imatrix/imatrix.cpp (save_imatrix) and tools/quantize/quantize.cpp. What is
written here are the means, over one.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantkit.core.gguf_file import GgufFile
from quantkit.core.gguf_values import array, string, u32
from quantkit.core.gguf_writer import GgufWriter
from quantkit.errors import QuantkitError

_SUM, _COUNT = ".in_sum2", ".counts"


def write(
    path: Path, matrix: Mapping[str, Tensor], datasets: list[str], chunks: int, size: int
) -> None:
    """``matrix``: float32 [in] by the weights' names in GGUF; ``chunks`` pieces of ``size`` tokens
    were looked at."""
    metadata = {
        "general.type": string("imatrix"),
        "imatrix.datasets": array("str", datasets),
        "imatrix.chunk_count": u32(chunks),
        "imatrix.chunk_size": u32(size),
    }
    tensors = {}
    for name, values in matrix.items():
        tensors[name + _SUM] = "F32", (1, len(values))
        tensors[name + _COUNT] = "F32", (1, 1)
    writer = GgufWriter(path, metadata, tensors)
    for name, values in matrix.items():
        writer.write(name + _SUM, values.float().reshape(1, -1).view(torch.uint8))
        writer.write(name + _COUNT, torch.ones(1, 1).view(torch.uint8))
    writer.close()


def read(path: Path) -> dict[str, Tensor]:
    """Means by the weights' names. Raises QuantkitError for what is no importance matrix."""
    file = GgufFile(path)
    if file.metadata.get("general.type") != "imatrix":
        raise QuantkitError(f"{path} is no importance matrix of llama.cpp")
    found = {}
    for name in file.tensors:
        weight = name.removesuffix(_SUM)
        if weight == name or weight + _COUNT not in file.tensors:
            continue
        total, count = _numbers(file, name), _numbers(file, weight + _COUNT)
        found[weight] = total / count.clamp(min=1)
    return found


def _numbers(file: GgufFile, name: str) -> Tensor:
    if file.tensors[name].type != "F32":
        raise QuantkitError(f"{name} in {file.path} is {file.tensors[name].type}, not F32")
    return file.raw(name).view(torch.float32).reshape(-1)
