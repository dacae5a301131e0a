"""Models for ``quantkit serve``: each is opened once, and its engine chosen by what it is."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
from quantkit.serve.worker import Backend, Worker
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


Note = Callable[[str], None]


@dataclass(frozen=True)
class _Loaded:
    """A model whose weights are in memory. ``start`` makes its engine, which takes memory for keys
    and values: of what is free when it is one of so many that have none yet."""

    start: Callable[[int], Engine]
    vocabulary: Vocabulary
    own: Mapping[str, Any]


def open_models(
    models: Sequence[str], names: Sequence[str], settings: Settings, note: Note
) -> list[Served]:
    """Load ``models``, and then start the engines, so that all have their weights in memory before
    one takes what is left. ``note`` is told what was chosen. Raises QuantkitError when one does not
    load."""
    ready = [_load(*one, settings, note) for one in zip(models, names)]
    served: list[Served] = []
    with ExitStack() as undo:
        for number, start in enumerate(ready):
            served.append(start(len(ready) - number))
            undo.callback(served[-1].engine.close)
        undo.pop_all()
    return served


def open_model(model: str, name: str, settings: Settings, note: Note) -> Served:
    """One alone."""
    return open_models([model], [name], settings, note)[0]


def _load(model: str, name: str, settings: Settings, note: Note) -> Callable[[int], Served]:
    source = resolve(model, settings.revision)
    chosen = choose(source, settings.engine, settings.device, context=settings.context)
    if chosen.llama is not None:
        loaded = _llamacpp(chosen.llama, settings)
        form, size = "gguf", chosen.llama.path.stat().st_size
    else:
        opened = open_checkpoint(source)
        making = {"torch": _torch, "vllm": _vllm}[chosen.name]
        loaded = making(opened, settings, lambda text: note(f"{name}: {text}"))
        form, size = opened.format, bytes_of(opened)
    about = {"format": form, "bytes": size, "source": source.name}

    def start(models: int) -> Served:
        engine, vocabulary = loaded.start(models), loaded.vocabulary
        note(
            f"{name}: {form}, {size / 1e9:.2f} GB, engine {chosen.name} ({chosen.why}), "
            f"context {engine.limits.context} tokens"
        )
        if vocabulary.template is None:
            note(f"{name} has no chat template: it answers /v1/completions only (--template)")
        return Served(name, engine, vocabulary, loaded.own, settings.max_tokens, about)

    return start


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


def _torch(opened: Opened, settings: Settings, note: Note) -> _Loaded:
    from quantkit.runtime.load import put_together

    device = pick_device(settings.device)
    tokenizer = opened.tokenizer()
    model = put_together(opened, device, pick_dtype(settings.dtype, device))
    config = model.config.get_text_config()
    said = model.generation_config.to_dict()
    context = _context(vars(config) | config.to_dict(), settings)
    ends = end_ids(said, tokenizer)

    def start(models: int) -> Engine:
        return Worker(torch_backend(model, ends, context, settings, note, models), settings.queue)

    size = model.get_input_embeddings().num_embeddings
    return _Loaded(start, Vocabulary(Tokenizer(tokenizer), size, settings.template), said)


def torch_backend(
    model: Any,
    ends: frozenset[int],
    context: int,
    settings: Settings,
    note: Note,
    models: int = 1,
) -> Backend:
    """``model`` with a captured step where it can have one, else called for every step; says which,
    and why. Takes its part of the memory that ``models`` share."""
    from quantkit.runtime.batch import refuse_state
    from quantkit.runtime.decode import why_not
    from quantkit.serve.engines import room
    from quantkit.serve.engines.torch import TorchBackend

    refuse_state(model)
    rows = settings.max_batch
    places = room.tokens(model, rows * context, settings.kv_tokens, models)
    reason = why_not(model)
    if reason is None:
        from quantkit.runtime.rows import NotCaptured  # Triton
        from quantkit.serve.engines.captured import CapturedBackend

        try:
            return CapturedBackend(
                model, ends, context=context, rows=rows, places=places, note=note
            )
        except NotCaptured as error:
            reason = str(error)
    note(f"the model is called for every step, without CUDA graphs: {reason}")
    return TorchBackend(model, ends, context=context, rows=rows, places=places)


def _llamacpp(model: LlamaCpp, settings: Settings) -> _Loaded:
    from quantkit.serve.engines.llamacpp import LlamaCppBackend

    def start(_: int) -> Engine:
        return Worker(LlamaCppBackend(model), settings.queue)

    vocabulary = Vocabulary(model, model.vocabulary, settings.template)
    return _Loaded(start, vocabulary, model.own_settings)


def _vllm(opened: Opened, settings: Settings, _: Note) -> _Loaded:
    from quantkit.serve.engines.vllm import VllmEngine

    config, said = opened.model_config, opened.source.read_json("generation_config.json") or {}
    tokenizer = opened.tokenizer()
    context = _context(config, settings)

    def start(_: int) -> Engine:
        return VllmEngine(
            weights(opened),
            opened.format,
            end_ids(said, tokenizer),
            context=context,
            rows=settings.max_batch,
            queue=settings.queue,
            dtype=settings.dtype,
        )

    size = int(config["vocab_size"])
    return _Loaded(start, Vocabulary(Tokenizer(tokenizer), size, settings.template), said)


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
