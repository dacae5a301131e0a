"""What runs a model, whoever computes: text to tokens, tokens that follow, tokens to text.

Two programs do: this process with torch (torch_engine.py), for every format, and llama.cpp
(llamacpp.py), for GGUF on a CPU, where it is faster.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from quantkit.core.sampling import Sampling
from quantkit.core.source import Source, resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime import llamacpp
from quantkit.runtime.device import pick_device, pick_dtype
from quantkit.runtime.llamacpp import LlamaCpp
from quantkit.runtime.opened import gguf_file, open_checkpoint

TORCH, LLAMA_CPP = "torch", "llama.cpp"
NAMES = ("auto", TORCH, LLAMA_CPP)


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
        """Text without special tokens; half a character at an end is U+FFFD."""


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


@dataclass(frozen=True)
class Choice:
    """The engine that runs a model, and why; ``llama``: the model in it, if it is llama.cpp."""

    name: str
    why: str
    llama: LlamaCpp | None = None


def choose(
    source: Source,
    engine: str,
    device: str,
    *,
    basename: str | None = None,
    context: int | None = None,
) -> Choice:
    """What ``engine`` stands for. ``auto`` is llama.cpp for a GGUF file on a CPU, where it is
    installed and opens the file (``context`` tokens long), else torch; any other name is itself.

    Raises UsageError when llama.cpp was asked for and ``source`` is no GGUF file, QuantkitError
    when it does not open it."""
    file = gguf_file(source, basename)
    if engine == LLAMA_CPP:
        if file is None:
            raise UsageError(
                f"llama.cpp runs GGUF files, and {source.name} is none",
                "quantkit convert --to gguf:q4_0 makes one",
            )
        return Choice(engine, "as asked for", LlamaCpp(file, context=context))
    if engine != "auto":
        return Choice(engine, "as asked for")
    if file is None:
        return Choice(TORCH, "quantkit's own loader")
    if pick_device(device).type != "cpu":
        return Choice(TORCH, "GGUF on a GPU")
    if not llamacpp.installed():
        return Choice(TORCH, "GGUF; pip install 'quantkit[llamacpp]' would be faster")
    try:
        return Choice(LLAMA_CPP, "GGUF on a CPU", LlamaCpp(file, context=context))
    except QuantkitError as error:
        return Choice(TORCH, f"GGUF, and {error.message}")


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
    """Load ``model`` into the engine of that name; ``note`` is told which ``auto`` has chosen for a
    GGUF file, and why. Raises and chooses as :func:`choose` does."""
    if engine not in NAMES:
        raise UsageError(f"there is no engine '{engine}'", f"use {', '.join(NAMES)}")
    source = resolve(model, revision, model_basename)
    chosen = choose(source, engine, device, basename=model_basename)
    if engine == "auto" and gguf_file(source, model_basename):
        note(f"{chosen.name} runs this model: {chosen.why}")
    if chosen.llama is not None:
        return chosen.llama
    from quantkit.runtime.load import put_together
    from quantkit.runtime.torch_engine import TorchEngine

    on = pick_device(device)
    opened = open_checkpoint(source, model_basename)
    tokenizer = opened.tokenizer()
    return TorchEngine(put_together(opened, on, pick_dtype(dtype, on)), tokenizer)
