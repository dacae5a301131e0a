"""What runs a model, whoever computes: text to tokens, tokens that follow, tokens to text.

Two programs do: this process with torch (torch_engine.py), for every format, and llama.cpp
(llamacpp.py), for GGUF on a CPU, where it is faster.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from quantkit.core.sampling import Sampling
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime import llamacpp
from quantkit.runtime.device import pick_device
from quantkit.runtime.llamacpp import LlamaCpp
from quantkit.runtime.opened import gguf_file

NAMES = ("auto", "torch", "llama.cpp")


class Tokenizing(Protocol):
    """How a model reads and writes.

    chat_template   the model's own, in Jinja, or None
    special_tokens  ``bos_token`` and ``eos_token`` as text
    """

    @property
    def chat_template(self) -> str | None: ...
    @property
    def special_tokens(self) -> Mapping[str, str]: ...

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; with ``special``, as the model wants a text to begin."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""


class Engine(Tokenizing, Protocol):
    """A model that is loaded.

    context       tokens that fit, prompt and answer together
    end_ids       the tokens that end a text or a turn
    own_settings  what the model's generation_config.json says of sampling
    """

    @property
    def context(self) -> int: ...
    @property
    def end_ids(self) -> frozenset[int]: ...
    @property
    def own_settings(self) -> Mapping[str, object]: ...

    def stream(self, ids: Sequence[int], sampling: Sampling, max_new_tokens: int) -> Iterator[int]:
        """Tokens that follow; an end token is given out too, as the last one."""


def open_engine(
    model: str,
    *,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    model_basename: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Load ``model`` into the engine of that name. ``auto`` is llama.cpp for a GGUF file on a CPU,
    where it is installed and can open it, else torch; ``note`` is told which, and why."""
    if engine not in NAMES:
        raise UsageError(f"there is no engine '{engine}'", f"use {', '.join(NAMES)}")
    source = resolve(model, revision)
    file = gguf_file(source, model_basename)
    if engine == "llama.cpp" and file is None:
        raise UsageError(
            f"llama.cpp runs GGUF files, and {model} is none", "quantkit convert --to gguf"
        )
    if file is not None and engine != "torch":
        found = _llamacpp(file, engine, device, note)
        if found is not None:
            return found
    from quantkit.runtime.load import load
    from quantkit.runtime.torch_engine import TorchEngine

    loaded, tokenizer = load(
        model, device=device, dtype=dtype, revision=revision, model_basename=model_basename
    )
    return TorchEngine(loaded, tokenizer)


def _llamacpp(file: Path, engine: str, device: str, note: Callable[[str], None]) -> LlamaCpp | None:
    """llama.cpp with this file; None, with the reason as a note, where torch is to run it."""
    if engine == "llama.cpp":
        return LlamaCpp(file)
    if pick_device(device).type != "cpu":
        return None
    if not llamacpp.installed():
        note("torch runs this GGUF file; pip install 'quantkit[llamacpp]' would be faster")
        return None
    try:
        found = LlamaCpp(file)
    except QuantkitError as error:
        note(f"torch runs this GGUF file: {error.message}")
        return None
    note("llama.cpp runs this GGUF file (--engine torch for quantkit's own loader)")
    return found
