"""One step of a model for several texts, captured as CUDA graphs, and reading what comes before it.

    rows = Rows(model, 8, longest=2048, places=8192)      for up to eight texts
    rows.capture([1, 2, 4, 8])                a graph for each number; a step takes the next larger
    rows.read([[5, 7], [4]], 0, [0, 64])      keys and values of two texts: from places 0 and 64 on
    rows.seat(0, [0, 64], [2, 1], [9, 12])    their next tokens, which steps compute from now on
    logits = rows.step(2)                     float [2, vocab]: what follows the tokens

Every row has a length and a stretch of the cache of its own (stretches.py): nothing is padded, and
texts come and go while the others run. Logits come from steps alone, so the last token of a prompt
is not read but left to a step.

On a CPU nothing is captured, and all the rest is the same.
"""

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from triton.errors import TritonError

from quantkit.runtime.device import sent
from quantkit.runtime.fused import fewer_launches
from quantkit.runtime.kernels import attend
from quantkit.runtime.stretches import Reading, Stepping, Stretches, beside


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures there: cuBLAS keeps a workspace for each stream that was used."""
    return torch.cuda.Stream(device)


class NotCaptured(Exception):
    """A step cannot be captured; says why."""


@contextmanager
def attempt(model: PreTrainedModel) -> Iterator[None]:
    """Raises NotCaptured when what is done with ``model`` inside fails, and leaves it as it was."""
    before = model.config._attn_implementation
    try:
        yield
    except (RuntimeError, TypeError, ValueError, TritonError) as error:
        model.set_attn_implementation(before)
        # an error in the middle of a capture ends the capture with another one
        raise NotCaptured(str(error.__context__ or error).partition("\n")[0]) from error


class Rows:
    """Up to ``count`` texts of ``model``, of at most ``longest`` tokens; ``places`` tokens in all
    have keys and values. Rows that no text has are computed, for nobody.

    token   int64 [count], of each row the token that is computed next
    length  int64 [count], the tokens before it
    first   int64 [count], where its stretch begins
    room    places of a stretch, where they lie side by side in the order of the rows; None: they
            lie anywhere
    """

    def __init__(
        self,
        model: PreTrainedModel,
        count: int,
        *,
        longest: int,
        places: int,
        room: int | None = None,
    ) -> None:
        self.count, self.room = count, room
        self._of = weakref.ref(model)  # the model goes when its user lets go of it, and this too
        self._longest = longest
        known = inspect.signature(model.forward).parameters
        self._settings = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._positions = "position_ids" in known
        self._device = model.device
        self._state = torch.zeros(4, count, dtype=torch.long, device=self._device)
        self.token, self.length, self.first, self._going = self._state
        self._open = torch.ones(count, 1, 1, 1, dtype=torch.bool, device=self._device)
        self._sizes: list[int] = []
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.cache = Stretches(model, places)
        self.leave(0)
        self.read([[0]], 0, [places])  # for nobody: the cache takes its memory
        self._arrived = self._counters() if attend.use(model) else None  # see attend.Texts

    @property
    def direct(self) -> bool:
        """Whether quantkit's kernel computes the attention of a step, which reads nothing but the
        stretches; otherwise torch is shown as much for every row as the longest may have."""
        return self._arrived is not None

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int]) -> None:
        """A graph for steps of each of these numbers of rows, instead of those that there were."""
        self._sizes, self._graphs = sorted(sizes), {}
        if self._device.type != "cuda":
            return
        before = self._state.clone()
        self.leave(0)
        with torch.cuda.device_of(self._state), fewer_launches(self._model()):
            pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()
            for size in reversed(self._sizes):
                self._graphs[size] = self._captured(size, pool)
        self._state.copy_(before)

    @torch.inference_mode()
    def read(self, parts: Sequence[Sequence[int]], before: int, firsts: Sequence[int]) -> None:
        """Compute keys and values of ``parts``, tokens of texts from their ``before``-th on; the
        texts begin at the places ``firsts``. Several parts that have something before them are
        those of all rows, side by side."""
        tokens = max(map(len, parts))
        if tokens == 0:
            return
        # filled up on the right, where no token of the text looks, and written to nobody's place
        ids = torch.zeros(2, len(parts), tokens, dtype=torch.long)
        ids[1] = self.cache.places
        for row, (part, first) in enumerate(zip(parts, firsts)):
            ids[0, row, : len(part)] = torch.tensor(part, dtype=torch.long)
            ids[1, row, : len(part)] = torch.arange(len(part)) + first + before
        here, at = sent(ids, self._device)
        places = torch.arange(before, before + tokens, device=self._device).expand(len(parts), -1)
        room = self.room or before + tokens
        doing = Reading(at.flatten(), before, tokens, firsts[0], room)
        with torch.cuda.device_of(self._state), self.cache.during(doing):
            self._call(here, places, None)

    @torch.inference_mode()
    def seat(
        self,
        row: int,
        firsts: Sequence[int],
        lengths: Sequence[int],
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Give the rows from ``row`` on to texts that begin at ``firsts`` and have ``lengths``
        tokens in the cache, followed by ``tokens``."""
        count = len(firsts)
        new = torch.tensor([tokens or [0] * count, lengths, firsts, [1] * count])
        self._state[:, row : row + count] = sent(new, self._device)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, as the first ones, in this order."""
        index = sent(torch.tensor(rows, dtype=torch.long), self._device)
        self._state[:, : len(rows)] = self._state[:, index]
        self.leave(len(rows))

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """The rows from ``row`` on are nobody's."""
        self._state[:, row:] = 0
        self.first[row:] = self.cache.places

    @torch.inference_mode()
    def step(self, count: int) -> Tensor:
        """Compute the next token of the first ``count`` rows -> logits [count, vocab] of what
        follows, good until the next step. Lengths go on by one; the tokens are for others to
        set."""
        size = next(size for size in self._sizes if size >= count)
        if self._device.type != "cuda":
            return self._advance(size)[:count]
        graph, logits = self._graphs[size]
        with torch.cuda.device_of(self._state):
            graph.replay()
        return logits[:count]

    @torch.inference_mode()
    def widen(self, room: int, used: int) -> None:
        """Have ``room`` places for each row, of which the first ``used`` stay; to be captured
        again."""
        assert self.room is not None, "only where texts lie side by side"
        self._graphs = {}  # their memory first
        self.cache.spread(self.count, self.room, room, used)
        self.room = room
        self.first.copy_(torch.arange(self.count, device=self._device) * room)

    def _captured(self, size: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        side = _side(self._device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled, and workspaces taken, beforehand
                self._advance(size)
        here.wait_stream(side)
        with torch.cuda.graph(graph, pool=pool, stream=side):
            logits = self._advance(size)
        return graph, logits

    def _advance(self, size: int) -> Tensor:
        token, length, first, going = self._state[:, :size]
        places = length.clamp(max=self._longest - 1)  # texts that have ended are carried along
        if self._arrived is None:
            logits = self._masked(token, places, length, first)
        else:
            logits = self._directly(token, places, self._texts(size, self._arrived))
        length += going
        return logits

    def _masked(self, token: Tensor, places: Tensor, length: Tensor, first: Tensor) -> Tensor:
        """Logits, where torch computes the attention: it is shown as many places of every text as
        the longest may have."""
        visible = self._most
        each = torch.arange(visible, device=self._device)

        def shown(held: Tensor) -> Tensor:
            if self.room is not None:
                return beside(held, 0, len(token), self.room)
            at = (first[:, None] + each).clamp(max=self.cache.places)
            found: Tensor = held.index_select(1, at.flatten()).unflatten(1, at.shape)
            return found.transpose(0, 1)

        doing = Stepping(first + length, length.amax(), visible, shown)
        with self.cache.during(doing):
            return self._call(token[:, None], places[:, None], each <= length[:, None])

    def _directly(self, token: Tensor, places: Tensor, texts: attend.Texts) -> Tensor:
        """Logits, where quantkit's kernel computes the attention. It knows where texts lie and how
        long they are, so that the mask has nothing to say."""

        def whole(held: Tensor) -> Tensor:
            return held.expand(len(token), *held.shape)

        doing = Stepping(texts.first + texts.length, texts.length[0], 1, whole)
        with attend.computing(texts), self.cache.during(doing):
            return self._call(token[:, None], places[:, None], self._open[: len(token)])

    @torch.inference_mode()
    def _counters(self) -> Tensor | None:
        """What the kernel counts with, or None for a model whose attention it does not compute;
        tried with rows that nobody has."""
        arrived = torch.zeros(self.count * self.cache.heads, dtype=torch.int32, device=self._device)
        texts = self._texts(self.count, arrived)
        try:
            self._directly(self.token, self.length, texts)
        except attend.Unfit:
            return None
        whole = self._positions and texts.taken == len(self.cache.layers)
        return arrived if whole else None

    def _texts(self, size: int, arrived: Tensor) -> attend.Texts:
        return attend.Texts(self.first[:size], self.length[:size], self._most, arrived)

    @property
    def _most(self) -> int:
        """Tokens that a text may have in the cache."""
        return self.room or min(self._longest, self.cache.places)

    def _call(self, tokens: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [texts, vocab] behind tokens [texts, n] at ``places`` of the same shape."""
        where = {"position_ids": places} if self._positions else {}
        found = self._model()(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **where,
            **self._settings,
        )
        logits: Tensor = found.logits[:, -1]
        return logits

    def _model(self) -> PreTrainedModel:
        found = self._of()
        if found is None:
            raise ReferenceError("the model of these rows is gone")
        return found
