"""Decoding without Python between the tokens.

On a GPU one step of the model is captured as a CUDA graph, on a cache of fixed size, and replayed
for every token. The next token is chosen on the GPU and fed to the next step there; a copy of it
comes to the host when it is ready, while the following steps run already. So the end of a text is
noticed a few steps late, and what came after it is dropped.

On a CPU, and for models whose cache has no fixed size (sliding windows, recurrent layers), the same
loop calls the model itself.
"""

import inspect
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from quantkit.core.sampling import Sampling
from quantkit.errors import QuantkitWarning, UsageError
from quantkit.runtime.draw import Draw

PREFILL = 1024  # tokens of a prompt that are computed together
_ROOM = 256  # a cache holds a multiple of this many tokens, so that a captured step serves again
_BEHIND = 3  # steps that run before their tokens are looked at
NONE = -1  # in place of a token, for a text that has ended

_HELD = "_quantkit_captured"  # where a model keeps its captured step, to be freed with it


def decode(
    model: PreTrainedModel,
    ids: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
) -> Iterator[list[int]]:
    """Tokens that follow each of the prompts ``ids``: at every step one for each text, NONE for
    those that have ended. A text ends after ``max_new_tokens``, or with one of ``stop_ids``, which
    is given out too. One text or batch at a time: on a GPU, a model has one captured step and one
    cache, and the next call takes them over.

    Raises UsageError for an empty prompt.
    """
    if not ids or not all(ids):
        raise UsageError("there are no tokens to continue")
    if max_new_tokens < 1:
        raise UsageError("--max-new-tokens must be at least 1")
    stop = frozenset(stop_ids)
    alive = [True] * len(ids)
    for tokens in _steps(model, ids, sampling, max_new_tokens):
        yield [token if going else NONE for token, going in zip(tokens, alive)]
        alive = [going and token not in stop for token, going in zip(tokens, alive)]
        if not any(alive):
            return


@torch.inference_mode()
def _steps(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], sampling: Sampling, steps: int
) -> Iterator[list[int]]:
    """Tokens of every text, ended or not."""
    device = model.device
    room = max(map(len, ids)) + steps
    stepper = _stepper(model, len(ids), room)
    draw = Draw(sampling, ids, model.config.get_text_config().vocab_size, device)
    token = draw(stepper.begin(ids))
    coming: deque[_Arriving] = deque([_Arriving(token)])
    for _ in range(steps - 1):
        token = draw(stepper.step(token))
        coming.append(_Arriving(token))
        if len(coming) > (_BEHIND if device.type == "cuda" else 0):
            yield coming.popleft().tokens()
    while coming:
        yield coming.popleft().tokens()


class _Arriving:
    """Tokens on their way from the device."""

    def __init__(self, token: Tensor) -> None:
        self._event = None
        if token.device.type == "cuda":
            self._here = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            self._here.copy_(token, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(token.device))
        else:
            self._here = token

    def tokens(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        found: list[int] = self._here.tolist()
        return found


class Plain:
    """A model with a growing cache, called for every token."""

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self.model = model
        self.cache = cache
        self._last = _last_only(model)

    def begin(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Logits [texts, vocab] behind the prompts. Shorter ones are filled up on the left with
        tokens that the mask leaves out."""
        device, longest = self.model.device, max(map(len, ids))
        rows = [[0] * (longest - len(row)) + list(row) for row in ids]
        tokens = torch.tensor(rows, device=device)
        empty = torch.tensor([longest - len(row) for row in ids], device=device)
        places = torch.arange(longest, device=device) - empty[:, None]
        self.mask = None if len({len(row) for row in ids}) == 1 else places >= 0
        for start in range(0, longest, PREFILL):
            part = slice(start, min(start + PREFILL, longest))
            seen = self._mask(part.stop)
            logits = self._logits(tokens[:, part], places[:, part].clamp(min=0), seen)
        self.places = places[:, -1:] + 1
        return logits

    def step(self, token: Tensor) -> Tensor:
        """Logits behind one more ``token`` [texts] of each."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], 1)
        logits = self._logits(token[:, None], self.places, self.mask)
        self.places += 1
        return logits

    def _mask(self, stop: int) -> Tensor | None:
        return None if self.mask is None else self.mask[:, :stop]

    def _logits(self, tokens: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        found = self.model(
            input_ids=tokens,
            position_ids=places,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **self._last,
        )
        logits: Tensor = found.logits[:, -1]
        return logits


class Captured(Plain):
    """A step as a CUDA graph, for ``texts`` texts and up to ``room`` tokens of each."""

    def __init__(self, model: PreTrainedModel, texts: int, room: int) -> None:
        from quantkit.runtime.fused import FixedLayer, fewer_launches  # Triton
        from quantkit.runtime.kernels import attend

        attend.use(model)
        device = model.device
        super().__init__(model, StaticCache(config=model.config, max_cache_len=room))
        self.length = torch.zeros((), dtype=torch.long, device=device)
        self.cache.layers = [FixedLayer(max_cache_len=room) for _ in self.cache.layers]
        for layer in self.cache.layers:
            layer.cumulative_length = self.length
        self.texts, self.room = texts, room
        self.places = torch.zeros(texts, 1, dtype=torch.long, device=device)
        self.token = torch.zeros(texts, dtype=torch.long, device=device)
        self.mask = torch.ones(texts, room, dtype=torch.bool, device=device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device_of(self.token), fewer_launches(model):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(2):  # kernels are compiled, and workspaces taken, beforehand
                    self._advance()
            torch.cuda.current_stream(device).wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.logits = self._advance()

    def _advance(self) -> Tensor:
        logits = self._logits(self.token[:, None], self.places, self.mask)
        self.places += 1
        return logits

    def _logits(self, tokens: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        logits = super()._logits(tokens, places, mask)
        self.length += tokens.shape[1]
        return logits

    def begin(self, ids: Sequence[Sequence[int]]) -> Tensor:
        self.length.zero_()
        places, mask = self.places, self.mask
        with torch.cuda.device_of(places):
            logits = super().begin(ids)
        # what the graph reads stays where it is
        mask.fill_(True)
        if self.mask is not None:
            mask[:, : self.mask.shape[1]] = self.mask
        places.copy_(self.places)
        self.places, self.mask = places, mask
        return logits

    def step(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        with torch.cuda.device_of(self.token):
            self.graph.replay()
        return self.logits


def _stepper(model: PreTrainedModel, texts: int, room: int) -> Plain:
    if model.device.type != "cuda":
        return Plain(model, DynamicCache(config=model.config))
    held: Captured | None = getattr(model, _HELD, None)
    if held is not None and held.texts == texts and held.room >= room:
        return held
    reason = why_not(model)
    if reason is None:
        held = None
        setattr(model, _HELD, None)  # its memory first
        try:
            made = Captured(model, texts, -(-room // _ROOM) * _ROOM)
            setattr(model, _HELD, made)
            return made
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
    warnings.warn(
        f"{type(model).__name__} is decoded without a CUDA graph, which is slower: {reason}",
        QuantkitWarning,
        stacklevel=4,
    )
    return Plain(model, DynamicCache(config=model.config))


def why_not(model: PreTrainedModel) -> str | None:
    """Why a step of this model cannot be captured, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    cache = StaticCache(config=model.config, max_cache_len=_ROOM)
    other = {type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}
    return f"its cache has layers of the kind {', '.join(sorted(other))}" if other else None


def _last_only(model: PreTrainedModel) -> dict[str, Any]:
    """What makes the model compute logits for the last token alone, where it can."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}
