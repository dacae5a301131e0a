"""What computes the predictions that are measured: quantkit itself, or llama.cpp.

llama.cpp multiplies with activations of 8 bits and sums in its own order; a GGUF file that runs
there is not quite the file multiplied out. ``--engine llama.cpp`` measures what runs there.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from quantkit.core.sampling import Sampling
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.llamacpp import LlamaCpp, refuse_missing
from quantkit.runtime.opened import Opened, open_checkpoint
from quantkit.workflows import divergence
from quantkit.workflows.whole import room

if TYPE_CHECKING:
    from quantkit.runtime.gguf_opened import GgufOpened

TORCH, LLAMA_CPP = "torch", "llama.cpp"


class InLlamaCpp:
    """The GGUF file at ``path``, opened when it first predicts. Raises QuantkitError when llama.cpp
    is missing, or the file does not fit into memory, where it lies as a whole."""

    def __init__(self, path: Path) -> None:
        refuse_missing()
        size, free = path.stat().st_size, room(torch.device("cpu"))
        if size > free:
            raise QuantkitError(
                f"llama.cpp needs {size / 1e9:.1f} GB for {path.name}, and {free / 1e9:.1f} GB are "
                "free",
                "leave out --engine: quantkit itself needs a block in memory",
            )
        self._path = path

    @cached_property
    def _llama(self) -> LlamaCpp:
        return LlamaCpp(self._path)

    def logits(self, ids: Tensor) -> Tensor:
        """int64 [tokens] -> what is predicted behind each of them, [tokens, vocabulary]."""
        return self._llama.logits(ids.tolist())

    def write(self, ids: list[int]) -> list[int]:
        """The greedy continuation of ``ids``, at most divergence.TOKENS long."""
        return list(self._llama.stream(ids, Sampling(temperature=0), divergence.TOKENS))

    def close(self) -> None:
        """Give the memory back."""
        self._llama.close()


def llama_cpp_for(name: str, opened: Opened) -> InLlamaCpp | None:
    """llama.cpp for a GGUF file if the engine ``name`` is it. Raises as InLlamaCpp does."""
    if name != LLAMA_CPP or opened.format != "gguf":
        return None
    return InLlamaCpp(cast("GgufOpened", opened).file.path)


def refuse_engine(name: str, sources: list[Source]) -> None:
    """Raises UsageError for an engine that there is not, and when nothing would run in it."""
    if name not in (TORCH, LLAMA_CPP):
        raise UsageError(f"there is no engine '{name}'", f"choose {TORCH} or {LLAMA_CPP}")
    if name == LLAMA_CPP and not any(open_checkpoint(s).format == "gguf" for s in sources):
        names = ", ".join(source.name for source in sources)
        raise UsageError(f"llama.cpp runs GGUF files, and {names} is none", "leave out --engine")
