"""Decoding without Python between the tokens, on a GPU.

One step of the model is captured as a CUDA graph, on a cache of fixed size (rows.py), and replayed
for every token; follow.py draws the tokens beside it. The cache grows when a text does, and the
step is then captured again. A model has one such step, which texts take turns in: :func:`captured`
hands it out, :func:`release` lets go of its memory.

Models whose cache has no fixed size (sliding windows, recurrent layers) are called for every token
instead, and so are all on a CPU.
"""

import warnings
import weakref
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from quantkit.core.prefix import shared
from quantkit.errors import QuantkitWarning
from quantkit.runtime.batch import has_state
from quantkit.runtime.experts import Experts
from quantkit.runtime.kernels import support

if TYPE_CHECKING:
    from quantkit.runtime.rows import Rows

PREFILL = 1024  # tokens of a prompt that are computed together
UNKNOWN = 1 << 20  # tokens of context, where a model does not say
_STEP = 256  # a cache holds a multiple of this many tokens
_FIRST = 512  # tokens to come that there is room for from the beginning


class Captured:
    """A step of ``model`` for so many ``texts``, and their keys and values (a follow.Runner). The
    texts begin together, and lie side by side in the cache.

    room   tokens of each text that there is memory for
    """

    ahead = 3

    def __init__(self, model: PreTrainedModel, texts: int) -> None:
        self.texts, self.turn = texts, 0
        self.weights = _weights(model)
        self._of = weakref.ref(model)  # the model goes when its user lets go of it, and this too
        self.drop()

    def drop(self) -> None:
        """Let go of the memory; who is in the middle of a text must begin it again."""
        self.forget()
        self.room = 0
        self._rows: Rows | None = None

    def forget(self) -> None:
        """Nothing that was read counts any more."""
        self.turn += 1
        self._computed = 0  # tokens of the longest text that are in the cache, or about to be
        self._read: Sequence[list[int]] = [[]]

    @property
    def held(self) -> list[int]:
        """The tokens of a single text that are known and in the cache."""
        return self._read[0][: self._computed] if self.room and self.texts == 1 else []

    def begin(self, texts: Sequence[list[int]], more: int) -> Tensor:
        """Logits [texts, vocab] behind ``texts``. What a single one begins with like the one before
        stays."""
        keep = shared(self.held, texts[0][:-1])
        self.turn += 1
        self._computed, self._read = keep, texts
        self.reserve(wanted(texts, more))
        lengths = [len(text) - 1 for text in texts]  # the last token is for the step
        firsts = [row * self.room for row in range(len(texts))]
        rows = self._having()
        for start in range(keep, max(lengths), PREFILL):
            stop = start + PREFILL
            rows.read(
                [text[start : min(stop, n)] for text, n in zip(texts, lengths)], start, firsts
            )
            self._computed = min(stop, max(lengths))
        rows.seat(0, firsts, lengths, [text[-1] for text in texts])
        return self._step(rows)

    def step(self, tokens: Tensor) -> Tensor:
        self.reserve(self._computed + 1)
        rows = self._having()
        with torch.inference_mode():
            rows.token.copy_(tokens)
        return self._step(rows)

    def _step(self, rows: "Rows") -> Tensor:
        logits = rows.step(self.texts)
        self._computed += 1
        return logits

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens of each text; a half more where it has to grow, which is
        then rare. What is in the cache stays."""
        if tokens <= self.room:
            return
        from quantkit.runtime.rows import Rows  # Triton

        room = -(-max(tokens, self.room * 3 // 2) // _STEP) * _STEP
        model, before = self._model(), self.room
        self.room = 0  # nothing half made counts
        if before:
            rows = self._having()
            rows.widen(room, self._computed)
        else:
            self._rows = None  # its memory first
            if _held.get(model) is not self:
                release(model)  # who was in the middle of a text takes the place back, and so on
                _held[model] = self
            places = self.texts * room
            rows = Rows(model, self.texts, longest=context(model), places=places, room=room)
            self._rows = rows
        rows.capture([self.texts])
        self.room = room

    def _having(self) -> "Rows":
        assert self._rows is not None, "there is room for no text"
        return self._rows

    def _model(self) -> PreTrainedModel:
        found = self._of()
        if found is None:
            raise ReferenceError("the model of this step is gone")
        return found


# a step, or why there is none
_held: "WeakKeyDictionary[PreTrainedModel, Captured | str]" = WeakKeyDictionary()


def captured(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], more: int = _FIRST
) -> Captured | None:
    """The step of ``model`` for as many texts as these, which up to ``more`` tokens will follow; it
    takes the place of one for another number of texts. None where there is none, on a GPU with a
    warning, once."""
    held = _held.get(model)
    if isinstance(held, str):
        return None
    if held is not None and held.texts == len(texts) and held.weights == _weights(model):
        return held
    reason = why_not(model)
    if reason is None:
        made = _tried(model, len(texts), wanted(texts, more))
        if isinstance(made, Captured):
            return made
        reason = made
    elif reason == support.NO_GPU:
        return None
    _held[model] = reason
    warnings.warn(
        f"{type(model).__name__} is decoded without a CUDA graph, which is slower: {reason}",
        QuantkitWarning,
        stacklevel=2,
    )
    return None


def _tried(model: PreTrainedModel, texts: int, tokens: int) -> Captured | str:
    """A step with room for so many tokens, or why it could not be captured."""
    from quantkit.runtime.rows import NotCaptured, attempt

    made = Captured(model, texts)
    try:
        with attempt(model):
            made.reserve(tokens)
    except NotCaptured as reason:
        made.drop()
        return str(reason)
    return made


def release(model: PreTrainedModel) -> None:
    """Let go of the step that was captured of ``model``, and of the keys and values in its cache:
    for other uses of the memory. The next text captures it again."""
    held = _held.pop(model, None)
    if isinstance(held, Captured):
        held.drop()


def forget(model: PreTrainedModel) -> None:
    """Go on from no text that was read before, as after a change of the weights in their place."""
    held = _held.get(model)
    if isinstance(held, Captured):
        held.forget()


def why_not(model: PreTrainedModel) -> str | None:
    """Why a step of this model cannot be captured, or None."""
    return support.device_why_not(model.device) or _cache_why_not(model)


def _cache_why_not(model: PreTrainedModel) -> str | None:
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers} - {DynamicLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        return f"its cache has layers of the kind {names}"
    if any(isinstance(module, Experts) for module in model.modules()):
        return "its experts are called one by one, as many as the tokens need"
    if has_state(model):
        return "it keeps a state of another kind than keys and values"
    # transformers' own word for it, by which it decides what to compile
    fixed = getattr(model, "_can_compile_fullgraph", False)
    return None if fixed else "transformers knows no cache of fixed size for it"


def wanted(texts: Sequence[Sequence[int]], more: int) -> int:
    """Tokens of each text to have room for in the beginning."""
    return max(map(len, texts)) + min(more, _FIRST)


def context(model: PreTrainedModel) -> int:
    """Tokens that fit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else UNKNOWN


def _weights(model: PreTrainedModel) -> tuple[int, ...]:
    """Where the weights lie, which a captured step has by heart."""
    return tuple(t.data_ptr() for t in chain(model.parameters(), model.buffers()))
