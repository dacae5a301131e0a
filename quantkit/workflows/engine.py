"""What computes the predictions that are measured: the model that quantkit loads, or llama.cpp.

llama.cpp multiplies with activations of 8 bits and sums in its own order; a GGUF file that runs
there is not quite the file multiplied out. ``--engine llama.cpp`` measures what runs there.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from quantkit.core.sampling import Sampling
from quantkit.core.source import Source
from quantkit.errors import UsageError
from quantkit.runtime.llamacpp import LlamaCpp
from quantkit.runtime.opened import Opened, open_checkpoint
from quantkit.workflows import divergence

if TYPE_CHECKING:
    from quantkit.runtime.gguf_opened import GgufOpened

TORCH, LLAMA_CPP = "torch", "llama.cpp"


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    def logits(self, ids: Tensor) -> Tensor:
        """int64 [tokens] -> what is predicted behind each of them, [tokens, vocabulary]."""

    def write(self, ids: list[int]) -> list[int]:
        """The greedy continuation of ``ids``, at most divergence.TOKENS long."""


@dataclass(frozen=True)
class Loaded:
    """A model of transformers."""

    model: Any
    tokenizer: Any
    name: str = TORCH

    def logits(self, ids: Tensor) -> Tensor:
        batch = ids[None].to(self.model.device)
        with torch.no_grad():
            found: Tensor = self.model(input_ids=batch, use_cache=False).logits[0]
        return found

    def write(self, ids: list[int]) -> list[int]:
        return divergence.greedy(self.model, self.tokenizer)(ids)


@dataclass(frozen=True)
class InLlamaCpp:
    """A GGUF file."""

    llama: LlamaCpp
    name: str = LLAMA_CPP

    def logits(self, ids: Tensor) -> Tensor:
        return self.llama.logits(ids.tolist())

    def write(self, ids: list[int]) -> list[int]:
        return list(self.llama.stream(ids, Sampling(temperature=0), divergence.TOKENS))


def engine_for(name: str, opened: Opened, model: Any, tokenizer: Any) -> Engine:
    """llama.cpp for a GGUF file if ``name`` says so, and the loaded ``model`` for all else. Raises
    QuantkitError when llama.cpp is missing or does not open the file."""
    if name == LLAMA_CPP and opened.format == "gguf":
        return InLlamaCpp(LlamaCpp(cast("GgufOpened", opened).file.path))
    return Loaded(model, tokenizer)


def refuse_engine(name: str, sources: list[Source]) -> None:
    """Raises UsageError for an engine that there is not, and when nothing would run in it."""
    if name not in (TORCH, LLAMA_CPP):
        raise UsageError(f"there is no engine '{name}'", f"choose {TORCH} or {LLAMA_CPP}")
    if name == LLAMA_CPP and not any(open_checkpoint(s).format == "gguf" for s in sources):
        names = ", ".join(source.name for source in sources)
        raise UsageError(f"llama.cpp runs GGUF files, and {names} is none", "leave out --engine")
