"""Tokens become the text of an answer: whole characters, and nothing of a stop string."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from quantkit.runtime.stream import Written
from quantkit.serve.engine import Finish, Stream, Token


@dataclass(frozen=True)
class Piece:
    """Some more text, the tokens that belong to it (only when log probabilities were asked for, and
    with ``offsets``, where each begins in the text), and at last why it ends."""

    text: str
    tokens: tuple[Token, ...] = ()
    offsets: tuple[int, ...] = ()
    finish: Finish | None = None


@dataclass
class _Held:
    """A token whose text has not been given out: where it begins."""

    token: Token
    at: int


class Writer:
    """Text of one answer, and the numbers of its tokens with the text that they belong to. A stop
    string and all behind it are never given out, nor their numbers. Engines leave out the tokens
    that end a text."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._written = Written(decode, stop)
        self._given = 0  # characters
        self._held: list[_Held] = []

    def push(self, token: Token) -> Piece:
        """What can be given out now."""
        if token.logprob is not None:
            self._held.append(_Held(token, self._written.seen))
        text = self._written.push(token.id)
        return self._piece(text, "stop" if self._stopped else None)

    def rest(self, finish: Finish) -> Piece:
        """The end, when no more tokens come."""
        text = self._written.rest()
        return self._piece(text, "stop" if self._stopped else finish, last=not self._stopped)

    @property
    def _stopped(self) -> bool:
        return self._written.reason == "stop"

    def _piece(self, text: str, finish: Finish | None, last: bool = False) -> Piece:
        self._given += len(text)
        # a token's numbers go with its text; those without text yet wait for it
        some = [one for one in self._held if last or one.at < self._given]
        self._held = self._held[len(some) :]
        return Piece(text, tuple(o.token for o in some), tuple(o.at for o in some), finish)


@dataclass
class Answer:
    """One choice while it is being made: ``count`` tokens were read from ``stream``."""

    stream: Stream
    writer: Writer
    count: int = 0

    async def pieces(self) -> AsyncIterator[Piece]:
        """The text as it comes; the last piece has ``finish``. Whoever stops reading cancels."""
        try:
            async for token in self.stream:
                self.count += 1
                piece = self.writer.push(token)
                if piece.finish or piece.text or piece.tokens:
                    yield piece
                if piece.finish:
                    return
            yield self.writer.rest(self.stream.finish or "stop")
        finally:
            self.stream.cancel()
