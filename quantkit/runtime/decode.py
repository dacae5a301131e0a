"""Decoding without Python between the tokens, on a GPU.

One step of the model is captured as a CUDA graph, on a cache of fixed size, and replayed for every
token; follow.py draws the tokens beside it. The cache grows when a text does, and the step is then
captured again. A model has one such step, which texts take turns in: :func:`captured` hands it out,
:func:`release` lets go of its memory.

Models whose cache has no fixed size (sliding windows, recurrent layers) are called for every token
instead, and so are all on a CPU.
"""

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from quantkit.core.prefix import shared
from quantkit.errors import QuantkitWarning
from quantkit.runtime.batch import has_state
from quantkit.runtime.kernels import support

PREFILL = 1024  # tokens of a prompt that are computed together
UNKNOWN = 1 << 20  # tokens of context, where a model does not say
_STEP = 256  # a cache holds a multiple of this many tokens
_FIRST = 512  # tokens to come that there is room for from the beginning


class Captured:
    """A step of ``model`` for so many ``texts``, and their keys and values (a follow.Runner).

    room   tokens of each text that there is memory for
    """

    ahead = 3

    def __init__(self, model: PreTrainedModel, texts: int) -> None:
        self.texts, self.turn = texts, 0
        self.weights = _weights(model)
        self._of = weakref.ref(model)  # the model goes when its user lets go of it, and this too
        self._last = context(model) - 1
        known = inspect.signature(model.forward).parameters
        self._settings = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._positions = "position_ids" in known
        device = model.device
        self.token = torch.zeros(texts, dtype=torch.long, device=device)
        self.places = torch.zeros(texts, 1, dtype=torch.long, device=device)
        self.length = torch.zeros((), dtype=torch.long, device=device)
        self.drop()

    def drop(self) -> None:
        """Let go of the memory; who is in the middle of a text must begin it again."""
        self.forget()
        self.room = 0
        self._replay: Callable[[], Tensor] = self._advance
        self._cache: Any = None

    def forget(self) -> None:
        """Nothing that was read counts any more."""
        self.turn += 1
        self._columns = 0  # what is computed, or about to be: ``length``, as the host knows it
        self._read: Sequence[list[int]] = [[]]

    @property
    def held(self) -> list[int]:
        """The tokens of a single text that are known and in the cache."""
        return self._read[0][: self._columns] if self.room and self.texts == 1 else []

    @torch.inference_mode()
    def begin(self, texts: Sequence[list[int]], more: int) -> Tensor:
        """Logits [texts, vocab] behind ``texts``. What a single one begins with like the one before
        stays; several are filled up on the left with tokens that the mask leaves out."""
        keep = shared(self.held, texts[0][:-1])
        longest = max(map(len, texts))
        self.turn += 1
        self._columns, self._read = keep, texts
        self.reserve(wanted(texts, more))
        device = self.token.device
        rows = torch.tensor([[0] * (longest - len(row)) + row for row in texts], device=device)
        empty = torch.tensor([longest - len(row) for row in texts], device=device)[:, None]
        places = (torch.arange(longest, device=device) - empty).clamp(min=0)
        self.mask.copy_(torch.arange(self.room, device=device) >= empty)
        self.length.fill_(keep)
        with torch.cuda.device_of(self.token):
            for start in range(keep, longest, PREFILL):
                stop = min(start + PREFILL, longest)
                seen = self.mask.clone()
                seen[:, stop:] = False  # causal as it is: transformers then needs no mask for it
                logits = self._run(rows[:, start:stop], places[:, start:stop], seen)
                self._columns = stop
        self.places.copy_(longest - empty)
        return logits

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        self.reserve(self._columns + 1)
        self.token.copy_(tokens)
        with torch.cuda.device_of(self.token):
            logits = self._replay()
        self._columns += 1
        return logits

    @torch.inference_mode()
    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens of each text; a half more where it has to grow, which is
        then rare. What is in the cache stays."""
        if tokens <= self.room:
            return
        room = -(-max(tokens, self.room * 3 // 2) // _STEP) * _STEP
        model, before = self._model(), self.room
        self.room, self._replay = 0, self._advance  # its memory first, and nothing half made counts
        if before == 0:
            if _held.get(model) is not self:
                release(model)  # who was in the middle of a text takes the place back, and so on
                _held[model] = self
            self._cache = StaticCache(config=model.config, max_cache_len=room)
            self._cache.layers = _fixed(len(self._cache.layers), room, self.length)
        else:
            for layer in self._cache.layers:
                layer.enlarge(room, self._columns)
        mask = torch.ones(self.texts, room, dtype=torch.bool, device=self.token.device)
        if before:
            mask[:, :before] = self.mask
        self.mask = mask
        if self.token.device.type == "cuda":
            self._capture(model, room)
        self.room = room

    def _capture(self, model: PreTrainedModel, room: int) -> None:
        from quantkit.runtime.fused import fewer_launches  # Triton

        places, device = self.places.clone(), self.token.device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device_of(self.token), fewer_launches(model):
            torch.cuda.empty_cache()
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(2):  # kernels are compiled, and workspaces taken, beforehand
                    self.length.fill_(room - 1)  # where nothing is yet
                    self.places.zero_()
                    self._advance()
            torch.cuda.current_stream(device).wait_stream(side)
            with torch.cuda.graph(graph):
                logits = self._advance()
        self.places.copy_(places)
        self.length.fill_(self._columns)

        def replay() -> Tensor:
            graph.replay()
            return logits

        self._replay = replay

    def _advance(self) -> Tensor:
        logits = self._run(self.token[:, None], self.places, self.mask)
        self.places.add_(1).clamp_(max=self._last)  # texts that have ended are carried along
        return logits

    def _run(self, tokens: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """Logits [texts, vocab] behind some more tokens [texts, n], at ``places`` of the same
        shape; ``mask`` [texts, room] is what they may look at."""
        where = {"position_ids": places} if self._positions else {}
        found = self._model()(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            **where,
            **self._settings,
        )
        self.length += tokens.shape[1]
        logits: Tensor = found.logits[:, -1]
        return logits

    def _model(self) -> PreTrainedModel:
        found = self._of()
        if found is None:
            raise ReferenceError("the model of this step is gone")
        return found


def _fixed(count: int, room: int, length: Tensor) -> list[Any]:
    """Layers of a cache that count with the same ``length``."""
    from quantkit.runtime.fused import FixedLayer  # Triton

    layers = [FixedLayer(max_cache_len=room) for _ in range(count)]
    for layer in layers:
        layer.cumulative_length = length
    return layers


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
    from triton.errors import TritonError

    from quantkit.runtime.kernels import attend

    before = model.config._attn_implementation
    attend.use(model)
    made = Captured(model, texts)
    try:
        made.reserve(tokens)
    except (RuntimeError, TypeError, ValueError, TritonError) as error:
        made.drop()
        model.set_attn_implementation(before)
        # an error in the middle of a capture ends the capture with another one
        return str(error.__context__ or error).partition("\n")[0]
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
