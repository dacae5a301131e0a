"""Models for ``quantkit serve``: each is opened once, and its engine chosen by what it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.core.source import resolve
from quantkit.errors import UsageError
from quantkit.runtime import templates
from quantkit.runtime.device import pick_device, pick_dtype
from quantkit.runtime.engine import choose
from quantkit.runtime.llamacpp import LlamaCpp
from quantkit.runtime.opened import Opened, open_checkpoint
from quantkit.runtime.tokenizer import Tokenizer, end_ids
from quantkit.serve.engine import Engine
from quantkit.serve.engines import NAMES
from quantkit.serve.model import Served
from quantkit.serve.prompts import Vocabulary
from quantkit.serve.worker import Worker
from quantkit.workflows.sizes import bytes_of

_CONTEXT = 2048  # tokens, where a model does not say what it was trained with


@dataclass(frozen=True)
class Settings:
    """How models are loaded and run; the options of the command have the same names."""

    engine: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    context: int | None = None
    max_batch: int = 16
    queue: int = 64
    kv_tokens: int | None = None
    max_tokens: int = 1024
    template: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("auto", *NAMES):
            raise UsageError(f"there is no engine '{self.engine}'", f"use {', '.join(NAMES)}")
        for name, least in (("context", 2), ("max_batch", 1), ("kv_tokens", 2), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}")
        if self.queue < 0:
            raise UsageError("--queue cannot be negative", "0 lets nobody wait")
        if self.template is not None:
            templates.find(self.template)


def open_model(model: str, name: str, settings: Settings, note: Callable[[str], None]) -> Served:
    """Load ``model``. ``note`` is told what was chosen. Raises QuantkitError when it does not
    load."""
    source = resolve(model, settings.revision)
    chosen = choose(source, settings.engine, settings.device, context=settings.context)
    if chosen.llama is not None:
        running, vocabulary, own = _llamacpp(chosen.llama, settings)
        form, size = "gguf", chosen.llama.path.stat().st_size
    else:
        opened = open_checkpoint(source)
        making = {"torch": _torch, "vllm": _vllm}[chosen.name]
        running, vocabulary, own = making(opened, settings)
        form, size = opened.format, bytes_of(opened)
    about = {"format": form, "bytes": size, "source": source.name}
    note(
        f"{name}: {form}, {size / 1e9:.2f} GB, engine {chosen.name} ({chosen.why}), "
        f"context {running.limits.context} tokens"
    )
    if vocabulary.template is None:
        note(f"{name} has no chat template: it answers /v1/completions only (--template)")
    return Served(name, running, vocabulary, own, settings.max_tokens, about)


def names_of(models: tuple[str, ...]) -> list[str]:
    """What clients call them: the name of the repository or folder, with a number where two are
    called the same."""
    found: list[str] = []
    for model in models:
        path = Path(model).expanduser()
        plain = model
        if path.exists():
            plain = path.resolve().stem if path.is_file() else path.resolve().name
        taken = sum(one == plain or one.startswith(f"{plain}-") for one in found)
        name, number = plain, taken + 1
        while name in found:
            name, number = f"{plain}-{number}", number + 1
        found.append(name)
    return found


Made = tuple[Engine, Vocabulary, Mapping[str, Any]]


def _torch(opened: Opened, settings: Settings) -> Made:
    from quantkit.runtime.load import put_together
    from quantkit.serve.engines.torch import TorchBackend

    device = pick_device(settings.device)
    tokenizer = opened.tokenizer()
    model = put_together(opened, device, pick_dtype(settings.dtype, device))
    config = model.config.get_text_config()
    said = model.generation_config.to_dict()
    backend = TorchBackend(
        model,
        end_ids(said, tokenizer),
        context=_context(vars(config) | config.to_dict(), settings),
        rows=settings.max_batch,
        kv_tokens=settings.kv_tokens,
    )
    size = model.get_input_embeddings().num_embeddings
    vocabulary = Vocabulary(Tokenizer(tokenizer), size, settings.template)
    return Worker(backend, settings.queue), vocabulary, said


def _llamacpp(model: LlamaCpp, settings: Settings) -> Made:
    from quantkit.serve.engines.llamacpp import LlamaCppBackend

    vocabulary = Vocabulary(model, model.vocabulary, settings.template)
    return Worker(LlamaCppBackend(model), settings.queue), vocabulary, model.own_settings


def _vllm(opened: Opened, settings: Settings) -> Made:
    from quantkit.serve.engines.vllm import VllmEngine

    config, said = opened.model_config, opened.source.read_json("generation_config.json") or {}
    tokenizer = opened.tokenizer()
    engine = VllmEngine(
        weights(opened),
        opened.format,
        end_ids(said, tokenizer),
        context=_context(config, settings),
        rows=settings.max_batch,
        queue=settings.queue,
        dtype=settings.dtype,
    )
    size = int(config["vocab_size"])
    return engine, Vocabulary(Tokenizer(tokenizer), size, settings.template), said


def weights(opened: Opened) -> Path:
    """What another program is told to open: the folder, or the GGUF file."""
    return opened.files[0] if opened.format == "gguf" else opened.source.folder


def _context(config: Mapping[str, Any], settings: Settings) -> int:
    """Tokens of prompt and answer together: what the model was trained with, or less."""
    own = config.get("max_position_embeddings") or config.get("n_positions") or _CONTEXT
    if settings.context is not None and settings.context > own:
        raise UsageError(
            f"--context {settings.context} is more than the {own} tokens of this model"
        )
    return settings.context or int(own)
