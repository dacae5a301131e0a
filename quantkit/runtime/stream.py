"""Text that appears while it is generated: in whole characters, and never with what stops it."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

from quantkit.core.sampling import Sampling
from quantkit.runtime.engine import Engine

_BROKEN = "\ufffd"


class Detokenizer:
    """Token ids in, new text out.

    A Japanese character is often several tokens; while one is incomplete, nothing is given out.
    Text is always decoded together with some tokens before it, since tokenizers treat the first
    token of a text in their own way.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # decoding starts here
        self._given = 0  # tokens before this one have been given out

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._given])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith(_BROKEN):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What is left at the end; a character that was cut off is not shown."""
        before = self._decode(self._ids[self._start : self._given])
        now = self._decode(self._ids[self._start :])
        self._start = self._given = len(self._ids)
        return now[len(before) :].rstrip(_BROKEN)


class StopStrings:
    """Text in, text out, up to the one of ``stops`` that is complete first, whatever the pieces.
    What may be the beginning of one is held back until it is clear.

    seen   characters that came in
    found  whether a stop string has come
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.seen = 0
        self.found = False

    def push(self, text: str) -> str:
        """What can be given out now that ``text`` is here."""
        if self.found or not text:
            return ""
        self._held += text
        self.seen += len(text)
        places = ((self._held.find(stop), len(stop)) for stop in self._stops)
        complete = [(start + size, start) for start, size in places if start >= 0]
        if complete:
            self.found = True
            return self._take(min(complete)[1])
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for start in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return self._take(start)
        return self._take(len(self._held))

    def rest(self) -> str:
        """What was held back and is no stop string after all."""
        return "" if self.found else self._take(len(self._held))

    def _take(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        return given


class Written:
    """One text while it is generated: give it tokens, get text. ``ids`` are the tokens so far,
    ``ends`` those that end it."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        ends: Collection[int] = (),
    ) -> None:
        self._ends = ends
        self._detokenizer = Detokenizer(decode)
        self._stops = StopStrings(stop)
        self.ids: list[int] = []
        self.reason: Literal["end", "stop"] | None = None

    @property
    def seen(self) -> int:
        """Characters so far, also those that are held back."""
        return self._stops.seen

    def push(self, token: int) -> str:
        """The text that can be shown now. ``reason`` says afterwards whether this was the last."""
        self.ids.append(token)
        if token in self._ends:
            self.reason = "end"
            return ""
        return self._shown(self._detokenizer.push(token))

    def rest(self) -> str:
        """What is left when no token follows."""
        return self._shown(self._detokenizer.rest()) + self._stops.rest()

    def _shown(self, text: str) -> str:
        shown = self._stops.push(text)
        if self._stops.found:
            self.reason = "stop"
        return shown


class Answer:
    """What ``engine`` says behind the tokens ``prompt``. Iterate over it once, for text in pieces;
    then ``text``, ``ids`` and ``reason`` are complete.

    reason   end: the model ended it; stop: a stop string came; length: ``max_new_tokens`` were
             made; context: the model's context is full; None: it was left before
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> None:
        self._engine, self._sampling, self._most = engine, sampling, max_new_tokens
        self._written = Written(engine.decode, stop, engine.end_ids)
        self.prompt = list(prompt)
        self.text = ""
        self.reason: Literal["end", "stop", "length", "context"] | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens so far."""
        return self._written.ids

    def __iter__(self) -> Iterator[str]:
        written = self._written
        tokens = self._engine.stream(self.prompt, self._sampling, self._most)
        for token in tokens:
            yield from self._shown(written.push(token))
            if written.reason is not None:
                break
        yield from self._shown(written.rest())
        full = len(self.ids) < self._most
        self.reason = written.reason or ("context" if full else "length")

    def _shown(self, text: str) -> Iterator[str]:
        if text:
            self.text += text
            yield text
