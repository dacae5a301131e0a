"""How large a model is: in its files, a weight on average, and in memory."""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from quantkit.core.qweight import QWeight
from quantkit.runtime.opened import Folder, Opened

if TYPE_CHECKING:
    from quantkit.runtime.gguf_opened import GgufOpened

_PIECE = 1 << 22  # numbers that are looked at together


def bytes_of(opened: Opened) -> int:
    """Of its weight files: tensors of a folder, a whole GGUF file."""
    if isinstance(opened, Folder):
        return opened.tensors.nbytes
    return sum(file.stat().st_size for file in opened.files)


def bits_per_weight(opened: Opened) -> float | None:
    """Of quantized linears, scales and zero points included (the order of groups not: ``g_idx``
    has 4 bytes an input); None where there are none."""
    weights = sum(packed.out * packed.width for packed in opened.linears.values())
    if not weights:
        return None
    names = [name for prefix in opened.linears for name in opened.names(prefix)]
    if isinstance(opened, Folder):
        stored = sum(opened.tensors.spec(n).nbytes for n in names if not n.endswith("g_idx"))
    else:
        stored = sum(cast("GgufOpened", opened).tensor(name).nbytes for name in names)
    return 8 * stored / weights


class Census:
    """What is in a model that never is in memory as a whole, seen part by part.

    bytes       of all parameters and buffers
    nonfinite   those with NaN or infinities: parameters, and parts of packed weights
    """

    def __init__(self, model: nn.Module) -> None:
        """``model``: with nothing in it but the buffers that it always has."""
        self._model = model
        self._always = self.bytes = memory_of(model)
        self.nonfinite: list[str] = []

    def see(self) -> None:
        """Count what is in it now. To be called once for every part."""
        self.bytes += memory_of(self._model) - self._always
        named = self._model.named_parameters()
        self.nonfinite += [name for name, tensor in named if not _finite(tensor)]

    def see_packed(self, name: str, q: QWeight) -> None:
        """Look at the scales and zero points of a linear."""
        parts = [(part, getattr(q, part)) for part in ("scale", "zero", "minimum")]
        self.nonfinite += [
            f"{name}.{part}" for part, t in parts if t is not None and not _finite(t)
        ]


def memory_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers that are in memory, each counted once."""
    held = (t for t in [*model.parameters(), *model.buffers()] if not t.is_meta)
    return sum({t.data_ptr(): t.nbytes for t in held}.values())


def _finite(tensor: torch.Tensor) -> bool:
    """Piece by piece: looking for infinities takes more memory than the numbers themselves."""
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    return all(bool(part.isfinite().all()) for part in tensor.flatten().split(_PIECE))
