"""Tokens become the text of an answer: whole characters, and nothing of a stop string."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantkit.runtime.stream import Detokenizer
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


@dataclass
class Writer:
    """Text of one answer. What could be the beginning of a stop string is held back until it is
    known not to be one; a stop string and all behind it are never given out."""

    tokenizer: Any
    stop: Sequence[str] = ()
    stopped: bool = False
    _given: int = 0  # characters
    _text: str = ""  # not given out yet
    _held: list[_Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer)

    def push(self, token: Token) -> Piece:
        """What can be given out now."""
        if token.logprob is not None:
            self._held.append(_Held(token, self._given + len(self._text)))
        return self._release(self._detokenizer.push(token.id), last=False)

    def rest(self, finish: Finish) -> Piece:
        """The end, when no more tokens come."""
        piece = self._release(self._detokenizer.rest(), last=True)
        return Piece(piece.text, piece.tokens, piece.offsets, "stop" if self.stopped else finish)

    def _release(self, new: str, last: bool) -> Piece:
        self._text += new
        end = min((at for s in self.stop if (at := self._text.find(s)) >= 0), default=None)
        if end is not None:
            self.stopped, self._text = True, self._text[:end]
        keep = 0 if last or self.stopped else _beginning(self._text, self.stop)
        text = self._text[: len(self._text) - keep]
        self._text = self._text[len(text) :]
        self._given += len(text)
        # a token's numbers go with its text; those without text yet wait for it
        some = [one for one in self._held if one.at < self._given or (last and not self.stopped)]
        self._held = self._held[len(some) :]
        finish: Finish | None = "stop" if self.stopped else None
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


def _beginning(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of ``text`` a stop string could begin with."""
    longest = max(map(len, stop), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0
